"""The transformer: causal with every option, its parts equal their formulas, it starts as it should, and it learns.

Shapes: B batch, T tokens, D model width, H heads, K head size, V vocabulary. Expected values are worked by hand or written
out from the papers' formulas, element by element.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from elastic_lm.errors import ConfigError
from elastic_lm.model.positions import Learned, Rotary, Sinusoidal, rotate
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GELU, GPT, Attention, SwiGLU, make_norm

torch.set_num_threads(1)

VOCAB, WIDTH, LENGTH, LAYERS, HEADS = 11, 16, 8, 2, 2
POSITIONS = ["learned", "sinusoidal", "rotary"]
KINDS = list(product(POSITIONS, ["rmsnorm", "layernorm"], ["swiglu", "gelu"]))
ROUNDING = 1e-5  # of fp32 sums of a few dozen terms around 1


def spec(**changes: Any) -> ModelSpec:
    shape = {"vocab_size": VOCAB, "num_layers": LAYERS, "num_heads": HEADS, "width": WIDTH, "max_tokens": LENGTH}
    return ModelSpec(**{**shape, **changes})


def make(*, seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(spec(**changes))


def make_loud(**changes: Any) -> GPT:
    """With weights around 1/2, so that what a token changes is well above rounding."""
    model = make(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def tokens(seed: int = 0, batch: int = 3, length: int = LENGTH) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "norm", "activation"), KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_finite_and_one_row_per_token(
    position: str, norm: str, activation: str, tied: bool, bias: bool
) -> None:
    model = make(position=position, norm=norm, activation=activation, tied=tied, bias=bias)
    for length in (1, LENGTH - 1, LENGTH):
        logits_BTV = model(tokens(length=length))
        assert logits_BTV.shape == (3, length, VOCAB)
        assert logits_BTV.dtype == torch.float32
        assert logits_BTV.isfinite().all()


@pytest.mark.parametrize(("position", "norm", "activation"), KINDS)
def test_a_later_token_never_changes_an_earlier_logit(position: str, norm: str, activation: str) -> None:
    model = make_loud(position=position, norm=norm, activation=activation, bias=True)
    before_BT = tokens()
    for place in range(LENGTH):
        after_BT = before_BT.clone()
        after_BT[:, place] = (after_BT[:, place] + 1) % VOCAB
        before_BTV, after_BTV = model(before_BT), model(after_BT)
        assert torch.equal(before_BTV[:, :place], after_BTV[:, :place])
        for later in range(place, LENGTH):
            assert (before_BTV[:, later] - after_BTV[:, later]).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize("position", POSITIONS)
def test_a_shorter_sequence_has_the_same_logits(position: str) -> None:
    model, tokens_BT = make_loud(position=position), tokens()
    whole_BTV = model(tokens_BT)
    for length in range(1, LENGTH):
        torch.testing.assert_close(model(tokens_BT[:, :length]), whole_BTV[:, :length], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("position", POSITIONS)
def test_samples_of_a_batch_do_not_meet(position: str) -> None:
    model, tokens_BT = make_loud(position=position), tokens()
    alone_BTV = torch.cat([model(row_T[None]) for row_T in tokens_BT])
    torch.testing.assert_close(model(tokens_BT), alone_BTV, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("position", POSITIONS)
def test_order_of_earlier_tokens_shows(position: str) -> None:
    """In one layer without positions the last token would see a set."""
    model = make_loud(position=position, num_layers=1)
    one, other = model(torch.tensor([[1, 2, 3]])), model(torch.tensor([[2, 1, 3]]))
    assert (one[:, -1] - other[:, -1]).abs().max() > 100 * ROUNDING


@pytest.mark.parametrize("position", POSITIONS)
def test_more_than_max_tokens_is_an_error(position: str) -> None:
    with pytest.raises(RuntimeError):
        make(position=position)(tokens(length=LENGTH + 1))


@pytest.mark.parametrize("bias", [True, False])
def test_tied_head_is_the_embedding_and_saves_its_parameters(bias: bool) -> None:
    tied, untied = make(tied=True, bias=bias), make(tied=False, bias=bias)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight
    assert not torch.equal(untied.head.weight, untied.embedding.weight)
    assert count(untied) - count(tied) == VOCAB * WIDTH


def test_bias_adds_one_number_per_output_of_every_projection_and_norm() -> None:
    with_bias, without = make(norm="layernorm", activation="gelu", bias=True), make(norm="layernorm", activation="gelu")
    projections = 3 * WIDTH + WIDTH + 4 * WIDTH + WIDTH
    norms = 2 * WIDTH
    assert count(with_bias) - count(without) == LAYERS * (projections + norms) + WIDTH


def test_dropout_works_while_training_only() -> None:
    model, tokens_BT = make(dropout=0.5), tokens()
    torch.manual_seed(1)
    first = model(tokens_BT)
    assert not torch.equal(model(tokens_BT), first)
    torch.manual_seed(1)
    assert torch.equal(model(tokens_BT), first)
    model.eval()
    assert torch.equal(model(tokens_BT), model(tokens_BT))


@pytest.mark.parametrize("position", POSITIONS)
def test_autocast_keeps_the_logits_near_those_of_full_precision(position: str) -> None:
    model, tokens_BT = make(position=position), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens_BT)
    assert half.dtype == torch.bfloat16
    # bf16 keeps 8 bits; a handful of roundings on logits well below 1.
    torch.testing.assert_close(half.float(), model(tokens_BT), rtol=0, atol=0.02)


# -- positions -------------------------------------------------------------------------------------------------------


def test_sinusoidal_positions_by_hand() -> None:
    """Width 4: waves of frequency 1 and 1/100; what is added is the wave, and the embedding is scaled by sqrt(4)."""
    positions = Sinusoidal(spec(width=4, max_tokens=3))
    expected_TD = torch.tensor([[0, 1, 0, 1], [math.sin(t := 1), math.cos(t), math.sin(t / 100), math.cos(t / 100)],
                                [math.sin(t := 2), math.cos(t), math.sin(t / 100), math.cos(t / 100)]])  # fmt: skip
    torch.testing.assert_close(positions(torch.zeros(1, 3, 4))[0], expected_TD, rtol=0, atol=1e-6)
    added_TD = positions(torch.ones(1, 2, 4))[0] - expected_TD[:2]
    torch.testing.assert_close(added_TD, torch.full((2, 4), 2.0), rtol=0, atol=1e-6)


def test_learned_positions_are_added_from_the_first() -> None:
    positions = Learned(spec(width=4, max_tokens=3))
    with torch.no_grad():
        positions.weight.copy_(torch.arange(12.0).view(3, 4))
    assert positions(torch.ones(5, 2, 4))[3].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize(("position", "trained"), [("learned", LENGTH * WIDTH), ("sinusoidal", 0), ("rotary", 0)])
def test_only_learned_positions_are_parameters_and_none_is_kept_state(position: str, trained: int) -> None:
    model = make(position=position)
    assert count(model.positions) == trained
    assert set(model.state_dict()) - set(dict(model.named_parameters())) == {"head.weight"}  # the tied one


def test_rotation_by_hand() -> None:
    """Head size 4: the pairs are (0, 2) and (1, 3), turned by 1 and 1/100 per position."""
    cos_TK, sin_TK = Rotary(spec(width=4, num_heads=1, max_tokens=3))(3)
    x_BHTK = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 3, 4)
    turned_TK = rotate(x_BHTK, cos_TK, sin_TK)[0, 0]
    for t, turned_K in enumerate(turned_TK.tolist()):
        c, s, slow_c, slow_s = math.cos(t), math.sin(t), math.cos(t / 100), math.sin(t / 100)
        by_hand_K = [1 * c - 3 * s, 2 * slow_c - 4 * slow_s, 3 * c + 1 * s, 4 * slow_c + 2 * slow_s]
        assert turned_K == pytest.approx(by_hand_K, abs=1e-6)


@pytest.mark.parametrize("shift", [1, 7, 40])
def test_shifting_queries_and_keys_alike_leaves_their_scores(shift: int) -> None:
    cos_TK, sin_TK = Rotary(spec(width=16, num_heads=2, max_tokens=64))(64)
    torch.manual_seed(0)
    q_BHTK, k_BHTK = torch.randn(2, 1, 2, 20, 8).unbind()

    def scores(start: int) -> Tensor:
        angles = cos_TK[start : start + 20], sin_TK[start : start + 20]
        return rotate(q_BHTK, *angles) @ rotate(k_BHTK, *angles).transpose(-1, -2)

    # Angles up to 60 are known to 60 · 2^-24 = 4e-6 each, and eight terms of about 1 are added.
    torch.testing.assert_close(scores(shift), scores(0), rtol=0, atol=1e-4)
    assert (scores(0) - q_BHTK @ k_BHTK.transpose(-1, -2)).abs().max() > 0.1


def test_rotation_keeps_lengths_and_position_zero() -> None:
    cos_TK, sin_TK = Rotary(spec())(LENGTH)
    x_BHTK = torch.randn(2, HEADS, LENGTH, WIDTH // HEADS)
    turned_BHTK = rotate(x_BHTK, cos_TK, sin_TK)
    assert torch.equal(turned_BHTK[:, :, 0], x_BHTK[:, :, 0])
    torch.testing.assert_close(turned_BHTK.norm(dim=-1), x_BHTK.norm(dim=-1), rtol=ROUNDING, atol=0)


def test_rotation_keeps_the_precision_of_what_it_turns() -> None:
    cos_TK, sin_TK = Rotary(spec())(LENGTH)
    assert rotate(torch.ones(1, 1, LENGTH, 8, dtype=torch.bfloat16), cos_TK, sin_TK).dtype == torch.bfloat16


# -- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_equals_its_formula(num_heads: int) -> None:
    """softmax over the past of q·k/sqrt(K), token by token and head by head."""
    torch.manual_seed(0)
    attention = Attention(spec(num_heads=num_heads, bias=True))
    x_TD = torch.randn(5, WIDTH)
    q_TD, k_TD, v_TD = attention.qkv(x_TD).chunk(3, dim=-1)
    size = WIDTH // num_heads
    rows = []
    for t in range(5):
        heads = []
        for head in (slice(h * size, (h + 1) * size) for h in range(num_heads)):
            scores = torch.stack([q_TD[t, head] @ k_TD[past, head] / math.sqrt(size) for past in range(t + 1)])
            heads.append(scores.softmax(0) @ v_TD[: t + 1, head])
        rows.append(torch.cat(heads))
    expected_TD = attention.residual(torch.stack(rows))
    torch.testing.assert_close(attention(x_TD[None], None)[0], expected_TD, rtol=ROUNDING, atol=ROUNDING)


def test_swiglu_equals_its_formula() -> None:
    torch.manual_seed(0)
    block, x_D = SwiGLU(spec(hidden=3, bias=True)), torch.randn(WIDTH)
    gate_and_up = block.gate_and_up(x_D)
    gate_F, up_F = gate_and_up[:3], gate_and_up[3:]
    expected_D = block.residual(gate_F / (1 + (-gate_F).exp()) * up_F)
    torch.testing.assert_close(block(x_D), expected_D, rtol=ROUNDING, atol=ROUNDING)


def test_gelu_equals_its_formula() -> None:
    torch.manual_seed(0)
    block, x_D = GELU(spec(hidden=3, activation="gelu", bias=True)), torch.randn(WIDTH)
    up_F = block.up(x_D)
    inner_F = math.sqrt(2 / math.pi) * (up_F + 0.044715 * up_F**3)
    expected_D = block.residual(0.5 * up_F * (1 + inner_F.tanh()))
    torch.testing.assert_close(block(x_D), expected_D, rtol=ROUNDING, atol=ROUNDING)


def test_norms_equal_their_formulas() -> None:
    x_D = torch.tensor([3.0, -1.0, 2.0, 0.0])
    rms = math.sqrt(14 / 4 + 1e-5)
    torch.testing.assert_close(make_norm(spec(width=4, norm="rmsnorm"))(x_D), x_D / rms)
    deviation = math.sqrt(10 / 4 + 1e-5)  # mean 1; squares of 2, -2, 1, -1
    torch.testing.assert_close(make_norm(spec(width=4, norm="layernorm"))(x_D), (x_D - 1) / deviation)


# -- the beginning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("num_layers", [1, 8])
def test_matrices_begin_normal_and_those_into_the_residual_stream_are_scaled_down(
    num_layers: int, position: str
) -> None:
    model = make(width=128, num_layers=num_layers, vocab_size=512, max_tokens=128, tied=False, position=position)
    residual = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            continue
        scaled = name.endswith("residual.weight")
        residual += scaled
        expected = 0.02 / math.sqrt(2 * num_layers) if scaled else 0.02
        # At least 128 · 128 draws: the deviation is known to 1/sqrt(2n) = 0.6 %, the mean to std/128.
        assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
        assert abs(parameter.mean().item()) < 5 * expected / 128, name
    assert residual == 2 * num_layers


@pytest.mark.parametrize(("position", "norm", "activation"), KINDS)
def test_biases_begin_at_zero_and_norms_at_one(position: str, norm: str, activation: str) -> None:
    model = make(position=position, norm=norm, activation=activation, bias=True)
    vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 1}
    assert len(vectors) == 2 * LAYERS + 1 + 4 * LAYERS + (2 * LAYERS + 1) * (norm == "layernorm")
    for name, parameter in vectors.items():
        assert set(parameter.tolist()) == {0.0 if name.endswith("bias") else 1.0}, name


@pytest.mark.parametrize("position", POSITIONS)
def test_first_loss_is_that_of_a_uniform_guess(position: str) -> None:
    logits_BTV, targets_BT = make(position=position)(tokens()), tokens(1)
    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.05)


def test_seed_alone_decides_the_weights() -> None:
    first, same, other = make(seed=1).state_dict(), make(seed=1).state_dict(), make(seed=2).state_dict()
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


@pytest.mark.parametrize("position", POSITIONS)
def test_tokens_are_heard_through_their_positions(position: str) -> None:
    """Each token decides the next one. Forty steps bring the loss from 4.6 to 0.3 to 0.9.

    Sinusoidal positions over unscaled embeddings (0.02 against waves of 1) were still at 4.3.
    """
    torch.manual_seed(0)
    model = GPT(ModelSpec(vocab_size=97, num_layers=2, num_heads=4, width=64, max_tokens=32, position=position))  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        columns = [torch.randint(0, 97, (8,))]
        for _ in range(32):
            columns.append((columns[-1] * 5 + 1) % 97)
        tokens_BS = torch.stack(columns, dim=1)
        logits_BTV = model(tokens_BS[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < math.log(97) / 2


# -- the shape -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "activation", "hidden", "expected"),
    [
        (64, "gelu", None, 256),
        (64, "swiglu", None, 176),  # 170.7 up to a multiple of 16
        (48, "swiglu", None, 128),  # 128 exactly
        (2048, "swiglu", None, 5472),  # 5461.3
        (64, "gelu", 100, 100),
        (64, "swiglu", 100, 100),
    ],
)
def test_hidden_width(width: int, activation: str, hidden: int | None, expected: int) -> None:
    assert spec(width=width, activation=activation, hidden=hidden).hidden_width == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"width": 63, "num_heads": 4},
            "model.width=63 is not a multiple of model.num_heads=4; use width 56 or 64",
        ),
        (
            {"width": 63, "num_heads": 4, "position": "learned"},
            "model.width=63 is not a multiple of model.num_heads=4; use width 60 or 64",
        ),
        ({"width": 3, "num_heads": 4}, "model.width=3 is not a multiple of model.num_heads=4; use width 8"),
        (
            {"width": 12, "num_heads": 4},
            "rotary positions need an even head size, and model.width/model.num_heads=3; halve num_heads or use "
            "position: learned",
        ),
        (
            {"width": 9, "num_heads": 3},
            "rotary positions need an even head size, and model.width/model.num_heads=3; use width 12 or use position: "
            "learned",
        ),
        ({"dropout": 1.0}, "model.dropout=1.0 is not in [0, 1)"),
        ({"dropout": -0.1}, "model.dropout=-0.1 is not in [0, 1)"),
        ({"dropout": math.nan}, "model.dropout=nan is not in [0, 1)"),
    ],
)
def test_shape_that_cannot_be_is_refused_with_a_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(**changes)
    assert str(caught.value) == message


@given(width=st.integers(1, 300), num_heads=st.integers(1, 40), position=st.sampled_from(POSITIONS))
def test_widths_that_a_refusal_suggests_are_accepted(width: int, num_heads: int, position: str) -> None:
    try:
        spec(width=width, num_heads=num_heads, position=position)
    except ConfigError as error:
        remedy = str(error).rpartition("; ")[2]
    else:
        assume(False)
    suggested = [int(word) for word in remedy.split() if word.isdigit()]
    assert suggested or "halve num_heads" in remedy
    for good in suggested:
        spec(width=good, num_heads=num_heads, position=position)
    if "halve num_heads" in remedy:
        assert num_heads % 2 == 0
        spec(width=width, num_heads=num_heads // 2, position=position)
