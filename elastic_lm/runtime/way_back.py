"""Whether a run has what it takes to go back, before that is decided: afterwards there is no other way.

Invariant: nothing that is stored is given up for step 0, unless the run is so young that it had to store no earlier state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.registry import Found
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.experiment import standing
from elastic_lm.experiment.rewinds import Rewinds, retention_of
from elastic_lm.storage import Storage


def obstacle(
    folder: Storage, config: RunConfig, rewinds: Rewinds, *, begins_at: int, check: Callable[[], None]
) -> str | None:
    """Why the run cannot go back as the last of `rewinds` says, in a sentence without a full stop; None: it can.

    The checkpoint that it would go on from is read whole. A run which has always kept what its policy asks for lacks none, unless
    bytes are damaged; one that had another policy before may.
    Args: `config`: with all rewinds but the last one; `begins_at`: the step of a fork; `check` raises unless the run is one's
    own.    Raises: StorageError; CheckpointVersionError; what `check` raises.
    """
    to_step = rewinds.made[-1].to_step
    skipped: list[str] = []
    newest = registry.newest_complete(folder, on_skipped=skipped.append, check=check, wanted=rewinds.keep)
    if newest is not None and newest.step >= begins_at:
        return None
    if newest is None and begins_at == 0 and to_step < _first_saved(config, _complete(folder)):
        return _obstacle_at_0(config)
    told = "".join(f"; {sentence.rstrip('.')}" for sentence in skipped if "the run went back" not in sentence)
    return f"there is no checkpoint of step {to_step} or earlier to go back to{told}"


def lack(folder: Storage, config: RunConfig, rewinds: Rewinds, *, begins_at: int) -> str | None:
    """A sentence for a run that goes on with no checkpoint old enough to go back to, as after a change of policy; else None.

    Raises: StorageError.
    """
    retention = retention_of(config)
    if not config.may_go_back or retention.reach_steps is None:
        return None
    there = standing.complete(folder, rewinds)
    if not there:
        return None
    oldest, newest = there[0].step, there[-1].step
    lowest = max(rewinds.floor(begins_at), newest - retention.reach_steps)  # to which a spike to come may send it
    if begins_at == 0:
        lowest = max(lowest, int(min(oldest, _first_saved(config, there))))
    if lowest >= oldest:
        return None
    far = config.spikes.rewind_steps if "rewind" in (config.spikes.policy, config.training.on_nonfinite) else 0
    return (
        f"No checkpoint is old enough to go back to: a spike that begins before step {oldest + far} ends the run, unless it "
        f"trains on by {way_on(config)}."
    )


def way_on(config: RunConfig) -> str:
    """By which setting a run trains on through what it would go back from."""
    return "spikes.policy=ignore" if config.spikes.goes_back else "training.on_nonfinite=skip"


def _complete(folder: Storage) -> list[Found]:
    return [one for one in registry.found(folder) if one.state == "complete"]


def _first_saved(config: RunConfig, there: Iterable[Found]) -> float:
    """Before this step the run has saved nothing; a step is not before it only where something is stored."""
    there = list(there)
    saving = [config.checkpoint.every_steps, *(_every_steps(one) for one in there)]
    return min((every for every in saving if every is not None), default=math.inf) if there else math.inf


def _every_steps(one: Found) -> int | None:
    """By which the run saved when it was written; 1: nobody knows."""
    try:
        every = one.meta["config"]["checkpoint"]["every_steps"]
    except (KeyError, TypeError):
        return 1
    return every if every is None or isinstance(every, int) else 1


def _obstacle_at_0(config: RunConfig) -> str | None:
    if config.model.init is None:
        return None
    from elastic_lm.huggingface import initial  # it imports torch

    tokens = Storage.open(config.data.tokens)
    try:
        initial.settled(config, tokens, Manifest.load(tokens))
    except (ConfigError, DataError) as error:
        return f"the weights that it began with are not there any more: {error}"
    return None
