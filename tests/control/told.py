"""A list that events are told to, for the parts of control that tell some."""

from __future__ import annotations

from elastic_lm.events.types import Event, EventKind


class Told(list[Event]):
    """Call it as `Emit`."""

    def __call__(self, kind: EventKind, message: str, *, step: int | None = None, **fields: object) -> None:
        self.append(Event(kind, message, step, fields=fields))

    def kinds(self) -> list[EventKind]:
        return [event.kind for event in self]
