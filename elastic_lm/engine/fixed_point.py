"""Fixed point: gradients as 64-bit integers, whose sum does not depend on the order of addition.

Rounding is half to even. A contribution that is not finite or above `bound` becomes zero and is counted as refused: int64
wraps silently, and a float NaN cast to an integer is undefined. Scheme, precision and cost: docs/reduction.md.

Two implementations give the same bits: a C kernel (one fused pass, compiled once per machine when a compiler is there) and
blocked torch operations (everywhere, every device).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_lm.engine import kernel

BLOCK = 1 << 16  # elements: the temporaries of a block stay in the second-level cache
SUM_BITS = 62
MEAN_FRACTION_BITS = 44  # a mean gradient is resolved to 2^-44 (6e-14) and may be as large as 2^18 / M
LOSS_FRACTION_BITS = 30


@dataclass(frozen=True)
class Unit:
    """One unit of the integers is 2^-fraction_bits; a single contribution may be up to `bound` units."""

    fraction_bits: int
    num_contributions: int

    @property
    def scale(self) -> float:
        return 2.0**self.fraction_bits

    @property
    def bound(self) -> float:
        return 2.0**SUM_BITS / self.num_contributions


def gradient_unit(targets_per_batch: int, num_micro_batches: int) -> Unit:
    """The unit for gradients of a loss *sum*: finer than 2^-44 of the mean for every target count."""
    return Unit(MEAN_FRACTION_BITS - math.ceil(math.log2(targets_per_batch)), num_micro_batches)


def loss_unit(num_micro_batches: int) -> Unit:
    return Unit(LOSS_FRACTION_BITS, num_micro_batches)


def fold(total: Tensor, values: Tensor, unit: Unit, *, first: bool) -> int | Tensor:
    """total[i] (int64) += values[i] (fp32) in units; with `first`, what `total` held before is overwritten instead.

    Both are flat, contiguous and of one size. Returns: how many elements were refused.
    """
    if kernel.available(total.device):
        return kernel.fold(total, values, unit.scale, unit.bound, first)
    return fold_with_torch(total, values, unit, first=first)


def fold_with_torch(total: Tensor, values: Tensor, unit: Unit, *, first: bool) -> Tensor:
    """The same bits as the kernel, on any device."""
    refused = torch.zeros((), dtype=torch.int64, device=total.device)
    block = BLOCK if total.device.type == "cpu" else total.numel()
    for start in range(0, total.numel(), max(1, block)):
        scaled = values[start : start + block].to(torch.float64).mul_(unit.scale)
        fits = scaled.abs() <= unit.bound
        refused += fits.numel() - fits.sum()
        rounded = torch.where(fits, scaled, 0.0).round_().to(torch.int64)
        part = total[start : start + block]
        part.copy_(rounded) if first else part.add_(rounded)
    return refused


def to_float(total: Tensor, unit: Unit, divisor: int, out: Tensor) -> Tensor:
    """out[i] (fp32) = total[i] / (units · divisor), through fp64."""
    scale = 1.0 / (unit.scale * divisor)
    if kernel.available(total.device):
        kernel.to_float(total, scale, out)
        return out
    block = BLOCK if total.device.type == "cpu" else total.numel()
    for start in range(0, total.numel(), max(1, block)):
        part = total[start : start + block]
        out[start : start + block] = part.to(torch.float64).mul_(scale).to(torch.float32)
    return out


def number_to_units(value: float, unit: Unit) -> int | None:
    """One number in units, rounded half to even; None when it is refused."""
    scaled = value * unit.scale
    if not abs(scaled) <= unit.bound:
        return None
    return round(scaled)
