"""Objectives: from a model and a micro-batch of tokens to (sum of losses, number of targets).

Sums, never means: a step's loss is the sum over all targets of the global batch divided by their number, so it does not
matter how samples are spread over micro-batches or members.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from elastic_lm.engine.cross_entropy import Targets, loss_at
from elastic_lm.engine.masking import Masked
from elastic_lm.engine.spec import CAUSAL, MASKED, MaskingSpec
from elastic_lm.errors import ConfigError

Objective = Callable[[nn.Module, Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class Causal:
    """Minimise the sum of -log P(x_t | x_<t). S = T + 1: the first T tokens are input, the last T are targets."""

    z_loss: float = 0.0

    def __call__(self, model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
        """Returns: the summed negative log-likelihood in nats (fp32 scalar), and B·T."""
        inputs_BT, targets_N, places_N = self.targets(tokens_BS)
        return loss_at(model, inputs_BT, targets_N, places_N, z_loss=self.z_loss), targets_N.numel()

    def targets(self, tokens_BS: Tensor) -> Targets:
        """What is read, what is to be predicted, and where."""
        return tokens_BS[:, :-1], tokens_BS[:, 1:].flatten(), None


causal = Causal()


def find_objective(name: str, masking: MaskingSpec | None = None, z_loss: float = 0.0) -> Objective:
    """`causal`, `masked`, or the user's function by import path.    Raises: ConfigError."""
    if name == CAUSAL:
        return Causal(z_loss)
    if name == MASKED:
        if masking is None:
            raise ConfigError("objective.name=masked needs to know the corpus's mask; give EngineSpec.masking")
        return Masked(masking, z_loss)
    return load_function(name, "objective.name")


def load_function(path: str, field: str) -> Callable[..., Any]:
    """The function at `package.module:function`.    Raises: ConfigError naming `field`."""
    module, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # TypeError: a relative path
        raise ConfigError(f"{field}={path!r} cannot be imported ({error}); write package.module:function") from error
    if not callable(function):
        raise ConfigError(f"{field}={path!r} is a {type(function).__name__}, not a function")
    return function
