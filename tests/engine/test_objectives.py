"""Objectives: sums worked by hand, and a refusal for every import path that leads nowhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from elastic_lm.engine.objectives import causal, find_objective, load_function
from elastic_lm.errors import ConfigError
from tests.engine import user_code

HALF, QUARTER = math.log(0.5), math.log(0.25)


class Table(nn.Module):
    """Logits that depend on the input token alone: after 0 all three are equally likely but one, after 1 and 2 one is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(
            torch.tensor([[HALF, QUARTER, QUARTER], [QUARTER, HALF, QUARTER], [0.0, -50.0, -50.0]])
        )
        self.seen: Tensor | None = None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.seen = tokens_BT
        return self.rows[tokens_BT]


def test_causal_is_the_summed_surprise_of_each_next_token() -> None:
    model = Table()
    tokens_BS = torch.tensor([[0, 0, 1, 1], [2, 0, 2, 0]])
    loss, num_targets = causal(model, tokens_BS)
    # First sample: 0 after 0, 1 after 0, 1 after 1. Second: 0 after 2 (sure), 2 after 0, 0 after 2 (sure).
    by_hand = -(HALF + QUARTER + HALF + 0 + QUARTER + 0)
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert num_targets == 6
    assert model.seen is not None and torch.equal(model.seen, tokens_BS[:, :-1])


def test_causal_gradient_is_probability_minus_one_where_it_was_right() -> None:
    model = Table()
    loss, _ = causal(model, torch.tensor([[0, 1]]))
    loss.backward()
    assert model.rows.grad is not None
    torch.testing.assert_close(model.rows.grad, torch.tensor([[0.5, 0.25 - 1, 0.25], [0, 0, 0], [0, 0, 0]]))


def test_causal_adds_over_samples_and_never_averages() -> None:
    model, tokens_BS = Table(), torch.tensor([[0, 0, 1], [1, 2, 0]])
    whole, num_targets = causal(model, tokens_BS)
    parts = [causal(model, row_S[None]) for row_S in tokens_BS]
    assert whole.item() == pytest.approx(sum(loss.item() for loss, _ in parts), rel=1e-6)
    assert num_targets == sum(number for _, number in parts) == 4


def test_causal_sums_in_single_precision_whatever_the_logits_are() -> None:
    """A thousand times log 2 in bf16 would be off by several."""
    loss, _ = causal(Table().bfloat16(), torch.zeros(1, 1001, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1000 * math.log(2), rel=0.005)  # the logits themselves have 8 bits


def test_objectives_are_found_by_name_or_path() -> None:
    assert find_objective("causal") == causal
    assert find_objective("tests.engine.user_code:every_second").__code__ is user_code.every_second.__code__


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mask", "cannot be imported"),
        ("tests.engine.user_code", "write package.module:function"),  # no function
        ("tests.engine.user_code:", "write package.module:function"),
        (":every_second", "cannot be imported"),
        ("", "cannot be imported"),
        (".user_code:every_second", "cannot be imported"),  # relative to nothing
        ("tests.engine.nowhere:every_second", "No module named 'tests.engine.nowhere'"),
        ("tests.engine.user_code:nothing", "has no attribute 'nothing'"),
        ("tests.engine.user_code:NUMBER", "is a int, not a function"),
    ],
)
def test_path_that_leads_to_no_function_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        find_objective(path)
    assert f"objective.name={path!r}" in str(caught.value)
    assert message in str(caught.value)


def test_refusal_names_the_field_it_was_given() -> None:
    with pytest.raises(ConfigError, match="^model.factory='x:y' cannot be imported"):
        load_function("x:y", "model.factory")
