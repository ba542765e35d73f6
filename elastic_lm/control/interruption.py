"""Why nobody trains, from the first cause on until somebody does again."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lm.protocol import Generation

START, WAIT = "start", "wait"  # for lack of workers: the first one, and any later
TAKEOVER = "coordinator"  # this coordinator took over from an earlier one
PLANNED = ("lease", "join", "drain", "checkpoint", "straggler", "resize", "evaluation")


@dataclass
class Interruption:
    """Training stands still. `generation` is the one that broke off; work in a later one ends the interruption."""

    cause: str
    since: float
    detail: str
    generation: Generation

    @property
    def is_wait(self) -> bool:
        return self.cause in (START, WAIT)

    def add(self, cause: str, detail: str, generation: Generation) -> None:
        """Something more came: the first cause is the one that counts, but a failure outranks a plan."""
        self.generation = generation
        if self.cause in PLANNED and cause not in PLANNED:
            self.cause, self.detail = cause, detail
