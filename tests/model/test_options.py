"""Later choices of architecture: each equals its formula, and where none is made the model is the one that it was."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_lm.errors import ConfigError
from elastic_lm.model.positions import Rotary
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT, Attention, Block, HeadTransform

VOCAB, WIDTH, LENGTH, LAYERS, HEADS = 11, 16, 8, 2, 4
CHOICES = ("attention", "num_kv_heads", "qk_norm", "norm_placement", "embedding_norm", "head_transform")
ROUNDING = 1e-5


def spec(**changes: Any) -> ModelSpec:
    shape = {"vocab_size": VOCAB, "num_layers": LAYERS, "num_heads": HEADS, "width": WIDTH, "max_tokens": LENGTH}
    return ModelSpec(**{**shape, **changes})


def build(kind: Any, changes: dict[str, Any]) -> Any:
    """With weights around 1/2."""
    torch.manual_seed(0)
    part = kind(spec(**changes))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(std=0.5)
    return part


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))


OPTIONS = [
    dict(zip(CHOICES, choice, strict=True))
    for choice in product(
        ["causal", "bidirectional"],
        [None, 1, 2],
        [True, False],
        ["pre", "post", "sandwich"],
        [True, False],
        [True, False],
    )
]


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_number_of_parameters_is_the_modules_with_all_options(norm: str, bias: bool) -> None:
    for options in OPTIONS:
        for tied in (True, False):
            shape = spec(norm=norm, bias=bias, tied=tied, **options)
            with torch.device("meta"):
                model = GPT(shape)
            assert shape.num_parameters == sum(p.numel() for p in model.parameters()), options
            matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2)
            assert shape.matmul_parameters == matrices + shape.head_parameters


def test_all_options_compute_and_train_every_parameter() -> None:
    for options in OPTIONS:
        model = build(GPT, {**options, "position": "learned", "bias": True})
        logits_BTV = model(tokens())
        assert logits_BTV.shape == (3, LENGTH, VOCAB) and logits_BTV.isfinite().all(), options
        logits_BTV.square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), options


def test_a_causal_model_with_all_options_never_looks_ahead() -> None:
    for options in (options for options in OPTIONS if options["attention"] == "causal"):
        model, before_BT = build(GPT, options), tokens()
        after_BT = before_BT.clone()
        after_BT[:, 5] = (after_BT[:, 5] + 1) % VOCAB
        assert torch.equal(model(before_BT)[:, :5], model(after_BT)[:, :5]), options


def test_grouped_queries_are_heads_whose_keys_and_values_are_repeated() -> None:
    grouped = build(Attention, {"num_kv_heads": 2, "attention": "bidirectional"})
    x_BTD, size = torch.randn(2, 5, WIDTH), WIDTH // HEADS
    q_BTD, k_BTG, v_BTG = grouped.qkv(x_BTD).split([WIDTH, 2 * size, 2 * size], dim=-1)
    outs = []
    for head in range(HEADS):
        mine, theirs = slice(head * size, (head + 1) * size), slice(head // 2 * size, (head // 2 + 1) * size)
        scores = q_BTD[..., mine] @ k_BTG[..., theirs].transpose(1, 2) / math.sqrt(size)
        outs.append(scores.softmax(-1) @ v_BTG[..., theirs])
    expected = grouped.residual(torch.cat(outs, -1))
    torch.testing.assert_close(grouped(x_BTD, None), expected, rtol=ROUNDING, atol=ROUNDING)


def test_queries_and_keys_are_normalised_in_each_head() -> None:
    """Their scale has no say any more, each head's for itself."""
    attention = build(Attention, {"qk_norm": True})
    x_BTD = torch.randn(2, 5, WIDTH)
    before = attention(x_BTD, None)
    with torch.no_grad():
        attention.qkv.weight[: WIDTH // HEADS] *= 50  # the first head's queries
        attention.qkv.weight[WIDTH : 2 * WIDTH] *= 7  # all keys
    torch.testing.assert_close(attention(x_BTD, None), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_block_equals_its_formula(placement: str) -> None:
    block = build(Block, {"norm_placement": placement})
    x_BTD = torch.randn(2, 5, WIDTH)
    attention, feed_forward = (lambda x: block.attention(x, None)), block.feed_forward
    if placement == "pre":
        expected = x_BTD + attention(block.attention_norm(x_BTD))
        expected = expected + feed_forward(block.feed_forward_norm(expected))
    elif placement == "post":
        expected = block.attention_norm(x_BTD + attention(x_BTD))
        expected = block.feed_forward_norm(expected + feed_forward(expected))
    else:
        expected = x_BTD + block.attention_out_norm(attention(block.attention_norm(x_BTD)))
        expected = expected + block.feed_forward_out_norm(feed_forward(block.feed_forward_norm(expected)))
    torch.testing.assert_close(block(x_BTD, None), expected, rtol=ROUNDING, atol=ROUNDING)


def test_head_transform_equals_its_formula() -> None:
    transform, x_ND = build(HeadTransform, {"activation": "gelu", "bias": True}), torch.randn(5, WIDTH)
    inner = transform.dense(x_ND)
    inner = 0.5 * inner * (1 + (math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)).tanh())
    torch.testing.assert_close(transform(x_ND), transform.norm(inner), rtol=ROUNDING, atol=ROUNDING)


def test_projections_are_not_scaled_down_where_each_sum_is_normalised() -> None:
    torch.manual_seed(0)
    model = GPT(spec(width=128, num_layers=8, norm_placement="post"))
    for name, parameter in model.named_parameters():
        if name.endswith("residual.weight"):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03)


def test_names_of_parameters_are_what_they_were() -> None:
    """Checkpoints are loaded by them."""
    names = [name for name, _ in GPT(spec(num_layers=1, position="learned")).named_parameters()]
    assert names == [
        "embedding.weight",
        "positions.weight",
        "blocks.0.attention_norm.weight",
        "blocks.0.attention.qkv.weight",
        "blocks.0.attention.residual.weight",
        "blocks.0.feed_forward_norm.weight",
        "blocks.0.feed_forward.gate_and_up.weight",
        "blocks.0.feed_forward.residual.weight",
        "norm.weight",
    ]


def test_groups_that_do_not_come_out_even_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        spec(num_kv_heads=3)
    assert str(caught.value) == (
        "model.num_kv_heads=3 does not divide model.num_heads=4 into equal groups; use one of 1, 2, 4"
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [("bert-base", 109_514_298), ("bert-large", 335_174_458)],  # with the head of the masked objective
)
def test_bert_has_the_published_number_of_parameters(name: str, published: int) -> None:
    """But for the two vectors that tell a first sentence from a second: there is no second one here."""
    shape = ModelSpec(vocab_size=30_522, max_tokens=512, **PRESETS[name].shape)
    assert shape.num_parameters == published - 2 * shape.width


# -- rotary positions over longer contexts ---------------------------------------------------------------------------

LONG: dict[str, Any] = {"rope_factor": 4.0, "rope_original_tokens": 64}


def frequencies(**changes: Any) -> Tensor:
    """Radians per token, of a head of 16, by the angles of the second token."""
    rotary = Rotary(spec(width=64, max_tokens=4, **changes))
    return torch.atan2(rotary.sin_TK[1], rotary.cos_TK[1])[:8]


def test_base_sets_the_slowest_pair() -> None:
    torch.testing.assert_close(frequencies(rope_theta=50_000.0), 50_000.0 ** (-torch.arange(8) / 8))


def test_linear_scaling_divides_all_frequencies() -> None:
    torch.testing.assert_close(frequencies(rope_scaling="linear", rope_factor=4.0), frequencies() / 4)


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
def test_fast_pairs_stay_and_slow_ones_are_divided(kind: str) -> None:
    """Of 64 tokens the first pair turns ten times, the fifth a tenth of once."""
    before, after = frequencies(), frequencies(rope_scaling=kind, **LONG)
    torch.testing.assert_close(after[4:], before[4:] / 4)
    between = after[1:4] / before[1:4]
    assert (between <= 1).all() and (between >= 1 / 4).all() and (between.diff() <= 0).all()
    if kind == "llama3":
        assert after[0] == before[0]
        turns = 64 * before[1].item() / (2 * math.pi)  # 3.2: between 1 and 4
        stays = (turns - 1) / 3
        assert after[1].item() == pytest.approx(before[1].item() * (stays + (1 - stays) / 4), rel=1e-5)


def test_yarn_makes_angles_longer_and_no_other_does() -> None:
    long = Rotary(spec(rope_scaling="yarn", **LONG))
    assert long.cos_TK[0].tolist() == pytest.approx([1 + 0.1 * math.log(4)] * 4)
    assert Rotary(spec(rope_scaling="llama3", **LONG)).cos_TK[0].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position": "learned", "rope_theta": 5e5},
            "model.rope_theta=500000.0 has no effect with model.position=learned",
        ),
        (
            {"position": "learned", "rope_scaling": "linear"},
            "model.rope_scaling=linear has no effect with model.position",
        ),
        ({"rope_factor": 2.0}, "model.rope_factor=2.0 has no effect with model.rope_scaling=null; remove it"),
        ({"rope_scaling": "linear"}, "model.rope_scaling=linear needs model.rope_factor; set it to the new context by"),
        (
            {"rope_scaling": "linear", **LONG},
            "model.rope_original_tokens=64 has no effect with model.rope_scaling=linear",
        ),
        (
            {"rope_scaling": "yarn", "rope_factor": 2.0},
            "model.rope_scaling=yarn needs model.rope_original_tokens; set it to",
        ),
    ],
)
def test_rotary_choices_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        spec(**changes)
    assert message in str(caught.value)


# -- documents that do not see each other ----------------------------------------------------------------------------

PACKED = torch.tensor([[1, 2, 0, 3, 4, 5, 0, 6], [0, 1, 2, 3, 4, 0, 0, 7]])  # 0 begins a document
DOCUMENTS = [(0, 0, 2), (0, 2, 6), (0, 6, 8), (1, 0, 5), (1, 5, 6), (1, 6, 8)]  # row, begin, end


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_packed_documents_have_the_logits_that_each_has_alone(attention: str) -> None:
    """With rotary positions, for which only distances count."""
    model = build(GPT, {"attention": attention, "document_separator": 0, "num_kv_heads": 2})
    packed_BTV = model(PACKED)
    for row, begin, end in DOCUMENTS:
        alone_TV = model(PACKED[row : row + 1, begin:end])[0]
        torch.testing.assert_close(packed_BTV[row, begin:end], alone_TV, rtol=ROUNDING, atol=1e-4)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_without_a_separator_documents_do_see_each_other(attention: str) -> None:
    model = build(GPT, {"attention": attention})
    alone_TV = model(PACKED[:1, 2:6])[0]
    assert (model(PACKED)[0, 2:6] - alone_TV).abs().max() > 0.1


# -- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_blocks_have_the_same_gradients_to_the_bit(dropout: float) -> None:
    def gradients(recomputes: bool) -> list[Tensor]:
        model = build(GPT, {"dropout": dropout, "document_separator": 0})
        model.recomputes = recomputes
        torch.manual_seed(1)
        model(PACKED).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    kept, again = gradients(False), gradients(True)
    assert len(kept) == len(again) > 0 and all(map(torch.equal, kept, again))
