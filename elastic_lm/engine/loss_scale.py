"""Dynamic loss scaling: what keeps gradients in fp16 from becoming zero or infinite (Micikevicius et al. 2018).

A step's loss is multiplied by 2^exponent, and its gradients are divided by it where they are added up, both without rounding.
A step in which some gradient is not finite is not left out, as is usual: it is computed again with half the scale, until all
are, so that no sample is lost.

Invariant: the exponent is a part of the state, like a moment: copied to joiners, saved, hashed; and written with the weights
only. Whoever begins a step anew, after a fault or on another member, begins it with the same exponent and comes by the same
overflows to the same one.
"""

from __future__ import annotations

import math

import torch

FIRST = 16  # for a mean over targets; sums are larger by their number
LOWEST = -24  # by then it is no overflow of fp16
GROWTH_STEPS = 2000  # without an overflow, after which the scale is doubled


class LossScale:
    """`flat`: fp32 [exponent, steps since it changed], where the replica's state is."""

    def __init__(self, targets_per_micro_batch: int, device: torch.device) -> None:
        self._first = FIRST - math.ceil(math.log2(targets_per_micro_batch))
        self.flat = torch.zeros(2, dtype=torch.float32, device=device)
        self.begin()

    def begin(self) -> None:
        """Of a run's first step."""
        self.flat.copy_(torch.tensor([self._first, 0.0]))

    @property
    def exponent(self) -> int:
        """That a step begins with."""
        return int(self.flat[0].item())

    def settle(self, exponent: int) -> None:
        """A step has ended with this one. To be called while the state counts as torn."""
        steps = self.flat[1].item() + 1 if exponent == self.exponent else 0.0
        if steps >= GROWTH_STEPS:
            exponent, steps = exponent + 1, 0.0
        self.flat.copy_(torch.tensor([exponent, steps]))
