"""Models of a user's own: counted by hand, with and without memory, and told apart from code that fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from elastic_lm.engine.build import build, count_parameters
from elastic_lm.engine.spec import FactorySpec
from elastic_lm.errors import ConfigError
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT

HERE = "tests.engine.user_code"
BAG = 10 * 8 + (3 * 3 + 3) + (8 * 10 + 10)  # embedding, the spare layer, the head with its bias


def factory(name: str, *, vocab_size: int = 10, **arguments: Any) -> FactorySpec:
    return FactorySpec(f"{HERE}:{name}", vocab_size, 16, arguments)


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        (factory("bag"), BAG),
        (factory("bag", width=4), 10 * 4 + 12 + (4 * 10 + 10)),
        (factory("tied"), BAG - 10 * 8),  # one matrix counts once
        (factory("value_reader"), BAG),
    ],
    ids=lambda value: getattr(value, "path", ""),
)
def test_parameters_of_a_factory_are_counted(spec: FactorySpec, number: int) -> None:
    assert count_parameters(spec) == number
    assert sum(parameter.numel() for parameter in build(spec).parameters()) == number


def test_counting_takes_no_memory() -> None:
    assert count_parameters(factory("bag", vocab_size=10**9, width=1000)) > 2 * 10**12  # 8 TB


def test_counting_leaves_the_default_device() -> None:
    count_parameters(factory("bag"))
    assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (factory("nothing"), "cannot be imported"),
        (factory("no_module"), "failed: TypeError: .*returned object, not an nn.Module"),
        (factory("bag", widht=3), "failed: TypeError: .*widht"),
        (factory("bag", width=-3), "failed: RuntimeError"),
        (factory("NUMBER"), "is a int, not a function"),
    ],
    ids=lambda value: getattr(value, "path", ""),
)
def test_factory_that_fails_is_named_with_what_it_raised(spec: FactorySpec, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.factory='{HERE}:\w+' {words}"):
        count_parameters(spec)


def test_our_own_model_is_built_from_its_shape() -> None:
    spec = ModelSpec(vocab_size=10, num_layers=1, num_heads=2, width=4, max_tokens=8)
    module: nn.Module = build(spec)
    assert isinstance(module, GPT)
    assert sum(parameter.numel() for parameter in module.parameters()) == spec.num_parameters
