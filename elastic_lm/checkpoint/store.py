"""Saving and loading whole states: the only way back when every worker is lost.

Invariant: a checkpoint that has a manifest is complete, whoever died when. Parts are read and verified one at a time and
loaded by name, so a checkpoint fits any world size. Trade-off: everything is hashed with sha256 (1.2 GB/s) on both ways; a
state that silently changed costs more.
No pickle is written or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from elastic_lm import failpoints
from elastic_lm.checkpoint.layout import MANIFEST, Manifest, Part, folder_of, part_name
from elastic_lm.checkpoint.registry import CheckpointInfo, read_part, verified
from elastic_lm.errors import AlreadyExistsError, CheckpointError, NotFoundError
from elastic_lm.storage import Storage

PART_BYTES = 256 * 2**20  # one request's worth; a larger tensor is a part of its own


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and verified."""

    info: CheckpointInfo
    tensors: dict[str, Tensor]


def save(
    storage: Storage, step: int, tensors: dict[str, Tensor], meta: dict[str, Any], *, part_bytes: int = PART_BYTES
) -> CheckpointInfo:
    """Write the state that has applied `step` steps into the run's folder. `meta` must be JSON.

    Saving the same state twice is harmless, and so is what a writer that died half way has left behind.
    Raises: StorageError; CheckpointError when another complete state of this step is there. Then nothing has changed.
    """
    folder = storage.child(folder_of(step))
    parts = []
    for index, names in enumerate(_split(tensors, part_bytes)):
        # CUDA tensors arrive here as well; safetensors wants them dense and on the host.
        data = safetensors.torch.save({name: tensors[name].detach().cpu().contiguous() for name in names})
        sha256 = hashlib.sha256(data).hexdigest()
        part = Part(part_name(index, sha256), len(data), sha256, tuple(names))
        _write_part(folder, part, data)
        parts.append(part)
        failpoints.hit("save", step)
    manifest = Manifest(step, tuple(parts), dict(meta))
    _publish(storage, manifest)
    return CheckpointInfo.of(storage, manifest)


def load(storage: Storage, step: int) -> Checkpoint:
    """The checkpoint of `step`, every byte verified.    Raises: CheckpointError naming what is missing or damaged."""
    folder = storage.child(folder_of(step))
    try:
        manifest = Manifest.from_json(folder.read(MANIFEST))
        tensors: dict[str, Tensor] = {}
        for part in manifest.parts:
            tensors |= _tensors_of(part, read_part(folder, part))
    except (CheckpointError, NotFoundError) as error:
        raise CheckpointError(f"checkpoint {folder.url} cannot be used: {error}") from error
    return Checkpoint(CheckpointInfo.of(storage, manifest), tensors)


def _split(tensors: dict[str, Tensor], part_bytes: int) -> Iterator[list[str]]:
    """Names in alphabetical order, cut into parts."""
    names: list[str] = []
    size = 0
    for name in sorted(tensors):
        num_bytes = tensors[name].numel() * tensors[name].element_size()
        if names and size + num_bytes > part_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += num_bytes
    if names:
        yield names


def _write_part(folder: Storage, part: Part, data: bytes) -> None:
    try:
        folder.create(part.name, data)
    except AlreadyExistsError:
        # An earlier writer's, with the same content by its name; verified, because its storage may have failed since.
        if folder.read(part.name) != data:
            folder.write(part.name, data)


def _publish(storage: Storage, manifest: Manifest) -> None:
    folder = storage.child(folder_of(manifest.step))
    try:
        folder.create(MANIFEST, manifest.to_json())
        return
    except AlreadyExistsError:
        pass
    try:
        there = verified(storage, manifest.step)
    except (CheckpointError, NotFoundError):
        folder.write(MANIFEST, manifest.to_json())
        return
    if there.parts != manifest.parts:
        raise CheckpointError(f"checkpoint {folder.url} is complete already and holds another state; it was left alone")


def _tensors_of(part: Part, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"part {part.name} is not safetensors: {error}") from error
    if set(tensors) != set(part.tensors):
        raise CheckpointError(f"part {part.name} holds other tensors than its manifest says")
    return tensors
