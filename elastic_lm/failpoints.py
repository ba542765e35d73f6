"""Named places where a fault can be injected, so that every edge of the protocol can be tested on purpose.

A failpoint is armed by text, `MEMBER:NAME@STEP=ACTION`, for example `w2:optimizer.middle@7=kill`. MEMBER and STEP may be
`*`; the first coordinator of a job is the member `c1`. Each armed entry fires once. Actions: `kill` (SIGKILL to oneself),
`freeze` (SIGSTOP to oneself), `raise` (an exception, as a bug would), `exit` (os._exit), `delay:SECONDS` (sleep with the
interpreter lock released), `hold:SECONDS` (a thread that keeps the interpreter lock) and `wait:FILE` (go on once this file
is there, or where a fence ends the step; so nothing is over before a test is done with it). Disarmed, `hit` costs one look
at an empty list.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from elastic_lm.errors import ConfigError

NAMES = (
    "warm_up",  # joiner: model built, probe not yet reported
    "lease.begin",  # lease received, nothing done
    "form.begin",  # before the group's constructor
    "form.end",  # group formed
    "copy.send",  # source: half of the state sent
    "copy.receive",  # joiner: half of the state received
    "step.begin",
    "data",  # before each micro-batch's tokens are asked for
    "micro_batch",  # before each micro-batch's forward
    "reduce.begin",  # all own micro-batches folded, the commit vector not sent
    "reduce.end",  # sum complete on this member, nothing applied
    "optimizer.middle",  # some parameters written, others not
    "step.end",  # step applied, next not begun
    "evaluate",  # a held-out batch is there, not measured
    "lease.end",  # before the report is returned
    "save",  # checkpoint: some parts written, no manifest
    "coordinator.open",  # services started, nobody called yet
    "coordinator.adopted",  # earlier members called, nothing decided
    "coordinator.grant",  # lease decided, told to nobody
    "coordinator.granted",  # lease told to some
    "coordinator.fence",  # a lease is to be given up, nobody knows
    "coordinator.save",  # checkpoint decided, nobody copies yet
    "coordinator.publish",  # all shares stored, no manifest
    "coordinator.rewind",  # members are to be given up for a rewind, which is not stored yet
    "coordinator.rewound",  # it is stored, nothing else is done
    "coordinator.finish",  # the verdict is there, nobody knows
    "coordinator.finished",  # it is logged, and not handed to whoever waits for it
)
TIMED = ("delay", "hold")
ACTIONS = ("kill", "freeze", "raise", "exit", *TIMED, "wait")
LONGEST_S = 3600.0
WAIT_POLL_S = 0.01


class InjectedError(RuntimeError):
    """Raised by a failpoint with the action `raise`; stands for a bug in user code."""


@dataclass
class _Armed:
    name: str
    step: int | None
    action: str
    seconds: float = 0.0
    file: str = ""


_armed: list[_Armed] = []


def parse(text: str) -> tuple[str, _Armed]:
    """`MEMBER:NAME@STEP=ACTION` -> (member, armed entry).    Raises: ConfigError naming the part that is wrong."""
    try:
        place, action = text.split("=")
        member, _, rest = place.partition(":")
        name, step = rest.split("@")
        kind, _, value = action.partition(":")
        at = None if step == "*" else int(step)
        entry = _Armed(name, at, kind, file=value) if kind == "wait" else _Armed(name, at, kind, float(value or 0))
    except ValueError as error:
        raise ConfigError(
            f"failpoint {text!r} is not MEMBER:NAME@STEP=ACTION, e.g. w2:optimizer.middle@7=kill"
        ) from error
    if name not in NAMES:
        raise ConfigError(f"failpoint {text!r}: unknown name {name!r}; known: {', '.join(NAMES)}")
    if not member:
        raise ConfigError(f"failpoint {text!r} names no member; write one, e.g. w2, or * for all")
    if entry.step is not None and entry.step < 0:
        raise ConfigError(f"failpoint {text!r}: step {entry.step} never comes; steps count from 0")
    if kind in TIMED and (not value or not 0 <= entry.seconds <= LONGEST_S):
        raise ConfigError(f"failpoint {text!r}: {kind} needs seconds from 0 to {LONGEST_S:.0f}, e.g. {kind}:0.5")
    if kind == "wait" and not value:
        raise ConfigError(f"failpoint {text!r}: wait needs a file, e.g. wait:/tmp/go-on")
    if kind not in ACTIONS:
        raise ConfigError(f"failpoint {text!r}: unknown action {kind!r}; known: {', '.join(ACTIONS)}")
    return member, entry


def arm(texts: tuple[str, ...] | list[str], member_id: str) -> None:
    """Arm, in this process, the entries that name this member or `*`."""
    for text in texts:
        member, entry = parse(text)
        if member in ("*", member_id):
            _armed.append(entry)


def hit(name: str, step: int | None = None, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Wait where that is armed for this place and step, unless `cancelled`; and fire the first other entry, if there is one."""
    if not _armed:
        return
    for entry in tuple(_armed):
        if entry.name == name and (entry.step is None or entry.step == step):
            if entry.action == "wait":
                _wait(entry, cancelled)
            else:
                _armed.remove(entry)
                _fire(entry, step)
                return


def _wait(entry: _Armed, cancelled: Callable[[], bool]) -> None:
    """It stays armed when it is cancelled, so that the step that is trained again waits, too."""
    while not os.path.exists(entry.file):
        if cancelled():
            return
        time.sleep(WAIT_POLL_S)
    _armed.remove(entry)


def _fire(entry: _Armed, step: int | None) -> None:
    if entry.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif entry.action == "freeze":
        # To this thread: of a signal to the process another one may take notice, while this one runs on for a moment.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
    elif entry.action == "exit":
        os._exit(1)
    elif entry.action == "raise":
        raise InjectedError(f"injected at {entry.name}, step {step}")
    elif entry.action == "delay":
        time.sleep(entry.seconds)
    elif entry.action == "hold":
        _hold_interpreter_lock(entry.seconds)


def _hold_interpreter_lock(seconds: float) -> None:
    """Keep every other Python thread of this process from running, as a bad C extension does."""
    import ctypes

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))  # PyDLL, unlike CDLL, does not release the lock
