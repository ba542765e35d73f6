"""What a run was found to be worth: `evaluations/step-NNNNNNNN/<task>.json` in its folder.

Each file is one task at one step (evaluation_file.py). Its `task_hash` says what was asked: tasks of one name with other hashes
are other tasks. Such a file is called `<task>-<hash>.json`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elastic_lm.evaluation_file import FOLDER, HASH_DIGITS, EvaluationFile, name_with_hash, place_of
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class Measured:
    """One metric of one task. `value` None: it is not finite. `low` and `high`: the ends of its interval, if there is one.

    `task_hash`: empty if unknown.
    """

    step: int
    task: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    task_hash: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return "not finite"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


def found(folder: Storage) -> list[Measured]:
    """All of a run, by step, task and metric.    Raises: StorageError."""
    places = [(place, path) for path in folder.list(f"{FOLDER}/") if (place := place_of(path))]
    each = [one for place, path in places for one in _of(folder, path, *place)]
    return sorted(each, key=lambda one: (one.step, one.task, one.task_hash, one.metric))


def names(measured: Iterable[Measured]) -> dict[tuple[str, str], str]:
    """(task, hash) -> what to call it: the task's name, with the hash's beginning where there are several of that name."""
    hashes: dict[str, set[str]] = {}
    for one in measured:
        hashes.setdefault(one.task, set()).add(one.task_hash)
    return {
        (task, each): task if len(of_task) == 1 else f"{task} ({each[:HASH_DIGITS] or 'unknown'})"
        for task, of_task in hashes.items()
        for each in of_task
    }


def _of(folder: Storage, path: str, step: int, file: str) -> Iterator[Measured]:
    written = EvaluationFile.load(folder, path)
    if written is None:
        return
    task_hash, task = written.body.get("task_hash"), written.body.get("task")
    task_hash = task_hash if isinstance(task_hash, str) else ""
    if not isinstance(task, str) or file != name_with_hash(task, task_hash):
        task = file
    for figure in written.figures:
        yield Measured(step, task, figure.name, figure.value, figure.low, figure.high, task_hash)
