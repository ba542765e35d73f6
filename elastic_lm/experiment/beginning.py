"""How attempts of a plan begin: the config of each, from scratch or as a fork of another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from elastic_lm.checkpoint.retention import Retention
from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.experiment import changes
from elastic_lm.experiment.attempt import Begun
from elastic_lm.experiment.plan import LAST_STEP, Plan, Planned


@dataclass(frozen=True)
class Beginning:
    """A plan with its base config.    Methods raise: ConfigError when a change does not apply; DataError; StorageError."""

    plan: Plan
    base: RunConfig

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
        return changes.with_skip(config, planned.skip, 0)

    def overrides(self, number: int, step: int) -> list[str]:
        """What a fork of a state that has applied `step` steps changes of its parent's config."""
        planned = self.planned[number]
        return [*planned.overrides, *([f"{LAST_STEP}={step + planned.steps}"] if planned.steps else [])]

    def fork(self, number: int, parent: RunConfig, step: int) -> RunConfig:
        """The parent's config with the attempt's changes, as the run goes on with it."""
        overrides = self.overrides(number, step)
        config = changes.changed(parent, overrides, name=self.run(number), storage=self.base.storage)
        changes.check_skip(parent, config, step)
        return changes.with_skip(config, self.planned[number].skip, step)

    def config(self, number: int, begun: Mapping[int, Begun]) -> RunConfig:
        """That of an attempt that has begun, as these say."""
        beginning = begun[number]
        if beginning.parent is None:
            return self.scratch(number)
        assert beginning.parent_step is not None
        return self.fork(number, self.config(beginning.parent, begun), beginning.parent_step)


def kept_steps(config: RunConfig, begins_at: int) -> list[int]:
    """The checkpoints that a run will have in the end, as far as that is known beforehand. `begins_at`: 0, or a fork's step."""
    saving, end = config.checkpoint, config.training.steps
    every = saving.every_steps or end
    saved = {step for step in range(every, end, every) if step > begins_at} | {end} | ({begins_at} - {0})
    return sorted(Retention(saving.keep, saving.keep_every).keeps(dict.fromkeys(saved)))


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
