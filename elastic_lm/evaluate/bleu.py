"""Tasks of the kind `bleu`: how close a model's continuations come to references, by BLEU (Papineni et al. 2002).

Invariant: the score is sacrebleu's of the whole set (Post 2018), with its default tokenisation; its signature is kept with the
result. The interval draws prompts again and adds up their counts of n-grams, from which sacrebleu computes each score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np

from elastic_lm.engine.spec import CAUSAL
from elastic_lm.evaluate.continuations import MOST_NEW_TOKENS, Written, continuations, num_cut
from elastic_lm.evaluate.fields import Fields
from elastic_lm.evaluate.intervals import Floats, Metric, bootstrap
from elastic_lm.evaluate.pieces import Plan
from elastic_lm.evaluate.result import Outcome
from elastic_lm.generation import Sampling
from elastic_lm.trained_model import ModelInterface

ORDER = 4  # of the longest n-grams


@dataclass(frozen=True)
class Item:
    """`references`: texts of which any would do behind the prompt."""

    prompt: str
    references: list[str]

    @classmethod
    def of(cls, fields: Fields) -> Item:
        """Raises: ConfigError."""
        return cls(fields.text("prompt", empty=True), fields.texts("references", 1))


class Bleu:
    """BLEU of the most probable continuations. `max_new_tokens`, `stop`: where these end at the latest."""

    kind = "bleu"
    objectives = (CAUSAL,)
    figures = ("bleu",)

    def __init__(self, items: list[Fields], options: Fields) -> None:
        self._items = [Item.of(fields) for fields in items]
        tokens = options.whole("max_new_tokens", 1, MOST_NEW_TOKENS, 64)
        self._sampling = Sampling(temperature=0.0, max_new_tokens=tokens)
        self._stop = options.optional_text("stop")

    def plan(self, model: ModelInterface) -> Plan:
        """Raises: DataError when the tokenizer cannot encode a prompt."""
        prompts = [item.prompt for item in self._items]
        cut = num_cut(model, prompts)
        return Plan(
            continuations(prompts, self._sampling, self._stop),
            lambda answers: self._outcome([written for answer in answers for written in answer], cut),
        )

    def _outcome(self, written: list[Written], cut_prompts: int) -> Outcome:
        texts = [each.text for each in written]
        metric, signature = score(texts, [item.references for item in self._items])
        counts = {"prompts": len(texts), "empty_continuations": texts.count(""), "cut_prompts": cut_prompts}
        if num_not_finite := sum(not each.is_finite for each in written):
            counts["not_finite"] = num_not_finite
            metric = Metric(None)
        return Outcome(
            {"bleu": metric}, counts, {"score": f"sacrebleu {signature}", "intervals": "bootstrap over prompts"}
        )


def score(texts: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Metric, str]:
    """BLEU, 0 to 100, and sacrebleu's signature. `references`: those of each text, one at least."""
    from sacrebleu.metrics.bleu import BLEU

    whole, single = BLEU(force=True), BLEU(effective_order=True)  # both without remarks; the counts are the same
    value = whole.corpus_score(texts, list(zip_longest(*references))).score
    parts = [single.sentence_score(text, several) for text, several in zip(texts, references, strict=True)]

    def of_sums(sums: Floats) -> float:
        counts, totals, (length, wanted) = np.split(sums.astype(int), [ORDER, 2 * ORDER])
        return float(BLEU.compute_bleu(list(counts), list(totals), length, wanted, smooth_method="exp").score)

    sums = bootstrap([[*part.counts, *part.totals, part.sys_len, part.ref_len] for part in parts], of_sums)
    return replace(sums, value=value), str(whole.get_signature())
