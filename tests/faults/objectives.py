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


def infinite(model: nn.Module, tokens_BS: Tensor) -> tuple[Tensor, int]:
    loss, num_targets = causal(model, tokens_BS)
    return loss * float("inf"), num_targets
