"""Tasks of the kind `safety`: what a model writes behind prompts that tempt it, judged by a function of the user's.

Which words do harm is no fact of ours: the scorer is `package.module:function`, from a text to a number in [0, 1], higher for
worse. It sees the continuation alone. A share above the threshold of such a scorer is how RealToxicityPrompts (Gehman et al.
2020) looks at a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic_lm.engine.objectives import load_function
from elastic_lm.engine.spec import CAUSAL
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.continuations import MOST_NEW_TOKENS, Continuations, continuations, num_cut
from elastic_lm.evaluate.fields import Fields
from elastic_lm.evaluate.intervals import Metric, bootstrap, wilson
from elastic_lm.evaluate.pieces import Plan
from elastic_lm.evaluate.result import Outcome
from elastic_lm.generation import Sampling
from elastic_lm.trained_model import ModelInterface, TrainedModel


class Safety:
    """`scorer`: the function; `threshold`: from where a text counts; `temperature`, `seed`: how texts are drawn (0: the best)."""

    kind = "safety"
    objectives = (CAUSAL,)
    figures = ("share_above", "mean")

    def __init__(self, items: list[Fields], options: Fields) -> None:
        self._prompts = [fields.text("prompt", empty=True) for fields in items]
        self._scorer = options.text("scorer")
        load_function(self._scorer, f"{options.source}: scorer")
        self._threshold = options.number("threshold", 0, 1, 0.5)
        self._sampling = Sampling(
            temperature=options.number("temperature", 0, 100, 0),
            max_new_tokens=options.whole("max_new_tokens", 1, MOST_NEW_TOKENS, 64),
            seed=options.whole("seed", 0, 2**63 - 1, 0),
        )
        self._stop = options.optional_text("stop")
        if self._sampling.temperature:
            options.rules["drawn"] = "by the seed and the number of the prompt"

    def plan(self, model: ModelInterface) -> Plan:
        """Raises: DataError when the tokenizer cannot encode a prompt."""
        cut = num_cut(model, self._prompts)
        pieces = [Judged(each, self._scorer) for each in continuations(self._prompts, self._sampling, self._stop)]
        return Plan(pieces, lambda answers: self._outcome([verdict for answer in answers for verdict in answer], cut))

    def _outcome(self, verdicts: list[Verdict], cut_prompts: int) -> Outcome:
        scores = [verdict.score for verdict in verdicts]
        above = sum(score >= self._threshold for score in scores)
        counts = {
            "prompts": len(scores),
            "above": above,
            "empty_continuations": sum(verdict.is_empty for verdict in verdicts),
            "cut_prompts": cut_prompts,
        }
        method = {
            "scorer": self._scorer,
            "threshold": f"{self._threshold:g}",
            "intervals": "Wilson; bootstrap over prompts",
        }
        if num_not_finite := sum(not verdict.is_finite for verdict in verdicts):
            counts["not_finite"] = num_not_finite
            return Outcome({"share_above": Metric(None), "mean": Metric(None)}, counts, method)
        metrics = {
            "share_above": wilson(above, len(scores)),
            "mean": bootstrap([[score, 1] for score in scores], lambda sums: float(sums[0] / sums[1])),
        }
        return Outcome(metrics, counts, method)


@dataclass(frozen=True)
class Verdict:
    """What the scorer said of a continuation. One that is not finite it was not asked about: the model gave no whole one."""

    score: float
    is_empty: bool
    num_tokens: int
    is_finite: bool = True


@dataclass(frozen=True)
class Judged:
    """A piece: continuations, and the verdict of `scorer`, by its import path, on each."""

    continuations: Continuations
    scorer: str

    def answer(self, model: TrainedModel) -> list[Verdict]:
        """Raises: ConfigError when the scorer fails, says what is no number in [0, 1], or cannot be imported; DataError."""
        score = load_function(self.scorer, "scorer")
        written = self.continuations.answer(model)
        return [
            Verdict(
                self._scored(score, each.text) if each.is_finite else 0.0,
                not each.text,
                each.num_tokens,
                each.is_finite,
            )
            for each in written
        ]

    def num_tokens(self, answer: list[Verdict]) -> int:
        return sum(verdict.num_tokens for verdict in answer)

    def _scored(self, score: Callable[[str], Any], text: str) -> float:
        try:
            found = float(score(text))
        except (Exception, SystemExit) as error:  # one that exits would end the evaluation as if it were done
            raise ConfigError(
                f"scorer={self.scorer} failed on {text[:40]!r}: {type(error).__name__}: {error}; correct it"
            ) from error
        if not 0 <= found <= 1:
            raise ConfigError(f"scorer={self.scorer} said {found} of {text[:40]!r}; it must be a number in [0, 1]")
        return found
