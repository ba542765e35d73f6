"""How attempts of a plan begin: the config of each, from scratch or as a fork of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest as Corpus
from elastic_lm.errors import ConfigError
from elastic_lm.experiment import changes
from elastic_lm.experiment.attempt import Begun
from elastic_lm.experiment.plan import LAST_STEP, Plan, Planned
from elastic_lm.experiment.rewinds import retention_of
from elastic_lm.storage import Storage

IDENTITY = ("model", "objective", "batch", "optimizer", "schedule", "training", "reduction")  # parts of a config


@dataclass(frozen=True)
class Beginning:
    """A plan with its base config, which names its corpus by its hash: all attempts have that one, or change it.

    Methods raise: UnfitError when a change does not apply; ConfigError; DataError; StorageError.
    """

    plan: Plan
    base: RunConfig
    _known: dict[Begun, RunConfig] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, plan: Plan, base: RunConfig) -> Beginning:
        """Raises: ConfigError when the base names another corpus than the one that is there; DataError; StorageError."""
        corpus = Corpus.load(Storage.open(base.data.tokens))
        base.settled(manifest=corpus.hash, window_blocks=corpus.window_blocks)
        return cls(plan, base.replace(f"data.manifest={corpus.hash}"))

    @cached_property
    def planned(self) -> tuple[Planned, ...]:
        return self.plan.attempts()

    def run(self, number: int) -> str:
        """Name of the attempt's run."""
        return f"{self.plan.name}-{number:02d}"

    def scratch(self, number: int) -> RunConfig:
        """The base with the attempt's changes, as they are from step 0."""
        planned = self.planned[number]
        config = changes.changed(self.base, planned.overrides, name=self.run(number), storage=self.base.storage)
        config = changes.leaving_out_more(config, planned.skip, 0, called="skip")
        if not self.plan.forks:  # else its batches are counted from its parent's, and may be trained by the fork alone
            changes.check_reach(self.base, config, planned.skip, called="skip")
        return config

    def is_from_folder(self, number: int) -> bool:
        """Whether the attempt is to be a fork, and from scratch would begin with the weights of model.init's folder."""
        return number > 0 and self.plan.forks and self.base.model.init is not None

    def overrides(self, number: int, step: int) -> list[str]:
        """What a fork of a state that has applied `step` steps changes of its parent's config."""
        planned = self.planned[number]
        return [*planned.overrides, *([f"{LAST_STEP}={step + planned.steps}"] if planned.steps else [])]

    def last_step(self, number: int, parent: RunConfig, step: int) -> int:
        """To which a fork of a state that has applied `step` steps is trained."""
        planned = self.planned[number]
        return step + planned.steps if planned.steps else planned.changes.get(LAST_STEP, parent.training.steps)

    def fork(self, number: int, parent: RunConfig, step: int) -> RunConfig:
        """The parent's config with the attempt's changes, as the run goes on with it."""
        overrides = self.overrides(number, step)
        config = changes.changed(parent, overrides, name=self.run(number), storage=self.base.storage)
        changes.check_skip(parent, config, step)
        skip = self.planned[number].skip
        config = changes.leaving_out_more(config, skip, step, called="skip")
        changes.check_reach(parent, config, skip, called="skip")
        return config

    def config(self, number: int, begun: Mapping[int, Begun]) -> RunConfig:
        """That of an attempt that has begun, as these say. Each is made once, its parents first."""
        lineage = [begun[number]]
        while (parent := lineage[-1].parent) is not None:
            lineage.append(begun[parent])
        config = self._made(lineage.pop(), None)
        while lineage:
            config = self._made(lineage.pop(), config)
        return config

    def _made(self, record: Begun, parent: RunConfig | None) -> RunConfig:
        if record not in self._known:
            if parent is None:
                self._known[record] = self.scratch(record.number)
            else:
                assert record.parent_step is not None
                self._known[record] = self.fork(record.number, parent, record.parent_step)
        return self._known[record]


def going_on(stored: RunConfig, planned: RunConfig) -> RunConfig:
    """What a fork is trained with: `stored` in its folder is its identity, with all that its parent's state has settled; whatever
    changes no bits is as it is `planned` now. A corpus may have moved.
    """
    was, now = stored.model_dump(mode="json"), planned.model_dump(mode="json")
    kept = {part: was[part] for part in IDENTITY}
    kept["training"]["recompute"] = now["training"]["recompute"]
    if stored.data.manifest != planned.data.manifest:
        kept["data"] = was["data"]
    return RunConfig(**{**now, **kept})


def kept_steps(config: RunConfig, begins_at: int) -> list[int]:
    """The checkpoints that a run will have in the end, if nothing interrupts it. `begins_at`: 0, or a fork's step.

    Which will be the best ones is not known beforehand.
    """
    end = config.training.steps
    every, retention = config.checkpoint.every_steps or end, retention_of(config)
    kept = {begins_at} - {0}
    for step in [*(step for step in range(every, end, every) if step > begins_at), end]:
        kept = retention.keeps(dict.fromkeys({*kept, step}))
    return sorted(kept)


def forked_step(plan: Plan, parent: RunConfig, begins_at: int) -> int:
    """Of which of the parent's checkpoints a fork will be.    Raises: ConfigError, with the nearest, when there will be none."""
    if plan.parent_step is None:
        return parent.training.steps
    kept = kept_steps(parent, begins_at)
    if plan.parent_step in kept:
        return plan.parent_step
    before = [step for step in kept if step < plan.parent_step][-1:]
    after = [step for step in kept if step > plan.parent_step][:1]
    saving = parent.checkpoint
    raise ConfigError(
        f"parent_step={plan.parent_step}: run {parent.name} will have no checkpoint of that step when it has ended; the nearest "
        f"will be of {' and '.join(f'step {step}' for step in before + after)} (checkpoint.every_steps={saving.every_steps}, "
        f"keep={saving.keep}, keep_every={saving.keep_every}). Name one of these, or have the base save and keep that one"
    )
