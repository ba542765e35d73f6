"""Which checkpoints a run has, and which of them can be used.

Invariant: what is chosen is complete, every byte verified; what is damaged is told and never chosen again. Bytes only:
tensors are store.py's, so looking at a run's checkpoints needs no torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import safetensors
from safetensors import SafetensorError

from elastic_lm.checkpoint.layout import FOLDER, MANIFEST, SET_ASIDE, Entry, Manifest, Part, folder_of, steps_in
from elastic_lm.errors import AlreadyExistsError, CheckpointError, CheckpointVersionError, NotFoundError
from elastic_lm.storage import Storage

MOST_NAMED = 3  # checkpoints, where the one that was asked for is not there


Wanted = Callable[
    [int, dict[str, Any]], bool
]  # by its step and its `meta`, whether a checkpoint is still one of the run


def any_of_them(step: int, meta: dict[str, Any]) -> bool:
    """What is `Wanted` of a run that never went back."""
    return True


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint. `step`: steps that its state has applied. `meta`: what its writer said about it."""

    step: int
    url: str
    size_bytes: int
    meta: dict[str, Any]

    @classmethod
    def of(cls, storage: Storage, manifest: Manifest) -> CheckpointInfo:
        url = storage.child(folder_of(manifest.step)).url
        return cls(manifest.step, url, sum(part.size_bytes for part in manifest.parts), manifest.meta)


@dataclass(frozen=True)
class Found:
    """A checkpoint as it lies in storage. `complete`: it has a manifest that fits it; its parts were not read. `given up`: that
    too, and the run went back from it (experiment/standing.py), which nobody knows here.

    `reason`: why it cannot be used. `size_bytes` of its parts and `meta` are those of the manifest of a complete one.
    """

    step: int
    url: str
    state: Literal["complete", "unfinished", "damaged", "other version", "given up"]
    size_bytes: int | None = None
    reason: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Of the training before it, as its writer knew it."""
        loss = self.meta.get("loss")
        return loss if isinstance(loss, float) and math.isfinite(loss) else None


def found(storage: Storage) -> list[Found]:
    """All checkpoints of the run, by step. Reads their manifests only.    Raises: StorageError."""
    return [look(storage, step, paths) for step, paths in sorted(listed(storage).items())]


def nearest(step: int, complete: Sequence[int]) -> str:
    """What to say where a step is asked for that has no checkpoint: which of the `complete` ones are near."""
    if not complete:
        return "it has no other one either: wait for its first"
    near = sorted(sorted(complete, key=lambda other: abs(other - step))[:MOST_NAMED])
    *others, last = [f"{other}" for other in near]
    return f"the nearest are {', '.join(others)} and {last}" if others else f"the only one is of step {last}"


def listed(storage: Storage) -> dict[int, list[str]]:
    """Names of all objects of the run's checkpoints, by step."""
    return steps_in(storage.list(f"{FOLDER}/"))


def look(storage: Storage, step: int, paths: list[str]) -> Found:
    """At one of those that are `listed`. Reads its manifest only."""
    folder = storage.child(folder_of(step))
    if not _has(paths, step, MANIFEST):
        state: Literal["damaged", "unfinished"] = "damaged" if _has(paths, step, SET_ASIDE) else "unfinished"
        return Found(step, folder.url, state, reason=_why_unfinished(paths, step))
    try:
        manifest = _fitting(folder, step, paths)
    except CheckpointVersionError as error:
        return Found(step, folder.url, "other version", reason=str(error))
    except (CheckpointError, NotFoundError) as error:
        return Found(step, folder.url, "damaged", reason=str(error))
    return Found(step, folder.url, "complete", sum(part.size_bytes for part in manifest.parts), meta=manifest.meta)


def _fitting(folder: Storage, step: int, paths: list[str]) -> Manifest:
    """The manifest, when all of its parts are there. They are not read.    Raises: CheckpointError; StorageError."""
    manifest = _manifest(folder, step)
    if missing := [part.name for part in manifest.parts if not _has(paths, step, part.name)]:
        raise CheckpointError(f"part {missing[0]} is not there")
    return manifest


def newest_complete(
    storage: Storage,
    *,
    on_skipped: Callable[[str], None] | None = None,
    thorough: bool = True,
    check: Callable[[], None] = lambda: None,
    wanted: Wanted = any_of_them,
) -> CheckpointInfo | None:
    """The newest checkpoint of the run whose every byte is as it was written, or None.

    What is incomplete or damaged is passed over and told to `on_skipped` in a sentence. A damaged one loses its manifest
    (it is kept under another name), so that nobody chooses it and its step can be saved again. Not `thorough`: for a look
    before the run is one's own; parts are not read, and nothing is changed. `check` raises unless the run is one's own; it is
    called right before anything is changed. One that is not `wanted` is left alone.
    Raises: StorageError; CheckpointVersionError when one of another version is the newest, which is left alone; what `check`
    raises.
    """
    tell = on_skipped or (lambda sentence: None)
    for step, paths in sorted(listed(storage).items(), reverse=True):
        folder = storage.child(folder_of(step))
        if not _has(paths, step, MANIFEST):
            tell(f"Passing over checkpoint {folder.url}: {_why_unfinished(paths, step)}.")
            continue
        try:
            info = CheckpointInfo.of(storage, _fitting(folder, step, paths))
            if wanted(info.step, info.meta):
                return CheckpointInfo.of(storage, verified(storage, step)) if thorough else info
            tell(f"Passing over checkpoint {folder.url}: the run went back from its steps.")
        except CheckpointVersionError as error:
            raise CheckpointVersionError(
                f"checkpoint {folder.url} cannot be used: {error}; train on with the version of elastic-lm that wrote it, or "
                "choose another name for a new run"
            ) from error
        except (CheckpointError, NotFoundError) as error:
            tell(f"Passing over checkpoint {folder.url}: {error}.")
            if thorough:
                _set_aside(folder, check)
    return None


def manifest_of(storage: Storage, step: int) -> Manifest:
    """That of the checkpoint at `step`. Its parts are not read.    Raises: CheckpointError; NotFoundError; StorageError."""
    return _manifest(storage.child(folder_of(step)), step)


def verified(storage: Storage, step: int) -> Manifest:
    """The manifest of the checkpoint at `step`, when it and every part have the hashes that they should have.

    Raises: CheckpointError naming what is damaged; NotFoundError what is missing; StorageError.
    """
    folder = storage.child(folder_of(step))
    manifest = _manifest(folder, step)
    for part in manifest.parts:
        read_part(folder, part)
    return manifest


def is_whole(storage: Storage, step: int) -> bool:
    """Whether there is a checkpoint at `step`, every byte as it was written.    Raises: StorageError."""
    try:
        verified(storage, step)
    except (CheckpointError, NotFoundError):
        return False
    return True


def read_part(folder: Storage, part: Part) -> dict[str, bytearray]:
    """The part's tensors as bytes. One wrong read may be the network's fault, two are the object's.

    Raises: CheckpointError naming what is damaged; StorageError.
    """
    return _read_verified(folder, part)[1]


def part_data(folder: Storage, part: Part) -> bytes:
    """The part as it lies there, every tensor in it verified.    Raises: as `read_part`."""
    return _read_verified(folder, part)[0]


def write_part(folder: Storage, part: Part, data: bytes) -> None:
    """Store a part that may be there. It counts once a manifest names it.    Raises: StorageError."""
    try:
        folder.create(part.name, data)
    except AlreadyExistsError:
        # An earlier writer's, with the same content by its name; verified, because its storage may have failed since.
        if folder.read(part.name) != data:
            folder.write(part.name, data)


def publish(
    storage: Storage, manifest: Manifest, *, check: Callable[[], None] = lambda: None, wanted: Wanted = any_of_them
) -> CheckpointInfo:
    """Write the manifest, which makes the checkpoint complete. Its parts are stored already.

    A damaged checkpoint of the same step is replaced, and one of another state that an earlier owner of the run wrote: it
    did so when it had been superseded, which shows in the state where sums are not exact; and one that is not `wanted`. All other
    whole ones stay.
    Args: `check` raises unless the writer owns the run; it is called right before anything is written.
    Raises: CheckpointError when a whole one of another state or one of another version is there, or a part is not there;
    StorageError; what `check` raises.
    """
    folder = storage.child(folder_of(manifest.step))
    names = folder.list()
    if missing := [part.name for part in manifest.parts if part.name not in names]:
        raise CheckpointError(f"part {missing[0]} was stored in {folder.url} and is gone; the manifest was not written")
    check()
    try:
        folder.create(MANIFEST, manifest.to_json())
        return CheckpointInfo.of(storage, manifest)
    except AlreadyExistsError:
        pass
    try:
        there = verified(storage, manifest.step)
    except CheckpointVersionError as error:
        raise CheckpointVersionError(f"checkpoint {folder.url} is there already and was left alone: {error}") from error
    except (CheckpointError, NotFoundError):
        there = None
    if there is not None and there.tensors == manifest.tensors:
        return CheckpointInfo.of(storage, there)
    in_place = there is not None and wanted(there.step, there.meta)
    if there is not None and in_place and there.owner_epoch >= manifest.owner_epoch:
        raise CheckpointError(f"checkpoint {folder.url} is complete already and holds another state; it was left alone")
    check()
    folder.write(MANIFEST, manifest.to_json())
    return CheckpointInfo.of(storage, manifest)


def _has(paths: list[str], step: int, name: str) -> bool:
    return f"{folder_of(step)}/{name}" in paths


def _why_unfinished(paths: list[str], step: int) -> str:
    if _has(paths, step, SET_ASIDE):
        return "it was found to be damaged before"
    return "it has no manifest, so its writer did not finish"


def _manifest(folder: Storage, step: int) -> Manifest:
    manifest = Manifest.from_json(folder.read(MANIFEST))
    if manifest.step != step:
        raise CheckpointError(f"its manifest is that of step {manifest.step}")
    return manifest


def _read_verified(folder: Storage, part: Part) -> tuple[bytes, dict[str, bytearray]]:
    data = folder.read(part.name)
    try:
        return data, _tensors_of(part, data)
    except CheckpointError:
        data = folder.read(part.name)
        return data, _tensors_of(part, data)


def _tensors_of(part: Part, data: bytes) -> dict[str, bytearray]:
    if len(data) != part.size_bytes:
        raise CheckpointError(f"part {part.name} is damaged: {len(data)} bytes of {part.size_bytes}")
    try:
        tensors = dict(safetensors.deserialize(data))
    except SafetensorError as error:
        raise CheckpointError(f"part {part.name} is damaged: it is not safetensors ({error})") from error
    if tensors.keys() != part.tensors.keys():
        raise CheckpointError(f"part {part.name} is damaged: it holds other tensors than its manifest says")
    for name, entry in part.tensors.items():
        found = tensors[name]
        told = Entry(found["dtype"], tuple(found["shape"]), hashlib.sha256(found["data"]).hexdigest())
        if told != entry:
            raise CheckpointError(
                f"part {part.name} is damaged: {name} is {told.dtype} {list(told.shape)} with the sha256 {told.sha256[:16]}…, "
                f"not {entry.dtype} {list(entry.shape)} with {entry.sha256[:16]}…"
            )
    return {name: found["data"] for name, found in tensors.items()}


def _set_aside(folder: Storage, check: Callable[[], None]) -> None:
    """Reading takes minutes, in which another owner may have taken over and saved this step anew."""
    check()
    try:
        data = folder.read(MANIFEST)
    except NotFoundError:
        return
    folder.write(SET_ASIDE, data)
    folder.delete(MANIFEST)
