"""Another shape for a model that was trained: which of its parameters stay, and how those begin that are new.

Invariant: whatever is kept is kept bit for bit. What is new begins, where that is possible, so that the model computes what it
did before: new blocks and new hidden units put out zero, a bias is zero, a head of its own is a copy of the embedding. A norm
cannot (it normalises): its gain begins as one, and the account says that the model computes something else. Parameters are
matched by name, so blocks are added and dropped behind the last one, and nothing is renumbered. What has no such meaning is
refused.

A value that is drawn depends on the seed, the parameter's name and its number there alone. Trade-off: it is a sum of twelve
uniform integers, for a normal distribution's logarithms and cosines have other last bits on other machines.

Sources: He et al. 2015 and Goyal et al. 2017 (blocks that begin as the identity), Chen et al. 2016 (Net2Net: a trained model
made wider or deeper), Ainslie et al. 2023 (heads of keys and values).
"""

from __future__ import annotations

import hashlib
import math
import re
import sys
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_lm.errors import ConfigError
from elastic_lm.model.account import Account, Fate, Kind, Shape
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT, initial_std

UNIFORMS = 12  # whose sum has a variance of 1; beyond three of its roots lie 0.20 % of them, and 0.27 % of a normal distribution
CHUNK = 1 << 16  # elements that are drawn at once: 1.5 MiB
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_BLOCK_END = ("attention.residual.", "feed_forward.residual.")  # what a block adds to the residual stream
_OUTER_NORMS = ("attention_out_norm.", "feed_forward_out_norm.")


@dataclass(frozen=True)
class Piece:
    """`size` entries of an axis that are taken over: from `start` of the old tensor to `into` of the new one."""

    start: int
    into: int
    size: int


@dataclass(frozen=True)
class Beginning:
    """How one parameter of the new model begins: with `pieces` of the old parameter `source` along `axis`, and `rest` elsewhere.

    `rest`: a constant, or the standard deviation of drawn values. `begins` says it in words.
    """

    name: str
    shape: Shape
    source: str | None = None
    axis: int = 0
    pieces: tuple[Piece, ...] = ()
    rest: float = 0.0
    is_drawn: bool = False
    kind: Kind | None = None  # None: it is as it was
    begins: str = ""

    @property
    def is_all_kept(self) -> bool:
        """Whether every value of it is one of the source's."""
        return sum(piece.size for piece in self.pieces) == self.shape[self.axis]

    def weight(self, old: Tensor | None, seed: int) -> Tensor:
        """The parameter, fp32. `old`: the source's, where there is one."""
        new = drawn(self.name, self.shape, self.rest, seed) if self.is_drawn else torch.full(self.shape, self.rest)
        return self._with_pieces(new, old)

    def moment(self, old: Tensor | None) -> Tensor:
        """Either moment of it: the source's where its values are, and zero elsewhere."""
        return self._with_pieces(torch.zeros(self.shape), old)

    def _with_pieces(self, new: Tensor, old: Tensor | None) -> Tensor:
        for piece in self.pieces:
            assert old is not None
            new.narrow(self.axis, piece.into, piece.size).copy_(old.narrow(self.axis, piece.start, piece.size))
        return new


@dataclass(frozen=True)
class Surgery:
    """From one shape to another: how every parameter of the new model begins, by name, and what became of the old ones."""

    beginnings: Mapping[str, Beginning]
    account: Account

    @classmethod
    def between(cls, before: ModelSpec, after: ModelSpec) -> Surgery:
        """Raises: ConfigError naming the tensor that has no meaning in the new shape, with the remedy."""
        for name, told, remedy in _refusals(before, after):
            change = f"model.{name}: {_chosen(before, name)!r} -> {_chosen(after, name)!r}"
            raise ConfigError(f"{change}: {told}; {remedy}, or begin a new run")
        was, now = shapes(before), shapes(after)
        beginnings = {name: _beginning(name, was, now, before, after) for name in now}
        fates = [
            *(Fate(b.name, b.kind, was.get(b.name), b.shape, b.begins) for b in beginnings.values() if b.kind),
            *(Fate(name, "dropped", shape, None) for name, shape in was.items() if name not in now),
        ]
        matched = sum(beginning.kind is None for beginning in beginnings.values())
        return cls(beginnings, Account(matched, tuple(fates), tuple(_differs(before, after))))


def shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Of a model's parameters, in its own order. Takes no memory for them."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT(spec).named_parameters()}


def drawn(name: str, shape: Shape, std: float, seed: int) -> Tensor:
    """Values of mean 0 and this standard deviation, fp32: the same bits wherever and whenever they are drawn."""
    values = torch.empty(math.prod(shape))
    for number, chunk in enumerate(values.split(CHUNK)):
        key = f"surgery {seed} {name} {number}".encode()
        uniform = array("h", hashlib.shake_256(key).digest(2 * UNIFORMS * chunk.numel()))
        if sys.byteorder == "big":  # the stream is little-endian
            uniform.byteswap()
        total = (
            torch.frombuffer(uniform, dtype=torch.int16).view(-1, UNIFORMS).sum(dim=1, dtype=torch.int32)
            + UNIFORMS // 2
        )  # of mean 0, exact in fp32
        chunk.copy_(total.float() * (std / 2**16))
    return values.view(shape)


# -- how parameters begin ------------------------------------------------------------------------------------------------


def _beginning(
    name: str, was: Mapping[str, Shape], now: Mapping[str, Shape], before: ModelSpec, after: ModelSpec
) -> Beginning:
    shape = now[name]
    if was.get(name) == shape:
        return Beginning(name, shape, name, pieces=(Piece(0, 0, shape[0]),))
    if name in was:
        return _resized(name, was[name], shape, before, after)
    if name == "head.weight":
        whole = (Piece(0, 0, shape[0]),)
        return Beginning(
            name, shape, "embedding.weight", pieces=whole, kind="added", begins="a copy of embedding.weight"
        )
    return _added(name, shape, before, after)


def _added(name: str, shape: Shape, before: ModelSpec, after: ModelSpec) -> Beginning:
    block = _BLOCK.match(name)
    is_new_block = block is not None and int(block[1]) >= before.num_layers
    # Behind norms of their own, the outputs of a block would be of full size after its first update, if they were zero before.
    ends = _OUTER_NORMS if after.norm_placement == "sandwich" else _BLOCK_END
    if name.endswith(".bias") or (is_new_block and any(end in name for end in ends)):
        return Beginning(name, shape, kind="added", begins="zero")
    if len(shape) == 1:  # of a norm
        return Beginning(name, shape, rest=1.0, kind="added", begins="one")
    if is_new_block or name.startswith("transform."):
        std = initial_std(after, name)
        return Beginning(name, shape, rest=std, is_drawn=True, kind="added", begins="as in a new model")
    raise AssertionError(f"no rule says how {name} begins")


def _resized(name: str, old: Shape, new: Shape, before: ModelSpec, after: ModelSpec) -> Beginning:
    if old[1:] == new[1:] and name == "positions.weight":
        return _with_rows(name, old[0], new, initial_std(after, name))
    if ".feed_forward." in name and before.width == after.width:
        return _wider(name, new, before, after)
    if ".attention.qkv." in name and old[1:] == new[1:] and after.kv_width != before.kv_width:
        return _with_more_heads(name, new, before, after)
    raise AssertionError(f"no rule says how {name} goes from {old} to {new}")


def _with_rows(name: str, rows: int, shape: Shape, std: float) -> Beginning:
    kept: tuple[Piece, ...] = (Piece(0, 0, min(rows, shape[0])),)
    if shape[0] < rows:
        return Beginning(name, shape, name, pieces=kept, kind="cut", begins=f"its first {shape[0]} rows")
    told = f"rows from {rows} on as in a new model"
    return Beginning(name, shape, name, pieces=kept, rest=std, is_drawn=True, kind="padded", begins=told)


def _wider(name: str, shape: Shape, before: ModelSpec, after: ModelSpec) -> Beginning:
    """New hidden units read as those of a new model do, and are not listened to."""
    old, new = before.hidden_width, after.hidden_width
    if name.endswith("residual.weight"):
        whole = (Piece(0, 0, old),)
        return Beginning(name, shape, name, 1, whole, kind="padded", begins=f"columns from {old} on zero")
    parts = shape[0] // new  # gate and up lie in one tensor
    kept = tuple(Piece(part * old, part * new, old) for part in range(parts))
    where = f"rows from {old} on" + (" of either part" if parts > 1 else "")
    if name.endswith(".bias"):
        return Beginning(name, shape, name, pieces=kept, kind="padded", begins=f"{where} zero")
    std, told = initial_std(after, name), f"{where} as in a new model"
    return Beginning(name, shape, name, pieces=kept, rest=std, is_drawn=True, kind="padded", begins=told)


def _with_more_heads(name: str, shape: Shape, before: ModelSpec, after: ModelSpec) -> Beginning:
    """Each head of keys and of values as often as there now are for its group of queries."""
    size, heads, times = before.head_size, before.kv_width // before.head_size, after.kv_width // before.kv_width
    pieces = [Piece(0, 0, before.width)]
    for part in range(2):
        old, new = before.width + part * before.kv_width, before.width + part * after.kv_width
        pieces += [
            Piece(old + head * size, new + (head * times + copy) * size, size)
            for head in range(heads)
            for copy in range(times)
        ]
    told = f"each head of keys and values {times} times"
    return Beginning(name, shape, name, pieces=tuple(pieces), kind="repeated", begins=told)


# -- what that means -----------------------------------------------------------------------------------------------------


_OTHER = (
    "activation", "attention", "dropout", "norm_eps", "rope_theta", "rope_scaling", "rope_factor", "rope_original_tokens",
)  # fmt: skip


def _differs(before: ModelSpec, after: ModelSpec) -> Iterator[str]:
    """Why the new model computes something else."""
    for name, what in (
        ("qk_norm", "the norms of queries and keys"),
        ("embedding_norm", "the norm behind the embedding"),
        ("head_transform", "the layer before the head"),
    ):
        if getattr(before, name) != getattr(after, name):
            yield f"{what} {'begin' if getattr(after, name) else 'end'}" + ("" if what.startswith("the norms") else "s")
    if before.norm_placement != after.norm_placement:
        yield f"the norms behind attention and feed-forward {'begin' if after.norm_placement == 'sandwich' else 'end'}"
    if before.bias and not after.bias:
        yield "biases end"
    if after.num_layers < before.num_layers:
        yield f"blocks [{after.num_layers}:{before.num_layers}] end"
    if after.num_layers > before.num_layers and after.norm_placement == "post":
        yield f"blocks [{before.num_layers}:{after.num_layers}] normalise what they let through"
    yield from (f"model.{name} changes" for name in _OTHER if getattr(before, name) != getattr(after, name))
    if before.document_separator != after.document_separator:
        yield "model.document_masking changes"


# -- what is refused -----------------------------------------------------------------------------------------------------


def _refusals(before: ModelSpec, after: ModelSpec) -> Iterator[tuple[str, str, str]]:
    """Fields whose change has no meaning: name, what is wrong with which tensor, remedy."""
    other = ", so that the same tensors would mean something else"
    if before.width != after.width:
        name = "blocks.0.attention.qkv.weight"
        yield "width", f"{name} {_told(shapes(before)[name], shapes(after)[name])}", "keep it"
    if before.num_heads != after.num_heads:
        yield "num_heads", f"blocks.0.attention.qkv.weight would be cut into other heads{other}", "keep it"
    if before.position != after.position:
        yield "position", f"blocks.0.attention.qkv.weight has learned to find positions elsewhere{other}", "keep it"
    if before.norm != after.norm:
        yield "norm", f"blocks.0.attention_norm.weight would scale what another norm leaves{other}", "keep it"
    if before.norm_placement != after.norm_placement and "post" in (before.norm_placement, after.norm_placement):
        told = f"blocks.0.attention_norm.weight would stand elsewhere{other}"
        yield "norm_placement", told, "change between pre and sandwich"
    if before.activation != after.activation and "swiglu" in (before.activation, after.activation):
        yield "activation", "blocks.0.feed_forward has other matrices with a gate than without one", "keep it"
    if before.vocab_size != after.vocab_size:
        told = _told((before.vocab_size, before.width), (after.vocab_size, after.width))
        reason = "rows that no token has learned would take their share of every prediction"
        if after.vocab_size < before.vocab_size:
            reason = "the rows that went would take their share of every prediction with them"
        yield "vocab_size", f"embedding.weight {told}, and {reason}", "keep it"
    if after.hidden_width < before.hidden_width:
        told = _told((before.width, before.hidden_width), (after.width, after.hidden_width))
        reason = "nobody knows which of its columns can go"
        remedy = f"use {before.hidden_width} or more"
        yield "hidden", f"blocks.0.feed_forward.residual.weight {told}, and {reason}", remedy
    if after.kv_width % before.kv_width:
        told = "heads of keys and values in blocks.0.attention.qkv.weight can be repeated, all of them equally often"
        if after.kv_width < before.kv_width:
            told = "heads of keys and values in blocks.0.attention.qkv.weight can be repeated, and not be made fewer"
        yield "num_kv_heads", told, f"use a multiple of {before.kv_width // before.head_size}"
    if after.tied and not before.tied:
        told = "head.weight and embedding.weight were trained apart, and one of them would have to go"
        yield "tied", told, "leave it untied"


def _chosen(spec: ModelSpec, name: str) -> object:
    """What a field comes to, where it may be left open."""
    settled = {"hidden": spec.hidden_width, "num_kv_heads": spec.kv_width // spec.head_size}
    return settled.get(name, getattr(spec, name))


def _told(old: Shape, new: Shape) -> str:
    return f"{list(old)} is stored, and {list(new)} is wanted"
