"""Where the result of a task lies in its run's folder: `evaluations/step-00001000/TASK.json`.

Where another task of the same name has its result there: `TASK-HASH.json`, with the first digits of the task's hash. `evaluate`
writes such files and `experiment` reads them; neither needs the other.
"""

from __future__ import annotations

import math
import re
from typing import Any

FOLDER = "evaluations"
HASH_DIGITS = 8
_PATH = re.compile(rf"{FOLDER}/step-(\d{{8,}})/([^/]+)\.json")


def path_of(step: int, name: str) -> str:
    return f"{FOLDER}/step-{step:08d}/{name}.json"


def place_of(path: str) -> tuple[int, str] | None:
    """The inverse of `path_of`; None for what is called otherwise."""
    match = _PATH.fullmatch(path)
    return None if match is None else (int(match[1]), match[2])


def name_with_hash(task: str, task_hash: str) -> str:
    """Of a file beside that of another task of this name."""
    return f"{task}-{task_hash[:HASH_DIGITS]}"


def number(value: Any) -> float | None:
    """Of what such a file may say; None for what is no number, or not finite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
