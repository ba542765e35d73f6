"""What a run's model came to in tasks that it was asked alone: `evaluations/step-NNNNNNNN/TASK.json` in its folder.

Invariant: of each task the newest step, so that a look takes a listing and a read for each task, however many files there are.
What is no result is passed over. A watcher's storage may be away for as long as it likes: nobody waits for it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from elastic_lm.errors import StorageError
from elastic_lm.evaluation_file import FOLDER, EvaluationFile, Figure, place_of
from elastic_lm.monitor.metrics import MOST_FIGURES, MOST_TASKS
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

LOOK_S = 60.0


class Rank(IntEnum):
    """What is told first where not all can be."""

    OWN = 0
    GROUP = 1  # of the harness: what its tasks come to together
    HARNESS = 2  # a task of the harness, alone or of a group


@dataclass(frozen=True)
class TaskResult:
    """`task`: as its file is called, with a part of its hash where there are several of the name."""

    task: str
    step: int
    figures: tuple[Figure, ...]
    rank: Rank = Rank.OWN


def newest(folder: Storage) -> list[TaskResult]:
    """All that there are, by the names of the tasks.    Raises: StorageError."""
    paths: dict[str, tuple[int, str]] = {}
    for path in folder.list(f"{FOLDER}/"):
        if (place := place_of(path)) is not None:
            step, task = place
            paths[task] = max(paths.get(task, (-1, "")), (step, path))
    found = (_read(folder, task, *paths[task]) for task in sorted(paths))
    return [result for result in found if result.figures]


def foremost(results: Sequence[TaskResult]) -> list[TaskResult]:
    """What metrics tell of these, so that an endpoint stays small: up to MOST_TASKS, of each up to MOST_FIGURES that are finite.

    One's own tasks come before groups, and these before single tasks of the harness; of each those that were asked last.
    """
    finite = (
        replace(result, figures=tuple(each for each in result.figures if each.value is not None)[:MOST_FIGURES])
        for result in results
    )
    told = sorted((one for one in finite if one.figures), key=lambda one: (one.rank, -one.step, one.task))
    return sorted(told[:MOST_TASKS], key=lambda one: one.task)


def _read(folder: Storage, task: str, step: int, path: str) -> TaskResult:
    """Without figures where the file is no result, or gone."""
    file = EvaluationFile.load(folder, path)
    if file is None:
        return TaskResult(task, step, ())
    counts, rank = file.body.get("counts"), Rank.OWN
    if file.body.get("kind") == "harness":
        rank = Rank.GROUP if isinstance(counts, dict) and "tasks" in counts else Rank.HARNESS
    return TaskResult(task, step, file.figures, rank)


class TaskWatcher:
    """Looks from a thread of its own, at once and every LOOK_S, and hands on what metrics tell."""

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
                    self._on_found(foremost(found))
            self._stop.wait(LOOK_S)
