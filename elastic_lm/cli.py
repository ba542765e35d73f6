"""The `elastic-lm` command: prepare a corpus, train a run; cli_run.py has what is done with a run that is there.

Invariant: a user's mistake, a refusal of storage and a run that did not finish each end in one message on stderr, without a
traceback, and in an exit code that says which it was (`Exit`). Heavy imports wait until a command needs them, so
that `--help` answers at once.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from elastic_lm import (
    __version__,
    cli_checkpoints,
    cli_config,
    cli_data,
    cli_deploy,
    cli_doctor,
    cli_estimate,
    cli_evaluate,
    cli_experiment,
    cli_fork,
    cli_jobs,
    cli_run,
    cli_runs,
    job_version,
)
from elastic_lm.corpus_figures import describe
from elastic_lm.errors import ConfigError, StorageError
from elastic_lm.terminal import (
    INTERRUPTED,
    OF_VERDICT,
    CommandGroup,
    Exit,
    deliver,
    give_up_unsaid,
    open_closed_streams,
    say,
    say_undelivered,
    told_errors,
)

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig
    from elastic_lm.data.manifest import Manifest
    from elastic_lm.data.mixture import Source
    from elastic_lm.data.prepare import PrepareOptions
    from elastic_lm.result import RunResult
    from elastic_lm.storage import Storage


PROGRAM = "elastic-lm"  # also where it is started by `python -m`

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog=f"Completion in your shell: {PROGRAM} --install-completion",
)
app.command()(cli_config.init)
app.add_typer(cli_run.app)
app.add_typer(cli_config.app, name="config")
app.add_typer(cli_checkpoints.app, name="checkpoints")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_fork.app)
app.add_typer(cli_experiment.app)
app.add_typer(cli_runs.app, name="runs")
app.add_typer(cli_jobs.app)
app.add_typer(cli_estimate.app)
app.add_typer(cli_evaluate.app)
app.add_typer(cli_doctor.app)
app.add_typer(cli_deploy.app)

ABOUT = f"""Pre-training of language models on a Ray cluster whose size changes under it, bit for bit.

Exit codes: {"; ".join(f"{code.value} {code.meaning}" for code in Exit)}.
"""


@app.callback(help=ABOUT)
def _about() -> None:
    pass


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, patterns, s3://.", metavar="SOURCE[=W]")],
    out: Annotated[str, typer.Option(help="Where tokens go: a folder or s3://.")],
    vocab_size: Annotated[int, typer.Option(help="Size of the trained vocabulary.")] = 16_384,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json to use instead.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.005,
    text_column: Annotated[str, typer.Option(help="Of .jsonl and .parquet.")] = "text",
    block_tokens: Annotated[int | None, typer.Option(help="Tokens per block; else by the corpus's size.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
) -> None:
    """Turn text into verified shards of tokens.

    Text is .txt .md .py .jsonl .parquet and the like, .gz and .zst around them. Run again, it goes on where it was. A number W
    behind a source is its weight: how often its documents occur in an epoch.
    """
    with told_errors():
        from elastic_lm.data.mixture import Source
        from elastic_lm.data.prepare import PrepareOptions
        from elastic_lm.data.summary import Summary

        options = PrepareOptions(
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            held_out=held_out,
            block_tokens=block_tokens,
            text_column=text_column,
        )
        found = [Source.parse(source) for source in sources]
        storage = _folder(out)
        began = time.monotonic()
        manifest = _prepare_here(found, storage, options) if local else _prepare_on_ray(found, storage, options)
        say(describe(storage, manifest, Summary.load(storage, manifest), time.monotonic() - began))


def _prepare_here(sources: list[Source], out: Storage, options: PrepareOptions) -> Manifest:
    from elastic_lm.data.prepare import prepare as prepare_here
    from elastic_lm.monitor.preparation import watching

    with watching(say) as view:
        return prepare_here(sources, out, options, view=view)


def _prepare_on_ray(sources: list[Source], out: Storage, options: PrepareOptions) -> Manifest:
    from elastic_lm.monitor.preparation import watching
    from elastic_lm.runtime import cluster, fan_out

    with cluster.connected() as sentence:
        say(sentence)
        with watching(say) as view:
            return fan_out.prepare(sources, out, options, view=view)


@app.command()
def train(
    config: cli_run.RunFile,
    set_: cli_run.Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate; start nothing.")] = False,
) -> None:
    """Train a run to its end.

    Resumes the run of that name from its newest checkpoint if there is one.
    """
    with told_errors():
        from elastic_lm.config import RunConfig

        job_version.check(os.environ)  # first: the config of another version may have fields that are unknown here
        chosen = RunConfig.load(config, set_ or ())
        if dry_run:
            cli_estimate.dry_run(chosen)
            return
        result = _train(chosen)
    _end(result)


@app.command()
def resume(run: cli_run.RunName, set_: cli_run.Overrides = None) -> None:
    """Go on with a run from its newest checkpoint.

    With the config that it was last trained with.
    """
    with told_errors():
        from elastic_lm.run import Run

        result = _train(Run.open(run).address.config(set_ or ()))
    _end(result)


def _train(config: RunConfig) -> RunResult:
    from elastic_lm.runtime.trainer import fit

    say(config.describe())
    return fit(config)


def _end(result: RunResult) -> NoReturn:
    say(str(result))
    raise typer.Exit(OF_VERDICT.get(result.verdict, Exit.FAILED))


@app.command()
def version() -> None:
    """Print the version."""
    deliver(__version__)


def _folder(address: str) -> Storage:
    """Storage at an address that somebody typed.    Raises: ConfigError when it cannot be one."""
    from elastic_lm.storage import Storage

    try:
        return Storage.open(address)
    except StorageError as error:
        raise ConfigError(str(error)) from error


def main() -> None:
    """Entry point of the `elastic-lm` command."""
    open_closed_streams()
    try:
        app(prog_name=PROGRAM)
    except OSError as error:  # of a help: typer prints it itself
        if error.errno != errno.ENOSPC:
            raise
        say_undelivered(error)
        sys.exit(Exit.UNAVAILABLE)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _end_beside_threads()
        raise
    finally:
        give_up_unsaid()


def _end_beside_threads() -> NoReturn:
    """What was interrupted may have left threads of Ray's behind, which crash an interpreter that ends under them."""
    give_up_unsaid()
    atexit._run_exitfuncs()
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
