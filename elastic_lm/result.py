"""What a run came to, for whoever called `fit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunResult:
    """The end of a run.

    `verdict`: done, stopped, failed_bug, poisoned, data_error, refused or failed; `message` says it in a sentence.
    `last_step` is the number of committed steps. `metrics`: final loss, tokens per second, goodput and the like.
    `checkpoint` is the address of the newest one, `digest` the sha256 of the final state ("state": weights and optimizer
    state; "weights": the weights alone), `report` the address of the HTML report, `table` that of the table of steps
    (Parquet). What is not known is None or missing.
    """

    verdict: str
    message: str
    last_step: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    digest: dict[str, str] = field(default_factory=dict)
    report: str | None = None
    table: str | None = None

    @property
    def ok(self) -> bool:
        """Whether every step that was asked for is done."""
        return self.verdict == "done"
