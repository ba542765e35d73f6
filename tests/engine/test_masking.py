"""The masked objective: how much is hidden, what the model reads, what counts, and that nobody but the sample decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_lm.engine.masking import Masked
from elastic_lm.engine.objectives import find_objective
from elastic_lm.engine.reduce import Reduction
from elastic_lm.engine.spec import EngineSpec, MaskingSpec
from elastic_lm.engine.step import Replica
from elastic_lm.errors import ConfigError
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT

VOCABULARY, MASK, SPECIAL = 50, 3, (0, 1, 2, 3, 4)
SPEC = MaskingSpec(0.15, MASK, SPECIAL, VOCABULARY)


def tokens(rows: int, length: int, *, low: int = len(SPECIAL)) -> Tensor:
    return torch.randint(low, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def make_gpt(**changes: Any) -> GPT:
    shape = {"num_layers": 2, "num_heads": 2, "width": 16, "attention": "bidirectional"} | changes
    torch.manual_seed(1)
    return GPT(ModelSpec(VOCABULARY, max_tokens=12, **shape)).eval()


def test_a_share_is_chosen_and_of_it_four_fifths_hidden_and_a_tenth_replaced() -> None:
    torch.manual_seed(0)
    read_BT, chosen_N = Masked(SPEC).corrupt(before := tokens(400, 500))
    assert len(chosen_N) / before.numel() == pytest.approx(0.15, abs=0.003)
    was_N, is_N = before.flatten()[chosen_N], read_BT.flatten()[chosen_N]
    assert (is_N == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    replaced = (is_N != MASK) & (is_N != was_N)
    assert replaced.float().mean().item() == pytest.approx(0.1 * 44 / 45, abs=0.01)  # one in 45 is replaced by itself
    assert is_N[replaced].unique().tolist() == list(range(len(SPECIAL), VOCABULARY))
    others = torch.ones(before.numel(), dtype=torch.bool)
    others[chosen_N] = False
    assert torch.equal(read_BT.flatten()[others], before.flatten()[others])


def test_special_tokens_are_never_chosen() -> None:
    torch.manual_seed(0)
    before = tokens(100, 100, low=0)
    _, chosen_N = Masked(SPEC).corrupt(before)
    assert not set(before.flatten()[chosen_N].tolist()) & set(SPECIAL)
    assert Masked(SPEC).corrupt(torch.full((5, 100), 4))[1].tolist() == []


def test_loss_is_the_summed_surprise_of_the_chosen_tokens_alone() -> None:
    model, batch_BS = make_gpt(), tokens(3, 13)
    torch.manual_seed(5)
    loss, num_targets = Masked(SPEC)(model, batch_BS)
    torch.manual_seed(5)
    read_BT, chosen_N = Masked(SPEC).corrupt(batch_BS[:, :-1])
    assert num_targets == len(chosen_N) > 0
    surprise = F.cross_entropy(model(read_BT).flatten(0, 1), batch_BS[:, :-1].flatten(), reduction="none")
    torch.testing.assert_close(loss, surprise[chosen_N].sum())


def test_users_model_is_asked_for_all_logits() -> None:
    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ours = make_gpt()

        def forward(self, tokens_BT: Tensor) -> Tensor:
            return self.ours(tokens_BT)

    found = []
    for model in (make_gpt(), Theirs()):
        torch.manual_seed(5)
        found.append(Masked(SPEC)(model, tokens(3, 13))[0])
    torch.testing.assert_close(*found)


def test_micro_batch_without_a_chosen_token_adds_nothing() -> None:
    model = make_gpt()
    loss, num_targets = Masked(SPEC)(model, torch.full((2, 13), 4))
    loss.backward()
    assert (loss.item(), num_targets) == (0.0, 0)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_token_is_seen_from_both_sides_and_from_one() -> None:
    before_BT = tokens(1, 12)
    after_BT = before_BT.clone()
    after_BT[0, -1] = 5 if before_BT[0, -1] != 5 else 6
    for attention, sees in (("bidirectional", True), ("causal", False)):
        model = make_gpt(attention=attention)
        assert torch.equal(model(before_BT)[0, 0], model(after_BT)[0, 0]) != sees


def test_logits_at_places_are_those_of_all() -> None:
    model, batch_BT = make_gpt(), tokens(2, 12)
    places_N = torch.tensor([0, 5, 23])
    torch.testing.assert_close(model(batch_BT, places_N), model(batch_BT).flatten(0, 1)[places_N])


def make_replica(**changes: Any) -> Replica:
    model = ModelSpec(VOCABULARY, 2, 2, 16, max_tokens=12, attention="bidirectional")
    spec = EngineSpec(model, 4, 3, 12, objective="masked", masking=SPEC, seed=3)
    replica = Replica(replace(spec, **changes))
    replica.initialise()
    return replica


def contribution(replica: Replica, step: int, micro_batch: int) -> tuple[Reduction, int]:
    reduction = replica.new_reduction()
    reduction.begin(step)
    replica.add_micro_batch(reduction, tokens(3, 13), step=step, micro_batch=micro_batch)
    commit = reduction.complete(None, False, lambda: False)
    return reduction, commit.num_targets


def test_what_is_hidden_follows_from_step_and_micro_batch_alone() -> None:
    """Whoever computes it, after whatever else."""
    first, second = make_replica(), make_replica()
    contribution(second, 0, 1)
    torch.rand(99)
    sums = []
    for replica in (first, second):
        reduction = replica.new_reduction()
        reduction.begin(4)
        replica.add_micro_batch(reduction, tokens(3, 13), step=4, micro_batch=2)
        commit = reduction.complete(None, False, lambda: False)
        sums.append((commit, reduction.gradient(commit, torch.empty_like(replica.state.weights)).clone()))
    assert sums[0][0] == sums[1][0]
    assert torch.equal(sums[0][1], sums[1][1])
    assert {contribution(first, step, micro)[1] for step in range(4) for micro in range(4)} != {sums[0][0].num_targets}


def test_masked_objective_needs_a_mask() -> None:
    with pytest.raises(ConfigError, match=r"give EngineSpec\.masking"):
        find_objective("masked")


def test_unit_of_sums_is_that_of_the_expected_targets() -> None:
    assert make_replica().spec.targets_per_batch == round(0.15 * 4 * 3 * 12)
