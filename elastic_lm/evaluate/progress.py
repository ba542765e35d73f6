"""How far an evaluation has come. Nothing is shown here: whoever shows it is a `View`, and is handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Progress:
    """`done` of `total` pieces of all tasks together, the last one of the task `stage`. `tokens`: read for them, or written.

    `doing`: what is done to `stage`, which may be something else than a task then. `total` None: nobody knows. `unit`: what is
    counted.
    """

    stage: str
    done: int
    total: int | None
    tokens: int
    doing: str = "evaluating"
    unit: str = "pieces"


class View(Protocol):
    """Shows an evaluation to somebody. Called by one thread; must not raise."""

    def show(self, progress: Progress) -> None:
        """It has come this far."""


class Unseen:
    """A view for nobody."""

    def show(self, progress: Progress) -> None:
        pass
