"""At which steps the held-out text is measured, and what is missing yet.

Members measure batches each for itself, between two leases that train, and tell what came of them in their reports: whoever goes
leaves its batches of that lease to the others. Invariant: an evaluation is told once, when every batch was measured with the
state of its step. One that fails is left out, and says so: training does not depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from elastic_lm.control.emit import Emit
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import Evaluation, LeaseEnd, LeaseReport, Measure

FAILURES = (LeaseEnd.RAISED, LeaseEnd.DATA_ERROR, LeaseEnd.UNAVAILABLE)


class Evaluating:
    """Keeps track of one attempt's evaluations. `done`: the steps of those that the log holds. `emit` takes events."""

    def __init__(self, spec: ControlSpec, done: Iterable[int], emit: Emit) -> None:
        self._spec, self._emit = spec, emit
        self._done = set(done)
        self._step: int | None = None  # of the one under way
        self._measures: dict[int, Measure] = {}

    def is_due(self, step: int | None) -> bool:
        """Whether held-out text is to be measured before this step is trained."""
        spec = self._spec
        if not step or spec.evaluate_every is None or not spec.num_held_out_batches or step in self._done:
            return False
        return step % spec.evaluate_every == 0 or step == spec.total_steps

    def missing(self, step: int) -> tuple[int, ...]:
        """Batches of this step's evaluation that nobody has measured."""
        if step != self._step:
            self._step, self._measures = step, {}
        return tuple(batch for batch in range(self._spec.num_held_out_batches) if batch not in self._measures)

    def take_in(self, report: LeaseReport, step: int) -> bool:
        """What a member measured at this step.    Returns: whether it failed in a way that ends the evaluation."""
        self._measures |= {measure.batch: measure for measure in report.measures}
        if any(not math.isfinite(measure.loss) for measure in report.measures):
            self._leave_out(step, "the loss on it is not finite")
            return True
        if report.end in FAILURES:
            self._leave_out(step, f"{report.member_id}: {report.error}")
            return True
        if step not in self._done and not self.missing(step):
            self._conclude(step)
        return False

    def forget(self) -> None:
        """Nobody holds the state of which something was measured."""
        self._step, self._measures = None, {}

    def inherit(self, evaluations: Iterable[Evaluation]) -> None:
        """A member comes back from an earlier coordinator and remembers these. Whoever keeps the log tells those it lacks."""
        self._done.update(evaluation.step for evaluation in evaluations)

    def _conclude(self, step: int) -> None:
        measures = list(self._measures.values())
        if not any(measure.num_targets for measure in measures):
            self._leave_out(step, "the objective finds no target in it")
            return
        self._done.add(step)
        evaluation = Evaluation.of(step, measures)
        self._emit(EventKind.EVALUATED, sentence(evaluation), step=step, **fields_of(evaluation))

    def _leave_out(self, step: int, why: str) -> None:
        if step in self._done:
            return  # two members failed
        self._done.add(step)
        self._emit(EventKind.NOTE, f"The evaluation at step {step} is left out: {why}.", step=step)


def sentence(evaluation: Evaluation) -> str:
    hits, targets = evaluation.num_correct, evaluation.num_targets
    right = "" if hits is None else f", {100 * hits / targets:.1f} % right"
    return f"Held out, before step {evaluation.step}: loss {evaluation.loss:.4f}, {targets:,} targets{right}."


def fields_of(evaluation: Evaluation) -> dict[str, Any]:
    """Of the event that tells it."""
    return {name: value for name, value in asdict(evaluation).items() if name != "step"}
