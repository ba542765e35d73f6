"""The shape of a GPT, as a stdlib dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastic_lm.errors import ConfigError

Position = Literal["learned", "sinusoidal", "rotary"]
Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu"]


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only transformer. `max_tokens` is the longest sequence, `hidden` the width inside a feed-forward block."""

    vocab_size: int
    num_layers: int
    num_heads: int
    width: int
    max_tokens: int
    hidden: int | None = None
    position: Position = "rotary"
    norm: Norm = "rmsnorm"
    activation: Activation = "swiglu"
    tied: bool = True
    bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            unit = self.num_heads * (2 if self.position == "rotary" else 1)
            low = self.width - self.width % unit
            remedy = " or ".join(str(width) for width in (low, low + unit) if width)
            raise ConfigError(
                f"model.width={self.width} is not a multiple of model.num_heads={self.num_heads}; use width {remedy}"
            )
        if self.position == "rotary" and (self.width // self.num_heads) % 2:
            remedy = f"use width {self.width + self.num_heads}" if self.num_heads % 2 else "halve num_heads"
            raise ConfigError(
                f"rotary positions need an even head size, and model.width/model.num_heads={self.width // self.num_heads}; "
                f"{remedy} or use position: learned"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} is not in [0, 1)")

    @property
    def hidden_width(self) -> int:
        """4·D for GELU; 8/3·D rounded up to a multiple of 16 for SwiGLU, which has three matrices (Shazeer, 2020)."""
        if self.hidden is not None:
            return self.hidden
        if self.activation == "gelu":
            return 4 * self.width
        return -(-8 * self.width // 3 // 16) * 16
