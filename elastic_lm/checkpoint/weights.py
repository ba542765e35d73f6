"""The newest weights of a run, for those who only read: export and generation."""

from __future__ import annotations

from torch import Tensor

from elastic_lm.checkpoint import registry, store
from elastic_lm.errors import CheckpointError
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
    return newest.info.step, {name.removeprefix(PARAMETERS): tensor for name, tensor in newest.tensors.items()}


def _newest(run_storage: Storage) -> store.Checkpoint:
    newest = registry.newest_complete(run_storage, thorough=False)
    if newest is None:
        raise CheckpointError(f"the run in {run_storage.url} has no complete checkpoint yet; wait for its first one")
    return store.load(run_storage, newest.step, prefix=PARAMETERS)
