"""Operations between members that are under way: looked at, never waited for.

Invariant: `done()` does not block, whatever the peers do, and raises `GroupBroken` when the operation will never complete.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from elastic_lm.errors import without_frames


class GroupBroken(Exception):
    """A peer is gone, or the group could not be formed."""


class Operation(Protocol):
    """Something that ends, or breaks."""

    def done(self) -> bool:
        """Raises: GroupBroken when it failed."""


class Pending:
    """A collective of a process group, and the tensor it reads or writes."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def done(self) -> bool:
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()  # completed: does not block, raises what went wrong
        except RuntimeError as error:
            raise GroupBroken(first_line(error)) from error
        return True


class Transfer:
    """Messages under way on a thread of their own."""

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self._run_messages = run
        self._outcome: list[BaseException | None] = []
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._run_messages()
        except BaseException as error:  # noqa: BLE001 - raised by `done` in the thread that waits
            self._outcome.append(without_frames(error))  # which hold this object and a generation's memory
        else:
            self._outcome.append(None)

    def done(self) -> bool:
        if not self._outcome:
            return False
        error = self._outcome[0]
        if error is None:
            return True
        # What is raised takes frames along, and with them this object: it is raised once and not kept.
        self._outcome[0] = GroupBroken(first_line(error))
        try:
            raise error
        finally:
            del error


def first_line(error: BaseException) -> str:
    """What went wrong, without c10d's stack."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
