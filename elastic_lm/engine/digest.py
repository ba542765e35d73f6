"""A name for a whole state: one sha256 over the hashes of its tensors, however the state is cut and whoever hashed what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

PARAMETERS = "parameters/"  # of tensors' names: the weights, which are told apart from moments
Hashed = tuple[str, Sequence[int], str]  # name, shape, and the sha256 of the bytes as hexadecimal digits


def state_digest(next_step: int, tensors: Iterable[Hashed]) -> str:
    """sha256 in hex, of the state that `next_step` is the next step of."""
    lines = [f"{name} {list(shape)} {sha256}\n" for name, shape, sha256 in sorted(tensors)]
    return hashlib.sha256("".join([f"next_step={next_step}\n", *lines]).encode()).hexdigest()


class HashedTensor(Protocol):
    """What a checkpoint says of a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...

    @property
    def sha256(self) -> str: ...


def checkpoint_digests(next_step: int, tensors: Mapping[str, HashedTensor]) -> dict[str, str]:
    """`state`: of all tensors, and `weights`: of the parameters alone. By name, as a checkpoint's manifest has them."""
    hashed = [(name, tensor.shape, tensor.sha256) for name, tensor in tensors.items()]
    weights = [each for each in hashed if each[0].startswith(PARAMETERS)]
    return {"state": state_digest(next_step, hashed), "weights": state_digest(next_step, weights)}
