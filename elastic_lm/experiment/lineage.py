"""Where a run is from: `lineage.json` in the folder of a fork.

It names the parent's state by its digests, says what was changed, and carries the parent's own lineage, so that the chain can be
told when the ancestors are gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from elastic_lm.config import CONFIG_FILE
from elastic_lm.errors import CheckpointError, NotFoundError
from elastic_lm.experiment.skip import Skip, ranges_told, skip_of
from elastic_lm.model.account import Account
from elastic_lm.storage import Storage

FILE = "lineage.json"  # in the run's folder
FORMAT, VERSION = "elastic-lm lineage", 2
NESTED = 1  # the version before


@dataclass(frozen=True)
class Change:
    """One field that the fork has changed, with its values as JSON has them. `identity`: whether it changes bits."""

    name: str
    before: Any
    after: Any
    identity: bool = True

    def __str__(self) -> str:
        return f"{self.name}: {self.before!r} -> {self.after!r}"


@dataclass(frozen=True)
class WentBack:
    """One time that a run went back before it was forked: its n-th rewind, what for, and the ranges of batches left out since."""

    number: int
    cause: str
    to_step: int
    left_out: Skip

    def __str__(self) -> str:
        batches = ranges_told(self.left_out)
        return f"rewind {self.number}: back to step {self.to_step}, leaving out batches {batches} ({self.cause})"


@dataclass(frozen=True)
class Parent:
    """The state that a fork begins with. `step`: steps that it has applied. `digest`: sha256 of `state` and of `weights`.

    `lineage`: where the parent is from itself. `rewinds`: all that it had made by then, those from later steps, too: the fork
    leaves out the same batches.
    """

    url: str
    name: str
    step: int
    digest: dict[str, str]
    fingerprint: str
    lineage: Lineage | None = None
    rewinds: tuple[WentBack, ...] = ()


@dataclass(frozen=True)
class Lineage:
    """Of one fork. `fingerprint`: of its identity. `skip`: ranges of batches that it leaves out beside its parent's.

    `time_s`: unix time at which it was made; `versions`: of what made it. `surgery`: what became of the parameters, where the
    model has another shape than the parent's.
    """

    run: str
    parent: Parent
    fingerprint: str
    changes: tuple[Change, ...] = ()
    skip: Skip = ()
    time_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    surgery: Account | None = None

    def is_same_fork(self, other: Lineage) -> bool:
        """Whether both make the same run of the same state."""
        mine, theirs = self.parent, other.parent
        same_state = (mine.url, mine.step, mine.digest) == (theirs.url, theirs.step, theirs.digest)
        ours, others = ((link.fingerprint, link.changes, link.surgery) for link in (self, other))
        return same_state and ours == others

    def is_same_request(self, other: Lineage) -> bool:
        """Whether both ask the same of the same state, whatever the parent's config was."""
        mine, theirs = (
            (link.parent.url, link.parent.step, link.parent.digest, link.skip, link._asked) for link in (self, other)
        )
        return mine == theirs

    @property
    def _asked(self) -> dict[str, Any]:
        return {change.name: change.after for change in self.changes if change.identity}

    def chain(self) -> Iterator[Lineage]:
        """This fork, then that by which its parent came to be, and so on."""
        link: Lineage | None = self
        while link is not None:
            yield link
            link = link.parent.lineage

    def trained_elsewhere(self, manifest: str) -> list[Parent]:
        """The ancestors that trained on another corpus than this one, the youngest first."""
        found, corpus = [], manifest
        for link in self.chain():
            corpus = next((change.before for change in link.changes if change.name == "data.manifest"), corpus)
            begun = link.parent.lineage
            if corpus != manifest and link.parent.step > (begun.parent.step if begun is not None else 0):
                found.append(link.parent)
        return found

    # -- reading and writing -----------------------------------------------------------------------------------------

    def body(self) -> dict[str, Any]:
        """As JSON has it: this fork, and its ancestors' in a list, the youngest first. No deeper however long the chain is."""
        own, *ancestors = (_own_body(link) for link in self.chain())
        return {**own, "ancestors": ancestors}

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, "version": VERSION, **self.body()}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Lineage:
        """The inverse of `to_json`.    Raises: ValueError, KeyError, TypeError or AttributeError on anything else."""
        body = json.loads(data)
        form, version = body.pop("format"), body.pop("version")
        if form != FORMAT or version not in (NESTED, VERSION):
            raise ValueError(f"it is no {FORMAT} of version {VERSION}")
        lineage: Lineage | None = None
        for link in reversed(_unnested(body) if version == NESTED else [body, *body.pop("ancestors")]):
            lineage = _lineage(link, lineage)
        assert lineage is not None
        return lineage

    @classmethod
    def load(cls, folder: Storage) -> Lineage | None:
        """That of the run in this folder; None when it is no fork.    Raises: CheckpointError when damaged; StorageError."""
        try:
            return cls.from_json(folder.read(FILE))
        except NotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder.url}/{FILE} cannot be read: {type(error).__name__}: {error}; training goes on without it as long as "
                "there is a checkpoint, a fork does not"
            ) from error


def step_of_fork(folder: Storage) -> int:
    """At which the run in this folder began; 0 when it is no fork, or nobody can tell.    Raises: StorageError."""
    try:
        lineage = Lineage.load(folder)
    except CheckpointError:
        return 0
    return 0 if lineage is None else lineage.parent.step


def check_fork_has_its_state(folder: Storage, newest_step: int | None, reasons: Sequence[str] = ()) -> int:
    """A fork begins with its parent's state or not at all: without one its first step would be trained from other weights.

    Args: `newest_step`: of the newest checkpoint that can be used; `reasons`: sentences about those that were passed over.
    Returns: the step at which it begins; 0: it is no fork, or nobody can tell.
    Raises: CheckpointError when the run in this folder is a fork and that is none, or older than the fork; StorageError.
    """
    try:
        lineage = Lineage.load(folder)
    except CheckpointError:
        if newest_step is None:
            raise
        return 0
    if lineage is None:
        return 0
    if newest_step is not None and newest_step >= lineage.parent.step:
        return lineage.parent.step
    parent = lineage.parent
    command = f"elastic-lm fork {parent.url}@{parent.step} --name {lineage.run}"
    if not folder.exists(CONFIG_FILE):
        raise CheckpointError(
            f"run {lineage.run} in {folder.url} is a fork of {parent.name} at step {parent.step} that is not finished; give the "
            f"command again that began it: {command}, with its --set and --skip"
        )
    there = "no checkpoint can be used" if newest_step is None else f"the newest checkpoint is of step {newest_step}"
    told = "".join(f" {reason}" for reason in reasons)
    raise CheckpointError(
        f"run {lineage.run} in {folder.url} is a fork of {parent.name} at step {parent.step}, and {there}: the state it was "
        f"forked with is damaged or not there; fork again: {command}, with its --set and --skip, after deleting "
        f"{folder.url}.{told}"
    )


def _own_body(link: Lineage) -> dict[str, Any]:
    body = asdict(replace(link, parent=replace(link.parent, lineage=None)))
    del body["parent"]["lineage"]
    return body


def _unnested(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Of an earlier version, in which each link held the one before it."""
    links, link = [], body
    while link is not None:
        links.append(link)
        link = link["parent"].pop("lineage")
    return links


def _lineage(body: dict[str, Any], before: Lineage | None) -> Lineage:
    parent, changes, surgery = body.pop("parent"), body.pop("changes"), body.pop("surgery", None)
    rewinds = tuple(WentBack(**{**each, "left_out": skip_of(each["left_out"])}) for each in parent.pop("rewinds", ()))
    return Lineage(
        **{**body, "skip": skip_of(body["skip"])},
        parent=Parent(**parent, lineage=before, rewinds=rewinds),
        changes=tuple(Change(**change) for change in changes),
        surgery=None if surgery is None else Account.from_body(surgery),
    )
