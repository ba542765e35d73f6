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

    def skip_to(self, step: int) -> tuple[list[StepRecord], list[int]]:
        """Nobody who is left can tell more of the steps before this one.

        Returns: of those that were not committed, the records that are known, which are now, and the steps that are missing.
        """
        before = range(self.next_step, step)
        known = [self._ahead.pop(s) for s in before if s in self._ahead]
        missing = sorted(set(before) - {record.step for record in known})
        for record in known:
            self.restore(record)
        self.next_step = max(self.next_step, step)
        return known, missing

    def go_back(self, step: int) -> None:
        """Steps from this one on are not the run's any more."""
        for later in [later for later in self._committed if later >= step]:
            del self._committed[later]
        self._ahead.clear()
        self.next_step = min(self.next_step, step)

    def since(self, step: int) -> tuple[StepRecord, ...]:
        """Records of the committed steps from this one on, as far as they are kept."""
        return tuple(self._committed[s] for s in range(step, self.next_step) if s in self._committed)

    def kept(self) -> tuple[StepRecord, ...]:
        """Of the last `KEPT_STEPS` committed steps, as far as they are known."""
        return tuple(self._committed.values())

    def last(self) -> StepRecord | None:
        """Of those that were not left out."""
        return next((record for record in reversed(self._committed.values()) if not record.refused), None)

    def mean_loss(self, stop: int, num_steps: int) -> float | None:
        """Of those of the steps [stop - num_steps, stop) that are known and were not left out; None when none is."""
        records = (self._known(step) for step in range(max(0, stop - num_steps), stop))
        losses = [record.loss for record in records if record is not None and not record.refused]
        return math.fsum(losses) / len(losses) if losses else None

    def _known(self, step: int) -> StepRecord | None:
        return self._committed.get(step) or self._ahead.get(step)
