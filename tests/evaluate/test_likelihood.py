"""Likelihoods: equal to hand-worked ones, and to those of transformers for the exported model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.likelihood import (
    BATCH_TOKENS,
    CHUNK_LOGITS,
    Reading,
    Score,
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


class Table(nn.Module):
    """Says of what comes behind token number n the row n."""

    def __init__(self, logits_NV: Tensor) -> None:
        super().__init__()
        self.logits_NV = logits_NV

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.logits_NV[tokens_BT]


def scores_of(logits_NV: Tensor, targets: Sequence[int]) -> list[Score]:
    """Of one target behind each token."""
    readings = [Reading((number,), (0,), (target,)) for number, target in enumerate(targets)]
    return scores(trained(Table(logits_NV), "causal"), readings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_probabilities_are_those_of_a_softmax_in_fp64(dtype: torch.dtype) -> None:
    """A softmax in fp32 is 1e-6 away, from logits of this size over so many tokens."""
    torch.manual_seed(0)
    logits_NV = (2 * torch.randn(64, 50_257) + 20).to(dtype)
    targets_N = torch.randint(0, 50_257, (64,))
    log_p_N = logits_NV.double().log_softmax(-1).gather(1, targets_N[:, None])[:, 0]
    found = [score.log_p for score in scores_of(logits_NV, targets_N.tolist())]
    assert found == pytest.approx(log_p_N.tolist(), rel=0, abs=3e-7)


def test_most_probable_token_is_the_first_of_equals_and_none_of_what_is_not_finite() -> None:
    inf, nan = math.inf, math.nan
    logits_NV = torch.tensor([[1.0, 2.0, 2.0], [1.0, 2.0, 2.0], [0.0, -inf, 0.0], [nan, 0.0, 1.0], [-inf, -inf, -inf]])
    found = scores_of(logits_NV, [1, 2, 1, 2, 1])
    assert [score.is_most_probable for score in found] == [True, False, False, False, False]
    likely = 1 / (2 + math.exp(-1))
    assert [score.log_p for score in found[:3]] == pytest.approx([math.log(likely), math.log(likely), -inf])
    assert all(math.isnan(score.log_p) for score in found[3:])


class Watch(TorchDispatchMode):
    """Sizes of what is made in fp64, and of what is searched for the place of its largest value."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.argmax.default:
            self.sizes.append(args[0].numel())
        elif isinstance(found, Tensor) and found.dtype == torch.float64:
            self.sizes.append(found.numel())
        return found


def test_logits_are_neither_copied_into_fp64_nor_searched_where_the_target_cannot_be_the_most_probable() -> None:
    """Either takes longer than all else that is done with them."""
    torch.manual_seed(0)
    logits_NV = torch.randn(300, 1000)
    targets = logits_NV.argmin(-1).tolist()
    targets[7] = int(logits_NV[7].argmax())
    with Watch() as watch:
        found = scores_of(logits_NV, targets)
    assert [number for number, score in enumerate(found) if score.is_most_probable] == [7]
    assert max(watch.sizes) == 1000  # that row alone


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
