"""What storage holds of an experiment: `experiments/NAME/` beside the runs.

`plans/NNNNNNNN.json` are what the experiment was asked, the first one and each that has added to it; of each attempt there are
`attempts/NN-begun.json`, `attempts/NN-ended.json` and, for each time that it was interrupted by what may pass,
`attempts/NN-trouble-KKKK.json`. Invariant: all of them are created once and never changed, so whatever is cut short is gone on
with by whoever reads them, and no attempt is made twice. `page.html` is made of them and of what is under way.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from elastic_lm.config_text import flatten, inline
from elastic_lm.errors import AlreadyExistsError, ConfigError, NotFoundError, StorageError
from elastic_lm.experiment.attempt import Begun, Ended, Trouble
from elastic_lm.experiment.target import exact
from elastic_lm.storage import Storage

FOLDER = "experiments"
FORMAT, VERSION = "elastic-lm experiment", 1
Record = TypeVar("Record")
PLANS, ATTEMPTS, PAGE = "plans", "attempts", "page.html"
NOTES = {
    "base.data.manifest": " (the corpus at data.tokens is not the one that the experiment began with)"
}  # on what differs
_PLAN = re.compile(rf"{PLANS}/(\d{{8}})\.json")
_ATTEMPT = re.compile(rf"{ATTEMPTS}/\d{{2,}}-(begun|ended|trouble)(-\d{{4}})?\.json")


@dataclass(frozen=True)
class Setup:
    """What an experiment is, as far as its results depend on it. All are plain values.

    `base`: what changes bits of the base config, or where it ends. `tasks`: the hash of each. `attempts`: what each changes.
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
        found = [f"{name}: {_told(was, name)} -> {_told(now, name)}{NOTES.get(name, '')}" for name in sorted({*was, *now})
                 if was.get(name) != now.get(name)]  # fmt: skip
        for number, before in enumerate(earlier.attempts):
            after = self.attempts[number] if number < len(self.attempts) else None
            if before != after:
                found.append(f"attempt {number}: {inline(before)} -> {'none' if after is None else inline(after)}")
        for name, limit in earlier.budget.items():
            raised = self.budget.get(name)
            if raised is not None and (limit is None or raised < limit):
                found.append(
                    f"budget.{name}: {'none' if limit is None else exact(limit)} -> {exact(raised)}, which is less"
                )
        return found


@dataclass(frozen=True)
class Records:
    """Of attempts, by number: how each has begun, what came of those that have ended, and their troubles, in order."""

    begun: dict[int, Begun]
    ended: dict[int, Ended]
    troubles: dict[int, list[Trouble]]


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
        found = [match for name in sorted(self.folder.list(f"{PLANS}/")) if (match := _PLAN.fullmatch(name))]
        if not found:
            return None, 0
        return _record(self.folder, found[-1][0], Setup), int(found[-1][1]) + 1

    # -- attempts ----------------------------------------------------------------------------------------------------

    def records(self) -> Records:
        """All that is written.    Raises: ConfigError when one is damaged."""
        found = Records({}, {}, {})
        for name in sorted(self.folder.list(f"{ATTEMPTS}/")):
            match = _ATTEMPT.fullmatch(name)
            if match is None:
                continue
            if match[1] == "begun":
                beginning = _record(self.folder, name, Begun)
                found.begun[beginning.number] = beginning
            elif match[1] == "ended":
                end = _record(self.folder, name, Ended)
                found.ended[end.number] = end
            else:
                trouble = _record(self.folder, name, Trouble)
                found.troubles.setdefault(trouble.number, []).append(trouble)
        return found

    def begin(self, record: Begun) -> None:
        self._create(f"{ATTEMPTS}/{record.number:02d}-begun.json", _data(record))

    def trouble(self, record: Trouble, earlier: int) -> None:
        """`earlier`: how many troubles the attempt had before."""
        self._create(f"{ATTEMPTS}/{record.number:02d}-trouble-{earlier:04d}.json", _data(record))

    def end(self, record: Ended) -> None:
        self._create(f"{ATTEMPTS}/{record.number:02d}-ended.json", _data(record))

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


def _data(record: Begun | Ended | Trouble) -> bytes:
    return (json.dumps({"format": FORMAT, "version": VERSION, **asdict(record)}, indent=1) + "\n").encode()


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
