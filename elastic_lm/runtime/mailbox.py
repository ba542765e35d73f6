"""The mailbox: where anybody leaves a word for whoever is the run's coordinator now, and hears how the run is doing.

A named actor without CPUs. It outlives a coordinator, so commands and progress survive a successor taking over: what was
not seen to is the successor's; what holds until further notice (the size, a stop) is told to it again, and so is who was
leaving. A command is seen to when whoever took it, and said what became of it, asks for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from elastic_lm.errors import ClusterError
from elastic_lm.monitor.progress import News
from elastic_lm.runtime.cluster import NAMESPACE, ON_HEAD

MAX_NEWS = 10_000
Place = tuple[str, int]  # of a process: its node's id and its own
STANDING = ("scale", "stop")
KILLED = "it was killed"
TAKEN_POLL_S = 0.2
TAKEN_S = 5.0  # the mailbox of a driver that was killed is gone within a second


@dataclass(frozen=True)
class Command:
    """`scale` (min_workers, max_workers), `stop` (reason) or `drain` (member_id or node_id)."""

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Attempt:
    """One start of a coordinator: which one it is, from 1, and how many have begun since a step was last committed.

    A month has many failures; what must not go on for ever is failing without a step between.
    `failure_before` says why the one before ended, `predecessor` where it was.
    """

    number: int
    number_in_vain: int
    failure_before: str
    predecessor: Place | None


class Mailbox:
    """Async actor: every method returns at once or waits without holding a thread."""

    def __init__(self) -> None:
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._taken: Command | None = None  # not known to be seen to
        self._takers: list[str] = []  # the last one takes
        self._standing: dict[str, Command] = {}  # the last one of each kind in STANDING
        self._news: list[News] = []
        self._dropped = 0
        self._published = asyncio.Event()
        self._status: dict[str, Any] = {}
        self._num_attempts = 0
        self._attempts_in_vain = 0  # since the step went on
        self._progress_before = (0, -1)  # how often the run went back, and its step
        self._place: Place | None = None
        self._last_failure = KILLED

    async def post(self, command: Command) -> None:
        """Leave a command for the coordinator."""
        if command.kind in STANDING:
            self._standing[command.kind] = command
        await self._commands.put(command)

    async def take(self, taker: str = "") -> Command | None:
        """The coordinator's long poll: the next command, when the one before is seen to, and its status published.

        Another taker than before is its successor; None: that is there.
        """
        if taker not in self._takers:
            if self._takers:
                await self.hand_over()
            self._takers.append(taker)
        if taker != self._takers[-1]:
            return None
        self._taken = None
        commands = self._commands
        command = await commands.get()
        if commands is self._commands:
            self._taken = command
        return command

    async def publish(self, news: list[News], status: dict[str, Any]) -> None:
        """What the coordinator has to tell: news for people, and the latest status."""
        self._news += news
        excess = len(self._news) - MAX_NEWS
        if excess > 0:
            del self._news[:excess]
            self._dropped += excess
        self._status = status
        self._published.set()
        self._published = asyncio.Event()

    async def follow(self, cursor: int, timeout_s: float) -> tuple[list[News], int, dict[str, Any]]:
        """News from number `cursor` on, the next cursor, and the status: after a publication or after `timeout_s`."""
        if cursor >= self._dropped + len(self._news):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._published.wait(), timeout_s)
        return self._news[max(0, cursor - self._dropped) :], self._dropped + len(self._news), self._status

    async def status(self) -> dict[str, Any]:
        """What the coordinator last said about the run."""
        return self._status

    async def begin_attempt(self, place: Place) -> Attempt:
        """A coordinator's process starts, in this place."""
        progress = self._status.get("num_rewinds", 0), self._status.get("step", -1)
        if progress > self._progress_before:
            self._progress_before, self._attempts_in_vain, self._last_failure = progress, 0, KILLED
        self._attempts_in_vain += 1
        self._num_attempts += 1
        await self.hand_over()
        before, self._place = self._place, place
        return Attempt(self._num_attempts, self._attempts_in_vain, self._last_failure, before)

    async def hand_over(self) -> None:
        """What is to be done is another coordinator's from now on, maybe one in the same process that is not there yet.

        It gets a queue of its own: an earlier one still waits at the old one, and would take from it.
        """
        left = [] if self._taken is None else [self._taken]
        left += [self._commands.get_nowait() for _ in range(self._commands.qsize())]
        self._taken = None
        self._commands = asyncio.Queue()
        waiting = [command for command in left if command.kind not in STANDING]
        members = self._status.get("members", {})
        leaving = [
            Command("drain", {"member_id": name}) for name, told in members.items() if told["leaving"] == "drain"
        ]
        for command in [*self._standing.values(), *waiting, *leaving]:
            self._commands.put_nowait(command)

    async def end_attempt(self, cause: str) -> bool:
        """The coordinator failed, and this is why. Returns whether the one before failed just so."""
        repeated, self._last_failure = cause == self._last_failure, cause
        return repeated


def mailbox_name(run: str) -> str:
    return f"mailbox-{run}"


def create_mailbox(run: str) -> Any:
    """The run's mailbox, owned by this process: it ends with it.

    Raises: ClusterError when the run has one already, and it stays.
    """
    deadline = time.monotonic() + TAKEN_S
    while True:
        try:
            return _create(run)
        except ValueError as error:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"run {run} is being trained on this cluster already; wait for it, stop it, or choose another name"
                ) from error
        time.sleep(TAKEN_POLL_S)


def _create(run: str) -> Any:
    actor = ray.remote(Mailbox).options(
        name=mailbox_name(run),
        namespace=NAMESPACE,
        num_cpus=0,
        resources=ON_HEAD,  # where the coordinator is: a worker's node comes and goes
        max_concurrency=1000,
    )
    return actor.remote()


def find_mailbox(run: str) -> Any:
    """The mailbox of a running run.    Raises: ValueError when there is none on this cluster."""
    return ray.get_actor(mailbox_name(run), namespace=NAMESPACE)
