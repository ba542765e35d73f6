"""Kinds of events and their one shape. Everything that watches a run is computed from these."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    """What happened. catalogue.py says what each kind means and which fields it carries."""

    RUN_STARTED = "run_started"
    MEMBER_STARTED = "member_started"
    MEMBER_READY = "member_ready"
    MEMBER_RETURNED = "member_returned"
    MEMBER_REFUSED = "member_refused"
    MEMBER_LOST = "member_lost"
    MEMBER_LEFT = "member_left"
    NODE_DRAINING = "node_draining"
    NODE_LOST = "node_lost"
    NODE_QUARANTINED = "node_quarantined"
    LEASE_GRANTED = "lease_granted"
    REFORMED = "reformed"
    STEP_COMMITTED = "step_committed"
    STEP_MISMATCH = "step_mismatch"
    WORKER_PACES = "worker_paces"
    STRAGGLER = "straggler"
    CHECKPOINT_SAVED = "checkpoint_saved"
    CHECKPOINT_FAILED = "checkpoint_failed"
    EVALUATED = "evaluated"
    REWOUND = "rewound"
    READER_REPLACED = "reader_replaced"
    RESIZED = "resized"
    NOTE = "note"
    RUN_FINISHED = "run_finished"


# Of what every event has. What is in `fields` depends on the kind, and on the version that wrote it.
_TYPES: dict[str, Any] = {
    "message": str,
    "step": int | None,
    "generation": str | None,
    "fields": dict,
    "time_s": int | float,
    "elapsed_s": int | float,
    "attempt": int,
    "owner_epoch": int,
}


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    `message` is a sentence with numbers, for people. `time_s` is unix time and `elapsed_s` monotonic seconds since the
    attempt began; both are 0 until the recorder stamps them. `world_size` counts the members of the current generation.
    `owner_epoch` is that of the run's owner who told it, as the log stamps it.
    """

    kind: EventKind
    message: str
    step: int | None = None
    generation: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    time_s: float = 0.0
    elapsed_s: float = 0.0
    attempt: int = 0
    owner_epoch: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Event:
        """The inverse of `to_json`.    Raises: ValueError, KeyError or TypeError on anything else."""
        data = json.loads(line)
        event = cls(**{**data, "kind": EventKind(data["kind"])})
        for name, types in _TYPES.items():
            if not isinstance(getattr(event, name), types):
                raise TypeError(f"{name} is {getattr(event, name)!r:.40}")
        return event
