"""Loss spikes: steps whose loss or gradient stands far out of what the steps before them had.

A step's loss, and the logarithm of its gradient's norm, are compared with those of `window_steps` steps before by a robust
z-score: the distance from their median in units of 1.4826 times their median absolute deviation, which is one standard deviation
where they are normal (Iglewicz and Hoaglin, 1993). A spike is `steps_in_a_row` steps on end that stand out, so that one
odd batch is none. Trade-off: the window ends before the streak it is compared with begins, and what is in it is not
weeded out; half of it would have to be bad to hide a spike.

Invariant: what is found follows from the committed steps alone, so whoever replays them finds the same.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass

MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SIGMA = 0.01  # of the median loss: below that the rest of a smooth curve would stand out
LEAST_LOG_SIGMA = 0.05  # of a gradient's norm: a twentieth of it
MOST_LEFT_OUT = 10  # steps on end that are left out for their gradients; so many end a run
LOSS, GRADIENT, POISONED = "loss", "gradient norm", "poisoned"  # causes; of the last control hears first


@dataclass(frozen=True)
class SpikeRules:
    """When steps are a spike. `loss_z`, `gradient_z`: how far out is far, in standard deviations; None: not looked at."""

    window_steps: int
    loss_z: float
    gradient_z: float | None
    steps_in_a_row: int


@dataclass(frozen=True)
class Spike:
    """Steps [first_step, last_step] stood out. `reason`: in words, without a full stop."""

    first_step: int
    last_step: int
    cause: str
    reason: str

    def __str__(self) -> str:
        return self.reason


class SpikeDetector:
    """Fed with every committed step in order."""

    def __init__(self, rules: SpikeRules) -> None:
        self._rules = rules
        gap = rules.steps_in_a_row - 1
        self._loss = _Usual(rules.window_steps, gap)
        self._log_norm = _Usual(rules.window_steps, gap)
        self._streak: list[int] = []
        self._passes = False

    def pass_over(self) -> None:
        """What stands out now is known: until a step does not, there is no other spike."""
        self._streak.clear()
        self._passes = True

    def observe(self, step: int, loss: float, grad_norm: float, *, left_out: bool = False) -> Spike | None:
        """The step is committed.    Returns: the spike of which it is the last step. `left_out`: it changed no weights."""
        if left_out:  # its figures say nothing
            return None
        log_norm = math.log(grad_norm) if grad_norm > 0 else None
        found = self._judge(step, loss, log_norm)
        self._loss.add(loss)
        if log_norm is not None:
            self._log_norm.add(log_norm)
        return found

    def _judge(self, step: int, loss: float, log_norm: float | None) -> Spike | None:
        cause, z, value, median = LOSS, self._loss.z(loss, self._rules.loss_z, relative=True), loss, self._loss.median
        limit = self._rules.gradient_z
        if z is None and limit is not None and log_norm is not None:
            z = self._log_norm.z(log_norm, limit)
            cause, value, median = GRADIENT, math.exp(log_norm), math.exp(self._log_norm.median)
        if z is None:
            self._streak.clear()
            self._passes = False
            return None
        if self._passes:
            return None
        self._streak.append(step)
        if len(self._streak) < self._rules.steps_in_a_row:
            return None
        first = self._streak[0]
        self._streak.clear()
        steps = f"step {step}" if first == step else f"steps {first} to {step}"
        reason = f"the {cause} stands out in {steps}: {value:.4g} where {median:.4g} was usual, {z:.1f} standard deviations more"
        return Spike(first, step, cause, reason)


class _Usual:
    """The numbers of a window that ends `gap` numbers ago."""

    def __init__(self, size: int, gap: int) -> None:
        self._size, self._gap = size, gap
        self._recent: deque[float] = deque()
        self._window: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, number: float) -> None:
        self._recent.append(number)
        if len(self._recent) <= self._gap:
            return
        self._window.append(entering := self._recent.popleft())
        insort(self._sorted, entering)
        if len(self._window) > self._size:
            del self._sorted[bisect_left(self._sorted, self._window.popleft())]

    @property
    def median(self) -> float:
        return _median(self._sorted)

    def z(self, number: float, limit: float, *, relative: bool = False) -> float | None:
        """How far above the median, if that is `limit` or more; None where it is not, or too little is known to say."""
        if len(self._sorted) < max(2, self._size // 2):
            return None
        median = self.median
        least = LEAST_SIGMA * abs(median) if relative else LEAST_LOG_SIGMA
        if number - median < limit * least or number <= median:  # most steps are done here
            return None
        deviations = sorted(abs(each - median) for each in self._sorted)
        scale = max(MAD_TO_SIGMA * _median(deviations), least)
        z = (number - median) / scale if scale else 0.0  # of a loss that is always zero nothing can be said
        return z if z >= limit else None


def _median(ordered: list[float]) -> float:
    middle = len(ordered) // 2
    if not ordered:
        return math.nan
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
