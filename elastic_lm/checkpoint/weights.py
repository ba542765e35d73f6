"""The weights of a run, for those who only read: export, generation, evaluation."""

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
    return newest.info.step, _named(newest)


def weights_at(run_storage: Storage, step: int) -> dict[str, Tensor]:
    """Of the complete checkpoint of this step.

    Raises: CheckpointError that names the nearest ones when there is none, or it is damaged; StorageError.
    """
    return _named(_loaded(run_storage, step_of(run_storage, step)))


def step_of(run_storage: Storage, step: int | None = None) -> int:
    """The step that is meant: of the newest complete checkpoint, or this one. By manifests alone, so it costs next to nothing.

    Raises: CheckpointError that names the nearest ones when there is none; StorageError.
    """
    if step is None:
        newest = registry.newest_complete(run_storage, thorough=False)
        if newest is None:
            raise CheckpointError(
                f"the run in {run_storage.url} has no complete checkpoint yet; wait for its first one"
            )
        return newest.step
    found = {checkpoint.step: checkpoint for checkpoint in registry.found(run_storage)}
    if step not in found or found[step].state != "complete":
        reason = f" ({found[step].state}: {found[step].reason})" if step in found else ""
        complete = [other.step for other in found.values() if other.state == "complete"]
        raise CheckpointError(
            f"the run in {run_storage.url} has no complete checkpoint of step {step}{reason}; {registry.nearest(step, complete)}"
        )
    return step


def _named(checkpoint: store.Checkpoint) -> dict[str, Tensor]:
    return {name.removeprefix(PARAMETERS): tensor for name, tensor in checkpoint.tensors.items()}


def _newest(run_storage: Storage) -> store.Checkpoint:
    return _loaded(run_storage, step_of(run_storage))


def _loaded(run_storage: Storage, step: int) -> store.Checkpoint:
    try:
        return store.load(run_storage, step, prefix=PARAMETERS)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; name another step ({registry.others(run_storage, step)})") from error
