"""What all commands share: what they print, their exit codes, and how an expected error ends them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, TextIO

import typer
from typer.core import TyperGroup, TyperOption

from elastic_lm.errors import (
    ClusterError,
    DataError,
    ElasticLMError,
    NotFoundError,
    OwnershipError,
    StorageError,
    TrackingError,
)


class Exit(IntEnum):
    """Exit codes, each with its meaning. `--help` and docs/commands.md are made of it."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_, member.meaning = code, meaning
        return member

    DONE = 0, "done"
    FAILED = (
        1,
        "the run failed: a bug, a poisoned step, a coordinator that failed again and again; or an experiment missed its target",
    )
    USAGE = 2, "a config, an argument or a checkpoint does not fit, or is not there"
    DATA = 3, "a corpus that must not be trained on, or a checkpoint that is damaged"
    UNAVAILABLE = 4, "storage, the cluster or a tracker gave no access or no answer, or another job trains the run"
    STOPPED = 5, "stopped on request, with a checkpoint: the same command goes on"


INTERRUPTED = 128 + signal.SIGINT  # as shells have it; typer ends so on Ctrl-C

OF_VERDICT = {
    "done": Exit.DONE,
    "reached": Exit.DONE,
    "stopped": Exit.STOPPED,
    "data_error": Exit.DATA,
    "unavailable": Exit.UNAVAILABLE,
    "refused": Exit.USAGE,
    "superseded": Exit.UNAVAILABLE,
}  # of a run or an experiment; with any other it failed


class CommandGroup(TyperGroup):
    """Commands whose help does not list the two options for shell completion: it says in a sentence how to get it."""

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            if isinstance(param, TyperOption) and param.name in ("install_completion", "show_completion"):
                param.hidden = True
        return params


def say(text: str, file: TextIO | None = None) -> None:
    """Print; what the stream cannot spell as escapes. A terminal that is gone or a full disk is no reason to stop training."""
    with contextlib.suppress(OSError, ValueError):
        _print(text, sys.stdout if file is None else file)


def deliver(text: str, *, end: str = "\n") -> None:
    """Print what a command is there to print. Where nobody reads on, the command ends at once; a full disk is an error."""
    try:
        _print(text, sys.stdout, end)
    except BrokenPipeError:
        raise typer.Exit(Exit.DONE) from None
    except OSError as error:
        say_undelivered(error)
        raise typer.Exit(Exit.UNAVAILABLE) from None


def say_undelivered(error: OSError) -> None:
    say(f"elastic-lm: the output could not be written: {error.strerror}; what is there of it is not all", sys.stderr)


def visible(text: str, *, line_breaks: bool = False) -> str:
    """Text without a character that a terminal would act on: as escapes of Python. `line_breaks`: newlines stay."""
    kept = {"\n"} if line_breaks else set()
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def _print(text: str, stream: TextIO, end: str = "\n") -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, end=end, flush=True)


def bytes_told(size_bytes: float) -> str:
    """A size for people, in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:,.1f} {unit}"
    return f"{size_bytes / 1e3:,.1f} kB"


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """What is expected to go wrong ends in one message and its exit code; a bug keeps its traceback."""
    try:
        yield
    except ElasticLMError as error:
        say(visible(f"elastic-lm: {error}", line_breaks=True), sys.stderr)
        raise typer.Exit(_code_of(error)) from None


def _code_of(error: ElasticLMError) -> Exit:
    if isinstance(error, DataError):
        return Exit.DATA
    if isinstance(error, NotFoundError):
        return Exit.USAGE
    if isinstance(error, (StorageError, ClusterError, TrackingError, OwnershipError)):
        return Exit.UNAVAILABLE
    return Exit.USAGE


def open_closed_streams() -> None:
    """Python has None for a stream that was closed before it began, on which half of all libraries stumble."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process


def give_up_unsaid() -> None:
    """What no one took would be written again as the interpreter ends, and failing there would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):
            pass  # None or closed: there is nothing to write to
