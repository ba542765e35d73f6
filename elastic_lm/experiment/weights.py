"""The weights of a run, for those who only read: export, generation, evaluation."""

from __future__ import annotations

from torch import Tensor

from elastic_lm.checkpoint import store
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment import standing
from elastic_lm.storage import Storage

PARAMETERS = "parameters/"


def newest_weights(run_storage: Storage) -> tuple[int, dict[str, Tensor]]:
    """Of the newest complete checkpoint: its step, and fp32 tensors by the parameters' names.

    Raises: CheckpointError when there is none, or it is damaged; StorageError.
    """
    try:
        newest = _newest(run_storage)
    except CheckpointError:  # a run that trains may have deleted it meanwhile, and has a newer one then
        newest = _newest(run_storage)
    return newest.info.step, _named(newest)


def weights_at(run_storage: Storage, step: int) -> dict[str, Tensor]:
    """Of the complete checkpoint of this step.

    Raises: CheckpointError that names the nearest ones when there is none, or it is damaged; StorageError.
    """
    return _named(_loaded(run_storage, standing.step_of(run_storage, step)))


def _named(checkpoint: store.Checkpoint) -> dict[str, Tensor]:
    return {name.removeprefix(PARAMETERS): tensor for name, tensor in checkpoint.tensors.items()}


def _newest(run_storage: Storage) -> store.Checkpoint:
    return _loaded(run_storage, standing.step_of(run_storage))


def _loaded(run_storage: Storage, step: int) -> store.Checkpoint:
    try:
        return store.load(run_storage, step, prefix=PARAMETERS)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; name another step ({standing.others(run_storage, step)})") from error
