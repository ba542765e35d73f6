"""`evaluate`: how good a run's model is, in figures with their intervals; told, and kept in the run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_lm import cli_run
from elastic_lm.errors import ConfigError, ElasticLMError
from elastic_lm.terminal import deliver, say, told_errors, visible

if TYPE_CHECKING:
    from elastic_lm.evaluate.intervals import Metric
    from elastic_lm.evaluate.result import Result
    from elastic_lm.run import Run

NICENESS = (
    19  # that of evaluators on a cluster: 15 by Ray, and 4. A run on the same machine, which has Ray's 15, goes first
)

app = typer.Typer()


@app.command()
def evaluate(
    run: cli_run.RunAtStep,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="held_out and YAML files of your own, with commas between.  [default: held_out]", metavar="TASK,..."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many held-out samples; of the harness, items of each task.", metavar="N"),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead, e.g. crows_pairs,toxigen.", metavar="TASK,..."),
    ] = None,
    harness_python: Annotated[
        str | None,
        typer.Option(
            help="The Python that has lm-eval; else ELASTIC_LM_HARNESS_PYTHON, else this one.", metavar="PATH"
        ),
    ] = None,
    harness_include: Annotated[
        str | None, typer.Option(help="With YAML files of your own harness tasks.", metavar="FOLDER")
    ] = None,
    harness_shots: Annotated[
        int | None, typer.Option(min=0, help="Examples before each item, unless a task allows none.", metavar="N")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="On so many workers of the Ray cluster at RAY_ADDRESS.", metavar="N")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: a line for each task.")] = False,
) -> None:
    """Tell how good a run's model is, with 95 % intervals.

    On this machine's CPU, or with --workers shared out over a cluster, also while the run trains. The task held_out is the loss
    on text that the corpus keeps from training; others are multiple choice, pairs of sentences, BLEU, a scorer of your own, and
    all of lm-evaluation-harness (docs/evaluation.md). Results are kept in the run's folder, below evaluations/.
    """
    with told_errors():
        if workers is None:
            _step_aside()
        from elastic_lm.monitor.evaluating import Display
        from elastic_lm.run import Run
        from elastic_lm.run_address import split_step

        of_harness = any(option is not None for option in (harness_python, harness_include, harness_shots))
        _check_options(harness, tasks, workers, of_harness=of_harness)
        name, step = split_step(run)
        found = Run.open(name)
        display = None if as_json else Display()

        def results() -> Iterator[Result]:
            """From its first line on the display is there: to import PyTorch takes seconds."""
            if harness is None:
                asked = _names("held_out" if tasks is None else tasks)
                yield from found.evaluate(*asked, step=step, samples=samples, workers=workers, view=display, tell=_tell)
            else:
                yield from found.evaluate_harness(
                    *_names(harness),
                    step=step,
                    samples=samples,
                    shots=harness_shots,
                    python=harness_python,
                    include=harness_include,
                    view=display,
                )

        for result in _alone_on_output(results()) if display is None else display.waiting_for(results()):
            refused = _kept(result, found)
            deliver(json.dumps(result.as_dict()) if as_json else "\n".join(_rows(result)))
            if refused is not None:
                raise refused


def _alone_on_output(results: Iterator[Result]) -> Iterator[Result]:
    """The same. What is printed meanwhile, as by a scorer, goes to standard error: it is no line of JSON."""
    while True:
        with contextlib.redirect_stdout(sys.stderr):
            result = next(results, None)
        if result is None:
            return
        yield result


def _kept(result: Result, run: Run) -> ElasticLMError | None:
    """Store it before it is told: nobody may read on.    Returns: why it is not stored."""
    try:
        result.store(run.address.folder())
    except ElasticLMError as error:
        return error
    return None


def _step_aside() -> None:
    """Take the lowest priority, for all threads that begin from here on, and the harness."""
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def _check_options(harness: str | None, tasks: str | None, workers: int | None, *, of_harness: bool) -> None:
    """`of_harness`: whether one was given that is for the harness alone.    Raises: ConfigError."""
    if harness is not None and tasks is not None:
        raise ConfigError("--tasks and --harness are two evaluations; give one of them, then the other")
    if harness is not None and workers is not None:
        raise ConfigError("--workers is for --tasks: the harness asks one model, on this machine; leave it out")
    if harness is None and of_harness:
        raise ConfigError(
            "--harness-python, --harness-include and --harness-shots are for tasks of the harness; name them with --harness"
        )


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def _tell(sentence: str) -> None:
    say(sentence, sys.stderr)


def _rows(result: Result) -> Iterator[str]:
    counts = ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in result.outcome.counts.items())
    yield f"{result.task} at step {result.step:,}: {counts}"
    for name, metric in result.outcome.metrics.items():
        yield f"{name.replace('_', ' '):>20}  {_told(metric)}"
    for name in ("caution", "corpus"):
        if name in result.outcome.method:
            yield visible(f"{'':>20}  {result.outcome.method[name]}")


def _told(metric: Metric) -> str:
    if metric.value is None:
        return "not finite"
    if metric.low is None or metric.high is None:
        return f"{metric.value:>12,.4f}"
    return f"{metric.value:>12,.4f}   {metric.low:,.4f} to {metric.high:,.4f}"
