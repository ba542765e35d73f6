"""A model from its spec: ours, or the one that a user's factory returns; and how many parameters the latter has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from elastic_lm.engine.objectives import load_function
from elastic_lm.engine.spec import FactorySpec
from elastic_lm.errors import ConfigError, ElasticLMError
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT


def build(model: ModelSpec | FactorySpec) -> nn.Module:
    """A new module.    Raises: ConfigError when the factory cannot be imported; TypeError when it returns something else."""
    if isinstance(model, ModelSpec):
        return GPT(model)
    factory = load_function(model.path, "model.factory")
    module = factory(vocab_size=model.vocab_size, max_tokens=model.max_tokens, **model.arguments)
    if not isinstance(module, nn.Module):
        raise TypeError(f"model.factory={model.path!r} returned {type(module).__name__}, not an nn.Module")
    return module


def fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Overwrite all parameters. One with fewer rows than the module has overwrites the first ones.

    Raises: ValueError when names or shapes do not fit, before anything is overwritten.
    """
    parameters = dict(module.named_parameters())
    for name in parameters.keys() | weights.keys():
        if name not in parameters or name not in weights:
            raise ValueError(f"initial weights and model do not both have {name}")
        mine, given = parameters[name].shape, weights[name].shape
        if mine[1:] != given[1:] or not 0 < given[0] <= mine[0]:
            raise ValueError(f"initial weights {name} are {list(given)}, the model's {list(mine)}")
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name][: len(tensor)].copy_(tensor)


def hidden_matrices(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The matrices within a model, by name of their parameter: rows of the parts that are matrices of their own.

    Raises: ConfigError when a model of the user's own does not tell, or tells of what is none of its matrices.
    """
    told = getattr(module, "hidden_matrices", None)
    if told is None:
        raise ConfigError(
            f"optimizer.kind=muon updates the matrices within a model, and {type(module).__name__} does not tell which those "
            "are; give it a method hidden_matrices() -> {parameter name: (rows of each part, ...)} without embeddings and the "
            "head, or use optimizer.kind: adamw"
        )
    found = {name: tuple(rows) for name, rows in told().items()}
    parameters = dict(module.named_parameters())
    for name, rows in found.items():
        shape = parameters[name].shape if name in parameters else ()
        if len(shape) != 2 or sum(rows) != shape[0] or min(rows, default=0) < 1:
            raise ConfigError(
                f"hidden_matrices() of {type(module).__name__} says {name}: {rows}, and the parameter's shape is {list(shape)}; "
                "name matrices, with rows that add up to theirs"
            )
    return found


def count_parameters(model: FactorySpec) -> int:
    """Elements that are trained, by building the module.    Raises: ConfigError, with what the factory raised.

    On the meta device, which takes no memory; for real when the factory looks at a tensor's value, which that has not.
    """
    try:
        try:
            with torch.device("meta"):
                module = build(model)
        except (RuntimeError, NotImplementedError):
            module = build(model)
    except ElasticLMError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(
            f"model.factory={model.path!r} failed: {type(error).__name__}: {error}; correct it, or model.args"
        ) from error
    return sum(parameter.numel() for parameter in module.parameters())
