"""What a tracker is to a run, and the scalars that all of them get.

Invariant: a tracker is given events that the log holds, from the first one on and in order, so what it shows is never ahead of
the log, and can be made again from it.
"""

from __future__ import annotations

import os
from typing import Protocol

from elastic_lm.events.types import Event
from elastic_lm.monitor.table import Row

# Column of the table of steps -> name in a tracker. Names with one beginning are shown side by side.
TAGS = {
    "loss_nats": "train/loss",
    "learning_rate": "train/learning_rate",
    "gradient_norm": "train/gradient_norm",
    "num_tokens": "train/tokens_per_step",
    "world_size": "workers/world_size",
    "step_s": "time/step_s",
    "compute_s": "time/compute_s",
    "data_wait_s": "time/data_wait_s",
    "reduce_wait_s": "time/reduce_wait_s",
    "optimizer_s": "time/optimizer_s",
}


class Sink(Protocol):
    """One tracker. Used by one thread; may raise whatever it likes, and whoever uses it is to expect that it hangs."""

    key: str  # as `--to` names it
    title: str  # for people

    def open(self) -> None:
        """Begin; what an earlier one has left is replaced or gone on with."""

    def write(self, event: Event) -> None:
        """A committed step or the run's end."""

    def caught_up(self) -> None:
        """What was in the log so far is written."""

    def flush(self) -> None:
        """Let others see what is written."""

    def close(self) -> None:
        """Flush and end. May be called after any failure, and when `open` was not."""


def scalars_of(row: Row) -> dict[str, float]:
    """By name, those that the row has."""
    return {tag: row[column] for column, tag in TAGS.items() if row[column] is not None}


def reason_of(error: BaseException) -> str:
    """The error in a line, without the key that a tracker's client may repeat."""
    text = " ".join(str(error).split())[:300]
    if secret := os.environ.get("WANDB_API_KEY"):
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
