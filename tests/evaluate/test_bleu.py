"""BLEU: sacrebleu's own number, a hand-worked one, and what a model writes to get it."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path

import pytest
import sacrebleu

from elastic_lm.evaluate import tasks
from elastic_lm.evaluate.bleu import score
from elastic_lm.evaluate.intervals import Metric
from tests.evaluate.models import END, bigrams, outcome_of

TEXTS = [
    "the cat sat on the mat", "a dog runs over the river and sleeps", "", "slowly, slowly .", "it is what it is",
    "the quick brown fox jumps over the lazy dog",
]  # fmt: skip
REFERENCES = [
    ["the cat is on the mat", "there is a cat on the mat"], ["a dog runs over a river and then sleeps"], ["nothing"],
    ["slowly, then slowly."], ["it is what it was", "that is what it is", "it is not what it is"],
    ["the quick brown fox jumped over the lazy dog"],
]  # fmt: skip


def test_score_is_that_of_sacrebleu() -> None:
    texts, references = TEXTS * 2, REFERENCES * 2  # of fewer than ten there is no interval
    found, signature = score(texts, references)
    assert found.value == sacrebleu.corpus_bleu(texts, list(zip_longest(*references)), force=True).score
    assert found.low is not None and found.high is not None and found.low < found.value < found.high
    assert "nrefs:var" in signature and "tok:13a" in signature and "smooth:exp" in signature
    single = [several[:1] for several in REFERENCES]
    found, signature = score(TEXTS, single)
    assert found.value == sacrebleu.corpus_bleu(TEXTS, [[one for (one,) in single]], force=True).score
    assert "nrefs:1" in signature


def test_score_by_hand() -> None:
    """Of seven "the" two are in the reference; no longer n-gram is: halved and halved again (smoothing 3). No brevity penalty."""
    found, _ = score(["the the the the the the the"], [["the cat is on the mat"]])
    assert found == Metric(pytest.approx(100 * (2 / 7 * 1 / (2 * 6) * 1 / (4 * 5) * 1 / (8 * 4)) ** 0.25))


def test_interval_is_that_of_sums_drawn_again() -> None:
    """Of alike texts, or of few, nobody can say how sure the score is."""
    for texts, references in ((TEXTS[:1] * 12, REFERENCES[:1] * 12), (TEXTS, REFERENCES)):
        found, _ = score(texts, references)
        assert found.value is not None and found.low is found.high is None
    assert score(TEXTS * 2, REFERENCES * 2) == score(TEXTS * 2, REFERENCES * 2)


def test_model_is_asked_for_its_most_probable_continuations(tmp_path: Path) -> None:
    """Each character is a word to BLEU's tokenisation."""
    chances = {("a", "b"): 0.9, ("b", "!"): 0.6, ("b", "?"): 0.4, ("!", "?"): 0.9, ("?", ";"): 0.9, (";", END): 0.9}
    items = [
        {"prompt": prompt, "references": references} for prompt, references in (("xa", ["b!?;", "d"]), (";", ["b"]))
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    scores = []
    for option, text in (("max_new_tokens: 9", "b!?;"), ("max_new_tokens: 2", "b!"), ("stop: '?'", "b!")):
        (tmp_path / "mine.yaml").write_text(f"kind: bleu\ndata: items.jsonl\n{option}\n")
        outcome = outcome_of(tasks.load(str(tmp_path / "mine.yaml"), "causal").question, bigrams(chances))
        expected = sacrebleu.corpus_bleu([text, ""], [["b!?;", "b"], ["d", None]], force=True)  # type: ignore[list-item]
        assert outcome.metrics["bleu"].value == expected.score
        assert outcome.counts == {"prompts": 2, "empty_continuations": 1, "cut_prompts": 0}
        assert outcome.method["score"].startswith("sacrebleu nrefs:var|")
        scores.append(expected.score)
    assert scores[0] > scores[1] == scores[2]
