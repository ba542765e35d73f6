"""Saving and loading whole states: the only way back when every worker is lost.

A state is saved in shares, by whoever holds it; a checkpoint is complete when its manifest is published (registry.py),
whoever died when. Parts are read and verified one at a time and loaded by name, so a checkpoint fits any world size.
Trade-off: everything is hashed with sha256 (1.2 GB/s) on both ways; a state that silently changed costs more. No pickle is
written or read.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from elastic_lm import failpoints
from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import MANIFEST, PART_BYTES, Entry, Manifest, Part, folder_of, part_name
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.errors import CheckpointError, NotFoundError
from elastic_lm.storage import Storage

AT_ONCE = 2  # parts: one is hashed while another is on its way
NAMES = {torch.float32: "F32"}  # of types, in safetensors' words; a state has no other


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    info: CheckpointInfo
    tensors: dict[str, Tensor]


def save(
    storage: Storage, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, part_bytes: int = PART_BYTES
) -> CheckpointInfo:
    """Write the state that has applied `step` steps into the run's folder, in one share. `meta` must be JSON.

    Saving the same state twice is harmless, and so is what a writer that died half way has left behind.
    Raises: StorageError; CheckpointError when another complete state of this step is there. Then nothing has changed.
    """
    parts = save_share(storage, step, tensors, part_bytes=part_bytes)
    return registry.publish(storage, Manifest(step, parts, dict(meta)))


def save_share(
    storage: Storage,
    step: int,
    tensors: dict[str, Tensor],
    *,
    share: int = 0,
    part_bytes: int = PART_BYTES,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[Part, ...]:
    """Write some tensors of a state. They count once a manifest names their parts.

    `cancelled` is looked at before each part; then `tensors` may be emptied.
    Raises: StorageError; CheckpointError when it was cancelled.
    """
    folder = storage.child(folder_of(step))

    def write(number: int, names: list[str]) -> Part:
        if cancelled():
            raise CheckpointError(f"the upload of step {step} was given up")
        part = write_part(folder, share, number, {name: tensors[name] for name in names})
        failpoints.hit("save", step)
        return part

    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix=f"save-{step}") as pool:
        return tuple(pool.map(write, itertools.count(), split(sizes, part_bytes)))


def write_part(folder: Storage, share: int, number: int, tensors: dict[str, Tensor]) -> Part:
    """Store these as one part in a checkpoint's folder.    Raises: StorageError."""
    # CUDA tensors arrive here as well; safetensors wants them dense and on the host.
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {name: _entry(tensor) for name, tensor in dense.items()}
    data = safetensors.torch.save(dense)
    part = Part(part_name(share, number, entries), len(data), entries)
    registry.write_part(folder, part, data)
    return part


def load(storage: Storage, step: int, *, on_part: Callable[[], None] = lambda: None, prefix: str = "") -> Checkpoint:
    """The checkpoint of `step`, every byte verified. `on_part` is called after each part, and may raise to end it.

    Args: `prefix`: of the names that are wanted; parts without any are not read.
    Raises: CheckpointError naming what is missing or damaged; StorageError.
    """
    folder = storage.child(folder_of(step))
    try:
        manifest = Manifest.from_json(folder.read(MANIFEST))
        tensors: dict[str, Tensor] = {}
        for part in manifest.parts:
            wanted = {name for name in part.tensors if name.startswith(prefix)}
            if wanted:
                found = read_part(folder, part)
                tensors |= {name: found[name] for name in found.keys() & wanted}
            on_part()
    except (CheckpointError, NotFoundError) as error:
        raise CheckpointError(f"checkpoint {folder.url} cannot be used: {error}") from error
    return Checkpoint(CheckpointInfo.of(storage, manifest), tensors)


def split(sizes: Mapping[str, int], part_bytes: int) -> Iterator[list[str]]:
    """Names in alphabetical order, cut into parts. `sizes` in bytes."""
    names: list[str] = []
    size = 0
    for name in sorted(sizes):
        if names and size + sizes[name] > part_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += sizes[name]
    if names:
        yield names


def _entry(tensor: Tensor) -> Entry:
    data = tensor.flatten().numpy().data if tensor.numel() else b""
    return Entry(NAMES[tensor.dtype], tuple(tensor.shape), hashlib.sha256(data).hexdigest())


def read_part(folder: Storage, part: Part) -> dict[str, Tensor]:
    """The tensors of a part, every byte verified.    Raises: CheckpointError naming what is damaged; StorageError."""
    data = registry.read_part(folder, part)
    types = {name: dtype for dtype, name in NAMES.items()}
    if unknown := {entry.dtype for entry in part.tensors.values()} - types.keys():
        raise CheckpointError(f"part {part.name} holds tensors of type {', '.join(sorted(unknown))}; a state is F32")
    return {
        name: torch.frombuffer(data[name], dtype=types[entry.dtype]).view(entry.shape)
        if data[name]
        else torch.empty(entry.shape, dtype=types[entry.dtype])
        for name, entry in part.tensors.items()
    }
