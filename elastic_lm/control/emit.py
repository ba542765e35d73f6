"""How the parts of control tell events: each is given one of these, so that all events leave by one door."""

from __future__ import annotations

from typing import Protocol

from elastic_lm.events.types import EventKind


class Emit(Protocol):
    """Tells an event: its kind, a sentence, and fields."""

    def __call__(self, kind: EventKind, message: str, *, step: int | None = None, **fields: object) -> None: ...
