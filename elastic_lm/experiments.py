"""`Experiment`: a plan carried out for real, by what trains, forks and evaluates. The command and other programs share it.

The loop itself is experiment/loop.py, which knows neither Ray nor a model.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.experiment import fork as forking
from elastic_lm.experiment import standing
from elastic_lm.experiment.account import Account
from elastic_lm.experiment.attempt import Attempt, Figures
from elastic_lm.experiment.beginning import Beginning
from elastic_lm.experiment.loop import Loop
from elastic_lm.experiment.plan import Plan
from elastic_lm.experiment.rehearsal import Prospect
from elastic_lm.experiment.result import ExperimentResult
from elastic_lm.experiment.skip import Skip
from elastic_lm.experiment.trainer import OUT_OF_TIME, Asked
from elastic_lm.result import RunResult
from elastic_lm.run import Run
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # between two looks at a run that is starting, or two words to one that does not hear
JOIN_S = 5.0


class Experiment:
    """An experiment: a base config, a target, and the attempts that are made one after another to reach it."""

    def __init__(self, loop: Loop, plan: Plan) -> None:
        self._loop = loop
        self.plan = plan

    @classmethod
    def open(
        cls,
        plan: str | os.PathLike[str] | Plan,
        *,
        tell: Callable[[str], None] = lambda sentence: None,
        on_line: Callable[[str], None] | None = None,
        quiet: bool = False,
    ) -> Experiment:
        """That of plan.yaml, at a path or an address: checked whole, and compared with what storage has of it. Writes nothing.

        Args: `tell` gets a sentence when an attempt begins and when it ends; `on_line` and `quiet` are those of `fit`.
        Raises: ConfigError when it cannot be carried out, or began as another plan; DataError, StorageError.
        """
        found = plan if isinstance(plan, Plan) else Plan.load(plan)
        beginning = Beginning.of(found, _settled(found.base_config()))
        return cls(Loop(beginning, _Trainer(found, on_line, quiet), tell), found)

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """All of the plan, as far as they are."""
        return self._loop.attempts

    @property
    def prospects(self) -> tuple[Prospect, ...]:
        """The same as they were checked, with what each changes and costs."""
        return self._loop.rehearsal.prospects

    def run(self) -> ExperimentResult:
        """Make one attempt after another until one reaches the target, or there is nothing left to do. Blocks.

        Goes on wherever it was cut short; an experiment that has ended is told and nothing is done. In the main thread signals
        stop the run that trains with a checkpoint, as in `fit`, and the experiment with it.
        Raises: OwnershipError when another process runs it; what `fit` and `Run.evaluate` raise.
        """
        return self._loop.run()


def _settled(base: RunConfig) -> RunConfig:
    """With the shape that is in model.init's folder, without which nobody knows what a run is.

    Raises: ConfigError when it has another: of a fork, whose weights are its parent's and no folder's.
    """
    if base.model.init is None:
        return base
    from elastic_lm.data.manifest import Manifest
    from elastic_lm.huggingface import initial  # it imports torch

    tokens = Storage.open(base.data.tokens)
    try:
        return initial.settled(base, tokens, Manifest.load(tokens))
    except ConfigError as error:
        if base.model.init_hash is None:  # no run's
            raise
        raise ConfigError(
            f"{error}. The first attempt begins at step 0 with that folder's weights, so the config of a fork to another shape, "
            "which has its weights from its parent, is no base; have attempts that are forks change the shape (parent: base)"
        ) from error


class _Trainer:
    """Trains on Ray, asks on this machine's CPU. See experiment/trainer.py."""

    def __init__(self, plan: Plan, on_line: Callable[[str], None] | None, quiet: bool) -> None:
        self._plan, self._on_line, self._quiet = plan, on_line, quiet
        self.signal: str | None = None
        self._fitting: set[tuple[object, ...]] = set()  # tokens and contexts for which all items are known to fit

    def asked(self, config: RunConfig) -> Mapping[str, Asked]:
        from elastic_lm.evaluate import tasks
        from elastic_lm.trained_model import interface_of

        found = tasks.find(self._plan.tasks, config, self._plan.samples)
        context = config.data.tokens, config.data.manifest, config.objective.name, config.model_spec(0).max_tokens
        if context not in self._fitting:
            interface = interface_of(config)
            for task in found:
                task.question.plan(interface)
            self._fitting.add(context)
        return {task.name: Asked(task.hash, task.question.figures) for task in found}

    def check(self, config: RunConfig) -> None:
        from elastic_lm.runtime.plan import make_plan
        from elastic_lm.tracking.trackers import check_installed, wanted_by

        check_installed(wanted_by(config))
        make_plan(config)

    def checkpoints(self, config: RunConfig) -> Sequence[int]:
        return [found.step for found in standing.complete(Storage.open(config.run_url))]

    def fork(self, parent: RunConfig, step: int, config: RunConfig, overrides: list[str], skip: Skip) -> None:
        request = forking.Request(RunAddress.at(parent.run_url), config.name, step, config.storage, overrides, skip)
        forking.fork(request)

    def train(self, config: RunConfig, limit_s: float | None) -> RunResult:
        from elastic_lm.runtime.trainer import fit

        with _stopped_after(config, limit_s) as is_over:
            result = fit(config, on_line=self._on_line, quiet=self._quiet, on_signal=self._hear)
        return replace(result, verdict=OUT_OF_TIME) if result.verdict == "stopped" and is_over() else result

    def _hear(self, signal: str) -> None:
        self.signal = signal

    def account(self, config: RunConfig) -> Account:
        return Account.of(Storage.open(config.run_url))

    def evaluate(self, config: RunConfig, step: int) -> Figures:
        run = Run.open(config)
        figures: dict[str, dict[str, float | None]] = {}
        for result in run.evaluate(*self._plan.tasks, step=step, samples=self._plan.samples):
            result.store(run.address.folder())
            figures[result.task] = {name: metric.value for name, metric in result.outcome.metrics.items()}
        return figures


@contextlib.contextmanager
def _stopped_after(config: RunConfig, limit_s: float | None) -> Iterator[Callable[[], bool]]:
    """The run is asked to stop, with a checkpoint, when it has been trained for so long. Yields: whether it was.

    Nobody asks before it trains: this process may not have joined the cluster yet.
    """
    ended, asked = threading.Event(), threading.Event()
    if limit_s is None:
        yield asked.is_set
        return
    run, began_s = Run.open(config), time.monotonic()

    def watch() -> None:
        while not _trains(run, time.monotonic() - began_s):  # its time begins with its log, as it is counted there
            if ended.wait(RETRY_S):
                return
        wait_s = min(limit_s, threading.TIMEOUT_MAX)
        while not ended.wait(wait_s):
            try:
                run.stop("the hours of the experiment's budget are over")
            except Exception as error:  # noqa: BLE001 - whatever it is: a thread that ends here bounds no hours any more
                logger.warning(
                    "The run was not asked to stop, which is tried again: %s: %s", type(error).__name__, error
                )
                wait_s = RETRY_S
            else:
                asked.set()
                return

    watcher = threading.Thread(target=watch, name="budget", daemon=True)
    watcher.start()
    try:
        yield asked.is_set
    finally:
        ended.set()
        watcher.join(JOIN_S)


def _trains(run: Run, since_s: float) -> bool:
    """Whether its log tells that it has begun to, since so long ago."""
    try:
        status = run.status()
    except Exception as error:  # noqa: BLE001 - as above
        logger.debug("It cannot be told whether the run trains: %s: %s", type(error).__name__, error)
        return False
    return status.verdict == "running" and status.seconds_ago < since_s
