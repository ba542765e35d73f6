"""Which checkpoints of a run stay, and how the others go.

Invariant: deleting begins with the manifest, so that whatever interrupts it leaves an unfinished checkpoint and not a
damaged one; nothing that may be about to finish is deleted, and no part that a manifest names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import MANIFEST, SET_ASIDE, Manifest, folder_of, is_part
from elastic_lm.checkpoint.registry import Found
from elastic_lm.errors import CheckpointError
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints stay: the `newest` ones, for good those of every multiple of `every_steps`, and of all that
    there are the `best` ones, whose loss was lowest. With `reach_steps`, also the newest of those that are at least so many steps
    older than the newest one, or the oldest where none is: one to go back to. And the next one after it, which takes its place
    when that is old enough: so it is never much older than twice that.
    """

    newest: int
    every_steps: int | None = None
    best: int = 0
    reach_steps: int | None = None

    def keeps(self, losses: Mapping[int, float | None]) -> set[int]:
        """Of these steps, each with its loss if that is known. Of equal losses the newer is the better."""
        milestones = {step for step in losses if self.every_steps and step % self.every_steps == 0}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        best = sorted(known, key=lambda step: (known[step], -step))[: self.best]
        return {*sorted(losses)[-self.newest :], *milestones, *best, *self._anchor(losses)}

    def _anchor(self, steps: Collection[int]) -> set[int]:
        if self.reach_steps is None or not steps:
            return set()
        old = [step for step in steps if step <= max(steps) - self.reach_steps]
        anchor = max(old, default=min(steps))
        return {anchor, min((step for step in steps if step > anchor), default=anchor)}


def prune(
    storage: Storage,
    retention: Retention,
    *,
    spared: Collection[int] = (),
    seen: dict[int, Found] | None = None,
    dry_run: bool = False,
    check: Callable[[], None] = lambda: None,
    wanted: registry.Wanted = registry.any_of_them,
) -> list[int]:
    """Delete the complete checkpoints that do not stay, and what unfinished or damaged ones have left behind.

    What is newer than every complete one stays: an unfinished one may be about to finish. So do the steps `spared`, and what
    another version of elastic-lm has written. `seen`: complete ones that an earlier call has looked at and need not be read
    again, as long as their manifests are there; it is brought up to date.
    Args: `check` raises unless whoever deletes owns the run; it is called before each checkpoint that goes. A complete one that
    is not `wanted` goes, too.
    Returns: the steps that were deleted, or would be.
    """
    there = registry.listed(storage)
    found = _look_at(storage, there, {} if seen is None else seen)
    whole = {step: one for step, one in found.items() if one.state == "complete"}
    complete = {step: one.loss for step, one in whole.items() if wanted(step, one.meta)}
    if not complete:
        return []
    foreign = {step for step, one in found.items() if one.state == "other version"}
    kept = retention.keeps(complete) | foreign | set(spared)
    deleted = [step for step in sorted(there) if step not in kept and (step < max(complete) or step in whole)]
    for step in deleted if not dry_run else ():
        check()
        for path in sorted(there[step], key=lambda path: not path.endswith(MANIFEST)):
            storage.delete(path)
    return deleted


def _look_at(storage: Storage, there: dict[int, list[str]], seen: dict[int, Found]) -> dict[int, Found]:
    """By step, ascending. `seen` becomes those that are complete."""
    found = {}
    for step, paths in sorted(there.items()):
        has_manifest = f"{folder_of(step)}/{MANIFEST}" in paths
        found[step] = seen[step] if has_manifest and step in seen else registry.look(storage, step, paths)
    seen.clear()
    seen.update({step: one for step, one in found.items() if one.state == "complete"})
    return found


def collect(storage: Storage, step: int) -> None:
    """Delete what attempts at `step` that were given up have stored: the parts that no manifest names.

    Parts are named by content, so one may belong to a complete checkpoint as well. Where a manifest cannot be read nobody
    knows, and all stay. Nobody may be writing a checkpoint of this step.    Raises: StorageError.
    """
    folder = storage.child(folder_of(step))
    names = folder.list()
    named: set[str] = set()
    if MANIFEST in names:
        try:
            named = {part.name for part in Manifest.from_json(folder.read(MANIFEST)).parts}
        except CheckpointError:
            return
    elif SET_ASIDE in names:
        return
    for name in names:
        if is_part(name) and name not in named:
            folder.delete(name)
