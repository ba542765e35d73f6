"""A name for a whole state: one sha256 over the hashes of its tensors, however the state is cut and whoever hashed what."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

Hashed = tuple[str, Sequence[int], str]  # name, shape, and the sha256 of the bytes as hexadecimal digits


def state_digest(next_step: int, tensors: Iterable[Hashed]) -> str:
    """sha256 in hex, of the state that `next_step` is the next step of."""
    lines = [f"{name} {list(shape)} {sha256}\n" for name, shape, sha256 in sorted(tensors)]
    return hashlib.sha256("".join([f"next_step={next_step}\n", *lines]).encode()).hexdigest()
