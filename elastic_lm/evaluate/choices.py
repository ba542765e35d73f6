"""Tasks of the kind `choices`: which of several texts a model finds likeliest behind a context, and how often it is right.

By their log-likelihoods, and by these per UTF-8 byte of what is scored, since a long one is less likely for its length alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_lm.engine.spec import CAUSAL
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate import likelihood
from elastic_lm.evaluate.fields import Fields, from_source
from elastic_lm.evaluate.intervals import Metric, wilson
from elastic_lm.evaluate.likelihood import Rivals, rivals
from elastic_lm.evaluate.pieces import Plan
from elastic_lm.evaluate.result import Outcome
from elastic_lm.trained_model import ModelInterface


@dataclass(frozen=True)
class Item:
    """`answer`: the number of the right choice, from 0. `source`: where they are written."""

    context: str
    choices: list[str]
    answer: int
    source: str

    @classmethod
    def of(cls, fields: Fields) -> Item:
        """Raises: ConfigError."""
        choices = fields.texts("choices", 2)
        for number, choice in enumerate(choices):
            first = choices.index(choice)
            if first < number:  # only one of them could be right, and of equal scores the first counts
                raise ConfigError(
                    f"{fields.source}: the choices {first} and {number}, counted from 0, are the same text; correct one, or "
                    "leave it out"
                )
        answer = fields.whole("answer", 0, len(choices) - 1)
        return cls(fields.text("context", empty=True), choices, answer, fields.source)

    def rivals(self, model: ModelInterface) -> Rivals:
        """Raises: ConfigError when a choice alone does not fit into the model's context, or adds no token to the context."""
        with from_source(self.source):
            return rivals(model, self.context, self.choices)


class Choices:
    """Multiple choice by likelihood."""

    kind = "choices"
    objectives = (CAUSAL,)
    figures = ("accuracy", "accuracy_per_byte")

    def __init__(self, items: list[Fields], options: Fields) -> None:
        self._items = [Item.of(fields) for fields in items]

    def plan(self, model: ModelInterface) -> Plan:
        """Raises: as `Item.rivals`."""
        asked = [item.rivals(model) for item in self._items]
        readings = [reading for each in asked for reading in each.readings]
        return likelihood.plan(readings, lambda log_p: self._outcome(asked, log_p))

    def _outcome(self, asked: list[Rivals], log_p: list[float]) -> Outcome:
        coming = iter(log_p)
        num_right = num_right_per_byte = num_not_finite = 0
        for item, each in zip(self._items, asked, strict=True):
            scores = [next(coming) for _ in item.choices]
            sizes = [each.tail_bytes + len(choice.encode()) for choice in item.choices]
            per_byte = [score / size for score, size in zip(scores, sizes, strict=True)]
            num_right += _best(scores) == item.answer
            num_right_per_byte += _best(per_byte) == item.answer
            num_not_finite += not all(map(math.isfinite, scores))
        number = len(self._items)
        counts = {
            "items": number,
            "choices": len(log_p),
            "cut_contexts": sum(reading.cut for each in asked for reading in each.readings),
            "shortened_contexts": sum(each.shortened for each in asked),
        }
        method = {"intervals": "Wilson"}
        if num_not_finite:  # of such scores none is the highest
            counts["not_finite"] = num_not_finite
            return Outcome({"accuracy": Metric(None), "accuracy_per_byte": Metric(None)}, counts, method)
        metrics = {"accuracy": wilson(num_right, number), "accuracy_per_byte": wilson(num_right_per_byte, number)}
        return Outcome(metrics, counts, method)


def _best(scores: list[float]) -> int:
    """The first of the highest."""
    return max(range(len(scores)), key=scores.__getitem__)
