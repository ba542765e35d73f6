"""A transformer, causal or not: token embedding, positions, blocks, and a head that is tied to the embedding or not.

Shapes: B batch, T tokens, D model width, H heads, K head size, F feed-forward width, V vocabulary, N chosen places.
Sources: Vaswani et al. 2017 (attention, sinusoidal positions), Radford et al. 2019 (norms before each part, learned positions,
scaled initialisation), Devlin et al. 2019 (norms after each sum, the head's transform), Ding et al. 2021 (norms on both sides),
Su et al. 2021 (rotary positions), Shazeer 2020 (SwiGLU), Zhang and Sennrich 2019 (RMSNorm), Ainslie et al. 2023 (grouped
queries), Henry et al. 2020 (norms of queries and keys).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_lm.model.spec import ModelSpec

INIT_STD = 0.02
ROTARY_BASE = 10_000.0


class GPT(nn.Module):
    """tokens_BT (integers) -> logits_BTV. T may be anything up to `spec.max_tokens`.

    With `places_N`, of the flattened batch -> logits_NV there alone.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.positions = _positions(spec)
        self.embedding_norm = make_norm(spec) if spec.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = nn.Identity() if spec.norm_placement == "post" else make_norm(spec)
        self.transform = HeadTransform(spec) if spec.head_transform else nn.Identity()
        self.head = nn.Linear(spec.width, spec.vocab_size, bias=spec.bias and spec.head_transform)
        if spec.tied:
            self.head.weight = self.embedding.weight
        self._initialise()

    def forward(self, tokens_BT: Tensor, places_N: Tensor | None = None) -> Tensor:
        x_BTD = self.embedding(tokens_BT)
        rotation = None
        if isinstance(self.positions, Rotary):
            rotation = self.positions(tokens_BT.shape[1])
        else:
            x_BTD = self.positions(x_BTD)
        x_BTD = self.dropout(self.embedding_norm(x_BTD))
        for block in self.blocks:
            x_BTD = block(x_BTD, rotation)
        if places_N is not None:
            x_BTD = x_BTD.flatten(0, 1)[places_N]
        return self.head(self.transform(self.norm(x_BTD)))

    def _initialise(self) -> None:
        """Normal(0, 0.02), biases 0; projections back into the residual stream are scaled by 1/sqrt(2·layers).

        Not where each sum is normalised: nothing adds up there.
        """
        shrinks = self.spec.norm_placement != "post"
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            if parameter.dim() < 2:
                continue
            scale = 1 / math.sqrt(2 * self.spec.num_layers) if shrinks and name.endswith("residual.weight") else 1.0
            nn.init.normal_(parameter, std=INIT_STD * scale)


class Block(nn.Module):
    """Attention, then feed-forward: x + f(norm(x)), or norm(x + f(x)), or x + norm(f(norm(x)))."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.is_post = spec.norm_placement == "post"
        self.attention_norm = make_norm(spec)
        self.attention = Attention(spec)
        self.feed_forward_norm = make_norm(spec)
        self.feed_forward = SwiGLU(spec) if spec.activation == "swiglu" else GELU(spec)
        outer = spec.norm_placement == "sandwich"
        self.attention_out_norm = make_norm(spec) if outer else nn.Identity()
        self.feed_forward_out_norm = make_norm(spec) if outer else nn.Identity()

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        if self.is_post:
            x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, rotation))
            return self.feed_forward_norm(x_BTD + self.feed_forward(x_BTD))
        x_BTD = x_BTD + self.attention_out_norm(self.attention(self.attention_norm(x_BTD), rotation))
        return x_BTD + self.feed_forward_out_norm(self.feed_forward(self.feed_forward_norm(x_BTD)))


class Attention(nn.Module):
    """Multi-head self-attention, to what came before or to everything."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.widths, self.head_size = (spec.width, spec.kv_width, spec.kv_width), spec.head_size
        self.is_grouped = spec.kv_width != spec.width
        self.dropout, self.is_causal = spec.dropout, spec.attention == "causal"
        self.qkv = nn.Linear(spec.width, spec.width + 2 * spec.kv_width, bias=spec.bias)
        self.q_norm = nn.RMSNorm(spec.head_size, eps=1e-5) if spec.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(spec.head_size, eps=1e-5) if spec.qk_norm else nn.Identity()
        self.residual = nn.Linear(spec.width, spec.width, bias=spec.bias)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in self.qkv(x_BTD).split(self.widths, dim=-1)
        )
        q_BHTK, k_BHTK = self.q_norm(q_BHTK), self.k_norm(k_BHTK)
        if rotation is not None:
            q_BHTK, k_BHTK = rotate(q_BHTK, *rotation), rotate(k_BHTK, *rotation)
        dropout = self.dropout if self.training else 0.0
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BHTK, v_BHTK, is_causal=self.is_causal, dropout_p=dropout, enable_gqa=self.is_grouped
        )
        return F.dropout(self.residual(out_BHTK.transpose(1, 2).flatten(2)), self.dropout, self.training)


class SwiGLU(nn.Module):
    """residual(silu(gate(x)) * up(x))"""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.gate_and_up = nn.Linear(spec.width, 2 * spec.hidden_width, bias=spec.bias)
        self.residual = nn.Linear(spec.hidden_width, spec.width, bias=spec.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = self.gate_and_up(x_BTD).chunk(2, dim=-1)
        return F.dropout(self.residual(F.silu(gate_BTF) * up_BTF), self.dropout, self.training)


class GELU(nn.Module):
    """residual(gelu(up(x)))"""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.up = nn.Linear(spec.width, spec.hidden_width, bias=spec.bias)
        self.residual = nn.Linear(spec.hidden_width, spec.width, bias=spec.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(self.residual(F.gelu(self.up(x_BTD), approximate="tanh")), self.dropout, self.training)


class HeadTransform(nn.Module):
    """norm(gelu(dense(x))), or with silu where the blocks have it: what BERT puts before the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dense = nn.Linear(spec.width, spec.width, bias=spec.bias)
        self.norm = make_norm(spec)
        self.is_gelu = spec.activation == "gelu"

    def forward(self, x_ND: Tensor) -> Tensor:
        x_ND = self.dense(x_ND)
        return self.norm(F.gelu(x_ND, approximate="tanh") if self.is_gelu else F.silu(x_ND))


def make_norm(spec: ModelSpec) -> nn.Module:
    if spec.norm == "rmsnorm":
        return nn.RMSNorm(spec.width, eps=1e-5)
    return nn.LayerNorm(spec.width, eps=1e-5, bias=spec.bias)


def _positions(spec: ModelSpec) -> nn.Module:
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

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.weight[: x_BTD.shape[1]]


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

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD * math.sqrt(x_BTD.shape[2]) + self.table_TD[: x_BTD.shape[1]]


class Rotary(nn.Module):
    """Angles by which queries and keys are turned. T -> (cos_TK, sin_TK)."""

    cos_TK: Tensor
    sin_TK: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        size = spec.width // spec.num_heads
        frequency = ROTARY_BASE ** (-torch.arange(0, size, 2) / size)
        angle_TK = (torch.arange(spec.max_tokens)[:, None] * frequency).repeat(1, 2)
        self.register_buffer("cos_TK", angle_TK.cos(), persistent=False)
        self.register_buffer("sin_TK", angle_TK.sin(), persistent=False)

    def forward(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        return self.cos_TK[:num_tokens], self.sin_TK[:num_tokens]


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) by its position's angle."""
    left, right = x_BHTK.chunk(2, dim=-1)
    return x_BHTK * cos_TK.to(x_BHTK.dtype) + torch.cat((-right, left), dim=-1) * sin_TK.to(x_BHTK.dtype)
