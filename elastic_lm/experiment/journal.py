"""What storage holds of an experiment: `experiments/NAME/` beside the runs.

`plans/NNNNNNNN.json` are what the experiment was asked, the first one and each that has added to it; of each attempt there are
`attempts/NN-begun.json` and `attempts/NN-ended.json`. Invariant: all of them are created once and never changed, so whatever is
cut short is gone on with by whoever reads them, and no attempt is made twice. `page.html` is made of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from elastic_lm.config_text import flatten, inline
from elastic_lm.errors import AlreadyExistsError, ConfigError, NotFoundError, StorageError
from elastic_lm.experiment.attempt import Begun, Ended
from elastic_lm.storage import Storage

FOLDER = "experiments"
FORMAT, VERSION = "elastic-lm experiment", 1
Record = TypeVar("Record")
PLANS, ATTEMPTS, PAGE = "plans", "attempts", "page.html"


@dataclass(frozen=True)
class Setup:
    """What an experiment is, as far as its results depend on it. All are plain values.

    `base`: the base config's fields that change bits, and its steps. `tasks`: the hash of each. `attempts`: what each changes.
    """

    target: str
    tasks: Mapping[str, str]
    parent: str
    parent_step: int | None
    base: Mapping[str, Any]
    attempts: Sequence[Mapping[str, Any]]
    budget: Mapping[str, float | None]

    def to_json(self) -> bytes:
        body = {"format": FORMAT, "version": VERSION, "hash": self.hash, **self.__dict__}
        return json.dumps(body, indent=1).encode()

    @property
    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.__dict__, sort_keys=True).encode()).hexdigest()

    def problems(self, earlier: Setup) -> list[str]:
        """What keeps this from going on where `earlier` was: one `field: was -> is` each."""
        was, now = (flatten({"target": a.target, "tasks": a.tasks, "parent": a.parent, "parent_step": a.parent_step,
                             "base": a.base}) for a in (earlier, self))  # fmt: skip
        found = [f"{name}: {_told(was, name)} -> {_told(now, name)}" for name in sorted({*was, *now})
                 if was.get(name) != now.get(name)]  # fmt: skip
        for number, before in enumerate(earlier.attempts):
            after = self.attempts[number] if number < len(self.attempts) else None
            if before != after:
                found.append(f"attempt {number}: {inline(before)} -> {'none' if after is None else inline(after)}")
        for name, limit in earlier.budget.items():
            raised = self.budget.get(name)
            if raised is not None and (limit is None or raised < limit):
                found.append(f"budget.{name}: {'none' if limit is None else f'{limit:g}'} -> {raised:g}, which is less")
        return found


class Journal:
    """That of one experiment. Every method raises StorageError when storage fails."""

    def __init__(self, folder: Storage) -> None:
        """`folder`: STORAGE/experiments/NAME."""
        self.folder = folder

    # -- what was asked ----------------------------------------------------------------------------------------------

    def check(self, setup: Setup) -> None:
        """Raises: ConfigError, with what differs, when the experiment began as another."""
        newest, _ = self._newest()
        problems = [] if newest is None else setup.problems(newest)
        if problems:
            lines = "\n  ".join(problems)
            raise ConfigError(
                f"the experiment in {self.folder.url} is another one than this plan:\n  {lines}\nPut these back, or choose "
                "another name. Attempts may be added at the end, and the budget may be raised"
            )

    def adopt(self, setup: Setup) -> None:
        """Write it down, unless it is what the experiment is already. Its owner does that, once it is checked."""
        newest, number = self._newest()
        if newest is None or newest.hash != setup.hash:
            self._create(f"{PLANS}/{number:08d}.json", setup.to_json())

    def _newest(self) -> tuple[Setup | None, int]:
        """With the number of the next."""
        names = self.folder.list(f"{PLANS}/")
        return (_record(self.folder, names[-1], Setup) if names else None), len(names)

    # -- attempts ----------------------------------------------------------------------------------------------------

    def records(self) -> tuple[dict[int, Begun], dict[int, Ended]]:
        """By number: how each has begun, and what came of those that have ended.    Raises: ConfigError when one is damaged."""
        begun: dict[int, Begun] = {}
        ended: dict[int, Ended] = {}
        for name in self.folder.list(f"{ATTEMPTS}/"):
            if name.endswith("-begun.json"):
                beginning = _record(self.folder, name, Begun)
                begun[beginning.number] = beginning
            elif name.endswith("-ended.json"):
                end = _record(self.folder, name, Ended)
                ended[end.number] = end
        return begun, ended

    def begin(self, record: Begun) -> None:
        self._create(f"{ATTEMPTS}/{record.number:02d}-begun.json", _data(record.as_json()))

    def end(self, record: Ended) -> None:
        self._create(f"{ATTEMPTS}/{record.number:02d}-ended.json", _data(record.as_json()))

    def write_page(self, page: str) -> str:
        """Unless it is there already.    Returns: where it is."""
        try:
            is_there = self.folder.read(PAGE) == page.encode()
        except NotFoundError:
            is_there = False
        if not is_there:
            self.folder.write(PAGE, page.encode())
        return f"{self.folder.url}/{PAGE}"

    def _create(self, name: str, data: bytes) -> None:
        """Raises: StorageError when it is there: only an owner writes here, and none does it twice."""
        try:
            self.folder.create(name, data)
        except AlreadyExistsError as error:
            raise StorageError(
                f"{self.folder.url}/{name} was written by somebody else meanwhile; give the command again"
            ) from error


def _told(values: Mapping[str, Any], name: str) -> str:
    return inline(values[name]) if name in values else "none"


def _data(values: Mapping[str, Any]) -> bytes:
    return (json.dumps({"format": FORMAT, "version": VERSION, **values}, indent=1) + "\n").encode()


def _record(folder: Storage, name: str, kind: type[Record]) -> Record:
    """Raises: ConfigError when it is not what was written there."""
    try:
        body = json.loads(folder.read(name))
        told = body.pop("format"), body.pop("version")
        body.pop("hash", None)
        if told != (FORMAT, VERSION):
            raise ValueError(f"it is of {told[0]} {told[1]}, and this is version {VERSION}")
        return kind(**body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{folder.url}/{name} cannot be read: {type(error).__name__}: {error}; read it with the version of elastic-lm that "
            "wrote it, or choose another name for the experiment"
        ) from error
