"""A new run that goes on from the exact state of another: the state is copied, and the config may change.

Invariant: `config.yaml`, written last, is what makes the run. Before it there is none: parts, then what finishes the fork, then
`lineage.json`, which says whose folder this is to be, then the checkpoint's manifest; whatever interrupts that, the same command
finishes it, and from the lineage on it needs the parent no more. Everything that can be wrong with a request is found before
anything is written, but for a damaged part, which is found when it is copied. The parent is only read: it may be training, and
may delete the checkpoint meanwhile. Where the model gets another shape, the parts with what that changes are made anew, the
same bits each time; all others are copies.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from elastic_lm import __version__
from elastic_lm.checkpoint import registry, transfer
from elastic_lm.checkpoint.layout import FOLDER, MANIFEST, Manifest, Part, folder_of, is_part
from elastic_lm.config import CONFIG_FILE, RUN_NAME, RunConfig
from elastic_lm.engine.digest import checkpoint_digests
from elastic_lm.errors import AlreadyExistsError, CheckpointError, ConfigError, NotFoundError, StorageError
from elastic_lm.experiment import changes, standing
from elastic_lm.experiment.lineage import FILE, Lineage
from elastic_lm.experiment.origin import Origin
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.experiment.skip import Skip
from elastic_lm.experiment.unfinished import Unfinished, is_unfinished, path_of
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage

if TYPE_CHECKING:
    from elastic_lm.experiment.fit import Alteration

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
    """A fork that can be made: checked, and nothing written. `note`: what one should know about it.

    `alteration`: what has to be made of the state, where the model has another shape.
    """

    origin: Origin
    config: RunConfig
    lineage: Lineage
    note: str | None = None
    alteration: Alteration | None = None

    @classmethod
    def of(cls, request: Request, step: int | None) -> Draft:
        """Raises: ConfigError or CheckpointError when it cannot be made; DataError; StorageError."""
        origin = Origin.of(request.parent, step)
        after, found = _wanted(request, origin.config, origin.step)
        changes.check_beginning(found)
        changes.check_corpus(after)
        changes.check_vocabulary(origin.config, after)
        alteration = _check_state(origin, after, found)
        lineage = Lineage(
            run=request.name,
            parent=origin.parent,
            fingerprint=after.identity_fingerprint(),
            changes=found,
            skip=request.skip,
            time_s=time.time(),
            versions={"elastic-lm": __version__, "python": platform.python_version()},
            surgery=None if alteration is None else alteration.account,
        )
        notes = [
            changes.spike_note(after, origin.step),
            changes.order_note(found, after, origin.step),
            changes.corpus_note(found),
            None if alteration is None else alteration.note,
        ]
        return cls(origin, after, lineage, " ".join(filter(None, notes)) or None, alteration)

    @classmethod
    def of_unfinished(cls, folder: Storage, begun: Lineage, half: Unfinished) -> Draft:
        """One whose state lies in the new run's own folder already."""
        return cls(Origin(folder, begun.parent.name, half.manifest, half.before), half.config, begun)

    def manifest(self, parts: tuple[Part, ...]) -> Manifest:
        """Of the state in the new run. It has had no owner yet."""
        told = {"fingerprint": self.lineage.fingerprint, "config": self.config.model_dump(mode="json")}
        manifest = Manifest(self.origin.step, parts, {**self.origin.manifest.meta, **told})
        if self.alteration is None:
            return manifest
        digest = checkpoint_digests(manifest.step, manifest.tensors)
        return dataclasses.replace(manifest, meta={**manifest.meta, "digest": digest})


@dataclass(frozen=True)
class Forked:
    """A fork that is made."""

    url: str
    config: RunConfig
    lineage: Lineage


def fork(request: Request, on_draft: Callable[[Draft], None] = lambda draft: None) -> Forked:
    """Make the run. `on_draft` hears of it before anything is copied, and again should it begin with a newer state.

    Raises: ConfigError, CheckpointError, DataError, StorageError. Then there is no such run, and what has been written of it is
    in nobody's way.
    """
    _check_name(request.name)
    folder = request.folder
    begun = _begun(folder)
    if begun is not None:
        return _finish(folder, begun, request, on_draft)
    for _ in range(MOST_TRIES):
        draft = Draft.of(request, request.step)
        on_draft(draft)
        try:
            parts = _copied(draft, folder)
        except CheckpointError as error:
            raise _damaged(draft.origin, error) from error
        if parts is not None:
            return _make(folder, draft, parts)
    raise CheckpointError(
        f"run {request.parent.name} deletes its checkpoints faster than they can be copied: {MOST_TRIES} in a row were gone; "
        "raise its checkpoint.keep, or fork it when it has ended"
    )


def _check_name(name: str) -> None:
    """Before a folder is looked into that is not the new run's.    Raises: ConfigError."""
    if not re.fullmatch(RUN_NAME, name):
        raise ConfigError(
            f"name={name!r} is no run's name; choose up to 63 letters, digits, '.', '_' and '-', the first one a letter or digit"
        )


def _damaged(origin: Origin, error: CheckpointError) -> CheckpointError:
    url = origin.folder.child(folder_of(origin.step)).url
    others = standing.others(origin.folder, origin.step, Rewinds.if_readable(origin.folder))
    return CheckpointError(
        f"checkpoint {url} of run {origin.name} cannot be forked: {error}; fork another step: RUN@STEP ({others})"
    )


def _wanted(request: Request, before: RunConfig, step: int) -> tuple[RunConfig, tuple[changes.Change, ...]]:
    """The config of the fork of a run with the config `before`, and what that changes.    Raises: ConfigError; DataError."""
    after = changes.changed(before, request.overrides, name=request.name, storage=request.place)
    changes.check_steps(after, step)
    changes.check_skip(before, after, step)
    after = changes.leaving_out_more(after, request.skip, step)
    changes.check_reach(before, after, request.skip)
    return after, changes.changes(before, after)


# -- one that was cut short --------------------------------------------------------------------------------------------


def _finish(folder: Storage, begun: Lineage, request: Request, on_draft: Callable[[Draft], None]) -> Forked:
    """By the command that began it. The parent is asked only where the state here is not whole."""
    if begun.parent.url != request.parent.folder().url or request.step not in (None, begun.parent.step):
        raise _another(folder, begun)
    half = Unfinished.load(folder)
    if half is not None:
        after, found = _wanted(request, half.before, begun.parent.step)
        if (after.identity_fingerprint(), found) != (begun.fingerprint, begun.changes):
            raise _another(folder, begun)
        if half.damage(folder) is None:
            on_draft(Draft.of_unfinished(folder, begun, half))
            return _publish(folder, half, _check_free(folder))
    draft = _same_draft(folder, begun, request, is_known=half is not None)
    on_draft(draft)
    try:
        parts = _copied(draft, folder)
    except CheckpointError as error:
        raise _cannot_finish(folder, begun, error) from error
    if parts is None:
        raise _cannot_finish(folder, begun, "its checkpoint is gone")
    return _make(folder, draft, parts)


def _same_draft(folder: Storage, begun: Lineage, request: Request, *, is_known: bool) -> Draft:
    """The fork that was begun, made of its parent again. `is_known`: that the request is the one that began it.

    Raises: ConfigError, CheckpointError when that is not to be had.
    """
    try:
        draft = Draft.of(request, begun.parent.step)
    except CheckpointError as error:
        raise _cannot_finish(folder, begun, error) from error
    if begun.is_same_fork(draft.lineage):
        return dataclasses.replace(draft, lineage=begun)
    if is_known or begun.is_same_request(draft.lineage):
        raise _cannot_finish(folder, begun, f"{begun.parent.name} has changed since")
    raise _another(folder, begun)


def _copied(draft: Draft, folder: Storage) -> tuple[Part, ...] | None:
    """The parts, all of which are there now; None when the parent has deleted its own meanwhile."""
    origin, change = draft.origin, draft.alteration
    try:
        if change is None:
            transfer.copy_parts(origin.folder, origin.manifest, folder)
            return origin.manifest.parts
        from elastic_lm.checkpoint import alteration  # it imports torch

        return alteration.alter_parts(origin.folder, origin.manifest, folder, change.recipes, change.dropped)
    except NotFoundError:
        if origin.folder.exists(f"{folder_of(origin.step)}/{MANIFEST}"):  # the first that goes
            raise
        return None


def _make(folder: Storage, draft: Draft, parts: tuple[Part, ...]) -> Forked:
    """All parts are there."""
    half = Unfinished(draft.origin.config, draft.manifest(parts))
    half.store(folder, draft.lineage)
    names = _claim(folder, draft)
    return _publish(folder, Unfinished.load(folder) or half, names)


def _publish(folder: Storage, half: Unfinished, names: Sequence[str]) -> Forked:
    """The lineage is there, too. `names`: what was there when there was no run."""
    try:
        data = folder.read(FILE)
    except NotFoundError:  # taken back, for there was a run
        raise _taken(folder) from None
    config = half.config
    needed = path_of(data, half.manifest.step)
    _sweep(folder, half.manifest, names, needed)  # now: once the manifest is there, somebody may train
    registry.publish(folder, half.manifest)
    try:
        folder.create(CONFIG_FILE, config.to_yaml().encode())
    except AlreadyExistsError:
        raise _taken(folder) from None
    folder.delete(needed)
    return Forked(folder.url, config, Lineage.from_json(data))


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
        last = name.rpartition("/")[2]
        is_before = is_part(last) or is_unfinished(last)  # the lineage
        is_ours = name == FILE or (name.startswith(f"{FOLDER}/") and (is_claimed or is_before))
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
        "another; give that command again to finish it, or choose another --name"
    )


def _cannot_finish(folder: Storage, begun: Lineage, reason: object) -> CheckpointError:
    parent = begun.parent
    remedy = "delete that folder, and fork again"
    if registry.is_whole(folder, parent.step):  # which may be nowhere else any more
        remedy = "choose another --name, and keep that folder: it holds the whole state of that step"
    return CheckpointError(
        f"{folder.url} holds a fork of {parent.name} at step {parent.step} that is not finished, and cannot be: {reason}; "
        f"{remedy}"
    )


def _sweep(folder: Storage, manifest: Manifest, names: Sequence[str], needed: str) -> None:
    """Parts that an earlier attempt at this fork has left: of another state, so nobody will ask for them.

    `names`: what was there when there was no run; `needed`: one that stays.
    """
    path = folder_of(manifest.step)
    kept = {needed, *(f"{path}/{name}" for name in (MANIFEST, *(part.name for part in manifest.parts)))}
    for name in names:
        if name.startswith(f"{FOLDER}/") and name not in kept:
            folder.delete(name)


def _check_state(origin: Origin, after: RunConfig, found: tuple[changes.Change, ...]) -> Alteration | None:
    if not any(change.identity for change in found):
        return None
    from elastic_lm.experiment import fit  # it imports torch

    return fit.check(origin.manifest.tensors, origin.config, after, found, origin.step)
