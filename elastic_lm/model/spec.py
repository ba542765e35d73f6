"""The shape of a transformer, as a stdlib dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastic_lm.errors import ConfigError

Position = Literal["learned", "sinusoidal", "rotary"]
Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["swiglu", "gelu", "gelu_erf"]
Sight = Literal["causal", "bidirectional"]
Placement = Literal["pre", "post", "sandwich"]
RopeScaling = Literal["linear", "yarn", "llama3"]

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5
# Turns of a pair within the original context: with more of them its frequency stays, with less it is divided (Peng et al. 2023).
YARN_FAST, YARN_SLOW = 32, 1
LLAMA3_HIGH, LLAMA3_LOW = 4, 1  # the same in Llama 3.1
ROPE_NEEDS = {
    "rope_factor": "the new context by the old one, e.g. 8",
    "rope_original_tokens": "the context that the model was trained with, e.g. 8192",
}
ROPE_SCALINGS = {"linear": ("rope_factor",), "yarn": tuple(ROPE_NEEDS), "llama3": tuple(ROPE_NEEDS)}

# Choices that came later. Where they are not made, a run is the one that it was before there were any.
LATER = {
    "attention": "causal",
    "num_kv_heads": None,
    "qk_norm": False,
    "norm_placement": "pre",
    "embedding_norm": False,
    "head_transform": False,
    "norm_eps": NORM_EPS,
    "rope_theta": ROTARY_BASE,
    "rope_scaling": None,
    "rope_factor": None,
    "rope_original_tokens": None,
    "document_separator": None,
}


@dataclass(frozen=True)
class ModelSpec:
    """A transformer that sees the tokens before each one (causal), or all of them.

    `max_tokens` is the longest sequence, `hidden` the width inside a feed-forward block. Groups of `num_heads / num_kv_heads`
    queries share keys and values. `norm_placement`: before each part of a block, after its sum, or on both sides of it.
    `norm_eps`: what norms add to the mean square. `gelu` is its approximation by tanh, `gelu_erf` the function itself.
    `head_transform`: a layer, activation and norm before the head, which then has a bias of its own (BERT). `rope_theta` and
    `rope_scaling` are of rotary positions: their base, and how a context of `rope_original_tokens` is stretched by
    `rope_factor`. `document_separator`: the token that begins a document; tokens of different ones do not see each other.
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
    attention: Sight = "causal"
    num_kv_heads: int | None = None
    qk_norm: bool = False
    norm_placement: Placement = "pre"
    embedding_norm: bool = False
    head_transform: bool = False
    norm_eps: float = NORM_EPS
    rope_theta: float = ROTARY_BASE
    rope_scaling: RopeScaling | None = None
    rope_factor: float | None = None
    rope_original_tokens: int | None = None
    document_separator: int | None = None

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
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            fitting = [n for n in range(1, self.num_heads + 1) if not self.num_heads % n]
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads} into equal groups; "
                f"use one of {', '.join(map(str, fitting))}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} is not in [0, 1)")
        if not 0 < self.norm_eps < 1:
            raise ConfigError(f"model.norm_eps={self.norm_eps} is not in (0, 1); use {NORM_EPS}")
        self._check_rotary()

    def _check_rotary(self) -> None:
        chosen = {
            "rope_theta": None if self.rope_theta == ROTARY_BASE else self.rope_theta,
            "rope_scaling": self.rope_scaling,
            "rope_factor": self.rope_factor,
            "rope_original_tokens": self.rope_original_tokens,
        }
        idle = {name: value for name, value in chosen.items() if value is not None and self.position != "rotary"}
        for name, idler in idle.items():
            raise ConfigError(
                f"model.{name}={idler} has no effect with model.position={self.position}; remove it or use position: rotary"
            )
        for name, advice in ROPE_NEEDS.items():
            value, needed = chosen[name], name in ROPE_SCALINGS.get(self.rope_scaling or "", ())
            if needed and value is None:
                raise ConfigError(f"model.rope_scaling={self.rope_scaling} needs model.{name}; set it to {advice}")
            if value is not None and not needed:
                scaling = self.rope_scaling or "null"
                raise ConfigError(f"model.{name}={value} has no effect with model.rope_scaling={scaling}; remove it")

    @property
    def hidden_width(self) -> int:
        """4·D for GELU; 8/3·D rounded up to a multiple of 16 for SwiGLU, which has three matrices (Shazeer, 2020)."""
        if self.hidden is not None:
            return self.hidden
        if self.activation != "swiglu":
            return 4 * self.width
        return -(-8 * self.width // 3 // 16) * 16

    @property
    def head_size(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_width(self) -> int:
        """Of all keys, and of all values."""
        return self.head_size * (self.num_kv_heads or self.num_heads)

    @property
    def head_parameters(self) -> int:
        """Elements of the matrices that a token is multiplied by only where it is predicted."""
        return self.vocab_size * self.width + (self.width**2 if self.head_transform else 0)

    @property
    def matmul_parameters(self) -> int:
        """Elements of the matrices that every token is multiplied by: those of the blocks, and the head's, tied or not."""
        feed_forward = (3 if self.activation == "swiglu" else 2) * self.hidden_width * self.width
        attention = 2 * self.width * (self.width + self.kv_width)
        return self.num_layers * (attention + feed_forward) + self.head_parameters

    @property
    def hidden_parameters(self) -> int:
        """Elements of the matrices between embedding and head."""
        return self.matmul_parameters - self.vocab_size * self.width

    @property
    def num_parameters(self) -> int:
        """Elements that are trained; a tied head is the embedding once more and counts once."""
        embedding = self.vocab_size * self.width
        positions = self.max_tokens * self.width if self.position == "learned" else 0
        head = (0 if self.tied else embedding) - embedding
        biases = self.num_layers * self._biases_per_block + self._biases_of_head if self.bias else 0
        return embedding + positions + self.matmul_parameters + head + biases + self._norm_parameters

    @property
    def _norm_parameters(self) -> int:
        per_block = 4 if self.norm_placement == "sandwich" else 2
        count = (
            per_block * self.num_layers + (self.norm_placement != "post") + self.embedding_norm + self.head_transform
        )
        size = self.width * (2 if self.norm == "layernorm" and self.bias else 1)
        return count * size + (2 * self.num_layers * self.head_size if self.qk_norm else 0)

    @property
    def _biases_per_block(self) -> int:
        """Queries and the way back: 2 D; keys and values. Feed-forward: 2 F (SwiGLU) or F in, and D out."""
        return 3 * self.width + 2 * self.kv_width + (2 if self.activation == "swiglu" else 1) * self.hidden_width

    @property
    def _biases_of_head(self) -> int:
        return self.width + self.vocab_size if self.head_transform else 0
