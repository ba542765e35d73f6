"""A new run that goes on from the exact state of another: the state is copied, and the config may change.

Invariant: `config.yaml`, written last, is what makes the run. Before it there is none: parts, then `lineage.json`, which says
whose folder this is to be, then the checkpoint's manifest; whatever interrupts that, the same command finishes it. Everything
that can be wrong with a request is found before anything is written. The parent is only read: it may be training, and may delete
the checkpoint meanwhile.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_lm import __version__
from elastic_lm.checkpoint import registry, transfer
from elastic_lm.checkpoint.layout import FOLDER, MANIFEST, Manifest, folder_of, is_part
from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.errors import AlreadyExistsError, CheckpointError, ConfigError, NotFoundError, StorageError
from elastic_lm.experiment import changes
from elastic_lm.experiment.lineage import FILE, Lineage, Skip
from elastic_lm.experiment.origin import Origin
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage

RUNS = "/runs/"
MOST_TRIES = 5  # for the newest checkpoint of a run that deletes it meanwhile


@dataclass(frozen=True)
class Request:
    """What is asked for. `step`: None for the newest. `overrides`: `a.b=value`; `skip`: ranges of batches to leave out.

    `storage`: where the new run goes; None: where its parent is.
    """

    parent: RunAddress
    name: str
    step: int | None = None
    storage: str | None = None
    overrides: Sequence[str] = ()
    skip: Skip = ()

    @property
    def place(self) -> str:
        """What the new run's config calls storage.    Raises: ConfigError."""
        if self.storage is not None:
            return self.storage
        place, found, _ = self.parent.folder().url.rpartition(RUNS)
        if not found:
            raise ConfigError(
                f"{self.parent.folder().url} is not STORAGE/runs/NAME, so it is not known where its fork goes; say --storage URL"
            )
        return place

    @property
    def folder(self) -> Storage:
        """That of the new run.    Raises: ConfigError."""
        try:
            return Storage.open(self.place).child(f"runs/{self.name}")
        except StorageError as error:
            raise ConfigError(str(error)) from error


@dataclass(frozen=True)
class Draft:
    """A fork that can be made: checked, and nothing written. `note`: what one should know about it."""

    origin: Origin
    config: RunConfig
    lineage: Lineage
    note: str | None = None

    @classmethod
    def of(cls, request: Request, step: int | None) -> Draft:
        """Raises: ConfigError or CheckpointError when it cannot be made; DataError; StorageError."""
        origin = Origin.of(request.parent, step)
        before = origin.config
        after = changes.changed(before, request.overrides, name=request.name, storage=request.place)
        changes.check_steps(after, origin.step)
        changes.check_skip(before, after, origin.step)
        after = changes.with_skip(after, request.skip, origin.step)
        found = changes.changes(before, after)
        changes.check_beginning(found)
        changes.check_vocabulary(before, after)
        _check_state(origin, after, found)
        lineage = Lineage(
            run=request.name,
            parent=origin.parent,
            fingerprint=after.identity_fingerprint(),
            changes=found,
            skip=request.skip,
            time_s=time.time(),
            versions={"elastic-lm": __version__, "python": platform.python_version()},
        )
        return cls(origin, after, lineage, changes.order_note(found, after, origin.step))

    @property
    def manifest(self) -> Manifest:
        """Of the same state, in the new run. It has had no owner yet."""
        told = {"fingerprint": self.lineage.fingerprint, "config": self.config.model_dump(mode="json")}
        return Manifest(self.origin.step, self.origin.manifest.parts, {**self.origin.manifest.meta, **told})


@dataclass(frozen=True)
class Forked:
    """A fork that is made."""

    url: str
    config: RunConfig
    lineage: Lineage
    num_parts: int
    size_bytes: int


def fork(request: Request, on_draft: Callable[[Draft], None] = lambda draft: None) -> Forked:
    """Make the run. `on_draft` hears of it before anything is copied, and again should it begin with a newer state.

    Raises: ConfigError, CheckpointError, DataError, StorageError. Then there is no such run, and what has been written of it is
    in nobody's way.
    """
    folder = request.folder
    begun = _begun(folder)
    if begun is not None:
        return _finish(folder, begun, request, on_draft)
    for _ in range(MOST_TRIES):
        draft = Draft.of(request, request.step)
        on_draft(draft)
        if _copied(draft, folder):
            return _make(folder, draft)
    raise CheckpointError(
        f"run {request.parent.name} deletes its checkpoints faster than they can be copied: {MOST_TRIES} in a row were gone; "
        "raise its checkpoint.keep, or fork it when it has ended"
    )


def _finish(folder: Storage, begun: Lineage, request: Request, on_draft: Callable[[Draft], None]) -> Forked:
    """A fork that was cut short, by the command that began it."""
    if begun.parent.url != request.parent.folder().url or request.step not in (None, begun.parent.step):
        raise _another(folder, begun)
    try:
        draft = Draft.of(request, begun.parent.step)
        if not begun.is_same_fork(draft.lineage):
            raise _another(folder, begun)
        on_draft(draft)
        is_copied = _copied(draft, folder)
    except CheckpointError as error:
        raise _cannot_finish(folder, begun, error) from error
    if not is_copied:
        raise _cannot_finish(folder, begun, "its checkpoint is gone")
    return _make(folder, draft)


def _copied(draft: Draft, folder: Storage) -> bool:
    """Whether all parts are there now; False when the parent has deleted them meanwhile."""
    origin = draft.origin
    try:
        transfer.copy_parts(origin.folder, origin.manifest, folder)
    except NotFoundError:
        if origin.folder.exists(f"{folder_of(origin.step)}/{MANIFEST}"):  # the first that goes
            raise
        return False
    return True


def _make(folder: Storage, draft: Draft) -> Forked:
    """All parts are there."""
    names = _claim(folder, draft)
    manifest = draft.manifest
    _sweep(folder, manifest, names)  # now: once the manifest is there, somebody may train
    info = registry.publish(folder, manifest)
    try:
        folder.create(CONFIG_FILE, draft.config.to_yaml().encode())
    except AlreadyExistsError:
        raise _taken(folder) from None
    lineage = Lineage.load(folder) or draft.lineage
    return Forked(folder.url, draft.config, lineage, len(manifest.parts), info.size_bytes)


def _claim(folder: Storage, draft: Draft) -> list[str]:
    """Write the lineage, unless it is there. A run that begins meanwhile finds it and ends, or is found here.

    Returns: what is there; no run is.    Raises: ConfigError when there is one, or another fork's lineage.
    """
    _check_free(folder)
    try:
        folder.create(FILE, draft.lineage.to_json())
    except AlreadyExistsError:
        begun = _begun(folder)
        if begun is None:  # deleted again, for there was a run
            raise _taken(folder) from None
        if not begun.is_same_fork(draft.lineage):
            raise _another(folder, begun) from None
        return _check_free(folder)
    try:
        return _check_free(folder)
    except ConfigError:
        if not folder.exists(f"{folder_of(draft.origin.step)}/{MANIFEST}"):  # else the same command has made this fork
            folder.delete(FILE)
        raise


# -- the new run's folder ----------------------------------------------------------------------------------------------


def _begun(folder: Storage) -> Lineage | None:
    """Of a fork that was cut short here; None where there is nothing, or nothing that counts.

    Raises: ConfigError when there is a run.
    """
    names = _check_free(folder)
    return Lineage.load(folder) if FILE in names else None


def _check_free(folder: Storage) -> list[str]:
    """Returns: what is there.    Raises: ConfigError unless that is a fork's that was cut short, or nothing that counts."""
    names = folder.list()
    is_claimed = FILE in names
    for name in names:
        is_ours = name == FILE or (name.startswith(f"{FOLDER}/") and (is_claimed or is_part(name.rpartition("/")[2])))
        if not is_ours:
            raise _taken(folder)
    return names


def _taken(folder: Storage) -> ConfigError:
    name = folder.url.rpartition("/")[2]
    return ConfigError(
        f"{folder.url} holds a run already; choose another --name, or go on with {name}: elastic-lm resume {folder.url}"
    )


def _another(folder: Storage, begun: Lineage) -> ConfigError:
    return ConfigError(
        f"{folder.url} holds a fork of {begun.parent.name} at step {begun.parent.step} that is not finished, and this is "
        "another; give that command again to finish it, or delete that folder, or choose another --name"
    )


def _cannot_finish(folder: Storage, begun: Lineage, reason: object) -> CheckpointError:
    return CheckpointError(
        f"{folder.url} holds a fork of {begun.parent.name} at step {begun.parent.step} that is not finished, and cannot be: "
        f"{reason}; delete that folder, and fork again"
    )


def _sweep(folder: Storage, manifest: Manifest, names: Sequence[str]) -> None:
    """Parts that an earlier attempt at this fork has left: of another state, so nobody will ask for them.

    `names`: what was there when there was no run.
    """
    path = folder_of(manifest.step)
    kept = {f"{path}/{name}" for name in (MANIFEST, *(part.name for part in manifest.parts))}
    for name in names:
        if name.startswith(f"{FOLDER}/") and name not in kept:
            folder.delete(name)


def _check_state(origin: Origin, after: RunConfig, found: tuple[changes.Change, ...]) -> None:
    if not any(change.identity for change in found):
        return
    from elastic_lm.experiment import fit  # it imports torch

    fit.check(origin.manifest.tensors, after, found, origin.step)
