"""The weights of a run, for those who only read: export, generation, evaluation."""

from __future__ import annotations

from torch import Tensor

from elastic_lm.checkpoint import store
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment import standing
from elastic_lm.storage import Storage

PARAMETERS = "parameters/"


def weights_of(run_storage: Storage, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """Of the complete checkpoint of `step`, or of the newest: its step, and fp32 tensors by the parameters' names.

    Raises: CheckpointError that names the nearest ones when there is none, or it is damaged; StorageError.
    """
    try:
        checkpoint = _loaded(run_storage, step)
    except CheckpointError:
        if step is not None:
            raise
        checkpoint = _loaded(run_storage, None)  # a run that trains may have deleted it, and has a newer one then
    named = {name.removeprefix(PARAMETERS): tensor for name, tensor in checkpoint.tensors.items()}
    return checkpoint.info.step, named


def _loaded(run_storage: Storage, step: int | None) -> store.Checkpoint:
    found = standing.step_of(run_storage, step)
    try:
        return store.load(run_storage, found, prefix=PARAMETERS)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; name another step ({standing.others(run_storage, found)})") from error
