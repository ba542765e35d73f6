"""`estimate`, and what `train --dry-run` prints: what a run takes, before anything is started.

The arithmetic is in estimate.py; here is found out what it rests on: the vocabulary, a factory's parameters, the speed
that the run's log tells.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_lm import cli_run
from elastic_lm.errors import ConfigError, DataError, StorageError
from elastic_lm.terminal import bytes_told, deliver, say, told_errors

if TYPE_CHECKING:
    from elastic_lm.config import BatchConfig, RunConfig
    from elastic_lm.engine.spec import FactorySpec
    from elastic_lm.estimate import Estimate, Model, Suggestion
    from elastic_lm.model.spec import ModelSpec

LOOK_EVENTS = 500  # of the newest in the log, for the speed
LOOK_S = 10.0
COLUMNS, INDENT = 80, 18

app = typer.Typer()


@app.command()
def estimate(
    config: cli_run.RunFile,
    set_: cli_run.Overrides = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="What one worker trains, for the hours.")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Of the corpus, where there is none yet.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Tell what a run takes: parameters, memory, work, time.

    For every number of workers in the run's range: how evenly the micro-batches divide among them, and how long the run
    takes. Starts nothing; reads the corpus's manifest for the vocabulary, and the run's log, if there is one, for its speed.
    """
    with told_errors():
        from elastic_lm.config import RunConfig
        from elastic_lm.estimate import Estimate

        _check_options(tokens_per_second, vocab_size)
        run = RunConfig.load(config, set_ or ())
        vocab_size = vocab_size or _vocab_size_of(run)
        run = with_shape(run, vocab_size)
        spec = run.engine_spec(vocab_size).model
        rate, source = (tokens_per_second, "as given") if tokens_per_second else logged_rate(run)
        found = Estimate.of(run, sizes_of(spec, run), rate)
    deliver(json.dumps(asdict(found), indent=1) if as_json else describe(found, run, source))


def dry_run(config: RunConfig) -> None:
    """Print the estimate of a run whose corpus and storage are read as training would, and what training would do.

    Raises: what `fit` raises before it starts anything.
    """
    from elastic_lm.data.manifest import Manifest
    from elastic_lm.data.windows import read_block
    from elastic_lm.estimate import Estimate
    from elastic_lm.runtime.plan import make_plan
    from elastic_lm.storage import Storage

    plan = make_plan(config)
    tokens = Storage.open(config.data.tokens)
    read_block(tokens, Manifest.load(tokens), 0)
    rate, source = logged_rate(plan.config)
    found = Estimate.of(plan.config, sizes_of(plan.spec.model, plan.config), rate)
    begins = "at step 0" if plan.resume_step is None else f"with the checkpoint of step {plan.resume_step}"
    say(f"{describe(found, plan.config, source)}\n")
    say("Corpus and storage can be read; `elastic-lm doctor` tries writing, too.")
    say("Nothing was started.")
    say(f"The run would begin {begins}.")


def sizes_of(spec: ModelSpec | FactorySpec, config: RunConfig) -> Model:
    """Parameters and operations; a factory's model is built to count the former.    Raises: ConfigError."""
    from elastic_lm.estimate import Model
    from elastic_lm.model.spec import ModelSpec

    if isinstance(spec, ModelSpec):
        return Model.of(spec, config.batch.sequence_length, config.predicted)
    from elastic_lm.engine.build import count_parameters

    with _modules_of_this_folder(), contextlib.redirect_stdout(sys.stderr):  # what it prints is not part of the answer
        return Model(count_parameters(spec))


def logged_rate(config: RunConfig) -> tuple[float | None, str]:
    """Tokens per second of one worker by the newest steps of the run's log, and where they are from or why there are none."""
    from elastic_lm.events.log import last
    from elastic_lm.events.types import EventKind
    from elastic_lm.storage import Storage

    log = Storage.open(config.run_url, deadline_s=LOOK_S, retries=2).child("events")
    try:
        events = last(log, LOOK_EVENTS)
    except StorageError as error:
        return None, f"its log could not be read: {error}"
    steps = [event.fields for event in events if event.kind is EventKind.STEP_COMMITTED]
    rates = [
        fields["num_targets"] / config.batch.micro_batches * -(-config.batch.micro_batches // fields["world_size"])
        / fields["step_s"]
        for fields in steps if fields["step_s"] > 0
    ]  # fmt: skip
    if not rates:
        return None, ""
    return statistics.median(rates), f"the median of the last {len(rates)} steps in its log"


def with_shape(config: RunConfig, vocab_size: int) -> RunConfig:
    """With the shape that it began with, or that is in model.init's folder.    Raises: ConfigError, StorageError."""
    if config.model.init is None:
        return config
    from elastic_lm.huggingface import initial

    return initial.with_shape(config, vocab_size, _begun(config))


def _begun(config: RunConfig) -> RunConfig | None:
    """What the run was last trained with, or was forked as; None when there is none, or nobody can tell."""
    from elastic_lm.config import CONFIG_FILE, RunConfig
    from elastic_lm.storage import Storage

    try:
        stored = Storage.open(config.run_url, deadline_s=LOOK_S, retries=2).read(CONFIG_FILE)
        return RunConfig.from_yaml(stored.decode(errors="replace"), CONFIG_FILE)
    except (ConfigError, StorageError):
        return None


def _check_options(tokens_per_second: float | None, vocab_size: int | None) -> None:
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise ConfigError(f"--tokens-per-second {tokens_per_second} is no speed; give what one worker trains, above 0")
    if vocab_size is not None and vocab_size < 1:
        raise ConfigError(f"--vocab-size {vocab_size} is no size of a vocabulary; 16384 is usual for a first corpus")


def _vocab_size_of(config: RunConfig) -> int:
    """What the config or the corpus says.    Raises: DataError with what to do when there is no corpus yet."""
    from elastic_lm.data.manifest import Manifest
    from elastic_lm.storage import Storage

    if config.model.vocab_size is not None:
        return config.model.vocab_size
    try:
        return Manifest.load(Storage.open(config.data.tokens)).vocab_size
    except DataError as error:
        raise DataError(f"{error}; before there is one, give --vocab-size") from error


@contextlib.contextmanager
def _modules_of_this_folder() -> Iterator[None]:
    """Workers find a user's modules in the folder that the command is started from; so must we."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


# -- what is told ----------------------------------------------------------------------------------------------------


def describe(found: Estimate, config: RunConfig, rate_source: str) -> str:
    """For people, 80 columns wide. `rate_source`: where the speed is from, or why there is none."""
    facts = "\n".join(
        textwrap.fill(text, COLUMNS, initial_indent=f"{name:>{INDENT - 2}}  ", subsequent_indent=" " * INDENT)
        for name, text in _facts(found, config)
    )
    advice = "\n".join(textwrap.fill(text, COLUMNS) for text in (*_advice(found, config), _hours(found, rate_source)))
    return "\n\n".join([facts, "\n".join(_table(found)), advice])


def _facts(found: Estimate, config: RunConfig) -> Iterator[tuple[str, str]]:
    batch, workers = config.batch, config.workers
    split = f"{batch.micro_batches} x {batch.micro_batch_size} samples x {batch.sequence_length} tokens"
    counted = f"{workers.min} to {workers.max}" if workers.min < workers.max else f"{workers.max}"
    yield (
        "run",
        f"{found.run}: {counted} worker{'s' * (workers.max > 1)} on {config.device}, {config.reduction.kind} sums",
    )
    inside = "" if found.matmul_parameters is None else f", {found.matmul_parameters:,} of them in matrix products"
    yield "parameters", f"{found.num_parameters:,}{inside}"
    yield "tokens per step", f"{found.tokens_per_step:,} = {split}"
    yield "tokens in all", f"{found.tokens_in_all:,} in {found.steps:,} steps"
    if found.training_flops is None:
        yield "training FLOPs", "not known for a model of your own"
    else:
        yield "training FLOPs", f"{found.training_flops:.3g}, {found.flops_per_token:,} per token"
    yield "worker's memory", f"{_memory(found)}. Not counted: activations, libraries"
    kept = f"{found.checkpoints_kept} {'is' if found.checkpoints_kept == 1 else 'are'} kept"
    yield (
        "checkpoint",
        f"{bytes_told(found.checkpoint_bytes)}, {kept}; as much more memory in the worker that saves one",
    )


def _memory(found: Estimate) -> str:
    parts = found.bytes_per_worker
    if len(parts) == 1:
        return f"{bytes_told(sum(parts.values()))} as measured"
    return (
        f"{bytes_told(sum(parts.values()))}: {', '.join(f'{name} {bytes_told(size)}' for name, size in parts.items())}"
    )


def _table(found: Estimate) -> Iterator[str]:
    yield f"{'workers':>9}  {'micro-batches each':>18}  {'step time':>9}  {'efficiency':>10}  {'hours':>8}"
    for row in found.workers:
        few, most = row.fewest_micro_batches, row.most_micro_batches
        each = f"{most}" if few == most else f"{few} or {most}"
        hours = "-" if row.hours is None else _number(row.hours)
        yield f"{row.num_workers:>9}  {each:>18}  {_number(row.step_time):>9}  {row.efficiency:>10.0%}  {hours:>8}"


def _advice(found: Estimate, config: RunConfig) -> Iterator[str]:
    batch = config.batch
    reached = f"worst {found.worst_efficiency:.0%} with {found.worst_workers}, {found.mean_efficiency:.0%} in the mean"
    if found.worst_efficiency == 1:
        reached = "all of them divide evenly"
    yield f"Efficiency is M / (N x ceil(M / N)) for M = {batch.micro_batches} micro-batches and N workers: {reached}."
    for suggestion in found.suggestions:
        yield f"Better: {_suggested(suggestion, batch)}"
    if found.suggestions:
        yield "These fields are part of what a run is: change them before it begins."


def _suggested(suggestion: Suggestion, batch: BatchConfig) -> str:
    count, size = suggestion.micro_batches, suggestion.micro_batch_size
    resized = "" if size == batch.micro_batch_size else f" and batch.micro_batch_size={size}"
    samples = count * size
    if samples == batch.samples:
        effect = f"the global batch stays at {samples:,} samples"
    else:
        effect = f"the global batch becomes {samples:,} samples in place of {batch.samples:,}, {samples / batch.samples - 1:+.0%}"
    reached = f"worst {suggestion.worst:.0%}, mean {suggestion.mean:.0%}"
    return f"batch.micro_batches={count}{resized} ({reached}); {effect}."


def _hours(found: Estimate, rate_source: str) -> str:
    if found.tokens_per_s_per_worker is None:
        why = f" ({rate_source})" if rate_source else ""
        return f"Hours need a speed{why}: `elastic-lm estimate --tokens-per-second`, what one worker trains."
    rate = f"{found.tokens_per_s_per_worker:,.0f} tokens/s of one worker"
    return f"Hours at {rate}, {rate_source}; sums and transfers are taken as free."


def _number(value: float) -> str:
    """Three digits that tell something, or more before the point."""
    return f"{value:#.3g}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:,.0f}"
