"""Progress for people: one line per interval, and every piece of news as it happens.

Invariant: nothing is printed here and nothing is decided; events go in, lines come out.
"""

from __future__ import annotations

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.goodput import Goodput

# Kinds whose sentence is told at once; the others are in the log.
NEWS = {
    EventKind.RUN_STARTED,
    EventKind.MEMBER_READY,
    EventKind.MEMBER_REFUSED,
    EventKind.MEMBER_LOST,
    EventKind.MEMBER_LEFT,
    EventKind.NODE_DRAINING,
    EventKind.NODE_QUARANTINED,
    EventKind.STEP_MISMATCH,
    EventKind.STRAGGLER,
    EventKind.CHECKPOINT_SAVED,
    EventKind.CHECKPOINT_FAILED,
    EventKind.READER_REPLACED,
    EventKind.RESIZED,
    EventKind.NOTE,
    EventKind.RUN_FINISHED,
}
# Every checkpoint and every end of a lease re-forms; only these are worth a line.
NEWSWORTHY_CAUSES = {"failure", "hang", "join", "drain", "resize", "straggler", "wait", "start"}


def is_news(event: Event) -> bool:
    """Whether a person who watches the run wants to be told."""
    return event.kind in NEWS or (event.kind is EventKind.REFORMED and event.fields["cause"] in NEWSWORTHY_CAUSES)


def news_line(event: Event) -> str | None:
    """The line that tells an event; None when it is no news."""
    return f"{_clock(event.elapsed_s)}  {event.message}" if is_news(event) else None


class Progress:
    """Fed with every event in order. `goodput` must have been fed with an event before this is."""

    def __init__(self, total_steps: int, interval_s: float, goodput: Goodput) -> None:
        self._total_steps = total_steps
        self._interval_s = interval_s
        self._goodput = goodput
        self._next_line_s = 0.0

    def lines(self, event: Event) -> list[str]:
        """What to tell about the event: nothing, a line of progress, or its own sentence."""
        if event.kind is EventKind.STEP_COMMITTED:
            last = event.step is not None and event.step + 1 == self._total_steps
            if event.elapsed_s < self._next_line_s and not last:
                return []
            self._next_line_s = event.elapsed_s + self._interval_s
            return [self._step_line(event)]
        line = news_line(event)
        return [] if line is None else [line]

    def _step_line(self, event: Event) -> str:
        assert event.step is not None
        fields = event.fields
        num_workers = fields["world_size"]
        parts = [
            f"{_clock(event.elapsed_s)}  step {event.step + 1:,}/{self._total_steps:,}",
            f"loss {fields['loss']:.4f}",
        ]
        if (rate := self._goodput.tokens_per_s()) is not None:
            parts.append(f"{rate:,.0f} tokens/s")
        parts.append(f"{fields['step_s']:.2f} s per step")
        parts.append(f"{num_workers} worker{'s' if num_workers != 1 else ''}")
        if (ratio := self._goodput.ratio()) is not None:
            parts.append(f"goodput {ratio:.0%}")
        return " · ".join(parts)


def _clock(elapsed_s: float) -> str:
    """Hours, minutes and seconds since the attempt began."""
    minutes, seconds = divmod(int(elapsed_s), 60)
    return f"{minutes // 60:d}:{minutes % 60:02d}:{seconds:02d}"
