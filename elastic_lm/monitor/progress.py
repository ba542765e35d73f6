"""Progress for people: what is worth a line at once, and how a run stands in between.

Invariant: nothing is printed here and nothing is decided; events and figures go in, words come out. Whoever shows them is a
`View`: plain lines (here), or a display that is drawn over and over (live.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from elastic_lm.events.types import Event, EventKind

Tone = Literal["good", "bad", "plain"]

# Kinds whose sentence is told at once, and how it is meant; the others are in the log.
TONES: dict[EventKind, Tone] = {
    EventKind.RUN_STARTED: "plain",
    EventKind.MEMBER_READY: "good",
    EventKind.MEMBER_RETURNED: "good",
    EventKind.MEMBER_REFUSED: "bad",
    EventKind.MEMBER_LOST: "bad",
    EventKind.MEMBER_LEFT: "plain",
    EventKind.NODE_DRAINING: "plain",
    EventKind.NODE_LOST: "bad",
    EventKind.NODE_QUARANTINED: "bad",
    EventKind.STEP_MISMATCH: "bad",
    EventKind.STRAGGLER: "plain",
    EventKind.CHECKPOINT_SAVED: "plain",
    EventKind.CHECKPOINT_FAILED: "bad",
    EventKind.EVALUATED: "plain",
    EventKind.REWOUND: "bad",
    EventKind.READER_REPLACED: "plain",
    EventKind.RESIZED: "plain",
    EventKind.NOTE: "plain",
    EventKind.RUN_FINISHED: "plain",
}
# Every checkpoint and every end of a lease re-forms; only these are worth a line.
NEWSWORTHY_CAUSES = {
    "failure",
    "hang",
    "join",
    "drain",
    "resize",
    "straggler",
    "wait",
    "start",
    "coordinator",
    "rewind",
}


@dataclass(frozen=True)
class News:
    """A line that is told once, and how it is meant."""

    text: str
    tone: Tone = "plain"


def news_of(event: Event) -> News | None:
    """What a person who watches the run wants to be told of the event; None when it is nothing."""
    if event.kind is EventKind.REFORMED:
        tone: Tone | None = "good" if event.fields["cause"] in NEWSWORTHY_CAUSES else None
    else:
        tone = TONES.get(event.kind)
    return None if tone is None else News(f"{clock(event.elapsed_s)}  {event.message}", tone)


@dataclass(frozen=True)
class Snapshot:
    """How a run stands after its last committed step, with the workers of now. None where nothing is known yet.

    `step` counts committed steps; `mfu` and `goodput` are ratios. `elapsed_s` is the time of the last event since the
    attempt began, `eta_s` the time to the last step at the present rate.
    """

    step: int
    total_steps: int
    state: str
    world_size: int
    min_workers: int
    max_workers: int
    num_starting: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    step_s: float | None = None
    goodput: float | None = None
    elapsed_s: float = 0.0
    eta_s: float | None = None

    @classmethod
    def of(
        cls, status: Mapping[str, Any], figures: Mapping[str, float], *, step: int, total_steps: int, elapsed_s: float
    ) -> Snapshot:
        """From control's status and the run's figures (names of the catalogue of metrics)."""
        states = [member["state"] for member in status["members"].values()]
        return cls(
            step=step,
            total_steps=total_steps,
            state="finishing" if step >= total_steps or "verdict" in status else _state(status, states),
            world_size=status["world_size"],
            min_workers=status["min_workers"],
            max_workers=status["max_workers"],
            num_starting=sum(state in ("pending", "starting") for state in states),
            loss=figures.get("loss_nats"),
            tokens_per_s=figures.get("tokens_per_second"),
            mfu=figures.get("mfu_ratio"),
            step_s=figures.get("step_seconds"),
            goodput=figures.get("goodput_ratio"),
            elapsed_s=elapsed_s,
            eta_s=figures.get("remaining_seconds"),
        )

    @property
    def workers(self) -> str:
        """How many train, and how many may."""
        low, high = self.min_workers, self.max_workers
        counted = f"{self.world_size} worker{'s' if self.world_size != 1 else ''}"
        return f"{counted} ({low}..{high})" if low != high else f"{self.world_size} of {high} worker{'s' * (high != 1)}"

    def parts(self) -> Iterable[str]:
        """The figures that are known, in words; the most wanted first."""
        if self.loss is not None:
            yield f"loss {self.loss:.4f}"
        if self.tokens_per_s is not None:
            yield f"{self.tokens_per_s:,.0f} tokens/s"
        if self.world_size or self.state != "finishing":  # at the end they are gone, and that is no news
            yield self.workers
        if self.goodput is not None:
            yield f"goodput {self.goodput:.0%}"
        if self.mfu is not None:
            yield f"MFU {self.mfu:.0%}"
        if self.step_s is not None:
            yield f"{self.step_s:.2f} s per step"


def _state(status: Mapping[str, Any], states: list[str]) -> str:
    if status["mode"] in ("leased", "ending"):
        return "training"
    if sum(state in ("ready", "active") for state in states) < status["min_workers"]:
        return "waiting for workers"
    return "forming"


class View(Protocol):
    """Shows a run to somebody while it trains. Called by one thread; must not raise."""

    tick_s: float  # how long the view may be left without a call, in seconds

    def news(self, news: News) -> None:
        """Something happened."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """The figures moved, or nothing did for `tick_s`."""


class Lines:
    """A view of plain lines: news as it happens, the figures every `interval_s` and at the last step."""

    tick_s = math.inf

    def __init__(self, tell: Callable[[str], None], interval_s: float) -> None:
        self._tell = tell
        self._interval_s = interval_s
        self._told_step = 0
        self._next_line_s = 0.0

    def news(self, news: News) -> None:
        self._tell(news.text)

    def snapshot(self, snapshot: Snapshot) -> None:
        is_last = snapshot.step == snapshot.total_steps
        if snapshot.step == self._told_step or (snapshot.elapsed_s < self._next_line_s and not is_last):
            return
        if snapshot.world_size == 0 and not is_last:  # resumed, and nothing has been trained yet
            return
        self._told_step, self._next_line_s = snapshot.step, snapshot.elapsed_s + self._interval_s
        parts = [f"{clock(snapshot.elapsed_s)}  step {snapshot.step:,}/{snapshot.total_steps:,}", *snapshot.parts()]
        if snapshot.eta_s and not is_last:
            parts.append(f"{clock(snapshot.eta_s)} left")
        self._tell(" · ".join(parts))


class Quiet:
    """A view that shows nothing: the result and the log have everything."""

    tick_s = math.inf

    def news(self, news: News) -> None:
        """Nobody wants to know."""

    def snapshot(self, snapshot: Snapshot) -> None:
        """Nobody wants to know."""


def clock(seconds: float) -> str:
    """Hours, minutes and seconds; days when there are any."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour:d}:{minute:02d}:{second:02d}"
