"""Where the result of a task lies in its run's folder: `evaluations/step-00001000/TASK.json`.

Where another task of the same name has its result there: `TASK-HASH.json`, with the first digits of the task's hash. `evaluate`
writes such files, `experiment` and `monitor` read them; none needs another.

A file is `{"metrics": {name: {"value": x, "low": x, "high": x}}}`, or a number alone in place of such a figure, with whatever
else its writer says. What is not of this shape is passed over: nothing is to fail for one file.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from elastic_lm.errors import NotFoundError
from elastic_lm.storage import Storage

FOLDER = "evaluations"
HASH_DIGITS = 8
_PATH = re.compile(rf"{FOLDER}/step-(\d{{8,}})/([^/]+)\.json")


@dataclass(frozen=True)
class Figure:
    """`value` None: it is not finite. `low` and `high`: the ends of its interval, if there is one."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class EvaluationFile:
    """What one says. `body`: all of it, for what else its writer may have told."""

    figures: tuple[Figure, ...]
    body: dict[str, Any]

    @classmethod
    def load(cls, folder: Storage, path: str) -> EvaluationFile | None:
        """None where the file is gone, or no result.    Raises: StorageError."""
        try:
            body = json.loads(folder.read(path))
        except (ValueError, RecursionError, NotFoundError):
            return None
        metrics = body.get("metrics") if isinstance(body, dict) else None
        if not isinstance(metrics, dict):
            return None
        figures = (_figure(name, told if isinstance(told, dict) else {"value": told}) for name, told in metrics.items())
        return cls(tuple(figure for figure in figures if figure is not None), body)


def path_of(step: int, name: str) -> str:
    return f"{FOLDER}/step-{step:08d}/{name}.json"


def place_of(path: str) -> tuple[int, str] | None:
    """The inverse of `path_of`; None for what is called otherwise."""
    match = _PATH.fullmatch(path)
    return None if match is None else (int(match[1]), match[2])


def name_with_hash(task: str, task_hash: str) -> str:
    """Of a file beside that of another task of this name."""
    return f"{task}-{task_hash[:HASH_DIGITS]}"


def _figure(name: str, told: dict[str, Any]) -> Figure | None:
    value = number(told.get("value"))
    if value is None and not _is_not_finite(told.get("value", "")):
        return None
    return Figure(name, value, number(told.get("low")), number(told.get("high")))


def _is_not_finite(value: object) -> bool:
    """As `evaluate` writes it, or as a number of its own that JSON has not."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def number(value: Any) -> float | None:
    """Of what such a file may say; None for what is no number, or not finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
