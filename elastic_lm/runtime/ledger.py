"""The ledger: which steps the run has committed, each exactly once and in order, whoever told.

Members tell the same step several times (rank 0 as it happens, everybody when a lease ends). Their records must agree in
every bit that the promise covers; a disagreement is an alarm, never a choice.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from elastic_lm.protocol import StepRecord

KEPT_STEPS = 10_000  # steps whose records are compared when they are told or trained again


@dataclass(frozen=True)
class Mismatch:
    """Two members, or two times, disagree about one step."""

    logged: StepRecord
    told: StepRecord


class Ledger:
    """Committed steps [0, next_step), and those that were told ahead of a gap."""

    def __init__(self) -> None:
        self.next_step = 0
        self._committed: OrderedDict[int, StepRecord] = OrderedDict()
        self._ahead: dict[int, StepRecord] = {}

    def add(self, records: tuple[StepRecord, ...]) -> tuple[list[StepRecord], list[Mismatch]]:
        """Enter what a member told. Returns: steps that are committed now, in order; and disagreements."""
        mismatches = [Mismatch(known, r) for r in records if (known := self._known(r.step)) and not known.same_bits(r)]
        for record in records:
            if record.step >= self.next_step:
                self._ahead.setdefault(record.step, record)
        committed = []
        while self.next_step in self._ahead:
            record = self._ahead.pop(self.next_step)
            self.restore(record)
            committed.append(record)
        return committed, mismatches

    def restore(self, record: StepRecord) -> None:
        """Enter a step that the log holds already."""
        self._committed[record.step] = record
        self.next_step = record.step + 1
        if len(self._committed) > KEPT_STEPS:
            self._committed.popitem(last=False)

    def skip_to(self, step: int) -> None:
        """Steps below `step` are in a checkpoint, whether or not anybody logged them."""
        self.next_step = max(self.next_step, step)

    def last(self) -> StepRecord | None:
        return next(reversed(self._committed.values()), None)

    def mean_loss(self, stop: int, num_steps: int) -> float | None:
        """Of those of the steps [stop - num_steps, stop) that are known; None when none is."""
        records = (self._known(step) for step in range(max(0, stop - num_steps), stop))
        losses = [record.loss for record in records if record is not None]
        return math.fsum(losses) / len(losses) if losses else None

    def _known(self, step: int) -> StepRecord | None:
        return self._committed.get(step) or self._ahead.get(step)
