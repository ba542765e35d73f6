"""What a run came to, for whoever called `fit`."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

LEAST_LOST_S = 0.05  # worker-seconds; less is not worth a word


@dataclass(frozen=True, repr=False)
class RunResult:
    """The end of a run.

    `verdict`: done, stopped, failed_bug, poisoned, spiked, data_error, unavailable, refused, superseded or failed; `message` says
    it in a sentence.
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

    def rows(self) -> Iterator[tuple[str, str]]:
        """(name, value) of everything that is known, in words."""
        figures = self.metrics
        yield "verdict", f"{self.verdict}: {self.message}"
        if self.last_step is not None:
            yield "steps", f"{self.last_step}"
        if figures.get("loss") is not None:
            yield "loss", f"{figures['loss']:.6f}"
        if figures.get("held_out_loss") is not None:
            yield "held-out loss", f"{figures['held_out_loss']:.6f}"
        if figures.get("tokens_per_s"):
            yield "tokens/s", f"{figures['tokens_per_s']:,.0f}"
        if figures.get("goodput") is not None:
            yield "goodput", f"{figures['goodput']:.1%}"
        lost = {cause: s for cause, s in figures.get("lost_worker_s", {}).items() if s >= LEAST_LOST_S}
        if lost:
            yield "lost", ", ".join(f"{cause} {seconds:.1f} worker-s" for cause, seconds in lost.items())
        for name in ("checkpoint", "report", "table"):
            if (address := getattr(self, name)) is not None:
                yield name, address
        for name, digest in sorted(self.digest.items()):
            yield name, f"sha256 {digest}"

    def __str__(self) -> str:
        """A line for each row."""
        return "\n".join(f"{name:>10}  {value}" for name, value in self.rows())

    def __repr__(self) -> str:
        """What matters most; `str` has the rest."""
        known = {
            "verdict": self.verdict,
            "message": self.message,
            "last_step": self.last_step,
            "loss": self.metrics.get("loss"),
            "checkpoint": self.checkpoint,
        }
        return f"RunResult({', '.join(f'{name}={value!r}' for name, value in known.items() if value is not None)})"

    def _repr_html_(self) -> str:
        """A small table, for notebooks."""
        cell = 'style="text-align:left;vertical-align:top;overflow-wrap:anywhere"'
        rows = "".join(
            f'<tr><th style="text-align:right;white-space:nowrap;vertical-align:top">{html.escape(name)}</th>'
            f"<td {cell}>{html.escape(value)}</td></tr>"
            for name, value in self.rows()
        )
        return f"<table>{rows}</table>"
