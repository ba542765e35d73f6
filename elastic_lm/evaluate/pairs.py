"""Tasks of the kind `pairs`: which of two sentences a model finds likelier, where one repeats a stereotype more than the other.

A model without a leaning takes each as often: a share of 0.5. Causal models by log-likelihood, masked ones by the
pseudo-log-likelihood of all tokens. The measure of CrowS-Pairs (Nangia et al. 2020) hides only the tokens that both sentences
share, so its figures do not compare with these for masked models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_lm.engine.spec import CAUSAL, MASKED
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate import likelihood
from elastic_lm.evaluate.fields import Fields, from_source
from elastic_lm.evaluate.intervals import Metric, bootstrap, wilson
from elastic_lm.evaluate.likelihood import Reading, continuation, hidden_one_by_one
from elastic_lm.evaluate.pieces import Plan
from elastic_lm.evaluate.result import Outcome
from elastic_lm.trained_model import ModelInterface


@dataclass(frozen=True)
class Item:
    """`more`: the sentence that stereotypes more; `less`: the other. `source`: where they are written."""

    more: str
    less: str
    source: str

    @classmethod
    def of(cls, fields: Fields) -> Item:
        """Raises: ConfigError."""
        item = cls(fields.text("more"), fields.text("less"), fields.source)
        if item.more == item.less:
            raise ConfigError(
                f"{fields.source}: more and less are the same sentence; correct one, or leave the pair out"
            )
        return item


class Pairs:
    """The share of pairs in which `more` is likelier, and by how much on average."""

    kind = "pairs"
    objectives = (CAUSAL, MASKED)
    figures = ("share_more", "mean_lead")

    def __init__(self, items: list[Fields], options: Fields) -> None:
        self._items = [Item.of(fields) for fields in items]

    def plan(self, model: ModelInterface) -> Plan:
        """Raises: ConfigError when a sentence does not fit into the model's context: half of one is another."""
        sentences = [sentence for item in self._items for sentence in _readings(model, item)]
        score = "log-likelihood" if model.objective == CAUSAL else "pseudo-log-likelihood of all tokens"

        def outcome(log_p: list[float]) -> Outcome:
            coming = iter(log_p)
            return _outcome([sum(next(coming) for _ in sentence) for sentence in sentences], score)

        return likelihood.plan([reading for sentence in sentences for reading in sentence], outcome)


def _outcome(scores: list[float], score: str) -> Outcome:
    """Of (pseudo-)log-likelihoods in nats, those of `more` and `less` by turns."""
    leads = [more - less for more, less in zip(scores[::2], scores[1::2], strict=True)]
    ties = sum(lead == 0 for lead in leads)
    number = len(leads)
    counts = {"pairs": number, "ties": ties}
    method = {"score": score, "intervals": "Wilson; bootstrap over pairs"}
    if num_not_finite := sum(not math.isfinite(lead) for lead in leads):
        counts["not_finite"] = num_not_finite
        return Outcome({"share_more": Metric(None), "mean_lead": Metric(None)}, counts, method)
    metrics = {
        "share_more": wilson(sum(lead > 0 for lead in leads) + ties / 2, number),
        "mean_lead": bootstrap([[lead, 1] for lead in leads], lambda sums: float(sums[0] / sums[1])),
    }
    return Outcome(metrics, counts, method)


def _readings(model: ModelInterface, item: Item) -> list[list[Reading]]:
    """Those of either sentence."""
    with from_source(item.source):
        if model.objective == CAUSAL:
            return [[continuation(model, "", text)] for text in (item.more, item.less)]
        return [hidden_one_by_one(model, text) for text in (item.more, item.less)]
