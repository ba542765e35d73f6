"""The mailbox: where anybody leaves a word for whoever is the run's coordinator now, and hears how the run is doing.

A named actor without CPUs. It outlives a coordinator, so commands and progress survive a successor taking over.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import ray

from elastic_lm.errors import ClusterError
from elastic_lm.monitor.progress import News
from elastic_lm.runtime.cluster import NAMESPACE, ON_HEAD

MAX_NEWS = 10_000


@dataclass(frozen=True)
class Command:
    """`scale` (min_workers, max_workers), `stop` (reason) or `drain` (member_id or node_id)."""

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Mailbox:
    """Async actor: every method returns at once or waits without holding a thread."""

    def __init__(self) -> None:
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._news: list[News] = []
        self._dropped = 0
        self._published = asyncio.Event()
        self._status: dict[str, Any] = {}
        self._attempts = 0
        self._last_failure = "it was killed"

    async def post(self, command: Command) -> None:
        """Leave a command for the coordinator."""
        await self._commands.put(command)

    async def take(self) -> Command:
        """The coordinator's long poll: the next command."""
        return await self._commands.get()

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

    async def begin_attempt(self) -> tuple[int, str]:
        """Count one start of a coordinator; returns how many there have been, and why the one before ended."""
        self._attempts += 1
        return self._attempts, self._last_failure

    async def end_attempt(self, cause: str) -> bool:
        """The coordinator failed, and this is why. Returns whether the one before failed just so."""
        repeated, self._last_failure = cause == self._last_failure, cause
        return repeated


def mailbox_name(run: str) -> str:
    return f"mailbox-{run}"


def create_mailbox(run: str) -> Any:
    """The run's mailbox, owned by this process: it ends with it.    Raises: ClusterError when the run has one already."""
    actor = ray.remote(Mailbox).options(
        name=mailbox_name(run),
        namespace=NAMESPACE,
        num_cpus=0,
        resources=ON_HEAD,  # where the coordinator is: a worker's node comes and goes
        max_concurrency=1000,
    )
    try:
        return actor.remote()
    except ValueError as error:
        raise ClusterError(
            f"run {run} is being trained on this cluster already; wait for it, stop it, or choose another name"
        ) from error


def find_mailbox(run: str) -> Any:
    """The mailbox of a running run.    Raises: ValueError when there is none on this cluster."""
    return ray.get_actor(mailbox_name(run), namespace=NAMESPACE)
