"""The `elastic-lm` command: prepare a corpus, train a run; cli_run.py has what is done with a run that is there.

Invariant: a user's mistake, a refusal of storage and a run that did not finish each end in one message on stderr, without a
traceback, and in an exit code that says which it was (`Exit`). Heavy imports wait until a command needs them, so
that `--help` answers at once.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from elastic_lm import __version__, cli_data, cli_run
from elastic_lm.errors import ConfigError, StorageError
from elastic_lm.terminal import Exit, give_up_unsaid, say, told_errors

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig
    from elastic_lm.data.manifest import Manifest
    from elastic_lm.data.mixture import Source
    from elastic_lm.data.prepare import PrepareOptions
    from elastic_lm.result import RunResult
    from elastic_lm.storage import Storage


OF_VERDICT = {"done": Exit.DONE, "stopped": Exit.STOPPED, "data_error": Exit.DATA, "refused": Exit.USAGE}

Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a field: a.b=value.", metavar="A.B=V")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(cli_run.app)
app.add_typer(cli_data.app, name="data")


@app.callback()
def _about() -> None:
    """Pre-training of language models on a Ray cluster whose size changes under it, bit for bit.

    Exit codes: 0 done; 1 the run failed; 2 a config, argument or checkpoint does not fit; 3 bad data; 4 storage or cluster
    unavailable; 5 stopped on request with a checkpoint (the same command goes on).
    """


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
    """Turn text into verified shards of tokens. Again, it goes on where it was.

    A number W behind a source is its weight: how often its documents occur in an epoch. See docs/data.md.
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
        say(cli_data.describe(storage, manifest, Summary.load(storage, manifest), time.monotonic() - began))


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
    config: Annotated[str, typer.Argument(help="The run's YAML file.", metavar="RUN.YAML")],
    set_: Overrides = None,
) -> None:
    """Train a run to its end. Resumes the run of that name from its newest checkpoint if there is one."""
    with told_errors():
        from elastic_lm.config import RunConfig

        result = _train(RunConfig.load(config, set_ or ()))
    _end(result)


@app.command()
def resume(run: cli_run.Run, set_: Overrides = None) -> None:
    """Go on with a run as it was last trained, from its newest checkpoint."""
    with told_errors():
        result = _train(cli_run.find(run).config(set_ or ()))
    _end(result)


def _train(config: RunConfig) -> RunResult:
    from elastic_lm.monitor.live import watching
    from elastic_lm.runtime.trainer import fit

    say(config.describe())
    with watching(say, config.metrics.interval_s) as view:
        return fit(config, view=view)


def _end(result: RunResult) -> NoReturn:
    say(describe(result))
    raise typer.Exit(OF_VERDICT.get(result.verdict, Exit.FAILED))


@app.command()
def version() -> None:
    """Print the version."""
    say(__version__)


def describe(result: RunResult) -> str:
    """The end of a run, for people."""
    figures = result.metrics
    rows = [("verdict", f"{result.verdict}: {result.message}")]
    if result.last_step is not None:
        rows.append(("steps", f"{result.last_step}"))
    if figures.get("loss") is not None:
        rows.append(("loss", f"{figures['loss']:.6f}"))
    if figures.get("tokens_per_s"):
        rows.append(("tokens/s", f"{figures['tokens_per_s']:,.0f}"))
    if figures.get("goodput") is not None:
        rows.append(("goodput", f"{figures['goodput']:.1%}"))
    lost = {cause: seconds for cause, seconds in figures.get("lost_worker_s", {}).items() if seconds >= 0.05}
    if lost:
        rows.append(("lost", ", ".join(f"{cause} {seconds:.1f} worker-s" for cause, seconds in lost.items())))
    if result.checkpoint:
        rows.append(("checkpoint", result.checkpoint))
    if result.report:
        rows.append(("report", result.report))
    rows += [(name, f"sha256 {digest}") for name, digest in sorted(result.digest.items())]
    return "\n".join(f"{name:>10}  {value}" for name, value in rows)


def _folder(address: str) -> Storage:
    """Storage at an address that somebody typed.    Raises: ConfigError when it cannot be one."""
    from elastic_lm.storage import Storage

    try:
        return Storage.open(address)
    except StorageError as error:
        raise ConfigError(str(error)) from error


def main() -> None:
    """Entry point of the `elastic-lm` command."""
    try:
        app()
    finally:
        give_up_unsaid()


if __name__ == "__main__":
    main()
