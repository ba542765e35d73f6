"""An evaluation: a run's model at a step, asked one task after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from elastic_lm.config import RunConfig
from elastic_lm.evaluate import tasks
from elastic_lm.evaluate.result import Result
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel


def evaluate(
    run_storage: Storage,
    config: RunConfig,
    names: Sequence[str],
    *,
    step: int | None = None,
    max_samples: int | None = None,
) -> Iterator[Result]:
    """The result of each task as soon as it is there; nothing is stored. `step` None: the newest complete checkpoint's.

    Raises: ConfigError when a task cannot be answered; CheckpointError when there is no such checkpoint; DataError, StorageError.
    """
    asked = tasks.find(names, config, max_samples)
    model = TrainedModel.load(run_storage, config, step)
    for task in asked:
        outcome = task.question.evaluate(model)
        yield Result(config.name, model.step, model.digest, task.name, task.kind, task.hash, outcome)
