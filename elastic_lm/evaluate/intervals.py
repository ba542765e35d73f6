"""A figure, and how sure it is: 95 % intervals, each by the formula that suits how the figure comes about.

Invariant: no formula draws a random number but the bootstrap, and that from a fixed seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
RESAMPLES = 1000
SEED = 0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Metric:
    """A value with its interval. None: it is not finite; or, of an interval, there is too little to say how sure it is."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def through(self, function: Callable[[float], float]) -> Metric:
        """The same of a rising function of the figure."""
        return Metric(*(None if x is None else _finite(function, x) for x in (self.value, self.low, self.high)))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Metric:
    """Sum over sum, of clusters that were drawn whole: samples of a batch are not independent, batches nearly are.

    R = Σy / Σx and var R = n / (n - 1) · Σ(y - R x)² / (Σx)², without interval for fewer than two clusters.
    Source: the ratio estimator (Cochran, Sampling Techniques, 1977, chapter 6), by linearisation.
    """
    y, x = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if not x.sum() > 0:
        return Metric(None)
    value = float(y.sum() / x.sum())
    if len(x) < 2 or not math.isfinite(value):
        return metric_of(value)
    n = len(x)
    error = math.sqrt(n / (n - 1) * float(((y - value * x) ** 2).sum())) / float(x.sum())
    return metric_of(value, value - Z * error, value + Z * error)


def wilson(num_hits: float, number: int) -> Metric:
    """A share of independent trials; half a hit is a tie.

    (p + z²/2n ± z √(p(1 - p)/n + z²/4n²)) / (1 + z²/n), which stays within [0, 1].    Source: Wilson 1927.
    """
    if number < 1:
        return Metric(None)
    p, spread = num_hits / number, Z**2 / number
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / number + spread / (4 * number)) / (1 + spread)
    return Metric(p, max(0.0, middle - half), min(1.0, middle + half))


def bootstrap(rows: Any, statistic: Callable[[Floats], float]) -> Metric:
    """A statistic of the sum of rows [n, k], the rows being drawn again with replacement (Efron 1979; Koehn 2004 for BLEU).

    `statistic` takes such a sum [k]. The interval is from the 2.5th to the 97.5th percentile of RESAMPLES.
    """
    rows_NK = np.asarray(rows, dtype=np.float64)
    if not len(rows_NK):
        return Metric(None)
    value = statistic(rows_NK.sum(0))
    if len(rows_NK) < 2:
        return metric_of(value)
    draw = np.random.Generator(np.random.PCG64(SEED))
    chances = np.full(len(rows_NK), 1 / len(rows_NK))
    drawn = [statistic(draw.multinomial(len(rows_NK), chances) @ rows_NK) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return metric_of(value, float(low), float(high))


def metric_of(*values: float) -> Metric:
    """Of a value, and the ends of its interval if it has one."""
    return Metric(*(value if math.isfinite(value) else None for value in values))


def _finite(function: Callable[[float], float], value: float) -> float | None:
    try:
        found = function(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None
