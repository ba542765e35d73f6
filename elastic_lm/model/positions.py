"""How the place of a token enters: added to the embedding (learned, sinusoidal) or as angles of queries and keys (rotary).

`start` is the place of the first token: those before it were read already.

Shapes: B batch, T tokens, D model width, H heads, K head size.
Sources: Vaswani et al. 2017 (sinusoidal), Radford et al. 2019 (learned), Su et al. 2021 (rotary), and for contexts beyond the one
that a model was trained with: Chen et al. 2023 (linear), Peng et al. 2023 (YaRN), Grattafiori et al. 2024 (Llama 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from elastic_lm.model.spec import LLAMA3_HIGH, LLAMA3_LOW, ROTARY_BASE, YARN_FAST, YARN_SLOW, ModelSpec


def make_positions(spec: ModelSpec) -> nn.Module:
    if spec.position == "learned":
        return Learned(spec)
    if spec.position == "sinusoidal":
        return Sinusoidal(spec)
    return Rotary(spec)


class Learned(nn.Module):
    """Adds a trained vector per position."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.max_tokens, spec.width))

    def forward(self, x_BTD: Tensor, start: int = 0) -> Tensor:
        return x_BTD + self.weight[start : start + x_BTD.shape[1]]


class Sinusoidal(nn.Module):
    """Adds fixed waves: even columns sine, odd columns cosine.

    Embeddings are scaled by sqrt(D) first (Vaswani et al. 2017, section 3.4). Otherwise the waves, of amplitude 1, drown
    them: after 40 steps of a toy task the loss was 4.3 instead of 0.9.
    """

    table_TD: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        columns = torch.arange(spec.width)
        frequency_D = ROTARY_BASE ** (-(columns - columns % 2) / spec.width)
        angle_TD = torch.arange(spec.max_tokens)[:, None] * frequency_D
        table_TD = torch.where(columns % 2 == 0, angle_TD.sin(), angle_TD.cos())
        self.register_buffer("table_TD", table_TD, persistent=False)

    def forward(self, x_BTD: Tensor, start: int = 0) -> Tensor:
        return x_BTD * math.sqrt(x_BTD.shape[2]) + self.table_TD[start : start + x_BTD.shape[1]]


class Rotary(nn.Module):
    """Angles by which queries and keys are turned. T -> (cos_TK, sin_TK), both times YaRN's factor where it is chosen."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        angle_TK = (torch.arange(spec.max_tokens)[:, None] * _frequencies(spec)).repeat(1, 2)
        sharpness = 1 + 0.1 * math.log(spec.rope_factor or 1) if spec.rope_scaling == "yarn" else 1.0
        self.register_buffer("cos_TK", angle_TK.cos() * sharpness, persistent=False)
        self.register_buffer("sin_TK", angle_TK.sin() * sharpness, persistent=False)

    def forward(self, num_tokens: int, start: int = 0) -> tuple[Tensor, Tensor]:
        return self.cos_TK[start : start + num_tokens], self.sin_TK[start : start + num_tokens]


def _frequencies(spec: ModelSpec) -> Tensor:
    """Radians per token of each pair, K/2 of them, the fastest first.

    Scaled by `rope_factor`: all of them (linear), or those that turn less than so often in the original context, with a ramp
    between those that stay and those that are divided: over turns (llama3), or over the pairs' numbers (yarn).
    """
    size = spec.head_size
    frequency = spec.rope_theta ** (-torch.arange(0, size, 2) / size)
    if spec.rope_scaling is None:
        return frequency
    assert spec.rope_factor is not None
    slow = frequency / spec.rope_factor
    if spec.rope_scaling == "linear":
        return slow
    assert spec.rope_original_tokens is not None
    if spec.rope_scaling == "llama3":
        turns = spec.rope_original_tokens * frequency / (2 * math.pi)
        stays = ((turns - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)).clamp(0, 1)
    else:
        first, last = (_pair_of(spec, turns) for turns in (YARN_FAST, YARN_SLOW))
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        stays = 1 - ((torch.arange(size // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)
    return slow * (1 - stays) + frequency * stays


def _pair_of(spec: ModelSpec, turns: float) -> float:
    """The number of the pair, not a whole one, that turns so often in the original context."""
    assert spec.rope_original_tokens is not None
    wavelength = spec.rope_original_tokens / turns
    return spec.head_size * math.log(wavelength / (2 * math.pi)) / (2 * math.log(spec.rope_theta))


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) by its position's angle."""
    left, right = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK.to(x_BHTK.dtype) + torch.cat((-right, left), dim=-1) * sin_TK.to(x_BHTK.dtype)
