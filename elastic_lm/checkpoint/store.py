"""Saving and loading whole states: the only way back when every worker is lost.

Invariant: a checkpoint that has a manifest is complete, whoever died when; one that lost it again (damage found while
reading) is never chosen. Parts are read and verified one at a time and loaded by name, so a checkpoint fits any world
size. Trade-off: everything is hashed with sha256 (1.2 GB/s) on both ways; a state that silently changed costs more.
No pickle is written or read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from elastic_lm import failpoints
from elastic_lm.checkpoint.layout import FOLDER, MANIFEST, SET_ASIDE, Manifest, Part, folder_of, part_name, steps_in
from elastic_lm.errors import AlreadyExistsError, CheckpointError, NotFoundError
from elastic_lm.storage import Storage

PART_BYTES = 256 * 2**20  # one request's worth; a larger tensor is a part of its own


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint. `step`: steps that its state has applied. `meta`: what its writer said about it."""

    step: int
    url: str
    size_bytes: int
    meta: dict[str, Any]


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
    _publish(folder, manifest)
    return _info(storage, manifest)


def load(storage: Storage, step: int) -> Checkpoint:
    """The checkpoint of `step`, every byte verified.    Raises: CheckpointError naming what is missing or damaged."""
    folder = storage.child(folder_of(step))
    try:
        manifest = Manifest.from_json(folder.read(MANIFEST))
        tensors: dict[str, Tensor] = {}
        for part in manifest.parts:
            tensors |= _tensors_of(part, _read_part(folder, part))
    except (CheckpointError, NotFoundError) as error:
        raise CheckpointError(f"checkpoint {folder.url} cannot be used: {error}") from error
    return Checkpoint(_info(storage, manifest), tensors)


def newest_complete(storage: Storage, *, on_skipped: Callable[[str], None] | None = None) -> CheckpointInfo | None:
    """The newest checkpoint of the run whose every byte is as it was written, or None.

    What is incomplete or damaged is passed over and told to `on_skipped` in a sentence. A damaged one loses its manifest
    (it is kept under another name), so that nobody chooses it and its step can be saved again.    Raises: StorageError.
    """
    tell = on_skipped or (lambda sentence: None)
    for step, paths in sorted(steps_in(storage.list(f"{FOLDER}/")).items(), reverse=True):
        folder = storage.child(folder_of(step))
        if f"{folder_of(step)}/{MANIFEST}" not in paths:
            tell(f"Passing over checkpoint {folder.url}: it has no manifest, so its writer did not finish.")
            continue
        try:
            manifest = _verified(folder, step)
        except (CheckpointError, NotFoundError) as error:
            tell(f"Passing over checkpoint {folder.url}: {error}.")
            _set_aside(folder)
            continue
        return _info(storage, manifest)
    return None


def prune(storage: Storage, *, keep: int) -> list[int]:
    """Delete all but the `keep` newest complete checkpoints, and what unfinished older ones have left.

    An unfinished one newer than every complete one may be about to finish and stays.    Returns: the steps deleted.
    """
    found = steps_in(storage.list(f"{FOLDER}/"))
    complete = sorted(step for step, paths in found.items() if f"{folder_of(step)}/{MANIFEST}" in paths)
    if not complete:
        return []
    kept = complete[-keep:]
    deleted = [step for step in sorted(found) if step not in kept and step < complete[-1]]
    for step in deleted:
        # The manifest goes first: whatever interrupts us leaves an unfinished checkpoint, not a damaged one.
        for path in sorted(found[step], key=lambda path: not path.endswith(MANIFEST)):
            storage.delete(path)
    return deleted


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


def _publish(folder: Storage, manifest: Manifest) -> None:
    try:
        folder.create(MANIFEST, manifest.to_json())
        return
    except AlreadyExistsError:
        pass
    try:
        there = _verified(folder, manifest.step)
    except (CheckpointError, NotFoundError):
        folder.write(MANIFEST, manifest.to_json())
        return
    if there.parts != manifest.parts:
        raise CheckpointError(f"checkpoint {folder.url} is complete already and holds another state; it was left alone")


def _verified(folder: Storage, step: int) -> Manifest:
    manifest = Manifest.from_json(folder.read(MANIFEST))
    if manifest.step != step:
        raise CheckpointError(f"its manifest is that of step {manifest.step}")
    for part in manifest.parts:
        _read_part(folder, part)
    return manifest


def _read_part(folder: Storage, part: Part) -> bytes:
    """The part's bytes. One wrong read may be the network's fault, two are the object's."""
    for _ in range(2):
        data = folder.read(part.name)
        if len(data) == part.size_bytes and hashlib.sha256(data).hexdigest() == part.sha256:
            return data
    raise CheckpointError(
        f"part {part.name} is damaged: {len(data)} bytes of {part.size_bytes}, or another sha256 than {part.sha256[:16]}…"
    )


def _tensors_of(part: Part, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except SafetensorError as error:
        raise CheckpointError(f"part {part.name} is not safetensors: {error}") from error
    if set(tensors) != set(part.tensors):
        raise CheckpointError(f"part {part.name} holds other tensors than its manifest says")
    return tensors


def _set_aside(folder: Storage) -> None:
    try:
        data = folder.read(MANIFEST)
    except NotFoundError:
        return
    folder.write(SET_ASIDE, data)
    folder.delete(MANIFEST)


def _info(storage: Storage, manifest: Manifest) -> CheckpointInfo:
    url = storage.child(folder_of(manifest.step)).url
    return CheckpointInfo(manifest.step, url, sum(part.size_bytes for part in manifest.parts), manifest.meta)
