"""Likelihoods: equal to hand-worked ones, and to those of transformers for the exported model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.likelihood import (
    BATCH_TOKENS,
    CHUNK_LOGITS,
    Reading,
    continuation,
    hidden_one_by_one,
    log_likelihoods,
    scores,
)
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.evaluate.models import END, REST, Neighbours, bigrams, token, trained

# Of fp32 sums in another order: 2e-5 a logit (test_logits.py), and a text has up to 16 tokens.
ROUNDING = 3e-4
TEXTS = ["the cat runs", "a dog sleeps", "slowly", "qqq zzz", "the the the the"]


# -- by hand ---------------------------------------------------------------------------------------------------------


def test_continuation_is_asked_token_by_token() -> None:
    model = bigrams({("a", "b"): 0.5, ("b", "c"): 0.25, (END, "b"): 0.125})
    readings = [continuation(model, "a", "bc"), continuation(model, "", "bc"), continuation(model, "xa", "c")]
    expected = [math.log(0.5 * 0.25), math.log(0.125 * 0.25), math.log(0.5 / 260)]
    assert log_likelihoods(model, readings) == pytest.approx(expected)


def test_space_at_the_end_of_a_context_is_asked_for() -> None:
    model = bigrams({("a", " "): 0.5, (" ", "b"): 0.25})
    for context, text in (("a ", "b"), ("a", " b")):
        assert log_likelihoods(model, [continuation(model, context, text)]) == pytest.approx([math.log(0.125)])


def test_too_long_a_context_loses_its_beginning() -> None:
    model = bigrams({("a", "b"): 0.5}, max_tokens=4)
    fits, cut = continuation(model, "xya", "b"), continuation(model, "xxya", "b")
    assert (fits.ids, fits.cut) == ((token(END), token("x"), token("y"), token("a")), False)
    assert (cut.ids, cut.cut) == ((token("x"), token("x"), token("y"), token("a")), True)
    assert log_likelihoods(model, [fits, cut]) == pytest.approx([math.log(0.5)] * 2)


def test_text_that_fills_the_context_is_asked_whole_and_a_longer_one_refused() -> None:
    model = bigrams({}, max_tokens=4)
    assert log_likelihoods(model, [continuation(model, "a" * 9, "bbbb")]) == pytest.approx([4 * REST])
    with pytest.raises(ConfigError, match="'bbbbb' has 5 tokens, and the model's context is 4; shorten it"):
        continuation(model, "", "bbbbb")


def test_pseudo_likelihood_hides_each_token_once() -> None:
    module = Neighbours()
    ids = [token(END), token("a"), token("b"), token("a"), token(END)]
    expected = 0.0
    for at in (1, 2, 3):
        logits_V = module.left_VV[ids[at - 1]] + module.right_VV[ids[at + 1]]
        expected += float(logits_V.log_softmax(0)[ids[at]])
    model = trained(module, "masked")
    assert sum(log_likelihoods(model, hidden_one_by_one(model, "aba"))) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="'a{15}' has 17 tokens with those that begin and end a document"):
        hidden_one_by_one(model, "a" * 15)


def test_order_and_company_do_not_matter() -> None:
    model = bigrams({("a", "b"): 0.5, ("b", "a"): 0.25}, max_tokens=64)
    texts = ["ab" * (1 + number % 7) for number in range(BATCH_TOKENS // 2)]
    readings = [continuation(model, "b", text) for text in texts]
    alone = {text: log_likelihoods(model, [continuation(model, "b", text)])[0] for text in set(texts)}
    assert log_likelihoods(model, readings) == pytest.approx([alone[text] for text in texts], rel=1e-12)


def test_logits_are_never_held_whole() -> None:
    """A context of 400 tokens with a vocabulary of 50,257 has 20 million of them."""
    torch.manual_seed(0)
    spec = ModelSpec(vocab_size=50_257, max_tokens=400, num_layers=1, num_heads=1, width=8)
    module, sizes = GPT(spec).eval(), []
    ids = torch.randint(0, spec.vocab_size, (401,)).tolist()
    with torch.no_grad():
        log_p_TV = module(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    module.head.register_forward_hook(lambda head, features, logits: sizes.append(logits.numel()))
    model = trained(module, "causal", max_tokens=400)
    best = tuple(log_p_TV.argmax(-1).tolist())
    whole = Reading(tuple(ids[:-1]), tuple(range(400)), tuple(ids[1:]))
    greedy = Reading(whole.ids, whole.places, best)
    wrong_at_last = Reading(whole.ids, whole.places, (*best[:-1], (best[-1] + 1) % spec.vocab_size))
    found = scores(model, [whole, greedy, wrong_at_last])
    expected = [
        float(log_p_TV.gather(1, torch.tensor(each.targets)[:, None]).sum()) for each in (whole, greedy, wrong_at_last)
    ]
    assert [score.log_p for score in found] == pytest.approx(expected, rel=1e-6)
    assert [score.is_most_probable for score in found] == [False, True, False]
    assert len(sizes) > 3 and max(sizes) <= CHUNK_LOGITS


# -- as transformers has it ------------------------------------------------------------------------------------------


def model_of(config: RunConfig) -> TrainedModel:
    return TrainedModel.load(Storage.open(config.run_url), config)


def test_likelihoods_are_those_of_the_exported_model(causal_run: RunConfig, tmp_path: Path) -> None:
    model = model_of(causal_run)
    Run.open(causal_run).export_model(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    context = "a dog and"
    found = log_likelihoods(model, [continuation(model, context, f" {text}") for text in TEXTS])
    for text, log_p in zip(TEXTS, found, strict=True):
        before = model.encoder.encode(context)[:-1]
        ids = [model.special_ids["end_of_text"], *model.encoder.encode(f"{context} {text}")[:-1]]
        with torch.no_grad():
            log_p_TV = theirs(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        wanted = range(1 + len(before), len(ids))
        assert log_p == pytest.approx(sum(float(log_p_TV[at - 1, ids[at]]) for at in wanted), abs=ROUNDING)


def test_pseudo_likelihoods_are_those_of_the_exported_model(masked_run: RunConfig, tmp_path: Path) -> None:
    model = model_of(masked_run)
    Run.open(masked_run).export_model(tmp_path / "model")
    theirs = AutoModelForMaskedLM.from_pretrained(tmp_path / "model").eval()
    for text in TEXTS:
        ids = [model.special_ids["end_of_text"], *model.encoder.encode(text)]
        expected = 0.0
        for at in range(1, len(ids) - 1):
            hidden = torch.tensor([[*ids[:at], model.special_ids["mask"], *ids[at + 1 :]]])
            with torch.no_grad():
                expected += float(theirs(hidden).logits[0, at].double().log_softmax(-1)[ids[at]])
        assert sum(log_likelihoods(model, hidden_one_by_one(model, text))) == pytest.approx(expected, abs=ROUNDING)
