"""The `elastic-lm` command: prepare a corpus, train a run.

Invariant: a user's mistake, a refusal of storage and a run that did not finish each end in one message on stderr, without a
traceback, and in an exit code that says which it was (`Exit`). Heavy imports wait until a command needs them, so
that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from elastic_lm import __version__
from elastic_lm.errors import ClusterError, ConfigError, DataError, ElasticLMError, NotFoundError, StorageError

if TYPE_CHECKING:
    from elastic_lm.result import RunResult
    from elastic_lm.storage import Storage


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0
    FAILED = 1  # a bug: the same exception twice, a poisoned step, a coordinator that failed again and again
    USAGE = 2  # a config, an argument or a checkpoint that does not fit, or is not there
    DATA = 3  # a corpus that must not be trained on
    UNAVAILABLE = 4  # storage or the cluster gave no access or no answer
    STOPPED = 5  # stopped on request, with a checkpoint: the same command goes on


OF_VERDICT = {"done": Exit.DONE, "stopped": Exit.STOPPED, "data_error": Exit.DATA, "refused": Exit.USAGE}

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def _about() -> None:
    """Pre-training of language models on a Ray cluster whose size changes under it, bit for bit.

    Exit codes: 0 done; 1 the run failed; 2 a config, argument or checkpoint does not fit; 3 bad data; 4 storage or cluster
    unavailable; 5 stopped on request with a checkpoint (the same command goes on).
    """


@app.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, patterns (* ? **) or s3:// addresses.")],
    out: Annotated[str, typer.Option(help="Where the tokens go: s3://bucket/prefix or a folder.")],
    vocab_size: Annotated[int, typer.Option(help="Size of the vocabulary that is trained.")] = 16_384,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer.json to use instead of training one.")] = None,
    held_out: Annotated[float, typer.Option(help="Share of documents kept for evaluation, by their hash.")] = 0.005,
    block_tokens: Annotated[int | None, typer.Option(help="Tokens per block; the default suits the size.")] = None,
    local: Annotated[bool, typer.Option("--local", help="In this process, without Ray.")] = False,
) -> None:
    """Turn text (.txt .md .py .jsonl ...) into verified shards of tokens. Run again, it goes on where it was stopped."""
    with _told_errors():
        from elastic_lm.data.prepare import PrepareOptions
        from elastic_lm.data.prepare import prepare as prepare_here

        chosen = {} if block_tokens is None else {"block_tokens": block_tokens}
        options = PrepareOptions(vocab_size=vocab_size, tokenizer=tokenizer, held_out=held_out, **chosen)
        for address in sources:
            _folder(address)
        storage = _folder(out)
        if local:
            manifest = prepare_here(sources, storage, options)
        else:
            from elastic_lm.runtime import cluster, fan_out

            with cluster.connected() as sentence:
                _say(sentence)
                manifest = fan_out.prepare(sources, storage, options)
        _say(
            f"Prepared {manifest.num_tokens:,} tokens in {len(manifest.blocks)} blocks, vocabulary {manifest.vocab_size}, "
            f"in {storage.url} (manifest {manifest.hash[:12]})."
        )


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="The run's YAML file.", metavar="RUN.YAML")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field: a.b=value.", metavar="A.B=V")
    ] = None,
) -> None:
    """Train a run to its end. Resumes the run of that name from its newest checkpoint if there is one."""
    with _told_errors():
        from elastic_lm.config import RunConfig
        from elastic_lm.runtime.trainer import fit

        settled = RunConfig.load(config, set_ or ())
        _say(settled.describe())
        result = fit(settled, on_line=_say)
    _say(describe(result))
    raise typer.Exit(OF_VERDICT.get(result.verdict, Exit.FAILED))


@app.command()
def version() -> None:
    """Print the version."""
    _say(__version__)


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
    rows += [(name, f"sha256 {digest}") for name, digest in sorted(result.digest.items())]
    return "\n".join(f"{name:>10}  {value}" for name, value in rows)


def _folder(address: str) -> Storage:
    """Storage at an address that somebody typed.    Raises: ConfigError when it cannot be one."""
    from elastic_lm.storage import Storage

    try:
        return Storage.open(address)
    except StorageError as error:
        raise ConfigError(str(error)) from error


def _say(text: str, file: TextIO | None = None) -> None:
    """Print. A terminal that is gone or a full disk behind it is no reason to stop training."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file, flush=True)


@contextlib.contextmanager
def _told_errors() -> Iterator[None]:
    """What is expected to go wrong ends in one message and its exit code; a bug keeps its traceback."""
    try:
        yield
    except ElasticLMError as error:
        _say(f"elastic-lm: {error}", sys.stderr)
        raise typer.Exit(_code_of(error)) from None


def _code_of(error: ElasticLMError) -> Exit:
    if isinstance(error, DataError):
        return Exit.DATA
    if isinstance(error, (StorageError, ClusterError)) and not isinstance(error, NotFoundError):
        return Exit.UNAVAILABLE
    return Exit.USAGE


def main() -> None:
    """Entry point of the `elastic-lm` command."""
    try:
        app()
    finally:
        _give_up_unsaid()


def _give_up_unsaid() -> None:
    """What no one took would be written again as the interpreter ends, and failing there would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):
            pass  # None or closed: there is nothing to write to


if __name__ == "__main__":
    main()
