"""A transformer, causal or not: token embedding, positions, blocks, and a head that is tied to the embedding or not.

Shapes: B batch, T tokens, S tokens with those that a cache holds before them, D model width, H heads, K head size, F feed-forward
width, V vocabulary, N chosen places.
Sources: Vaswani et al. 2017 (attention), Radford et al. 2019 (norms before each part, scaled initialisation), Devlin et al. 2019
(norms after each sum, the head's transform), Ding et al. 2021 (norms on both sides), Shazeer 2020 (SwiGLU), Zhang and Sennrich
2019 (RMSNorm), Ainslie et al. 2023 (grouped queries), Henry et al. 2020 (norms of queries and keys).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from elastic_lm.model.cache import Cache, KeysAndValues
from elastic_lm.model.positions import Rotary, make_positions, rotate
from elastic_lm.model.spec import ModelSpec

INIT_STD = 0.02
Rotation = tuple[Tensor, Tensor]  # cos_TK, sin_TK


class GPT(nn.Module):
    """tokens_BT (integers) -> logits_BTV. T may be anything up to `spec.max_tokens`.

    With `places_N`, of the flattened batch -> logits_NV there alone. With a `cache`, which is for causal models, the tokens are
    those behind what it holds, and it takes them in. Where documents are told apart by a separator, the first token of a sequence
    need not be one.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, spec.width)
        self.positions = make_positions(spec)
        self.embedding_norm = make_norm(spec) if spec.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(spec.dropout)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = nn.Identity() if spec.norm_placement == "post" else make_norm(spec)
        self.transform = HeadTransform(spec) if spec.head_transform else nn.Identity()
        self.head = nn.Linear(spec.width, spec.vocab_size, bias=spec.bias and spec.head_transform)
        if spec.tied:
            self.head.weight = self.embedding.weight
        self.recomputes = (
            False  # the insides of blocks in backward, instead of keeping them: the same bits in less memory
        )
        self._initialise()

    def forward(self, tokens_BT: Tensor, places_N: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.head(self.features(tokens_BT, places_N, cache))

    def features(self, tokens_BT: Tensor, places_N: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head is applied to: features_BTD, or features_ND of the places."""
        tokens_BS = tokens_BT if cache is None else cache.extended(tokens_BT)
        start = tokens_BS.shape[1] - tokens_BT.shape[1]
        x_BTD = self.embedding(tokens_BT)
        rotation = None
        if isinstance(self.positions, Rotary):
            rotation = self.positions(tokens_BT.shape[1], start)
        else:
            x_BTD = self.positions(x_BTD, start)
        sight_B1TS = self._sight(tokens_BS, start)
        x_BTD = self.dropout(self.embedding_norm(x_BTD))
        for number, block in enumerate(self.blocks):
            if self.recomputes and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, rotation, sight_B1TS, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, rotation, sight_B1TS, None if cache is None else cache.layers[number])
        if places_N is not None:
            x_BTD = x_BTD.flatten(0, 1)[places_N]
        return self.transform(self.norm(x_BTD))

    def _sight(self, tokens_BS: Tensor, start: int) -> Tensor | None:
        """Whom the tokens from `start` on see. None: each what came before it, or everything.

        With a separator: tokens of one document, which begins with it, so that nothing of the one before is seen.
        """
        separator = self.spec.document_separator
        if separator is None:
            if start in (0, tokens_BS.shape[1] - 1):
                return None
            document_BS = torch.zeros_like(tokens_BS)
        else:
            document_BS = tokens_BS.eq(separator).cumsum(1)
        sight_BTS = document_BS[:, start:, None] == document_BS[:, None, :]
        return (sight_BTS.tril(start) if self.spec.attention == "causal" else sight_BTS)[:, None]

    def hidden_matrices(self) -> dict[str, tuple[int, ...]]:
        """All but embeddings and head, by name of the parameter: rows of those that were put together to one product."""
        spec = self.spec
        together = {
            "qkv.weight": (spec.width, spec.kv_width, spec.kv_width),
            "gate_and_up.weight": (spec.hidden_width, spec.hidden_width),
        }
        return {
            name: together.get(".".join(name.split(".")[-2:]), (parameter.shape[0],))
            for name, parameter in self.named_parameters()
            if parameter.dim() == 2 and name.startswith(("blocks.", "transform."))
        }

    def _initialise(self) -> None:
        """Matrices normal with `initial_std`, biases 0, gains 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            if parameter.dim() < 2:
                continue
            nn.init.normal_(parameter, std=initial_std(self.spec, name))


def initial_std(spec: ModelSpec, name: str) -> float:
    """Of the matrix of this name in a new model: 0.02; projections back into the residual stream are scaled by 1/sqrt(2·layers).

    Not where each sum is normalised: nothing adds up there.
    """
    shrinks = spec.norm_placement != "post" and name.endswith("residual.weight")
    return INIT_STD * (1 / math.sqrt(2 * spec.num_layers) if shrinks else 1.0)


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

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        sight_B1TS: Tensor | None = None,
        cache: KeysAndValues | None = None,
    ) -> Tensor:
        if self.is_post:
            x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, rotation, sight_B1TS, cache))
            return self.feed_forward_norm(x_BTD + self.feed_forward(x_BTD))
        x_BTD = x_BTD + self.attention_out_norm(self.attention(self.attention_norm(x_BTD), rotation, sight_B1TS, cache))
        return x_BTD + self.feed_forward_out_norm(self.feed_forward(self.feed_forward_norm(x_BTD)))


class Attention(nn.Module):
    """Multi-head self-attention: to what came before, to everything, or to where `sight_B1TS` is true."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.widths, self.head_size = (spec.width, spec.kv_width, spec.kv_width), spec.head_size
        self.is_grouped = spec.kv_width != spec.width
        self.dropout, self.is_causal = spec.dropout, spec.attention == "causal"
        self.qkv = nn.Linear(spec.width, spec.width + 2 * spec.kv_width, bias=spec.bias)
        self.q_norm = nn.RMSNorm(spec.head_size, eps=spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(spec.head_size, eps=spec.norm_eps) if spec.qk_norm else nn.Identity()
        self.residual = nn.Linear(spec.width, spec.width, bias=spec.bias)

    def forward(
        self,
        x_BTD: Tensor,
        rotation: Rotation | None,
        sight_B1TS: Tensor | None = None,
        cache: KeysAndValues | None = None,
    ) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for part in self.qkv(x_BTD).split(self.widths, dim=-1)
        )
        q_BHTK, k_BHTK = self.q_norm(q_BHTK), self.k_norm(k_BHTK)
        if rotation is not None:
            q_BHTK, k_BHTK = rotate(q_BHTK, *rotation), rotate(k_BHTK, *rotation)
        k_BHSK, v_BHSK = (k_BHTK, v_BHTK) if cache is None else cache.extended(k_BHTK, v_BHTK)
        is_whole = q_BHTK.shape[2] == k_BHSK.shape[2]  # else one token, which sees all before it
        dropout = self.dropout if self.training else 0.0
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BHSK,
            v_BHSK,
            attn_mask=sight_B1TS,
            is_causal=self.is_causal and sight_B1TS is None and is_whole,
            dropout_p=dropout,
            enable_gqa=self.is_grouped,
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
        self.gelu = make_gelu(spec)
        self.dropout = spec.dropout
        self.up = nn.Linear(spec.width, spec.hidden_width, bias=spec.bias)
        self.residual = nn.Linear(spec.hidden_width, spec.width, bias=spec.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return F.dropout(self.residual(self.gelu(self.up(x_BTD))), self.dropout, self.training)


class HeadTransform(nn.Module):
    """norm(gelu(dense(x))), or with silu where the blocks have it: what BERT puts before the head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.dense = nn.Linear(spec.width, spec.width, bias=spec.bias)
        self.norm = make_norm(spec)
        self.activation = nn.SiLU() if spec.activation == "swiglu" else make_gelu(spec)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x_ND)))


def make_gelu(spec: ModelSpec) -> nn.GELU:
    return nn.GELU("none" if spec.activation == "gelu_erf" else "tanh")


def make_norm(spec: ModelSpec) -> nn.Module:
    if spec.norm == "rmsnorm":
        return nn.RMSNorm(spec.width, eps=spec.norm_eps)
    return nn.LayerNorm(spec.width, eps=spec.norm_eps, bias=spec.bias)
