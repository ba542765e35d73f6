"""What a run takes, before it is started: parameters, memory, operations, and time for every number of workers.

Invariant: arithmetic only, on numbers that the caller has found out; the same input gives the same answer, without torch.
What cannot be known beforehand (activations, the cost of sums and transfers) is left out and said to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from elastic_lm.config import BatchConfig, RunConfig
from elastic_lm.model.flops import training_flops_per_token
from elastic_lm.model.spec import ModelSpec

# Bytes of a parameter in a worker. Exact sums: counted (docs/reduction.md), and measured as such. Fast sums: 20 by the same
# count but 25.3 measured (bench/README.md), so the measurement is taken, which has no parts.
EXACT_BYTES = {"weights": 4.0, "moments": 8.0, "gradient": 4.0, "accumulator": 8.0}
FAST_BYTES = {"measured": 25.3}
CHECKPOINT_BYTES = 12  # weights and two moments in fp32
MOMENT_BYTES = 4

MOST_ROWS = 12
POOR_WORST, POOR_MEAN = 0.8, 0.9  # below either, another number of micro-batches is looked for
WORTH_TELLING = 0.02  # of efficiency, by which a second suggestion must be better than the first
MOST_CANDIDATES = 512
MOST_SIZES = 1024  # of a range that a candidate is judged by
MOST_MICRO_BATCHES = 65_536  # as in the config

Split = tuple[int, int]  # micro-batches, and samples in each


@dataclass(frozen=True)
class Model:
    """Sizes of a model. `matmul_parameters` and `flops_per_token` are None for one whose inside we do not know.

    `hidden_parameters`: those in matrices between embedding and head, as far as we know.
    """

    num_parameters: int
    matmul_parameters: int | None = None
    flops_per_token: int | None = None
    hidden_parameters: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, sequence_length: int, predicted: float = 1.0) -> Model:
        """Of a shape, with an objective that predicts this share of the tokens."""
        flops = training_flops_per_token(spec, sequence_length, predicted)
        return cls(spec.num_parameters, spec.matmul_parameters, flops, spec.hidden_parameters)


@dataclass(frozen=True)
class Row:
    """A number of workers. `step_time` is relative to the smallest number of the range; `hours` for the whole run."""

    num_workers: int
    fewest_micro_batches: int
    most_micro_batches: int
    step_time: float
    efficiency: float
    hours: float | None


@dataclass(frozen=True)
class Suggestion:
    """Another split of the work into micro-batches, with the efficiency it has over the range of workers."""

    micro_batches: int
    micro_batch_size: int
    worst: float
    mean: float


@dataclass(frozen=True)
class Estimate:
    """All of it. `tokens_per_s_per_worker` is the rate that the hours rest on, `worst_workers` the size that fits worst."""

    run: str
    num_parameters: int
    matmul_parameters: int | None
    steps: int
    tokens_per_step: int
    tokens_in_all: int
    flops_per_token: int | None
    training_flops: int | None
    bytes_per_worker: dict[str, int]
    checkpoint_bytes: int
    checkpoints_kept: int
    workers: tuple[Row, ...]
    worst_efficiency: float
    worst_workers: int
    mean_efficiency: float
    suggestions: tuple[Suggestion, ...]
    tokens_per_s_per_worker: float | None

    @classmethod
    def of(cls, config: RunConfig, model: Model, tokens_per_s: float | None) -> Estimate:
        """For every number of workers in the run's range; `tokens_per_s`: of one worker, if it is known."""
        batch, steps, low, high = config.batch, config.training.steps, config.workers.min, config.workers.max
        tokens, flops = batch.tokens * steps, model.flops_per_token
        one_moment = model.hidden_parameters if config.optimizer.kind == "muon" else 0
        worst, worst_workers, mean = profile(batch.micro_batches, range(low, high + 1))
        return cls(
            run=config.name,
            num_parameters=model.num_parameters,
            matmul_parameters=model.matmul_parameters,
            steps=steps,
            tokens_per_step=batch.tokens,
            tokens_in_all=tokens,
            flops_per_token=flops,
            training_flops=None if flops is None else flops * tokens,
            bytes_per_worker=bytes_per_worker(model.num_parameters, one_moment, exact=config.reduction.kind == "exact"),
            checkpoint_bytes=CHECKPOINT_BYTES * model.num_parameters - MOMENT_BYTES * one_moment,
            checkpoints_kept=config.checkpoint.keep + config.checkpoint.keep_best,
            workers=tuple(rows(batch, steps, low, high, tokens_per_s)),
            worst_efficiency=worst,
            worst_workers=worst_workers,
            mean_efficiency=mean,
            suggestions=tuple(suggestions(batch, low, high)),
            tokens_per_s_per_worker=tokens_per_s,
        )


# -- memory ----------------------------------------------------------------------------------------------------------


def bytes_per_worker(num_parameters: int, one_moment: int = 0, *, exact: bool) -> dict[str, int]:
    """What a worker holds through a step, by part; activations are not in it. `one_moment`: parameters that have no second."""
    parts = EXACT_BYTES if exact else FAST_BYTES
    held = {name: round(size * num_parameters) for name, size in parts.items()}
    held["moments" if exact else "measured"] -= MOMENT_BYTES * one_moment
    return held


# -- workers ---------------------------------------------------------------------------------------------------------


def efficiency(micro_batches: int, num_workers: int) -> float:
    """Share of the workers' time that computes: M / (N ceil(M / N)), for workers of equal speed."""
    return micro_batches / (num_workers * math.ceil(micro_batches / num_workers))


def profile(micro_batches: int, sizes: Iterable[int]) -> tuple[float, int, float]:
    """(worst efficiency, the smallest number of workers that has it, mean) over these numbers of workers."""
    found = [(efficiency(micro_batches, num_workers), num_workers) for num_workers in sizes]
    worst, num_workers = min(found)
    return worst, num_workers, math.fsum(value for value, _ in found) / len(found)


def rows(batch: BatchConfig, steps: int, low: int, high: int, tokens_per_s: float | None) -> list[Row]:
    """A row for every number of workers in [low, high], or for those that tell most. `tokens_per_s`: of one worker."""
    most_at_low = math.ceil(batch.micro_batches / low)
    found = []
    for num_workers in sizes(batch.micro_batches, low, high):
        most = math.ceil(batch.micro_batches / num_workers)
        tokens_each = steps * most * batch.micro_batch_size * batch.sequence_length  # the busiest worker's
        hours = tokens_each / tokens_per_s / 3600 if tokens_per_s else None
        share = efficiency(batch.micro_batches, num_workers)
        found.append(Row(num_workers, batch.micro_batches // num_workers, most, most / most_at_low, share, hours))
    return found


def sizes(micro_batches: int, low: int, high: int) -> list[int]:
    """At most MOST_ROWS numbers of workers: both ends, the worst, and in between by equal factors."""
    if high - low < MOST_ROWS:
        return list(range(low, high + 1))
    num_factors = MOST_ROWS - 2
    spread = {round(low * (high / low) ** (index / num_factors)) for index in range(num_factors + 1)}
    return sorted(spread | {profile(micro_batches, range(low, high + 1))[1]})


# -- a better number of micro-batches --------------------------------------------------------------------------------


def suggestions(batch: BatchConfig, low: int, high: int) -> list[Suggestion]:
    """Splits that keep more of the workers busy, when the chosen one is poor somewhere in [low, high] or in the mean.

    First one that keeps the global batch, if there is one; then one that changes it, if that is clearly better.
    """
    worst, _, mean = profile(batch.micro_batches, range(low, high + 1))
    if worst >= POOR_WORST and mean >= POOR_MEAN:
        return []
    best, found = mean, []
    for splits in (_same_batch(batch, high), _near(batch, high)):
        suggestion = _nearest_good(splits, batch, low, high)
        if suggestion is not None and suggestion.mean >= best + WORTH_TELLING:
            found.append(suggestion)
            best = suggestion.mean
    return found


def _same_batch(batch: BatchConfig, high: int) -> list[Split]:
    """All that have the samples of the global batch."""
    smallest, largest = math.ceil(batch.samples / MOST_MICRO_BATCHES), batch.samples // high
    found = [(batch.samples // size, size) for size in range(smallest, largest + 1) if batch.samples % size == 0]
    return [(count, size) for count, size in found if count != batch.micro_batches]


def _near(batch: BatchConfig, high: int) -> list[Split]:
    """From half to twice the chosen number, of the same size; multiples of the most workers, whatever is left out."""
    low, most = max(high, math.ceil(batch.micro_batches / 2)), min(2 * batch.micro_batches, MOST_MICRO_BATCHES)
    stride = max(1, (most - low) // MOST_CANDIDATES)
    found = {*range(low, most + 1, stride), *range(-(-low // high) * high, most + 1, high)}
    return [(count, batch.micro_batch_size) for count in sorted(found - {batch.micro_batches})]


def _nearest_good(splits: Sequence[Split], batch: BatchConfig, low: int, high: int) -> Suggestion | None:
    """The split nearest to the chosen one that is not poor; if all are, the one with the highest mean."""
    judged_by = range(low, high + 1, max(1, (high - low) // MOST_SIZES))
    judged = [(split, profile(split[0], judged_by)) for split in splits]
    good = [split for split, (worst, _, mean) in judged if worst >= POOR_WORST and mean >= POOR_MEAN]
    if good:
        count, size = min(good, key=lambda split: abs(math.log(split[0] / batch.micro_batches)))
    elif judged:
        count, size = max(judged, key=lambda pair: (pair[1][2], -pair[0][0]))[0]
    else:
        return None
    worst, _, mean = profile(count, range(low, high + 1))
    return Suggestion(count, size, worst, mean)
