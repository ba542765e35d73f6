"""A run that is there: looked at from its log, reached into through its cluster. The commands and other programs share it.

Invariant: looking needs the run's storage only, from any machine, and changes nothing there but the files that one asks
for (`report`, `export`, `refill`). `scale`, `stop` and `drain` need the cluster that trains it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.events.log import last, read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.result import RunResult
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa

    from elastic_lm.evaluate.pieces import Answerer
    from elastic_lm.evaluate.progress import View
    from elastic_lm.evaluate.result import Result

FOLLOW_S = 1.0
LOOK_EVENTS = 5_000  # of the newest, for a quick look
KEPT_LOSSES = 10_000  # as many as a recorder has in mind


@dataclass(frozen=True)
class RunStatus:
    """How a run is doing, by its newest events. None where nothing is known.

    `verdict` is "running" until there is one. `step` counts committed steps, `of` those that are wanted; `workers` are
    those of the last generation. `seconds_ago`: age of the last event.
    """

    run: str
    verdict: str
    message: str | None
    step: int
    of: int | None
    loss: float | None
    workers: int
    tokens_per_s: float | None
    last_event: str | None
    seconds_ago: float


class Run:
    """One run, by its name, its YAML file or its address. Nothing is read before it is asked for."""

    def __init__(self, address: RunAddress) -> None:
        self._given = address

    @classmethod
    def open(cls, run: str | os.PathLike[str] | RunConfig) -> Run:
        """The run that is meant: `RUN.yaml`, the address or folder `STORAGE/runs/NAME`, a bare name, or a config.

        A bare name is that of a folder in `./runs`, else of a run on the cluster at RAY_ADDRESS.    Raises: ConfigError.
        """
        if isinstance(run, RunConfig):
            return cls(RunAddress(run.name, Storage.open(run.run_url)))
        return cls(RunAddress.find(os.fspath(run)))

    def __repr__(self) -> str:
        return f"Run({self._given.storage.url if self._given.storage else self.name!r})"

    @property
    def name(self) -> str:
        return self._given.name

    @cached_property
    def address(self) -> RunAddress:
        """The run and where it is stored; a bare name is asked of RAY_ADDRESS.    Raises: ConfigError, ClusterError."""
        if self._given.storage is None and "RAY_ADDRESS" in os.environ:
            from elastic_lm.runtime import remote

            return RunAddress.at(remote.run_url(self.name))
        return self._given

    @property
    def url(self) -> str:
        """Where everything about the run is kept.    Raises: ConfigError, ClusterError."""
        return self.address.folder().url

    # -- looking: each raises ConfigError, NotFoundError or StorageError when there is no such run, or no answer ------------

    @property
    def config(self) -> RunConfig:
        """What the run was last trained with."""
        return self.address.stored_config()

    def status(self) -> RunStatus:
        """How the run is doing, from the end of its log."""
        from elastic_lm.monitor.history import History

        history = History.of(last(self.address.log(), LOOK_EVENTS))
        point = history.points[-1] if history.points else None
        _, rates = history.tokens_per_s(most_parts=10)
        return RunStatus(
            run=self.name,
            verdict=history.verdict or "running",
            message=history.message or None,
            step=point.step + 1 if point else 0,
            of=history.config.get("training", {}).get("steps"),
            loss=point.fields["loss"] if point else None,
            workers=history.world_sizes[-1][1] if history.world_sizes else 0,
            tokens_per_s=rates[-1] if rates else None,
            last_event=history.news[-1].message if history.news else None,
            seconds_ago=time.time() - history.ended_s,
        )

    def events(self, *, follow: bool = False) -> Iterator[Event]:
        """What happened, in order. `follow`: wait for more until the run has finished."""
        return read(self.address.log(), poll_s=FOLLOW_S if follow else None)

    def metrics(self) -> pa.Table:
        """A row for each committed step, as docs/steps.md says; `.to_pandas()` and `polars.from_arrow` take it on."""
        from elastic_lm.monitor import table

        return table.table_of(self.events())

    @property
    def result(self) -> RunResult | None:
        """What the run came to; None as long as it has no verdict."""
        result = _result_of(self.events())
        if result is None:
            return None
        folder = self.address.folder()
        return replace(result, **_newest_checkpoint(folder, result.last_step), **_files(folder))

    def report(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the run's report, one HTML file, to `path` or into its folder.    Returns: where it is."""
        from elastic_lm.experiment import ancestry
        from elastic_lm.monitor import report, task_results

        self.address.log()
        folder = self.address.folder()
        ancestors = ancestry.of_run(folder)
        if path is None:
            return report.write(self.name, folder, ancestors)
        page = report.render(self.name, self.events(), task_results.newest(folder), ancestors)
        try:
            Path(path).write_text(page, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{os.fspath(path)} cannot be written: {error.strerror}") from error
        return os.fspath(path)

    def export(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the table of steps: Parquet or CSV at `path`, else Parquet in its folder.    Returns: where it is."""
        from elastic_lm.monitor import table

        if path is None:
            self.address.log()
            return table.write(self.name, self.address.folder())
        table.write_file(self.events(), os.fspath(path))
        return os.fspath(path)

    def export_model(self, folder: str | os.PathLike[str]) -> int:
        """Write the newest checkpoint to a folder that Hugging Face's transformers loads.    Returns: its step.

        Raises: ConfigError when transformers has no such model, or the folder is there already; CheckpointError; DataError.
        """
        from elastic_lm.huggingface.export import export

        return export(self.address.folder(), self.address.stored_config(), os.fspath(folder))

    def generate(
        self,
        prompt: str,
        *,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float = 1.0,
        max_new_tokens: int = 128,
        seed: int = 0,
        step: int | None = None,
    ) -> Iterator[str]:
        """Continue the prompt with the newest checkpoint, or that of `step`, on this machine's CPU: pieces of text as they come.

        Of a run with the masked objective: the prompt, each `<|mask|>` in it filled in.
        Raises: ConfigError when a choice or the prompt does not do; CheckpointError when there is no such checkpoint; DataError.
        """
        from elastic_lm.generation import Generator, Sampling
        from elastic_lm.trained_model import TrainedModel

        sampling = Sampling(temperature, top_k, top_p, max_new_tokens, seed)
        model = TrainedModel.load(self.address.folder(), self.address.stored_config(), step)
        return Generator(model).generate(prompt, sampling)

    def evaluate(
        self,
        *tasks: str,
        step: int | None = None,
        samples: int | None = None,
        workers: int | None = None,
        view: View | None = None,
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> Iterator[Result]:
        """How good the model is: the result of each task as soon as it is there.

        `tasks`: `held_out`, or addresses of YAML files (docs/evaluation.md). `step`: of another checkpoint than the newest;
        `samples`: at most so many held-out ones. `workers`: so many of the Ray cluster at RAY_ADDRESS compute it, or of one
        that is started for it; else this process, on its CPU. `view` is shown how far it has come; `tell` gets what is said
        of the cluster. Nothing is stored: `result.store(run.address.folder())` does that.
        Raises: ConfigError when a task cannot be answered; CheckpointError when there is no such checkpoint; DataError;
        ClusterError when there is no cluster, or it gives no workers.
        """
        from elastic_lm.evaluate.evaluation import evaluate
        from elastic_lm.evaluate.fields import check_number
        from elastic_lm.evaluate.pieces import here

        check_number("samples", samples, 1)
        check_number("workers", workers, 1)
        answerer: Answerer = here
        if workers is not None:
            from elastic_lm.runtime.evaluators import OnCluster

            answerer = OnCluster(workers, tell)
        return evaluate(
            self.address.folder(),
            self.address.stored_config(),
            tasks or ("held_out",),
            step=step,
            max_samples=samples,
            answerer=answerer,
            view=view,
        )

    def evaluate_harness(
        self,
        *tasks: str,
        step: int | None = None,
        samples: int | None = None,
        shots: int | None = None,
        python: str | None = None,
        include: str | None = None,
        view: View | None = None,
    ) -> Iterator[Result]:
        """The same for tasks of lm-evaluation-harness, by its names (docs/evaluation.md).

        `samples`: at most so many items of each task; `shots`: examples before each, unless a task allows none. `python`: the
        one that has lm-eval, else ELASTIC_LM_HARNESS_PYTHON, else this one; `include`: a folder with tasks of your own.
        Raises: as `evaluate`.
        """
        from elastic_lm.evaluate.harness.evaluation import Harness

        address = self.address
        harness = Harness(tasks, python, include, samples, shots)
        return harness.evaluate(address.folder(), address.stored_config(), step, view=view)

    def fork(
        self,
        name: str,
        *,
        step: int | None = None,
        storage: str | None = None,
        overrides: Sequence[str] = (),
        skip: Sequence[tuple[int, int]] = (),
    ) -> Run:
        """Make a run that goes on from this one's state: `fit(run.fork("hotter", ...).config)` trains it (docs/experiments.md).

        Args: `step` of the checkpoint, None for the newest; `storage`: where it goes, None for where this run is; `overrides`:
        `a.b=value`; `skip`: half-open ranges of batches to leave out.
        Raises: ConfigError when it cannot be made, or the name is taken; CheckpointError, DataError. Then there is no such run.
        """
        from elastic_lm.experiment.fork import Request, fork

        return Run.open(fork(Request(self.address, name, step, storage, overrides, tuple(skip))).url)

    def refill(self, tracker: str, overrides: Sequence[str] = ()) -> None:
        """Write the whole log so far into `tensorboard` or `wandb`, where nothing comes to be twice.

        It goes where the run's config says, with `a.b=value` overrides on top.    Raises: TrackingError, too.
        """
        from elastic_lm.tracking import trackers

        if tracker not in trackers.KEYS:
            raise ConfigError(f"{tracker!r} is no tracker; choose {' or '.join(trackers.KEYS)}")
        trackers.refill(self.address.stored_config(overrides), tracker, self.events())

    # -- reaching into it: each raises ClusterError when there is no cluster, or the run is not trained on it --------------

    def scale(self, min_workers: int, max_workers: int) -> None:
        """Change how many workers the run wants. They come and leave between two steps.    Raises: ConfigError, too."""
        if not 1 <= min_workers <= max_workers:
            raise ConfigError(
                f"{min_workers} to {max_workers} workers is no range; choose 1 <= min_workers <= max_workers"
            )
        self._command("scale", {"min_workers": min_workers, "max_workers": max_workers})

    def stop(self, reason: str = "asked by a person") -> None:
        """Ask the run to stop after its running step, with a checkpoint."""
        self._command("stop", {"reason": reason})

    def drain(self, node: str) -> str:
        """Ask the workers on a node to leave between two steps. `node`: the beginning of its id.    Returns: its id."""
        return self._command("drain", {}, node=node)

    def _command(self, kind: str, arguments: dict[str, Any], *, node: str | None = None) -> str:
        from elastic_lm.runtime import remote

        return remote.command(self.name, kind, arguments, node=node)


# -- parts -----------------------------------------------------------------------------------------------------------


def _result_of(events: Iterable[Event]) -> RunResult | None:
    """Verdict and figures: what the recorder of the last attempt had, because they are computed from the same events."""
    from elastic_lm.monitor.goodput import Goodput

    goodput: Goodput | None = None
    losses: dict[int, float] = {}  # of the last steps
    evaluations: dict[int, Event] = {}
    finished: Event | None = None
    for event in events:
        if event.kind is EventKind.RUN_STARTED:
            goodput = goodput or Goodput(event.fields["config"]["batch"]["micro_batches"])
            finished = None
        elif event.kind is EventKind.STEP_COMMITTED:
            _remember(losses, event)
        elif event.kind is EventKind.EVALUATED:
            evaluations[event.step or 0] = event
        elif event.kind is EventKind.REWOUND:
            stays = event.step or 0
            losses = {step: loss for step, loss in losses.items() if step < stays}
            evaluations = {step: told for step, told in evaluations.items() if step <= stays}
        elif event.kind is EventKind.RUN_FINISHED:
            finished = event
        if goodput is not None:
            goodput.observe(event)
    if finished is None or goodput is None:
        return None
    evaluation = evaluations.get(finished.step or 0)
    figures = {
        "loss": losses[max(losses)] if losses else None,
        "held_out_loss": None if evaluation is None else evaluation.fields["loss"],
        "tokens_per_s": goodput.tokens_per_s(),
        "goodput": goodput.ratio(),
        "lost_worker_s": goodput.lost_worker_s(),
    }
    reason = finished.fields.get("reason", finished.message)  # a log of an earlier version has none
    return RunResult(finished.fields["verdict"], reason, finished.step, figures)


def _remember(losses: dict[int, float], committed: Event) -> None:
    """The loss of a step that was not left out, among those of as many steps as the recorder keeps."""
    if committed.step is None or committed.fields.get("refused"):
        return
    losses.pop(committed.step, None)
    losses[committed.step] = committed.fields["loss"]
    if len(losses) > KEPT_LOSSES:
        del losses[next(iter(losses))]


def _newest_checkpoint(folder: Storage, last_step: int | None) -> dict[str, Any]:
    """Where the newest complete one is, and the digests of the final state if it holds that. Its parts are not read."""
    from elastic_lm.checkpoint import registry

    complete = [found for found in registry.found(folder) if found.state == "complete"]
    if not complete:
        return {}
    newest = complete[-1]
    return {"checkpoint": newest.url, "digest": newest.meta.get("digest", {}) if newest.step == last_step else {}}


def _files(folder: Storage) -> dict[str, Any]:
    """What has been made of the log."""
    from elastic_lm.monitor import report, table

    files = {"report": report.FILE, "table": table.FILE}
    return {name: f"{folder.url}/{path}" for name, path in files.items() if folder.exists(path)}
