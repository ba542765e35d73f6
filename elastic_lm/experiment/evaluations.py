"""What a run was found to be worth: `evaluations/step-NNNNNNNN/<task>.json` in its folder.

Each file is one task at one step: `{"metrics": {name: {"value": x, "low": x, "high": x}}}`, with whatever else its writer says.
What is not of this shape is passed over: a comparison is not to fail for one file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from elastic_lm.errors import NotFoundError
from elastic_lm.storage import Storage

FOLDER = "evaluations"
_PATH = re.compile(rf"{FOLDER}/step-(\d{{8,}})/([^/]+)\.json")


@dataclass(frozen=True)
class Measured:
    """One metric of one task. `low` and `high`: the ends of its interval, if there is one."""

    step: int
    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


def found(folder: Storage) -> list[Measured]:
    """All of a run, by step, task and metric.    Raises: StorageError."""
    paths = [(match, path) for path in folder.list(f"{FOLDER}/") if (match := _PATH.fullmatch(path))]
    each = [one for match, path in paths for one in _of(folder, path, int(match[1]), match[2])]
    return sorted(each, key=lambda one: (one.step, one.task, one.metric))


def _of(folder: Storage, path: str, step: int, task: str) -> Iterator[Measured]:
    try:
        body = json.loads(folder.read(path))
    except (ValueError, RecursionError, NotFoundError):
        return
    metrics = body.get("metrics") if isinstance(body, dict) else None
    for name, told in metrics.items() if isinstance(metrics, dict) else ():
        values = told if isinstance(told, dict) else {"value": told}
        if (value := _number(values.get("value"))) is not None:
            yield Measured(step, task, str(name), value, _number(values.get("low")), _number(values.get("high")))


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
