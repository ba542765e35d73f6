"""What a run's model came to in tasks that it was asked alone: `evaluations/step-NNNNNNNN/TASK.json` in its folder.

Invariant: of each task the newest step, of few tasks, so that a look takes a listing and a few reads however many files there
are. What is no result is passed over. A watcher's storage may be away for as long as it likes: nobody waits for it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from elastic_lm.errors import NotFoundError, StorageError
from elastic_lm.evaluation_file import FOLDER, number, place_of
from elastic_lm.monitor.metrics import MOST_FIGURES, MOST_TASKS
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

LOOK_S = 60.0


@dataclass(frozen=True)
class Figure:
    """`low` and `high`: the ends of its 95 % interval, if there is one."""

    name: str
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class TaskResult:
    """`task`: as its file is called, with a part of its hash where there are several of the name."""

    task: str
    step: int
    figures: tuple[Figure, ...]


def newest(folder: Storage) -> list[TaskResult]:
    """By the names of the tasks; of more than MOST_TASKS those that were asked last.    Raises: StorageError."""
    paths: dict[str, tuple[int, str]] = {}
    for path in folder.list(f"{FOLDER}/"):
        if (place := place_of(path)) is not None:
            step, task = place
            paths[task] = max(paths.get(task, (-1, "")), (step, path))
    latest = sorted(paths, key=lambda task: (-paths[task][0], task))[:MOST_TASKS]
    found = (TaskResult(task, paths[task][0], tuple(_figures(folder, paths[task][1]))) for task in sorted(latest))
    return [result for result in found if result.figures]


def _figures(folder: Storage, path: str) -> Iterator[Figure]:
    try:
        body: Any = json.loads(folder.read(path))
    except (ValueError, RecursionError, NotFoundError):
        return
    metrics = body.get("metrics") if isinstance(body, dict) else None
    for name, told in list(metrics.items())[:MOST_FIGURES] if isinstance(metrics, dict) else ():
        value = number(told.get("value")) if isinstance(told, dict) else None
        if value is not None:
            yield Figure(name, value, number(told.get("low")), number(told.get("high")))


class TaskWatcher:
    """Looks from a thread of its own, at once and every LOOK_S, and hands on what there is."""

    def __init__(self, folder: Storage, on_found: Callable[[list[TaskResult]], None]) -> None:
        self._folder, self._on_found = folder, on_found
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="task-results", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Hand on nothing more. A look that hangs is left to its thread."""
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                found = newest(self._folder)
            except StorageError as error:
                logger.debug("Results of tasks cannot be read now: %s", error)
            else:
                if not self._stop.is_set():
                    self._on_found(found)
            self._stop.wait(LOOK_S)
