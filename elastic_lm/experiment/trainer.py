"""What the loop of attempts leaves to others: training, forking, asking. So the loop needs neither a cluster nor a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from elastic_lm.config import RunConfig
from elastic_lm.experiment.account import Account
from elastic_lm.experiment.attempt import Figures
from elastic_lm.experiment.skip import Skip
from elastic_lm.result import RunResult

OUT_OF_TIME = "out_of_time"  # the verdict of a run that was stopped, with a checkpoint, because its time was up


@dataclass(frozen=True)
class Asked:
    """A task: the hash of all that decides its outcome beside the model, and the figures that it tells."""

    hash: str
    figures: tuple[str, ...]


class Trainer(Protocol):
    """Each method may raise an ElasticLMError: then nothing is known of the attempt, and the loop ends to be gone on with."""

    signal: str | None
    """Name of one that asked to stop while a run was trained; None when none did. The loop clears it when it begins."""

    def asked(self, config: RunConfig) -> Mapping[str, Asked]:
        """The tasks, by name, as they are for this run.

        Raises: ConfigError when one is broken, not for its objective, or has an item that does not fit its model.
        """

    def check(self, config: RunConfig) -> None:
        """Raises: what `train` would before it begins anything."""

    def checkpoints(self, config: RunConfig) -> Sequence[int]:
        """Steps of the run's complete checkpoints, as far as they can be used.    Raises: CheckpointError when none can be."""

    def fork(self, parent: RunConfig, step: int, config: RunConfig, overrides: list[str], skip: Skip) -> None:
        """Make `config`'s run of the parent's state at `step`; where that was cut short, go on with it.

        Raises: UnfitError when that state cannot take the changes; CheckpointError when it is not there.
        """

    def train(self, config: RunConfig, limit_s: float | None) -> RunResult:
        """Until there is a verdict, going on with what is there; for `limit_s` at most, then it is `OUT_OF_TIME`."""

    def account(self, config: RunConfig) -> Account:
        """Of the run, also of one that has not begun."""

    def evaluate(self, config: RunConfig, step: int) -> Figures:
        """What the run's state of this step, its last one, comes to in each task; kept in the run's folder, too.

        Raises: CheckpointError when that is not there.
        """
