"""Presets are what they say: each is built, without memory, and counted."""

from __future__ import annotations

import pytest
import torch

from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT

GPT2_VOCAB, GPT2_TOKENS = 50_257, 1024


def build(name: str) -> GPT:
    with torch.device("meta"):
        return GPT(ModelSpec(vocab_size=GPT2_VOCAB, max_tokens=GPT2_TOKENS, **PRESETS[name].shape))


@pytest.mark.parametrize("name", PRESETS)
def test_stated_parameters_are_those_of_the_blocks_and_the_last_norm(name: str) -> None:
    """Vocabulary and sequence length come from elsewhere: what depends on them is left out."""
    model = build(name)
    parts = [*model.blocks.parameters(), *model.norm.parameters()]
    assert sum(parameter.numel() for parameter in parts) == PRESETS[name].parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),  # "124M"; Radford et al. 2019 counted 117M by mistake
        ("gpt2-medium", 354_823_168),  # "355M"
    ],
)
def test_gpt2_has_the_published_number_of_parameters(name: str, published: int) -> None:
    assert sum(parameter.numel() for parameter in build(name).parameters()) == published
