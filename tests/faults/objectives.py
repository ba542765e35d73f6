"""Objectives with something wrong in them, by import path as a user's own would be."""

from __future__ import annotations

from torch import Tensor, nn

from elastic_lm.engine.objectives import causal

_num_calls = 0


def buggy(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """Well while a worker warms up (one call), and never again."""
    global _num_calls
    _num_calls += 1
    if _num_calls > 1:
        raise ZeroDivisionError("the bug in the user's objective")
    return causal(model, tokens_BS)


def infinite_on_noise(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    """Not finite where a sample has hardly a token twice, which text of a few words never has."""
    loss, num_targets = causal(model, tokens_BS)
    is_noise = any(len(row.unique()) > 0.8 * len(row) for row in tokens_BS)
    return loss * float("inf") if is_noise else loss, num_targets


def infinite(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    loss, num_targets = causal(model, tokens_BS)
    return loss * float("inf"), num_targets
