"""Goodput: what part of the held worker-seconds became committed tokens, and where the rest went.

goodput = committed tokens / (held worker-seconds x undisturbed rate). A worker is held from the start of its process to
its end. The undisturbed rate, in tokens per worker-second, is the median over recent steps of tokens / (N x step time x
share of the slots that hold a micro-batch): what a worker does when nothing disturbs it and the work divides evenly.

Invariant: computed from events alone, so that a replayed log gives the same figures; no worker-second has
two causes. Trade-off: a step's time is that of the member which told it, so a straggler shows as a slower rate.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque

from elastic_lm.events.types import Event, EventKind

RATE_STEPS = 500
RECENT_S = 30.0
ROUNDING_S = 1e-6  # less is what the additions above it leave over
HISTORY = 2_000  # events: enough to look back over any interruption


class Goodput:
    """Fed with every event of a run in order, `observe`; asked for figures at any time."""

    def __init__(self, num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches
        self._attempt = -1
        self._now_s = 0.0
        self._starting: dict[str, float] = {}  # member -> elapsed time of its start
        self._held: set[str] = set()
        self._held_s = 0.0
        self._ready_s = 0.0  # worker-seconds of members that were warmed up
        self._ready_history: deque[tuple[float, float]] = deque(
            [(0.0, 0.0)], maxlen=HISTORY
        )  # (time, ready_s until then)
        self._lost: dict[str, float] = defaultdict(float)
        self._tokens = 0
        self._batch_tokens: int | None = None
        self._next_step = 0
        self._rates: deque[float] = deque(maxlen=RATE_STEPS)
        self._recent: deque[tuple[float, int, float]] = deque()  # (time, tokens, seconds of the step)

    @property
    def members_held(self) -> int:
        return len(self._held)

    @property
    def held_worker_s(self) -> float:
        return self._held_s

    def observe(self, event: Event) -> None:
        """Account for the time up to the event, then for the event."""
        self._advance(event)
        member_id = str(event.fields.get("member_id"))
        match event.kind:
            case EventKind.RUN_STARTED:
                self._batch_tokens = _batch_tokens(event)
            case EventKind.MEMBER_STARTED:
                self._held.add(member_id)
                self._starting[member_id] = event.elapsed_s
            case EventKind.MEMBER_RETURNED:
                self._held.add(member_id)
            case EventKind.MEMBER_READY:
                self._end_warm_up(member_id)
            case EventKind.MEMBER_LOST | EventKind.MEMBER_LEFT | EventKind.MEMBER_REFUSED:
                self._end_warm_up(member_id)
                self._held.discard(member_id)
            case EventKind.REFORMED:
                self._lost[event.fields["cause"]] += self._ready_since(event.elapsed_s - event.fields["lost_s"])
            case EventKind.STEP_COMMITTED:
                self._commit(event)
            case EventKind.REWOUND if event.step is not None:
                self._give_up(self._next_step - event.step)
                self._next_step = min(self._next_step, event.step)
            case _:
                pass

    def num_tokens(self, committed: Event) -> int:
        """That a step read; more than its targets where only some are predicted, and these where no config is known."""
        return self._batch_tokens or int(committed.fields["num_targets"])

    def ratio(self) -> float | None:
        """Goodput from 0 to 1; None before the first step."""
        useful_s = self._useful_s()
        if useful_s is None or self._held_s <= 0:
            return None
        return min(1.0, useful_s / self._held_s)

    def lost_worker_s(self) -> dict[str, float]:
        """Held worker-seconds that committed nothing, by cause. `unnamed` is what no event accounts for."""
        lost = dict(self._lost)
        useful_s = self._useful_s()
        if useful_s is not None:
            lost["unnamed"] = max(0.0, self._held_s - useful_s - sum(lost.values()))
        return {cause: seconds for cause, seconds in lost.items() if seconds > ROUNDING_S}

    def tokens_per_s(self) -> float | None:
        """Committed tokens per second of wall time, over the last half minute; None before the second step."""
        seconds, counts = self._recent_steps()
        return sum(counts) / seconds if seconds > 0 else None

    def steps_per_s(self) -> float | None:
        """The same for steps."""
        seconds, counts = self._recent_steps()
        return len(counts) / seconds if seconds > 0 else None

    def _recent_steps(self) -> tuple[float, list[int]]:
        """(seconds, tokens of each step in them): from the commit of the first recent step to that of the last.

        Of steps that were told long after they were trained, under an earlier coordinator, what they took.
        """
        recent = list(self._recent)  # in one piece: a scraper's thread may ask while another one observes
        if not recent:
            return 0.0, []
        later = recent[1:]
        passed_s = recent[-1][0] - recent[0][0]
        return max(passed_s, sum(step_s for _, _, step_s in later)), [count for _, count, _ in later]

    def _advance(self, event: Event) -> None:
        if event.attempt != self._attempt:  # its clock begins anew, and nobody of the last attempt is held
            self._attempt, self._now_s = event.attempt, event.elapsed_s
            self._held.clear()
            self._starting.clear()
            self._recent.clear()
            self._ready_history.clear()
            self._ready_history.append((self._now_s, self._ready_s))
        passed_s = max(0.0, event.elapsed_s - self._now_s)
        self._held_s += passed_s * len(self._held)
        self._ready_s += passed_s * (len(self._held) - len(self._starting))
        self._now_s = max(self._now_s, event.elapsed_s)
        self._ready_history.append((self._now_s, self._ready_s))

    def _ready_since(self, then_s: float) -> float:
        """Worker-seconds of warmed-up members since `then_s`: those that warmed up meanwhile have a cause already."""
        later = self._ready_history[0]
        for time_s, ready_s in reversed(self._ready_history):
            if time_s <= then_s:
                share = (then_s - time_s) / (later[0] - time_s) if later[0] > time_s else 0.0
                return self._ready_s - (ready_s + share * (later[1] - ready_s))
            later = (time_s, ready_s)
        return self._ready_s - later[1]

    def _end_warm_up(self, member_id: str) -> None:
        began = self._starting.pop(member_id, None)
        if began is not None:
            self._lost["warm_up"] += self._now_s - began

    def _commit(self, event: Event) -> None:
        assert event.step is not None
        if event.step < self._next_step:
            return  # trained again after a restart: the tokens are counted, the time is not useful
        fields = event.fields
        self._next_step = event.step + 1
        num_tokens = self.num_tokens(event)
        self._tokens += num_tokens
        self._recent.append((event.elapsed_s, num_tokens, fields["step_s"]))
        while self._recent[0][0] < event.elapsed_s - RECENT_S and len(self._recent) > 2:
            self._recent.popleft()
        worker_s = fields["world_size"] * fields["step_s"]
        waited_s = fields["world_size"] * fields["data_wait_s"]
        filled = self._filled(fields["world_size"])
        busy_s = (worker_s - waited_s) * filled
        if busy_s > 0:
            self._rates.append(num_tokens / busy_s)
        self._lost["data"] += waited_s
        self._lost["uneven"] += (worker_s - waited_s) * (1 - filled)

    def _give_up(self, num_steps: int) -> None:
        """What these steps have read and what they took was for nothing. All steps read the same number of tokens."""
        if num_steps <= 0 or not self._rates:
            return
        num_tokens = (
            num_steps * self._tokens // self._next_step
            if self._batch_tokens is None
            else num_steps * self._batch_tokens
        )
        self._tokens = max(0, self._tokens - num_tokens)
        self._lost["rewind"] += num_tokens / statistics.median(self._rates)

    def _filled(self, world_size: int) -> float:
        """Share of a step's slots that hold a micro-batch: M / (N x ceil(M / N))."""
        return self._num_micro_batches / (world_size * -(-self._num_micro_batches // world_size))

    def _useful_s(self) -> float | None:
        return self._tokens / statistics.median(self._rates) if self._rates else None


def _batch_tokens(started: Event) -> int | None:
    batch = started.fields["config"].get("batch", {})
    sizes = [batch.get(name) for name in ("micro_batches", "micro_batch_size", "sequence_length")]
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None
