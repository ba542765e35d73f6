"""What a run was found to be worth: `evaluations/step-NNNNNNNN/<task>.json` in its folder.

Each file is one task at one step: `{"metrics": {name: {"value": x, "low": x, "high": x}}}`, with whatever else its writer says.
`task_hash` says what was asked: tasks of one name with other hashes are other tasks. Such a file is called `<task>-<hash>.json`.
What is not of this shape is passed over: a comparison is not to fail for one file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from elastic_lm.errors import NotFoundError
from elastic_lm.evaluation_file import FOLDER, HASH_DIGITS, name_with_hash, number, place_of
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
    try:
        body = json.loads(folder.read(path))
    except (ValueError, RecursionError, NotFoundError):
        return
    if not isinstance(body, dict):
        return
    task_hash, task, metrics = (body.get(name) for name in ("task_hash", "task", "metrics"))
    task_hash = task_hash if isinstance(task_hash, str) else ""
    if not isinstance(task, str) or file != name_with_hash(task, task_hash):
        task = file
    for name, told in metrics.items() if isinstance(metrics, dict) else ():
        values = told if isinstance(told, dict) else {"value": told}
        value = number(values.get("value"))
        if value is not None or _is_not_finite(values.get("value", "")):
            low, high = number(values.get("low")), number(values.get("high"))
            yield Measured(step, task, str(name), value, low, high, task_hash)


def _is_not_finite(value: object) -> bool:
    """As `evaluate` writes it, or as a number of its own that JSON has not."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))
