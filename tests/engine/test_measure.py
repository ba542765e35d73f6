"""Held-out measures: equal to a calculation by hand, whatever state training is in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_lm.engine.spec import FactorySpec, MaskingSpec
from elastic_lm.engine.step import Replica
from tests.engine.members import SIZE, VOCAB, SyntheticTokens, tiny_spec

TOKENS = SyntheticTokens().tokens(0, 0)
MASKING = MaskingSpec(0.3, 3, (0, 1, 2, 3, 4), VOCAB)


def replica(**changes: Any) -> Replica:
    found = Replica(tiny_spec(**changes))
    found.initialise()
    return found


def test_causal_measure_is_that_of_the_logits() -> None:
    mine = replica()
    measure = mine.measure(TOKENS, 0)
    tokens_BS = torch.from_numpy(TOKENS.astype("int64"))
    with torch.no_grad():
        logits_BTV = mine.model.eval()(tokens_BS[:, :-1])
    log_p_BTV = logits_BTV.double().log_softmax(-1)
    targets_BT = tokens_BS[:, 1:]
    assert measure.loss == pytest.approx(-float(log_p_BTV.gather(-1, targets_BT[..., None]).sum()), rel=1e-6)
    assert measure.num_targets == targets_BT.numel()
    assert measure.num_correct == int((logits_BTV.argmax(-1) == targets_BT).sum())


def test_what_a_measure_hides_follows_from_the_batch_alone() -> None:
    one, other = replica(objective="masked", masking=MASKING), replica(objective="masked", masking=MASKING, seed=8)
    other.state.load(one.state.tensors(), 0)
    torch.manual_seed(1)
    first = one.measure(TOKENS, 5)
    torch.manual_seed(2)
    assert other.measure(TOKENS, 5) == first
    assert 0 < first.num_targets < TOKENS[:, 1:].size
    assert one.measure(TOKENS, 6).num_targets != first.num_targets or one.measure(TOKENS, 6).loss != first.loss


def test_training_goes_on_as_if_nothing_was_measured() -> None:
    """Dropout is off within a measure and on behind it, and no random number of training's is taken."""
    plain, measured = replica(), replica()
    for mine in (plain, measured):
        reduction = mine.new_reduction()
        reduction.begin(0)
        for number in range(2):
            if mine is measured:
                mine.measure(TOKENS, number)
            mine.add_micro_batch(reduction, SyntheticTokens().tokens(0, number), step=0, micro_batch=number)
        mine.bytes = reduction.raw_total()  # type: ignore[attr-defined]
    assert plain.bytes == measured.bytes  # type: ignore[attr-defined]


def test_recomputed_and_compiled_blocks_measure_the_same() -> None:
    expected = replica().measure(TOKENS, 0)
    assert replica(recompute=True).measure(TOKENS, 0) == expected
    assert replica(compile=True).measure(TOKENS, 0) == expected


class Bigrams(nn.Module):
    """A model of the user's own."""

    def __init__(self, vocab_size: int, max_tokens: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.table(tokens_BT)


def last_token(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """An objective of the user's own."""
    logits_BV = model(tokens_BS[:, :-1])[:, -1]
    return nn.functional.cross_entropy(logits_BV, tokens_BS[:, -1], reduction="sum"), len(tokens_BS)


def test_users_model_and_objective_are_measured() -> None:
    factory = FactorySpec(f"{__name__}:Bigrams", VOCAB, 16)
    measure = replica(model=factory).measure(TOKENS, 0)
    assert (measure.num_targets, measure.num_correct is not None) == (TOKENS[:, 1:].size, True)
    measure = replica(model=factory, objective=f"{__name__}:last_token").measure(TOKENS, 0)
    assert (measure.num_targets, measure.num_correct) == (SIZE, None)
