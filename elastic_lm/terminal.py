"""What all commands share: what they print, their exit codes, and how an expected error ends them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import TextIO

import typer

from elastic_lm.errors import ClusterError, DataError, ElasticLMError, NotFoundError, StorageError, TrackingError


class Exit(IntEnum):
    """Exit codes."""

    DONE = 0
    FAILED = 1  # a bug: the same exception twice, a poisoned step, a coordinator that failed again and again
    USAGE = 2  # a config, an argument or a checkpoint that does not fit, or is not there
    DATA = 3  # a corpus that must not be trained on
    UNAVAILABLE = 4  # storage, the cluster or a tracker gave no access or no answer
    STOPPED = 5  # stopped on request, with a checkpoint: the same command goes on


def say(text: str, file: TextIO | None = None) -> None:
    """Print. A terminal that is gone or a full disk behind it is no reason to stop training."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file, flush=True)


@contextlib.contextmanager
def told_errors() -> Iterator[None]:
    """What is expected to go wrong ends in one message and its exit code; a bug keeps its traceback."""
    try:
        yield
    except ElasticLMError as error:
        say(f"elastic-lm: {error}", sys.stderr)
        raise typer.Exit(_code_of(error)) from None


def _code_of(error: ElasticLMError) -> Exit:
    if isinstance(error, DataError):
        return Exit.DATA
    if isinstance(error, (StorageError, ClusterError, TrackingError)) and not isinstance(error, NotFoundError):
        return Exit.UNAVAILABLE
    return Exit.USAGE


def give_up_unsaid() -> None:
    """What no one took would be written again as the interpreter ends, and failing there would change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):
            pass  # None or closed: there is nothing to write to
