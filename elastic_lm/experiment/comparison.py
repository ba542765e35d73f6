"""Two runs side by side: what was chosen differently, and what came of it. Computed from their folders and their ancestors' logs.

Invariant: figures are of what a run has trained itself; the ancestors' steps are in curves, and where two runs part is looked for
in these.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.events.log import read
from elastic_lm.experiment import ancestry, evaluations
from elastic_lm.experiment.changes import changes
from elastic_lm.experiment.evaluations import Measured
from elastic_lm.experiment.lineage import Change, Lineage
from elastic_lm.monitor.ancestors import NONE, Ancestors
from elastic_lm.monitor.chart import duration
from elastic_lm.monitor.history import History
from elastic_lm.run_address import EVENTS, RunAddress

MEAN_STEPS = 100  # a step's loss is mostly its batch's
BITS = ("loss", "grad_norm", "learning_rate", "sample_hash")  # of a step's record, what two equal runs have in common


@dataclass(frozen=True)
class Side:
    """One of the two. `lineage`: None for a run that is no fork; `history`: of its own log alone."""

    name: str
    url: str
    config: RunConfig
    history: History
    lineage: Lineage | None
    measured: tuple[Measured, ...]
    ancestors: Ancestors = NONE

    @classmethod
    def of(cls, run: RunAddress) -> Side:
        """Reads the whole log, and those of its ancestors.

        Raises: ConfigError, NotFoundError when there is no such run; CheckpointError when its lineage is damaged; StorageError.
        """
        folder = run.folder()
        config = run.stored_config()
        history = History.of(read(folder.child(EVENTS), on_problem=lambda told: None))
        measured = tuple(evaluations.found(folder))
        lineage = Lineage.load(folder)
        return cls(run.name, folder.url, config, history, lineage, measured, ancestry.of(lineage))

    @cached_property
    def records(self) -> dict[int, dict[str, Any]]:
        """Of the committed steps, by step."""
        return {point.step: point.fields for point in self.history.points}

    @cached_property
    def applied(self) -> dict[int, dict[str, Any]]:
        """Those without the steps that were left out, which say nothing of the model."""
        return {step: fields for step, fields in self.records.items() if not fields.get("refused")}

    @cached_property
    def before(self) -> dict[int, dict[str, Any]]:
        """Of the steps that ancestors have trained for it, by step."""
        return {point.step: point.fields for point in self.ancestors.points()}

    @cached_property
    def line(self) -> dict[int, dict[str, Any]]:
        """Of all steps that led to its weights, by step."""
        return {**self.before, **self.records}

    @cached_property
    def trainers(self) -> dict[int, str]:
        """By whom each of these was trained: its address."""
        before = {point.step: each.url for each in self.ancestors.stretches for point in each.points}
        return {**before, **dict.fromkeys(self.records, self.url)}

    @property
    def begins_at(self) -> int:
        return self.lineage.parent.step if self.lineage else 0

    def figures(self) -> dict[str, str]:
        """What it came to, in words; what is not known is left out."""
        history, points = self.history, self.history.points
        losses = [fields["loss"] for fields in self.applied.values()]
        last = losses[-MEAN_STEPS:]
        lowest = min(filter(math.isfinite, losses), default=None)
        num_left_out = len(points) - len(losses)
        _, rates = history.tokens_per_s(most_parts=10)
        ratio = history.goodput.ratio()
        told = {
            "state": history.verdict or ("no verdict" if points else "not begun"),
            "steps": f"{points[-1].step + 1:,} of {self.config.training.steps:,}" if points else None,
            "from": f"{self.lineage.parent.name} at step {self.begins_at:,}" if self.lineage else None,
            "loss": f"{losses[-1]:.4f}" if losses else None,
            "mean loss": f"{sum(last) / len(last):.4f}, last {len(last)} steps" if last else None,
            "lowest loss": f"{lowest:.4f}" if lowest is not None else None,
            "left out": f"{num_left_out:,} steps" if num_left_out else None,
            "tokens": f"{history.num_tokens:,}" if points else None,
            "tokens with ancestors": self._tokens_in_all(),
            "tokens/s": f"{sum(rates) / len(rates):,.0f}" if rates else None,
            "goodput": f"{ratio:.1%}" if ratio is not None else None,
            "time": duration(history.ended_s - history.began_s) if points else None,
            "fingerprint": self.config.identity_fingerprint()[:16],
        }
        return {name: value for name, value in told.items() if value is not None}

    def _tokens_in_all(self) -> str | None:
        """That led to its weights, of a fork."""
        if not self.ancestors.forks:
            return None
        return "unknown" if self.ancestors.lacks else f"{self.ancestors.num_tokens + self.history.num_tokens:,}"


@dataclass(frozen=True)
class Comparison:
    """Of runs `a` and `b`, in this order."""

    a: Side
    b: Side

    @classmethod
    def of(cls, a: RunAddress, b: RunAddress) -> Comparison:
        return cls(Side.of(a), Side.of(b))

    @property
    def names(self) -> tuple[str, str]:
        """Of runs that have the same name, their addresses."""
        return (self.a.url, self.b.url) if self.a.name == self.b.name else (self.a.name, self.b.name)

    @cached_property
    def differences(self) -> tuple[Change, ...]:
        """Fields of the config in which they differ, those first that change bits: `before` is a's value, `after` b's."""
        return changes(self.a.config, self.b.config)

    @cached_property
    def figures(self) -> list[tuple[str, str, str]]:
        """(name, a's, b's)."""
        of_a, of_b = self.a.figures(), self.b.figures()
        names = list(dict.fromkeys([*of_a, *of_b]))
        names.sort(key=lambda name: name == "fingerprint")
        return [(name, of_a.get(name, "–"), of_b.get(name, "–")) for name in names]

    @cached_property
    def measured(self) -> list[tuple[int, str, str, Measured | None, Measured | None]]:
        """(step, task, metric, a's, b's) of what either was evaluated on; beside each other only if the task is the same."""
        names = evaluations.names([*self.a.measured, *self.b.measured])
        of_a, of_b = (
            {(m.step, names[m.task, m.task_hash], m.metric): m for m in side.measured} for side in (self.a, self.b)
        )
        return [(*key, of_a.get(key), of_b.get(key)) for key in sorted({*of_a, *of_b})]

    @cached_property
    def shared(self) -> list[int]:
        """Steps of both lines that were trained once: by an ancestor of both, or by one of them before the other was forked."""
        a, b = self.a, self.b
        both = a.line.keys() & b.line.keys()
        return sorted(s for s in both if a.trainers[s] == b.trainers[s] and _is_same(a.line[s], b.line[s]))

    @cached_property
    def common(self) -> list[int]:
        """Steps that are in both lines and were trained for each of them."""
        return sorted((self.a.line.keys() & self.b.line.keys()) - set(self.shared))

    @cached_property
    def first_difference(self) -> int | None:
        """The first of the common steps that did not come out the same, bit for bit."""
        a, b = self.a.line, self.b.line
        return next((s for s in self.common if any(_differ(a[s].get(name), b[s].get(name)) for name in BITS)), None)

    @property
    def lacks(self) -> list[str]:
        """A sentence for each run of whose ancestors not all is known."""
        sides = zip(self.names, (self.a, self.b), strict=True)
        return [f"{name}: {side.ancestors.lacks}" for name, side in sides if side.ancestors.lacks]

    @property
    def relation(self) -> str:
        """In a sentence: which of them is from which, and how far they are the same."""
        return " ".join(filter(None, (self._kinship(), self._sameness())))

    def _kinship(self) -> str | None:
        for child, other in ((self.b, self.a), (self.a, self.b)):
            for number, link in enumerate(child.lineage.chain() if child.lineage else ()):
                if link.parent.url == other.url:
                    how = "a fork" if number == 0 else f"a fork, {number + 1} generations on,"
                    return f"{child.name} is {how} of {other.name} at step {link.parent.step:,}."
        shared = {link.parent.url: link.parent for link in (self.a.lineage.chain() if self.a.lineage else ())}
        for link in self.b.lineage.chain() if self.b.lineage else ():
            if (ancestor := shared.get(link.parent.url)) is not None:
                steps = (f"{ancestor.step:,}", f"{link.parent.step:,}")
                at = f"step {steps[0]}" if steps[0] == steps[1] else f"the steps {steps[0]} and {steps[1]}"
                return f"Both are from {link.parent.name}, at {at}."
        return None

    def _sameness(self) -> str | None:
        return " ".join(filter(None, (self._once(), self._twice()))) or None

    def _once(self) -> str | None:
        """Of the steps that were trained once for both."""
        if not self.shared:
            return None
        names = {each.url: each.name for side in (self.a, self.b) for each in side.ancestors.stretches}
        names |= {side.url: side.name for side in (self.a, self.b)}
        trainers = list(dict.fromkeys(names[self.a.trainers[step]] for step in self.shared))
        steps = f"Step {self.shared[0]:,} was" if len(self.shared) == 1 else f"Steps {_range(self.shared)} were"
        return f"{steps} trained once for both, by {' and '.join(trainers)}."

    def _twice(self) -> str | None:
        if not self.common:
            other = "other " if self.shared else ""
            return f"Their curves have no {other}step in common." if self.a.records and self.b.records else None
        steps = f"{len(self.common):,} steps that were trained for each ({_range(self.common)})"
        if self.first_difference is None:
            return f"All {steps} came out the same, bit for bit."
        same = bisect.bisect_left(self.common, self.first_difference)
        if not same:
            return f"The {steps} differ from the first on."
        return f"Of {steps} the first {same:,} came out the same, bit for bit; they part at step {self.first_difference:,}."

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "runs": [
                {"name": side.name, "url": side.url, "figures": side.figures(), "lacks": side.ancestors.lacks}
                for side in (self.a, self.b)
            ],
            "relation": self.relation,
            "steps_trained_once": len(self.shared),
            "steps_in_common": len(self.common),
            "first_difference": self.first_difference,
            "differences": [
                {"name": change.name, "a": change.before, "b": change.after, "identity": change.identity}
                for change in self.differences
            ],
            "evaluations": [
                {
                    "step": step,
                    "task": one.task,
                    "task_hash": one.task_hash,
                    "metric": metric,
                    "a": a and a.value,
                    "b": b and b.value,
                }
                for step, _, metric, a, b in self.measured
                if (one := a or b)
            ],
        }


def _differ(one: Any, other: Any) -> bool:
    """What is no number in both is the same."""
    return bool(one != other) and not (one != one and other != other)


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two records are one, by how long each part of the step took, too."""
    return not any(_differ(one.get(name), other.get(name)) for name in {*one, *other})


def _range(steps: Sequence[int]) -> str:
    return f"{steps[0]:,} to {steps[-1]:,}"
