"""The number of parameters by arithmetic is that of the module, for every model that can be chosen."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch

from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT

CHOICES = list(
    product(
        ["learned", "sinusoidal", "rotary"], ["rmsnorm", "layernorm"], ["swiglu", "gelu"], [True, False], [True, False],
        [None, 20],
    )
)  # fmt: skip
NAMES = ("position", "norm", "activation", "tied", "bias", "hidden")


def counted(spec: ModelSpec) -> int:
    with torch.device("meta"):
        model = GPT(spec)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_number_of_parameters_is_the_modules(choice: tuple[Any, ...]) -> None:
    """Sizes without common factors, so that no term can stand in for another."""
    chosen = dict(zip(NAMES, choice, strict=True))
    spec = ModelSpec(vocab_size=101, num_layers=3, num_heads=2, width=28, max_tokens=13, **chosen)
    assert spec.num_parameters == counted(spec)


@pytest.mark.parametrize("name", PRESETS)
def test_number_of_parameters_of_a_preset_is_the_modules(name: str) -> None:
    spec = ModelSpec(vocab_size=50_257, max_tokens=1024, **PRESETS[name].shape)
    assert spec.num_parameters == counted(spec)


def test_number_of_parameters_needs_no_torch() -> None:
    script = (
        "import sys\nfrom elastic_lm.model.spec import ModelSpec\nimport elastic_lm.model.flops\n"
        "assert ModelSpec(10, 1, 1, 4, 8).num_parameters and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
