"""Fault schedules as data, and the run they are injected into.

The coordinator runs in a thread of the test's process (Ray Train, which hosts it in production, adds nothing here but six
seconds per run; tests/runtime/test_fit.py goes through it). The oracle is in oracle.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError

from elastic_lm import failpoints
from elastic_lm.config import RunConfig
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.result import RunResult
from elastic_lm.runtime.cluster import ON_HEAD, LocalCluster, wait_for
from elastic_lm.runtime.mailbox import Command, create_mailbox
from elastic_lm.runtime.recorder import record_of
from elastic_lm.runtime.trainer import coordinate
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.faults.oracle import bits_of, undisturbed

MICRO_BATCHES = 6
WAIT_S = 200.0
# Where processes compete for the cores, one that lives is silent for a second now and then, and tests count who was lost.
PATIENT_S = 10.0
AT_ONCE = {"heartbeat_timeout_s": ControlSpec.heartbeat_timeout_s}  # `control` of runs in which workers are frozen


@dataclass(frozen=True)
class Fault:
    """What happens as soon as `at_step` steps are committed; `victim` counts through the members (or nodes, readers)."""

    what: str
    at_step: int
    victim: int = 0
    after_s: float = 0.0


def make_corpus(folder: Path) -> str:
    """The address of a small corpus of several windows."""
    from elastic_lm.data.prepare import PrepareOptions, prepare

    source = write_lines(folder / "text.jsonl", texts(3000))
    url = f"file://{folder}/tokens"
    prepare([source], Storage.open(url), PrepareOptions(vocab_size=300, block_tokens=1025))
    return url


def make_config(tokens: str, storage: str, name: str, *, steps: int, **changes: Any) -> RunConfig:
    """A run of the ~100k-parameter model; `changes` replace whole parts."""
    parts: dict[str, Any] = {
        "model": {"preset": "tiny"},
        "batch": {"micro_batches": MICRO_BATCHES, "micro_batch_size": 2, "sequence_length": 64},
        "schedule": {"warmup_steps": 5},
        "checkpoint": {"every_steps": 50},
        "workers": {"min": 2, "max": 3},
        "metrics": {"port": 0},
    }
    # A frozen holder of the last state is waited for this long: less than the harness waits for anything.
    control = {"backoff_base_s": 0.2, "progress_timeout_s": 20.0, "heartbeat_timeout_s": PATIENT_S}
    for part, defaults in (
        ("data", {"tokens": tokens, "window_blocks": 4, "reader_timeout_s": 3.0}),
        ("training", {"steps": steps}),
        ("control", control),
    ):
        parts[part] = {**defaults, **changes.pop(part, {})}
    return RunConfig(name=name, storage=storage, **{**parts, **changes})


def held(config: RunConfig, step: int, gate: Path) -> RunConfig:
    """A run that waits for tokens of this step until there is this file.

    Whatever a test does to it until then happens to a run that trains, however slow the machine is.
    """
    hold = f"*:data@{step}=wait:{gate}"
    return RunConfig(**dict(config) | {"failpoints": (hold, *config.failpoints)})


class Run:
    """One run in the background on the cluster this process has joined."""

    def __init__(self, config: RunConfig, gate: Path) -> None:
        """`gate`: the file that a run is held for (see `held`)."""
        self.config = config
        self.mailbox = create_mailbox(config.name)
        self._gate = gate
        self._outcome: RunResult | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._train()
        except BaseException as error:  # noqa: BLE001 - raised by `result`
            self._outcome = error

    def _train(self) -> RunResult:
        return coordinate(self.config, self.mailbox, self.config.name)

    # -- watching ----------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        return dict(ray.get(self.mailbox.status.remote(), timeout=WAIT_S))

    def await_status(self, condition: Callable[[dict[str, Any]], Any], what: str) -> dict[str, Any]:
        """The first status that meets `condition`, or the last one when the run ends before."""

        def look() -> dict[str, Any] | None:
            status = self.status()
            if not self._thread.is_alive() or (status and condition(status)):
                return status
            return None

        return dict(wait_for(look, timeout_s=WAIT_S, what=what))

    def await_step(self, step: int) -> dict[str, Any]:
        return self.await_status(lambda status: status["step"] >= step, f"step {step}")

    def await_three_at_work(self, step: int) -> dict[str, Any]:
        return self.await_status(
            lambda status: status["world_size"] == 3 and status["step"] >= step, f"three at work at step {step}"
        )

    def await_logged(self, kind: EventKind, number: int) -> None:
        """Until the log holds so many events of this kind: what a coordinator has not stored is lost with it."""
        wait_for(lambda: self.count(kind) >= number, timeout_s=WAIT_S, what=f"{number} events {kind}", poll_s=0.1)

    def let_go_on(self) -> None:
        """It is not held any more."""
        self._gate.touch()

    def command(self, kind: str, **arguments: Any) -> None:
        ray.get(self.mailbox.post.remote(Command(kind, arguments)))

    def stop(self, reason: str) -> None:
        """And wait until it is to stop behind the step that runs."""
        self.command("stop", reason=reason)
        wait_for(self._is_stopping, timeout_s=WAIT_S, what="the coordinator's word that it stops", poll_s=0.1)

    def _is_stopping(self) -> bool:
        notes = (event.message for event in self.events() if event.kind is EventKind.NOTE)
        return any(message.startswith("Stopping after") for message in notes)

    def result(self, timeout_s: float = WAIT_S) -> RunResult:
        """The verdict of a run to which nothing is done any more; takes the mailbox down."""
        self.let_go_on()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"no verdict after {timeout_s:.0f} s; status: {self.status()}")
        ray.kill(self.mailbox)
        if isinstance(self._outcome, RunResult):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def end(self) -> None:
        """Stop what a failed test has left behind, and take the mailbox down."""
        if self._thread.is_alive():
            self.command("stop", reason="the test is over")
            self.result()
        ray.kill(self.mailbox)

    def events(self) -> list[Event]:
        return list(read(Storage.open(self.config.run_url).child("events")))

    def committed(self) -> list[Event]:
        """What the log holds of every committed step, in the order of the log."""
        return [event for event in self.events() if event.kind is EventKind.STEP_COMMITTED]

    def count(self, kind: EventKind) -> int:
        """How many events of this kind the log holds by now."""
        return sum(event.kind is kind for event in self.events())

    def kill_a_worker(self) -> str:
        """SIGKILL to the eldest one at work.    Returns: its id."""
        members = self.status()["members"].items()
        member_id, pid = next((name, m["pid"]) for name, m in members if m["state"] == "active")
        os.kill(pid, signal.SIGKILL)
        return member_id

    def steps(self) -> tuple[tuple[Any, ...], ...]:
        """Of every committed step, in order, what the promise covers."""
        return tuple(bits_of(record_of(event)) for event in self.committed())


class Host:
    """The actor that a coordinator lives in, so that it can be killed and frozen: what Ray Train's worker is to `fit`."""

    def pid(self) -> int:
        return os.getpid()

    def run(self, config: RunConfig, mailbox: Any, number: int) -> RunResult:
        failpoints.arm(config.failpoints, f"c{number}")
        return coordinate(config, mailbox, config.name)


class HostedRun(Run):
    """A run whose coordinator is a process of its own; another one succeeds it at once when it is killed or given up."""

    def __init__(self, config: RunConfig, gate: Path) -> None:
        self.num_coordinators = 0
        self.host_pids: list[int] = []
        self.given_up: list[ray.ObjectRef] = []  # what came of those that were given up
        self._frozen: list[int] = []
        self._gives_up = threading.Event()
        super().__init__(config, gate)

    def _train(self) -> RunResult:
        while True:
            self.num_coordinators += 1
            ray.get(self.mailbox.begin_attempt.remote(("", self.num_coordinators)))
            host = ray.remote(Host).options(num_cpus=0, resources=ON_HEAD).remote()
            self.host_pids.append(ray.get(host.pid.remote()))
            outcome = host.run.remote(self.config, self.mailbox, self.num_coordinators)
            while not ray.wait([outcome], timeout=0.05)[0] and not self._gives_up.is_set():
                pass
            if self._gives_up.is_set():
                self._gives_up.clear()
                self.given_up.append(outcome)
                continue
            with contextlib.suppress(RayActorError):
                return ray.get(outcome)

    def coordinator_pid(self) -> int:
        def is_at_work(status: dict[str, Any]) -> bool:
            return "coordinator" in status and is_running(status["coordinator"]["pid"])

        return int(self.await_status(is_at_work, "a coordinator")["coordinator"]["pid"])

    def freeze_coordinator(self) -> int:
        """And have another one succeed it, as Ray Train does after a while. Returns: its process id."""
        pid = self.coordinator_pid()
        os.kill(pid, signal.SIGSTOP)
        self._give_up(pid)
        return pid

    def await_frozen(self, number: int) -> None:
        """Until the coordinator of this number has stopped itself; then another one succeeds it, too."""

        def is_stopped() -> bool:
            return len(self.host_pids) >= number and psutil.Process(self.host_pids[number - 1]).status() == "stopped"

        wait_for(is_stopped, timeout_s=WAIT_S, what=f"coordinator {number} frozen")
        self._give_up(self.host_pids[number - 1])

    def _give_up(self, pid: int) -> None:
        self._frozen.append(pid)
        self._gives_up.set()

    def result(self, timeout_s: float = WAIT_S) -> RunResult:
        try:
            return super().result(timeout_s)
        finally:
            for pid in self._frozen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def await_successor(self, pid: int) -> None:
        self.await_status(lambda status: status["coordinator"]["pid"] != pid, "another coordinator")


# -- faults ----------------------------------------------------------------------------------------------------------


class Injector:
    """Carries out a schedule on a run and its cluster."""

    def __init__(self, cluster: LocalCluster, run: Run) -> None:
        self._cluster, self._run = cluster, run
        self.told: list[str] = []

    def inject(self, schedule: Sequence[Fault]) -> None:
        for fault in schedule:
            status = self._run.await_status(
                lambda status, step=fault.at_step: (
                    status["step"] >= step and any(m["pid"] for m in status["members"].values())
                ),
                f"step {fault.at_step} and a worker",
            )
            if "verdict" in status:
                return
            time.sleep(fault.after_s)
            self.told.append(f"{fault} at step {status['step']}: {getattr(self, fault.what)(fault, status)}")

    def kill(self, fault: Fault, status: dict[str, Any]) -> str:
        return self._signal(signal.SIGKILL, self._member(fault, status)["pid"])

    def kill_coordinator(self, fault: Fault, status: dict[str, Any]) -> str:
        """Of a `HostedRun`."""
        return self._signal(signal.SIGKILL, status["coordinator"]["pid"])

    def freeze_coordinator(self, fault: Fault, status: dict[str, Any]) -> str:
        """Of a `HostedRun`, which has another succeed it."""
        assert isinstance(self._run, HostedRun)
        return f"SIGSTOP to {self._run.freeze_coordinator()}"

    def freeze(self, fault: Fault, status: dict[str, Any]) -> str:
        return self._signal(signal.SIGSTOP, self._member(fault, status)["pid"])

    def blink(self, fault: Fault, status: dict[str, Any]) -> str:
        """Frozen for less than anybody may be evicted for."""
        pid = self._member(fault, status)["pid"]
        self._signal(signal.SIGSTOP, pid)
        time.sleep(0.3)
        return self._signal(signal.SIGCONT, pid)

    def kill_all(self, fault: Fault, status: dict[str, Any]) -> str:
        pids = [member["pid"] for member in status["members"].values() if member["pid"]]
        return ", ".join(self._signal(signal.SIGKILL, pid) for pid in pids)

    def drain(self, fault: Fault, status: dict[str, Any]) -> str:
        member_id = self._member(fault, status)["id"]
        self._run.command("drain", member_id=member_id)
        return member_id

    def scale(self, fault: Fault, status: dict[str, Any]) -> str:
        self._run.command("scale", min_workers=1, max_workers=fault.victim)
        return f"to {fault.victim}"

    def kill_node(self, fault: Fault, status: dict[str, Any]) -> str:
        living = {node.node_id: node for node in self._cluster.nodes}
        on_some = lambda status: [m for m in status["members"].values() if m["node_id"] in living]  # noqa: E731
        members = on_some(
            self._run.await_status(on_some, "a worker on a node that lives")
        )  # not on one that was just killed
        node = living[members[fault.victim % len(members)]["node_id"]]
        node.kill()
        self._cluster.nodes.remove(node)
        return node.node_id

    def add_node(self, fault: Fault, status: dict[str, Any]) -> str:
        return self._cluster.add_node().node_id

    def kill_reader(self, fault: Fault, status: dict[str, Any]) -> str:
        return self._signal(signal.SIGKILL, self._reader(fault))

    def freeze_reader(self, fault: Fault, status: dict[str, Any]) -> str:
        return self._signal(signal.SIGSTOP, self._reader(fault))

    def _member(self, fault: Fault, status: dict[str, Any]) -> dict[str, Any]:
        members = [{"id": m, **found} for m, found in sorted(status["members"].items()) if found["pid"]]
        return members[fault.victim % len(members)]

    def _reader(self, fault: Fault) -> int:
        readers = wait_for(
            lambda: sorted(processes_titled(self._cluster, "ray::Reader")), timeout_s=WAIT_S, what="a reader"
        )
        return readers[fault.victim % len(readers)]

    @staticmethod
    def _signal(number: signal.Signals, pid: int) -> str:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return f"{number.name} to {pid}"


def is_running(pid: int) -> bool:
    """Neither dead nor stopped."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD, psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return False


def processes_titled(cluster: LocalCluster, title: str) -> list[int]:
    """Process ids of the cluster's processes whose title begins so."""
    found = []
    for process in _processes(cluster):
        with contextlib.suppress(psutil.Error):
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
    return found


def _processes(cluster: LocalCluster) -> Iterator[psutil.Process]:
    for node in [*cluster.nodes, cluster.head]:
        yield from node.processes()


def assert_nothing_left(cluster: LocalCluster) -> None:
    """No worker and no reader outlives its run, frozen ones included."""

    def gone() -> bool:
        return not processes_titled(cluster, "ray::Worker") and not processes_titled(cluster, "ray::Reader")

    wait_for(gone, timeout_s=WAIT_S, what="workers and readers ended")


def assert_same_bits(run: Run, result: RunResult) -> None:
    """Done; every step once, with the undisturbed run's losses and samples; the same final state."""
    digest, steps = undisturbed(run.config)
    assert result.verdict == "done", result.message
    assert run.steps() == steps
    assert result.digest["state"] == digest
    assert not [event for event in run.events() if event.kind is EventKind.STEP_MISMATCH]
