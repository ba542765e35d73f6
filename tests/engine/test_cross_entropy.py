"""The loss by chunks is the loss of all logits: its value, its gradients, with and without the penalty on the divisor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_lm.engine import cross_entropy
from elastic_lm.engine.cross_entropy import head_loss, hits_at, loss_of_logits

ROWS, WIDTH, VOCAB = 37, 12, 29
ROUNDING = 1e-5  # of fp32 sums of a few dozen terms around 1


@pytest.fixture(params=[1, 5 * VOCAB, 1 << 20], ids=["a row", "five rows", "all"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", request.param)


def make(*, bias: bool = False, rows: int = ROWS) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=bias)
    return head, torch.randn(rows, WIDTH, requires_grad=True), torch.randint(0, VOCAB, (rows,))


def gradients(loss: Tensor, head: nn.Linear, features_ND: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [features_ND, *head.parameters()]))


def by_formula(logits_NV: Tensor, targets_N: Tensor, z_loss: float) -> Tensor:
    log_divisor_N = logits_NV.exp().sum(-1).log()
    right_N = logits_NV[torch.arange(len(targets_N)), targets_N]
    return (log_divisor_N - right_N).sum() + z_loss * log_divisor_N.square().sum()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_gradients_are_those_of_the_formula_and_the_value_is_the_loss_alone(bias: bool, z_loss: float) -> None:
    head, features_ND, targets_N = make(bias=bias)
    expected = gradients(by_formula(head(features_ND), targets_N, z_loss), head, features_ND)
    value = by_formula(head(features_ND), targets_N, 0.0)
    for loss in (head_loss(head, features_ND, targets_N, z_loss), loss_of_logits(head(features_ND), targets_N, z_loss)):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, value, rtol=ROUNDING, atol=0)
        for mine, theirs in zip(gradients(loss, head, features_ND), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=ROUNDING, atol=ROUNDING)


def test_backward_of_a_scaled_loss_scales_the_gradients() -> None:
    head, features_ND, targets_N = make()
    plain = gradients(head_loss(head, features_ND, targets_N), head, features_ND)
    scaled = gradients(head_loss(head, features_ND, targets_N) * 8, head, features_ND)
    for mine, theirs in zip(scaled, plain, strict=True):
        assert torch.equal(mine, theirs * 8)


def test_without_gradients_the_value_is_the_same() -> None:
    head, features_ND, targets_N = make()
    with torch.no_grad():
        assert torch.equal(head_loss(head, features_ND, targets_N), head_loss(head, features_ND.clone(), targets_N))
    assert head_loss(head, features_ND, targets_N).item() == head_loss(head, features_ND.detach(), targets_N).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_under_autocast_the_products_are_low_and_the_sum_is_not(dtype: torch.dtype, z_loss: float) -> None:
    """A thousand times log 29 in half precision would be off by several; gradients keep the eight bits of their factors."""
    head, features_ND, targets_N = make(rows=1000)
    with torch.autocast("cpu", dtype):
        loss = head_loss(head, features_ND, targets_N, z_loss)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, by_formula(head(features_ND), targets_N, 0.0), rtol=2e-3, atol=0)
    expected = gradients(by_formula(head(features_ND), targets_N, z_loss), head, features_ND)
    for mine, theirs in zip(gradients(loss, head, features_ND), expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0.02 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_row_is_no_loss(dtype: torch.dtype) -> None:
    """A micro-batch in which the masked objective has chosen nothing."""
    head, features_ND, targets_N = make(rows=0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = head_loss(head, features_ND, targets_N)
    assert loss.item() == 0
    loss.backward()
    assert features_ND.grad is not None and features_ND.grad.shape == (0, WIDTH)


def test_a_tied_matrix_gets_the_sum_of_both_gradients() -> None:
    head, _, targets_N = make()
    tokens_N = torch.randint(0, VOCAB, (ROWS,))
    head_loss(head, F.embedding(tokens_N, head.weight), targets_N).backward()
    mine = head.weight.grad
    head.weight.grad = None
    F.cross_entropy(head(F.embedding(tokens_N, head.weight)), targets_N, reduction="sum").backward()
    torch.testing.assert_close(mine, head.weight.grad, rtol=ROUNDING, atol=ROUNDING)


class Told(nn.Module):
    """A model of a user's, whose logits are these."""

    def __init__(self, logits_NV: Tensor) -> None:
        super().__init__()
        self.logits_NV = logits_NV

    def forward(self, inputs_BT: Tensor) -> Tensor:
        return self.logits_NV[None]


@pytest.mark.parametrize("values", [1, 2, 5, 1000])
def test_hit_is_the_first_of_the_largest(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that tells all tokens apart by nothing hits the first one alone."""
    monkeypatch.setitem(cross_entropy.CHUNK_ELEMENTS, "cpu", 7 * 11)  # seven rows at a time
    generator = torch.Generator().manual_seed(values)
    logits_NV = torch.randint(0, values, (60, 11), generator=generator).float()
    targets_N = torch.randint(0, 11, (60,), generator=generator)
    found = hits_at(Told(logits_NV), torch.zeros(1, 60, dtype=torch.int64), targets_N)
    assert torch.equal(found.hit_N, logits_NV.argmax(-1) == targets_N)
    assert 0 < int(found.hit_N.sum()) < 60
    assert found.loss == pytest.approx(float(F.cross_entropy(logits_NV, targets_N, reduction="sum")), rel=1e-6)
