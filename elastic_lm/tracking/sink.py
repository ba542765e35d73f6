"""What a tracker is to a run, and the scalars that all of them get.

Invariant: a tracker is given events that the log holds, from the first one on and in order, so what it shows is never ahead of
the log, and can be made again from it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.held_out import HeldOutScore
from elastic_lm.monitor.table import row_of

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

OF_ALL = ("loss_nats", "gradient_norm")  # of a step that was left out they say nothing


class Sink(Protocol):
    """One tracker. Used by one thread; may raise whatever it likes, and whoever uses it is to expect that it hangs."""

    key: str  # as `--to` names it
    title: str  # for people

    def open(self) -> None:
        """Begin; what an earlier one has left is replaced or gone on with."""

    def write(self, event: Event) -> None:
        """A committed step, an evaluation or the run's end."""

    def caught_up(self) -> None:
        """What was in the log so far is written."""

    def flush(self) -> None:
        """Let others see what is written."""

    def close(self) -> None:
        """Flush and end. May be called after any failure, and when `open` was not."""


@dataclass(frozen=True)
class Point:
    """What an event adds to a tracker's curves, by name, at `step`. An evaluation's is that of the step that it comes before."""

    step: int
    scalars: dict[str, float]
    is_step: bool


def point_of(event: Event) -> Point | None:
    """Of a committed step or an evaluation; None of anything else."""
    if event.kind is EventKind.EVALUATED:
        try:
            score = HeldOutScore.of(event)
        except (KeyError, TypeError, ValueError):
            return None  # of another version
        told = {
            "loss": score.loss,
            "perplexity": score.perplexity,
            "accuracy": score.accuracy,
            "bits_per_byte": score.bits_per_byte,
        }
        scalars = {f"held_out/{name}": number for name, number in told.items() if number is not None}
        return Point(score.step, scalars, is_step=False)
    if (row := row_of(event)) is None:
        return None
    names = {column: tag for column, tag in TAGS.items() if not (row["num_refused"] and column in OF_ALL)}
    scalars = {tag: row[column] for column, tag in names.items() if row[column] is not None}
    return Point(row["step"], scalars, is_step=True)


def reason_of(error: BaseException) -> str:
    """The error in a line, without the key that a tracker's client may repeat."""
    text = " ".join(str(error).split())[:300]
    if secret := os.environ.get("WANDB_API_KEY"):
        text = text.replace(secret, "***")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
