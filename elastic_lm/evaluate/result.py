"""What a model came to in a task, and how that is kept: `evaluations/step-00001000/TASK.json` in the run's folder.

Invariant: the file says what was asked (`task_hash`), of which weights (`weights`) and in which version of the format, so that
figures which do not compare are not compared by mistake. An evaluation that is done again replaces its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_lm.evaluate.intervals import Metric
from elastic_lm.storage import Storage

FORMAT = "elastic-lm evaluation"
VERSION = 1
FOLDER = "evaluations"


@dataclass(frozen=True)
class Outcome:
    """`metrics` by name, the most telling one first. `counts`: what they rest on. `method`: how they were computed, in words."""

    metrics: Mapping[str, Metric]
    counts: Mapping[str, int]
    method: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """The outcome of a task. `step` and `weights` (their sha256) say of which model."""

    run: str
    step: int
    weights: str
    task: str
    kind: str
    task_hash: str
    outcome: Outcome

    @property
    def path(self) -> str:
        """In the run's folder."""
        return f"{FOLDER}/step-{self.step:08d}/{self.task}.json"

    def as_dict(self) -> dict[str, Any]:
        """As it is stored."""
        values = asdict(self)
        outcome = values.pop("outcome")
        return {"format": FORMAT, "version": VERSION, **values, **outcome}

    def store(self, run_storage: Storage) -> None:
        """Raises: StorageError."""
        run_storage.write(self.path, (json.dumps(self.as_dict(), indent=1) + "\n").encode())
