"""The mailbox: where anybody leaves a word for whoever is the run's coordinator now, and hears how the run is doing.

A named actor without CPUs. It outlives a coordinator, so commands and progress survive a successor taking over.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

import ray

from elastic_lm.runtime.cluster import NAMESPACE

MAX_LINES = 10_000


@dataclass(frozen=True)
class Command:
    """`scale` (min_workers, max_workers), `stop` (reason) or `drain` (member_id or node_id)."""

    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)


class Mailbox:
    """Async actor: every method returns at once or waits without holding a thread."""

    def __init__(self) -> None:
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._lines: list[str] = []
        self._dropped = 0
        self._news = asyncio.Event()
        self._status: dict[str, Any] = {}
        self._attempts = 0

    async def post(self, command: Command) -> None:
        """Leave a command for the coordinator."""
        await self._commands.put(command)

    async def take(self) -> Command:
        """The coordinator's long poll: the next command."""
        return await self._commands.get()

    async def publish(self, lines: list[str], status: dict[str, Any]) -> None:
        """The coordinator's news: lines for people, and the latest status."""
        self._lines += lines
        excess = len(self._lines) - MAX_LINES
        if excess > 0:
            del self._lines[:excess]
            self._dropped += excess
        self._status = status
        self._news.set()
        self._news = asyncio.Event()

    async def follow(self, cursor: int, timeout_s: float) -> tuple[list[str], int]:
        """Lines from number `cursor` on, as soon as there are any or after `timeout_s`; and the next cursor."""
        if cursor >= self._dropped + len(self._lines):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout_s)
        return self._lines[max(0, cursor - self._dropped) :], self._dropped + len(self._lines)

    async def status(self) -> dict[str, Any]:
        """What the coordinator last said about the run."""
        return self._status

    async def begin_attempt(self) -> int:
        """Count one start of a coordinator; returns how many there have been."""
        self._attempts += 1
        return self._attempts


def mailbox_name(run: str) -> str:
    return f"mailbox-{run}"


def create_mailbox(run: str) -> Any:
    """The run's mailbox, owned by this process: it ends with it."""
    actor = ray.remote(Mailbox).options(
        name=mailbox_name(run), namespace=NAMESPACE, num_cpus=0, max_concurrency=1000, get_if_exists=True
    )
    return actor.remote()


def find_mailbox(run: str) -> Any:
    """The mailbox of a running run.    Raises: ValueError when there is none on this cluster."""
    return ray.get_actor(mailbox_name(run), namespace=NAMESPACE)
