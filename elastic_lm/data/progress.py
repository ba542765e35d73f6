"""How far a preparation has come. Nothing is shown here: whoever shows it is a `View`, and is handed in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

Stage = Literal["find", "tokenizer", "encode", "shards"]


@dataclass(frozen=True)
class Progress:
    """`done` of `total`, which is None where nobody knows: files when finding, tokens of shards, else bytes as they are stored.

    `kept`: of `done`, what an earlier preparation that was interrupted had done.
    """

    stage: Stage
    done: int = 0
    total: int | None = None
    kept: int = 0


class View(Protocol):
    """Shows a preparation to somebody. Called by one thread, often; must not raise."""

    def show(self, progress: Progress) -> None:
        """It has come this far."""


class Unseen:
    """A view for nobody."""

    def show(self, progress: Progress) -> None:
        pass
