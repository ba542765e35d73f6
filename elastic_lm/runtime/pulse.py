"""What a member's next heartbeat says.

Written by the training thread, read by the lifeline's; each field is one store. Invariant: a step's record is told at least
once to whoever is the coordinator: what went into a connection that broke goes into the next one again. Trade-off: told
twice is nothing, the ledger enters each step once; of a gap longer than `TOLD_AGAIN` steps the lease's report tells.
"""

from __future__ import annotations

from collections import deque

from elastic_lm.protocol import Generation, Heartbeat, Phase, StepRecord

TOLD_AGAIN = 1024  # records
BEAT_RECORDS = 512  # about a quarter of the longest line that a coordinator takes


class Pulse:
    """Of one member."""

    def __init__(self, member_id: str) -> None:
        self._member_id = member_id
        self.generation: Generation | None = None
        self.phase = Phase.STARTING
        self.next_step = 0
        self.progress = 0
        self.micro_batch_s: float | None = None
        self.first_generation = Generation(0, 0)  # whose steps are told
        self._records: list[StepRecord] = []
        self._told: deque[StepRecord] = deque(maxlen=TOLD_AGAIN)

    def tell(self, record: StepRecord) -> None:
        """In one of the next heartbeats."""
        self._records.append(record)

    def tell_again(self) -> None:
        """The connection is a new one: what went into the one before may not have arrived."""
        self._records[:0] = self._told
        self._told.clear()

    def beat(self) -> Heartbeat:
        """The next heartbeat; its records are not in the one after it."""
        records = tuple(self._records[:BEAT_RECORDS])
        del self._records[: len(records)]
        self._told.extend(records)
        records = tuple(record for record in records if record.generation >= self.first_generation)
        return Heartbeat(
            self._member_id,
            self.generation,
            self.phase,
            self.next_step,
            self.progress,
            self.micro_batch_s,
            records,
        )
