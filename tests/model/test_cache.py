"""The cache: a pass over new tokens alone comes to the logits of one over all, in every shape that a causal model has.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_lm.model.cache import Cache
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT
from tests.model.test_options import LENGTH, LONG, VOCAB, build, spec

ROUNDING = 1e-5  # of fp32 sums in another order, by the largest logit: measured 1.6e-6 at most over all of these

# What has a say in attention, each with each; then what has none.
SHAPES: list[dict[str, Any]] = [
    {"num_kv_heads": heads, "qk_norm": is_normed, "position": position, "document_separator": separator}
    for heads, is_normed, position, separator in product(
        [None, 1, 2], [True, False], ["learned", "sinusoidal", "rotary"], [None, 0]
    )
] + [
    {"norm_placement": "post", "embedding_norm": True, "head_transform": True},
    {"norm_placement": "sandwich"},
    {"norm": "layernorm", "activation": "gelu", "bias": True},
    {"activation": "gelu_erf", "tied": False},
    {"rope_theta": 50_000.0},
    {"rope_scaling": "linear", "rope_factor": 4.0},
    {"rope_scaling": "yarn", **LONG},
    {"rope_scaling": "llama3", **LONG},
]


def make(changes: dict[str, Any]) -> GPT:
    return build(GPT, changes).eval()  # type: ignore[no-any-return]


def tokens() -> Tensor:
    """Of three sequences that begin a document, and one that begins within one; another document begins later in each."""
    tokens_BT = torch.randint(1, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    tokens_BT[:3, 0] = 0
    tokens_BT[range(4), [2, 5, 6, 3]] = 0
    return tokens_BT


@torch.no_grad()
def by_parts(model: GPT, tokens_BT: Tensor, *sizes: int) -> Tensor:
    """Logits of all tokens, read so many at a time."""
    assert sum(sizes) == tokens_BT.shape[1]
    cache = Cache(model.spec, tokens_BT.shape[1])
    return torch.cat([model(part_BT, cache=cache) for part_BT in tokens_BT.split(sizes, dim=1)], dim=1)


def assert_same(found_BTV: Tensor, expected_BTV: Tensor, name: object = "") -> None:
    off = (found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()
    assert off < ROUNDING, f"{name}: {off}"


@pytest.mark.parametrize("sizes", [(3, 1, 1, 1, 1, 1), (1, 3, 1, 2, 1)])
def test_tokens_read_by_parts_have_the_logits_of_a_pass_over_all(sizes: tuple[int, ...]) -> None:
    for shape in SHAPES:
        model = make(shape)
        assert_same(by_parts(model, tokens(), *sizes), model(tokens()), shape)


def test_tokens_read_before_do_show() -> None:
    """Without them the logits are others by far."""
    for shape in [{"position": "learned"}, {"position": "rotary"}]:
        model = make(shape)
        assert (by_parts(model, tokens(), 3, 5)[:, 3:] - model(tokens()[:, 3:])).abs().max() > 0.1


def test_places_are_those_of_the_new_tokens() -> None:
    model, cache = make({}), Cache(spec(), LENGTH)
    model(tokens()[:, :5], cache=cache)
    assert cache.num_tokens == 5
    found_NV = model(tokens()[:, 5:], torch.tensor([2, 5]), cache)  # the last tokens of the first two sequences
    assert cache.num_tokens == LENGTH
    assert_same(found_NV, model(tokens())[:2, -1])


def test_more_tokens_than_the_context_has_are_refused() -> None:
    model, cache = make({"position": "learned"}), Cache(spec(), 10 * LENGTH)
    model(tokens(), cache=cache)
    with pytest.raises(AssertionError):
        model(tokens()[:, :1], cache=cache)


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 73_728), ({"num_kv_heads": 3}, 73_728 // 4)],  # 2 x 12 layers x 768 (a quarter) x 4 bytes
)
def test_memory_is_that_of_keys_and_values(changes: dict[str, Any], size: int) -> None:
    """Of all tokens that there is room for, from the first pass on."""
    with torch.device("meta"):
        model = GPT(ModelSpec(256, max_tokens=1024, **PRESETS["gpt2"].shape, **changes))
        cache = Cache(model.spec, 100)
        model(torch.zeros(2, 7, dtype=torch.long), cache=cache)
        nothing = torch.empty(2, changes.get("num_kv_heads", 12), 0, 64)
        kept = [part for layer in cache.layers for part in layer.extended(nothing, nothing)]
    assert sum(part.untyped_storage().nbytes() for part in kept) == 2 * 100 * size
