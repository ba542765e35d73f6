"""Tasks of the kind `choices`: which of several texts a model finds likeliest behind a context, and how often it is right.

By their log-likelihoods, and by these per UTF-8 byte of the choice, since a long one is less likely for its length alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lm.engine.spec import CAUSAL
from elastic_lm.evaluate.fields import Fields
from elastic_lm.evaluate.intervals import wilson
from elastic_lm.evaluate.likelihood import continuation, log_likelihoods
from elastic_lm.evaluate.result import Outcome
from elastic_lm.trained_model import TrainedModel


@dataclass(frozen=True)
class Item:
    """`answer`: the number of the right choice, from 0."""

    context: str
    choices: list[str]
    answer: int

    @classmethod
    def of(cls, fields: Fields) -> Item:
        """Raises: ConfigError."""
        choices = fields.texts("choices", 2)
        return cls(fields.text("context", empty=True), choices, fields.whole("answer", 0, len(choices) - 1))


class Choices:
    """Multiple choice by likelihood."""

    kind = "choices"
    objectives = (CAUSAL,)

    def __init__(self, items: list[Fields], options: Fields) -> None:
        self._items = [Item.of(fields) for fields in items]

    def evaluate(self, model: TrainedModel) -> Outcome:
        """Raises: ConfigError when a choice alone does not fit into the model's context."""
        readings = [continuation(model, item.context, choice) for item in self._items for choice in item.choices]
        log_p = iter(log_likelihoods(model, readings))
        num_right = num_right_per_byte = 0
        for item in self._items:
            scores = [next(log_p) for _ in item.choices]
            per_byte = [score / len(choice.encode()) for score, choice in zip(scores, item.choices, strict=True)]
            num_right += _best(scores) == item.answer
            num_right_per_byte += _best(per_byte) == item.answer
        number = len(self._items)
        return Outcome(
            {"accuracy": wilson(num_right, number), "accuracy_per_byte": wilson(num_right_per_byte, number)},
            {"items": number, "choices": len(readings), "cut_contexts": sum(reading.cut for reading in readings)},
            {"intervals": "Wilson"},
        )


def _best(scores: list[float]) -> int:
    """The first of the highest."""
    return max(range(len(scores)), key=scores.__getitem__)
