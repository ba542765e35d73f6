"""What a model came to in a task, and how that is kept: `evaluations/step-00001000/TASK.json` in the run's folder.

Where that is the result of another task of the same name: `TASK-HASH.json`, with the first 8 digits of the task's hash.

Invariant: the file says what was asked (`task_hash`), of which weights (`weights`) and in which version of the format, so that
figures which do not compare are not compared by mistake. An evaluation that is done again replaces its file. Nothing is kept of
weights that the run has given up meanwhile (docs/spikes.md): who goes back clears what is there, and who stores looks behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_lm.errors import CheckpointError, NotFoundError
from elastic_lm.evaluate.intervals import Metric
from elastic_lm.evaluation_file import name_with_hash, path_of
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.storage import Storage

FORMAT = "elastic-lm evaluation"
VERSION = 1


@dataclass(frozen=True)
class Outcome:
    """`metrics` by name, the most telling one first. `counts`: what they rest on. `method`: how they were computed, in words."""

    metrics: Mapping[str, Metric]
    counts: Mapping[str, int]
    method: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The outcome of a task. `step` and `weights` (their sha256) say of which model.

    `num_rewinds`: how often the run had gone back before the weights were read.
    """

    run: str
    step: int
    weights: str
    task: str
    kind: str
    task_hash: str
    outcome: Outcome
    num_rewinds: int = 0

    def as_dict(self) -> dict[str, Any]:
        """As it is stored."""
        values = asdict(self)
        del values["num_rewinds"]
        outcome = values.pop("outcome")
        return {"format": FORMAT, "version": VERSION, **values, **outcome}

    def store(self, run_storage: Storage) -> None:
        """Raises: CheckpointError when the run has given up the weights meanwhile, or nobody can tell; StorageError."""
        self._check_that_they_stay(run_storage)
        path = path_of(self.step, self.task)
        if _hash_in(run_storage, path) not in (None, self.task_hash):
            path = path_of(self.step, name_with_hash(self.task, self.task_hash))
        run_storage.write(path, (json.dumps(self.as_dict(), indent=1) + "\n").encode())
        try:
            self._check_that_they_stay(run_storage)  # the run may have cleared its folder between look and write
        except CheckpointError:
            run_storage.delete(path)
            raise

    def _check_that_they_stay(self, run_storage: Storage) -> None:
        for rewind in Rewinds.load(run_storage).made[self.num_rewinds :]:
            if self.step > rewind.to_step:
                raise CheckpointError(
                    f"the run went back to step {rewind.to_step} while its step {self.step} was evaluated in {self.task}: the "
                    f"result is of weights that it gave up, and is not kept (rewind {rewind.number} of {run_storage.url}); "
                    "evaluate the run again"
                )


def _hash_in(run_storage: Storage, path: str) -> str | None:
    """Of the task whose result is there; None for nothing, or what cannot be read."""
    try:
        body = json.loads(run_storage.read(path))
    except (NotFoundError, ValueError, RecursionError):
        return None
    found = body.get("task_hash") if isinstance(body, dict) else None
    return found if isinstance(found, str) else None
