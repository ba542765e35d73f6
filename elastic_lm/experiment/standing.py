"""Which checkpoints of a run count for who reads it: those of the run that it is now, and none that it went back from.

One of those is to be deleted. It is there until somebody takes the run up again, and once more when it is stored late, by a write
that hung.

Invariant: whoever reads a run asks here, so that none of them takes a checkpoint that another one passes over. Reads manifests
only, and needs no torch.
"""

from __future__ import annotations

from dataclasses import replace

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.registry import Found
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.experiment.skip import ranges_told
from elastic_lm.storage import Storage


def found(folder: Storage, rewinds: Rewinds | None = None) -> list[Found]:
    """All checkpoints of the run, by step; what it went back from is "given up". `rewinds` None: those in its folder.

    Raises: CheckpointError when one of these is damaged; StorageError.
    """
    known = Rewinds.load(folder) if rewinds is None else rewinds
    return [_judged(one, known) for one in registry.found(folder)]


def complete(folder: Storage, rewinds: Rewinds | None = None) -> list[Found]:
    """Those that can be used.    Raises: as `found`."""
    return [one for one in found(folder, rewinds) if one.state == "complete"]


def step_of(folder: Storage, step: int | None = None) -> int:
    """The step that is meant: of the newest that can be used, or this one. Reads its manifest alone, where that is a good one.

    Raises: CheckpointError that says why there is none, and names the nearest ones; StorageError.
    """
    if step is None:
        return _newest(folder)
    rewinds, paths = Rewinds.load(folder), registry.listed(folder).get(step)
    one = None if paths is None else _judged(registry.look(folder, step, paths), rewinds)
    if one is None or one.state != "complete":
        reason = "" if one is None else f" ({one.state}: {one.reason})"
        near = registry.nearest(step, [other.step for other in complete(folder, rewinds)])
        raise CheckpointError(f"the run in {folder.url} has no complete checkpoint of step {step}{reason}; {near}")
    return step


def others(folder: Storage, step: int, rewinds: Rewinds | None = None) -> str:
    """What to say where the checkpoint of a step cannot be used: which other ones can.    Raises: as `found`."""
    steps = [str(one.step) for one in complete(folder, rewinds) if one.step != step]
    return f"there are {', '.join(steps)}" if steps[1:] else f"there is {steps[0] if steps else 'no other'}"


def _newest(folder: Storage) -> int:
    rewinds = Rewinds.load(folder)
    newest = registry.newest_complete(folder, thorough=False, wanted=rewinds.keep)
    if newest is None:
        since = f" since it went back to step {rewinds.made[-1].to_step}" if rewinds else " yet"
        raise CheckpointError(f"the run in {folder.url} has no complete checkpoint{since}; wait for its first one")
    return newest.step


def _judged(one: Found, rewinds: Rewinds) -> Found:
    rewind = rewinds.given_up_by(one.step, one.meta) if one.state == "complete" else None
    if rewind is None:
        return one
    reason = f"the run went back to step {rewind.to_step}, leaving out batches {ranges_told(rewind.left_out)}"
    return replace(one, state="given up", reason=reason)
