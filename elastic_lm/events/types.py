"""Kinds of events and their one shape. Everything that watches a run is computed from these."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any


class EventKind(StrEnum):
    """What happened. The fields that each kind carries are named behind it."""

    RUN_STARTED = "run_started"  # resume_step, config, flops_per_token (None: unknown)
    MEMBER_REQUESTED = "member_requested"  # member_id
    MEMBER_STARTED = "member_started"  # member_id, node_id, pid
    MEMBER_READY = "member_ready"  # member_id, node_id, startup_s, environment
    MEMBER_REFUSED = "member_refused"  # member_id, environment, expected
    MEMBER_LOST = "member_lost"  # member_id, cause, node_id
    MEMBER_LEFT = "member_left"  # member_id, cause (drain, resize, end)
    NODE_DRAINING = "node_draining"  # node_id
    NODE_QUARANTINED = "node_quarantined"  # node_id, failures
    LEASE_GRANTED = "lease_granted"  # members, start_step, stop_step, shares
    REFORMED = "reformed"  # cause (failure, hang, join, drain, checkpoint, start, resize, straggler), lost_s
    STEP_COMMITTED = "step_committed"  # all of StepRecord
    STEP_MISMATCH = "step_mismatch"  # logged, told: an alarm
    WORKER_PACES = "worker_paces"  # paces: {member_id: [seconds per micro-batch, micro-batches per step]}
    STRAGGLER = "straggler"  # member_id, micro_batch_s, median_s
    CHECKPOINT_SAVED = "checkpoint_saved"  # step, seconds
    CHECKPOINT_FAILED = "checkpoint_failed"  # step, error
    READER_REPLACED = "reader_replaced"  # reader_id, replacement, cause
    RESIZED = "resized"  # min_workers, max_workers
    NOTE = "note"  # a sentence for people
    RUN_FINISHED = "run_finished"  # verdict


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    `message` is a sentence with numbers, for people. `time_s` is unix time and `elapsed_s` monotonic seconds since the
    attempt began; both are 0 until the recorder stamps them. `world_size` counts the members of the current generation.
    """

    kind: EventKind
    message: str
    step: int | None = None
    generation: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    time_s: float = 0.0
    elapsed_s: float = 0.0
    attempt: int = 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str) -> Event:
        """The inverse of `to_json`.    Raises: ValueError, KeyError or TypeError on anything else."""
        data = json.loads(line)
        event = cls(**{**data, "kind": EventKind(data["kind"])})
        if not isinstance(event.fields, dict) or not isinstance(event.step, int | None):
            raise TypeError("fields is no object, or step no number")
        return event
