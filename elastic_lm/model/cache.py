"""What a causal model keeps of the tokens that it has read, so that those behind them take a pass over themselves alone.

Invariant: a cache is of one batch of sequences, read from their first token on, by one model with the same weights. Logits are
those of a pass over all tokens, up to rounding: a matrix product over one token has not the bits of the same row in a product
over all. A pass that fails leaves the cache useless. Without gradients: keys and values are written in place.

Memory: a token takes 2 · layers · `ModelSpec.kv_width` elements, in fp32 73,728 bytes of gpt2. All of it is taken by the first
pass, since growing would copy everything with each token.

Shapes: B batch, T new tokens, S all tokens read, C capacity, H heads of keys and values, K head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from elastic_lm.model.spec import ModelSpec


class Cache:
    """Of at most `capacity` tokens, and of no more than the model's context has. `layers`: what each block keeps."""

    def __init__(self, spec: ModelSpec, capacity: int) -> None:
        self._capacity = min(capacity, spec.max_tokens)
        self.layers = [KeysAndValues(self._capacity) for _ in range(spec.num_layers)]
        self._tokens_BS: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return 0 if self._tokens_BS is None else self._tokens_BS.shape[1]

    def extended(self, tokens_BT: Tensor) -> Tensor:
        """All tokens that are read with these."""
        read = tokens_BT if self._tokens_BS is None else torch.cat((self._tokens_BS, tokens_BT), dim=1)
        assert read.shape[1] <= self._capacity
        self._tokens_BS = read
        return read


class KeysAndValues:
    """Of one layer, where its positions are in them already."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._num_tokens = 0
        self._kept: tuple[Tensor, Tensor] | None = None  # k_BHCK, v_BHCK

    def extended(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """k_BHSK and v_BHSK of all tokens, these included."""
        if self._kept is None:
            num_sequences, num_heads, _, size = k_BHTK.shape
            shape = (num_sequences, num_heads, self._capacity, size)
            self._kept = k_BHTK.new_empty(shape), v_BHTK.new_empty(shape)
        start = self._num_tokens
        self._num_tokens += k_BHTK.shape[2]
        k_BHCK, v_BHCK = self._kept
        k_BHCK[:, :, start : self._num_tokens] = k_BHTK
        v_BHCK[:, :, start : self._num_tokens] = v_BHTK
        return k_BHCK[:, :, : self._num_tokens], v_BHCK[:, :, : self._num_tokens]
