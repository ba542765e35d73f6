"""The shape of a transformer, as a stdlib dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastic_lm.errors import ConfigError

Position = Literal["learned", "sinusoidal", "rotary"]
Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu"]
Reads = Literal["causal", "bidirectional"]


@dataclass(frozen=True)
class ModelSpec:
    """A transformer that sees the tokens before each one (causal), or all of them.

    `max_tokens` is the longest sequence, `hidden` the width inside a feed-forward block.
    """

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
    attention: Reads = "causal"

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

    @property
    def matmul_parameters(self) -> int:
        """Elements of the matrices that every token is multiplied by: those of the blocks, and the head's, tied or not."""
        feed_forward = (3 if self.activation == "swiglu" else 2) * self.hidden_width * self.width
        return self.num_layers * (4 * self.width**2 + feed_forward) + self.vocab_size * self.width

    @property
    def num_parameters(self) -> int:
        """Elements that are trained; a tied head is the embedding once more and counts once."""
        embedding = self.vocab_size * self.width
        positions = self.max_tokens * self.width if self.position == "learned" else 0
        norms = (2 * self.num_layers + 1) * self.width * (2 if self.norm == "layernorm" and self.bias else 1)
        head = 0 if self.tied else embedding
        blocks = self.matmul_parameters - embedding + (self.num_layers * self._biases_per_block if self.bias else 0)
        return embedding + positions + blocks + norms + head

    @property
    def _biases_per_block(self) -> int:
        """Queries, keys, values and the way back: 4 D. Feed-forward: 2 F (SwiGLU) or F in, and D out."""
        return 5 * self.width + (2 if self.activation == "swiglu" else 1) * self.hidden_width
