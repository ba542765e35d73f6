"""Rewinds: where a run went back to before a loss spike, and left out the batches that made it.

A rewind is nothing but more batches that are left out: `training.skip` grows by a range that begins with the batch of step
`to_step`. Every state of at most that many steps is one of the run that had left these batches out from its beginning, so the run
goes on from the newest checkpoint of such a state, and comes to that run's bits. `rewinds/NNNN.json` in the run's folder, created
once and never changed, is what makes a rewind; whatever dies before that has decided nothing, and after it whoever takes the
run over goes back.

Invariant: which batches are left out follows from the committed steps and the config, never from which checkpoints there are or
when the spike was noticed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from elastic_lm import evaluation_file
from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import MANIFEST, folder_of
from elastic_lm.checkpoint.retention import Retention
from elastic_lm.config import RunConfig
from elastic_lm.data.order import batch_of, merged
from elastic_lm.errors import AlreadyExistsError, CheckpointError
from elastic_lm.experiment.skip import Skip, ranges_told, skip_of
from elastic_lm.experiment.spikes import MOST_LEFT_OUT, POISONED, Spike, SpikeRules
from elastic_lm.storage import Storage

FOLDER = "rewinds"
FORMAT, VERSION = "elastic-lm rewind", 1
_PATH = re.compile(rf"{FOLDER}/(\d{{4}})\.json")


@dataclass(frozen=True)
class Rewind:
    """One time that the run went back. `number` counts from 1.

    `cause`: "loss", "gradient norm" or "poisoned"; `reason` says it in a sentence. Steps [first_step, last_step] are why.
    `to_step`: steps that stay. `before` and `after`: `training.skip` until then and from then on. `fingerprint`: of the run's
    identity from then on. `time_s`: unix time.
    """

    number: int
    cause: str
    reason: str
    first_step: int
    last_step: int
    to_step: int
    before: Skip
    after: Skip
    fingerprint: str
    time_s: float = 0.0

    @classmethod
    def of(cls, spike: Spike, config: RunConfig, *, number: int, floor: int = 0) -> Rewind:
        """What to do about a spike. `config`: with the rewinds before it; `floor`: the run does not go back behind this step."""
        skip, rules = config.training.skip, config.spikes
        if rules.policy == "skip" and spike.cause != POISONED:
            to_step = max(floor, spike.first_step)
            num_batches = spike.last_step - to_step + 1
        else:
            to_step = max(floor, spike.first_step - rules.rewind_steps)
            num_batches = rules.skip_batches
        left_out = batch_of(to_step, skip), batch_of(to_step + num_batches - 1, skip) + 1
        after = merged((*skip, left_out))
        return cls(
            number=number,
            cause=spike.cause,
            reason=str(spike),
            first_step=spike.first_step,
            last_step=spike.last_step,
            to_step=to_step,
            before=skip,
            after=after,
            fingerprint=with_skip(config, after).identity_fingerprint(),
            time_s=time.time(),
        )

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """The ranges of batches that were not left out before."""
        ranges: list[tuple[int, int]] = []
        for start, stop in self.after:
            for was_start, was_stop in merged(self.before):
                if was_start >= start and was_stop <= stop:
                    ranges.append((start, was_start))
                    start = was_stop
            ranges.append((start, stop))
        return [(start, stop) for start, stop in ranges if start < stop]

    def __str__(self) -> str:
        return f"Back to step {self.to_step}, leaving out batches {ranges_told(self.left_out)}: {self.reason}"

    @classmethod
    def from_json(cls, data: bytes) -> Rewind:
        """Raises: ValueError, KeyError, TypeError or AttributeError on anything but what `to_json` gives."""
        body = json.loads(data)
        if (body.pop("format"), body.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is no {FORMAT} of version {VERSION}")
        for name in ("before", "after"):
            body[name] = skip_of(body[name])
        return cls(**body)

    def to_json(self) -> bytes:
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1).encode()


@dataclass(frozen=True)
class Rewinds:
    """All of one run, the first one first."""

    made: tuple[Rewind, ...] = ()

    @classmethod
    def load(cls, folder: Storage) -> Rewinds:
        """Raises: CheckpointError when one is damaged; StorageError."""
        names = sorted(name for name in folder.list(f"{FOLDER}/") if _PATH.fullmatch(name))
        made = tuple(_read(folder, name) for name in names)
        for number, rewind in enumerate(made, 1):
            if rewind.number != number or (number > 1 and rewind.before != made[number - 2].after):
                raise CheckpointError(
                    f"{folder.url}/{_name(rewind.number)} does not follow on the rewind before it, whose file is missing or is "
                    "another one; put it back, or fork the run from a checkpoint (elastic-lm fork)"
                )
        return cls(made)

    @classmethod
    def if_readable(cls, folder: Storage) -> Rewinds:
        """None where one is damaged: each checkpoint knows what was left out when it was written.    Raises: StorageError."""
        try:
            return cls.load(folder)
        except CheckpointError:
            return cls()

    def __len__(self) -> int:
        return len(self.made)

    def floor(self, begins_at: int) -> int:
        """Behind this step the run never goes back: it begins there, or went back to there before.

        The state of that step is good. If what comes next stands out as well, then more batches are to be left out from there on.
        """
        return max(begins_at, self.made[-1].to_step) if self.made else begins_at

    def __iter__(self) -> Iterator[Rewind]:
        return iter(self.made)

    def applied(self, config: RunConfig) -> RunConfig:
        """`config` with the batches of all rewinds left out. One that leaves out others of its own is another run's."""
        if not self.made or self._place(config.training.skip) is None:
            return config
        return with_skip(config, self.made[-1].after)

    def earlier_configs(self, config: RunConfig) -> list[RunConfig]:
        """`config` as it was before each of them; none where it leaves out others of its own."""
        place = self._place(config.training.skip)
        return [] if place is None else [with_skip(config, skip) for skip in self._skips()[:place]]

    def as_was(self, config: RunConfig, meta: Mapping[str, Any]) -> RunConfig:
        """`config` as it was when the checkpoint with this `meta` was written, as far as that is the rewinds' doing.

        One that leaves out others of its own stays what it is.
        """
        place = self._place_of(meta)
        if place is None or self._place(config.training.skip) is None:
            return config
        return with_skip(config, self._skips()[place])

    def keep(self, step: int, meta: Mapping[str, Any]) -> bool:
        """Whether the checkpoint of this step, with this `meta`, is one of the run that it is now."""
        return self.given_up_by(step, meta) is None

    def given_up_by(self, step: int, meta: Mapping[str, Any]) -> Rewind | None:
        """Which of them made it one that is not."""
        place = self._place_of(meta)
        later = () if place is None else self.made[place:]
        return next((rewind for rewind in later if step > rewind.to_step), None)

    def _skips(self) -> list[Skip]:
        return [self.made[0].before, *(rewind.after for rewind in self.made)] if self.made else []

    def _place_of(self, meta: Mapping[str, Any]) -> int | None:
        try:
            return self._place(skip_of(meta["config"]["training"]["skip"]))
        except (KeyError, TypeError, ValueError):
            return None  # of another version

    def _place(self, skip: Skip) -> int | None:
        """After how many rewinds these were the batches to leave out; None: never."""
        skips = [merged(each) for each in self._skips()]
        return skips.index(merged(skip)) if merged(skip) in skips else None


def with_skip(config: RunConfig, skip: Skip) -> RunConfig:
    return config.replace(f"training.skip={json.dumps([list(each) for each in skip])}")


def rules_of(config: RunConfig) -> SpikeRules | None:
    """By which the run's steps are judged; None: they are not."""
    spikes = config.spikes
    if spikes.policy == "ignore":
        return None
    return SpikeRules(spikes.window_steps, spikes.loss_z, spikes.gradient_z, spikes.steps_in_a_row)


def retention_of(config: RunConfig) -> Retention:
    """Which checkpoints the run keeps. Where it may go back, one of them it could go back to from any step behind the newest.

    So does a run that a spike ends: it may be forked from there.
    """
    checkpoint, spikes = config.checkpoint, config.spikes
    is_far = spikes.policy in ("stop", "rewind") or config.training.on_nonfinite == "rewind"
    if not is_far and not spikes.goes_back:
        return Retention(checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best)
    gaps = (spikes.steps_in_a_row - 1) * (MOST_LEFT_OUT - 1) if config.training.on_nonfinite == "skip" else 0
    reach = (
        (spikes.rewind_steps if is_far else 0) + spikes.steps_in_a_row + gaps
    )  # a streak goes on over steps left out
    return Retention(checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best, reach)


# -- the run's folder --------------------------------------------------------------------------------------------------


def decide(folder: Storage, rewind: Rewind) -> None:
    """Make it so.    Raises: CheckpointError when there is another one of this number; StorageError."""
    name = _name(rewind.number)
    try:
        folder.create(name, rewind.to_json())
    except AlreadyExistsError:
        there = _read(folder, name)
        if (there.before, there.after) != (rewind.before, rewind.after):
            raise CheckpointError(f"{folder.url}/{name} is there already, and another one: {there}") from None


def clear(folder: Storage, rewinds: Rewinds, check: Callable[[], None]) -> list[int]:
    """Delete what belongs to steps that the run went back from: checkpoints, and what their weights were found to be worth.

    Such a checkpoint may be stored late, by a write that hung: so they are looked for each time, and the results once for each
    rewind. `check` raises unless the run is one's own, before each deletion.
    Returns: the steps of the checkpoints that are gone.    Raises: StorageError.
    """
    gone = _clear_checkpoints(folder, rewinds, check)
    for rewind in rewinds:
        done = _name(rewind.number).replace(".json", ".cleared")
        if folder.exists(done):
            continue
        for name in folder.list(f"{evaluation_file.FOLDER}/"):
            if (place := evaluation_file.place_of(name)) is not None and place[0] > rewind.to_step:
                check()
                folder.delete(name)
        folder.write(done, b"")
    return gone


def _clear_checkpoints(folder: Storage, rewinds: Rewinds, check: Callable[[], None]) -> list[int]:
    gone = []
    for step, paths in registry.listed(folder).items():
        found = registry.look(folder, step, paths)
        if found.state == "complete" and not rewinds.keep(step, found.meta):
            check()
            for path in sorted(paths, key=lambda path: path != f"{folder_of(step)}/{MANIFEST}"):
                folder.delete(path)
            gone.append(step)
    return gone


def _name(number: int) -> str:
    return f"{FOLDER}/{number:04d}.json"


def _read(folder: Storage, name: str) -> Rewind:
    try:
        return Rewind.from_json(folder.read(name))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder.url}/{name} cannot be read: {type(error).__name__}: {error}; it says which batches the run leaves out. Put "
            "it back, or fork the run from a checkpoint (elastic-lm fork)"
        ) from error
