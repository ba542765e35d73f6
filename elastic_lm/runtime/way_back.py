"""Whether a run has what it takes to go back, before that is decided: afterwards there is no other way."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from elastic_lm.checkpoint import registry
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.experiment.rewinds import Rewinds, retention_of
from elastic_lm.storage import Storage


def obstacle(
    folder: Storage, config: RunConfig, rewinds: Rewinds, *, begins_at: int, check: Callable[[], None]
) -> str | None:
    """Why the run cannot go back as the last of `rewinds` says, in a sentence without a full stop; None: it can.

    The checkpoint that it would go on from is read whole. A run which has always kept what its policy asks for lacks none, unless
    bytes are damaged; one that had another policy before may. To begin at step 0 is what is meant only where the first checkpoint
    is of a later step than the one to go back to.
    Args: `config`: with all rewinds but the last one; `begins_at`: the step of a fork; `check` raises unless the run is one's
    own.    Raises: StorageError; CheckpointVersionError; what `check` raises.
    """
    to_step = rewinds.made[-1].to_step
    skipped: list[str] = []
    newest = registry.newest_complete(folder, on_skipped=skipped.append, check=check, wanted=rewinds.keep)
    if newest is not None and newest.step >= begins_at:
        return None
    if newest is None and _begins_at_0(config, to_step, begins_at):
        return _obstacle_at_0(config)
    told = "".join(f"; {sentence.rstrip('.')}" for sentence in skipped if "the run went back" not in sentence)
    return f"there is no checkpoint of step {to_step} or earlier to go back to{told}"


def lack(config: RunConfig, there: Collection[int], *, floor: int) -> str | None:
    """A sentence for a run that goes on with no checkpoint old enough to go back to, as after a change of policy; else None.

    Args: `there`: the steps of its checkpoints; `floor`: behind which it does not go back.
    """
    reach = retention_of(config).reach_steps if config.may_go_back else None
    if reach is None or not there:
        return None
    oldest, farthest = min(there), max(there) - reach
    if oldest <= max(floor, farthest) or _begins_at_0(config, farthest, floor):
        return None
    return (
        f"No checkpoint is old enough to go back to: a spike before step {oldest + reach} ends the run, unless it trains on by "
        "spikes.policy=ignore."
    )


def _begins_at_0(config: RunConfig, to_step: int, floor: int) -> bool:
    """The run is so young that it has no earlier state."""
    return floor == 0 and to_step < (config.checkpoint.every_steps or math.inf)


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
