"""What a run takes, worked by hand; a better split is one that a person finds on paper, too."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from elastic_lm.config import BatchConfig
from elastic_lm.estimate import (
    CHECKPOINT_BYTES,
    EXACT_BYTES,
    FAST_BYTES,
    MOST_MICRO_BATCHES,
    MOST_ROWS,
    POOR_MEAN,
    POOR_WORST,
    Estimate,
    Model,
    Suggestion,
    bytes_per_worker,
    efficiency,
    profile,
    rows,
    sizes,
    suggestions,
)
from elastic_lm.model.spec import ModelSpec
from tests.test_config import config

BENCH = Path(__file__).parents[1] / "bench" / "README.md"


def batch(micro_batches: int, micro_batch_size: int = 2, sequence_length: int = 16) -> BatchConfig:
    return BatchConfig(micro_batches=micro_batches, micro_batch_size=micro_batch_size, sequence_length=sequence_length)


# -- memory ----------------------------------------------------------------------------------------------------------


def test_exact_worker_holds_24_bytes_of_a_parameter() -> None:
    """4 of weights, 2 x 4 of moments, 4 of the mean gradient, 8 of the 64-bit accumulator."""
    held = bytes_per_worker(1000, exact=True)
    assert held == {"weights": 4000, "moments": 8000, "gradient": 4000, "accumulator": 8000}
    assert sum(held.values()) == 24_000


def test_fast_worker_holds_what_was_measured() -> None:
    assert bytes_per_worker(1000, exact=False) == {"measured": 25_300}


@pytest.mark.parametrize(("kind", "parts"), [("exact", EXACT_BYTES), ("fast", FAST_BYTES)])
def test_bytes_are_those_of_the_benchmark(kind: str, parts: dict[str, float]) -> None:
    row = re.search(rf"^\| {kind} \| ([\d.]+) \([\d.]+ - [\d.]+\) \| [\d.]+ M and", BENCH.read_text(), re.MULTILINE)
    assert row is not None
    assert sum(parts.values()) == float(row[1])


# -- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batches", "num_workers", "share"),
    [
        (8, 1, 1.0),
        (8, 2, 1.0),
        (8, 3, 8 / 9),  # 3, 3 and 2: the third waits for a third of the step
        (8, 5, 8 / 10),  # 2, 2, 2, 1 and 1
        (8, 7, 8 / 14),
        (8, 8, 1.0),
    ],
)
def test_efficiency_is_the_share_of_time_that_computes(micro_batches: int, num_workers: int, share: float) -> None:
    assert efficiency(micro_batches, num_workers) == pytest.approx(share)


@given(st.integers(1, 200), st.integers(1, 200))
def test_efficiency_is_what_counting_gives(micro_batches: int, num_workers: int) -> None:
    counts = [len(range(rank, micro_batches, num_workers)) for rank in range(num_workers)]
    assert efficiency(micro_batches, num_workers) == pytest.approx(sum(counts) / (num_workers * max(counts)))


def test_profile_of_a_range_is_its_worst_where_that_is_and_its_mean() -> None:
    worst, num_workers, mean = profile(8, range(1, 7))  # 1, 1, 8/9, 1, 8/10, 8/12
    assert (worst, num_workers) == (pytest.approx(8 / 12), 6)
    assert mean == pytest.approx((1 + 1 + 8 / 9 + 1 + 0.8 + 8 / 12) / 6)


def test_row_counts_micro_batches_time_and_hours() -> None:
    """8 micro-batches of 2 x 16 tokens, 900 steps, 100 tokens/s: one micro-batch takes 0.32 s."""
    one, two, three = rows(batch(8), 900, 1, 3, 100.0)
    assert (one.num_workers, one.fewest_micro_batches, one.most_micro_batches, one.step_time) == (1, 8, 8, 1.0)
    assert (two.fewest_micro_batches, two.most_micro_batches, two.step_time) == (4, 4, 0.5)
    assert (three.fewest_micro_batches, three.most_micro_batches, three.step_time) == (2, 3, 3 / 8)
    assert one.hours == pytest.approx(8 * 0.32 * 900 / 3600)
    assert three.hours == pytest.approx(3 * 0.32 * 900 / 3600)
    assert three.efficiency == pytest.approx(8 / 9)


def test_step_time_is_relative_to_the_fewest_workers() -> None:
    assert [row.step_time for row in rows(batch(8), 1, 2, 8, None)] == [1.0, 0.75, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert {row.hours for row in rows(batch(8), 1, 2, 8, None)} == {None}


def test_small_range_has_a_row_for_each_size() -> None:
    assert sizes(12, 1, 12) == list(range(1, 13))
    assert sizes(12, 5, 5) == [5]


def test_wide_range_has_its_ends_its_worst_and_equal_factors_between() -> None:
    found = sizes(1100, 1, 1000)
    assert len(found) <= MOST_ROWS
    assert found[0] == 1 and found[-1] == 1000
    assert profile(1100, range(1, 1001))[1] in found
    assert set(found) >= {1, 2, 4, 8, 16, 32, 63, 126, 251, 501, 1000}  # a thousand is two to the ten, nearly


@given(st.integers(1, 2000), st.integers(0, 2000), st.integers(0, 5000))
def test_rows_are_few_rising_and_inside_the_range(low: int, more: int, spare: int) -> None:
    high = low + more
    found = sizes(high + spare, low, high)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (low, high)
    assert len(found) <= MOST_ROWS


# -- a better split --------------------------------------------------------------------------------------------------


def test_split_that_is_good_everywhere_is_left_alone() -> None:
    assert suggestions(batch(12), 1, 6) == []  # 80% with 5, else all of it


def test_global_batch_is_kept_where_smaller_micro_batches_make_up_for_more() -> None:
    """12 over 8 workers: 75%. 48 samples are 24 x 2 as well: 24/28 with 7 is the worst then."""
    first = suggestions(batch(12, 4), 1, 8)[0]
    assert (first.micro_batches, first.micro_batch_size) == (24, 2)
    assert first.worst == pytest.approx(24 / 28)
    assert first.mean == pytest.approx((6 + 24 / 25 + 24 / 28) / 8)


def test_global_batch_that_must_change_changes_little() -> None:
    """8 micro-batches of one sample over exactly 3 workers: no other split of 8 samples is better; 9 leave nobody idle."""
    assert suggestions(batch(8, 1), 3, 3) == [Suggestion(9, 1, 1.0, 1.0)]


def test_second_suggestion_is_told_only_when_it_is_clearly_better() -> None:
    """32 samples over exactly 3 workers: 32 x 1 gives 32/33; 9 x 4 gives all of it, with 4 samples more."""
    assert suggestions(batch(8, 4), 3, 3) == [
        Suggestion(32, 1, pytest.approx(32 / 33), pytest.approx(32 / 33)),
        Suggestion(9, 4, 1.0, 1.0),
    ]
    [only] = suggestions(batch(12, 4), 1, 8)
    assert only.micro_batches * only.micro_batch_size == 48


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 200), st.integers(1, 12))
def test_suggestion_is_possible_and_better(low: int, more: int, spare: int, size: int) -> None:
    high = low + more
    chosen = batch(high + spare, size)
    worst, _, mean = profile(chosen.micro_batches, range(low, high + 1))
    found = suggestions(chosen, low, high)
    if worst >= POOR_WORST and mean >= POOR_MEAN:
        assert found == []
    for suggestion in found:
        assert suggestion.micro_batches >= high
        assert suggestion.mean > mean
        assert (suggestion.worst, suggestion.mean) == profile(suggestion.micro_batches, range(low, high + 1))[::2]
        keeps = suggestion.micro_batches * suggestion.micro_batch_size == chosen.samples
        assert keeps or suggestion.micro_batch_size == size


def test_widest_range_is_judged_in_time() -> None:
    began = time.process_time()
    assert suggestions(batch(40_000, 64), 1, 40_000)
    assert time.process_time() - began < 5  # half a second; without bounds on candidates and sizes, hours


# -- the whole -------------------------------------------------------------------------------------------------------


def test_sizes_of_a_shape_are_its_own() -> None:
    spec = ModelSpec(vocab_size=10, num_layers=2, num_heads=2, width=4, max_tokens=8, activation="gelu")
    model = Model.of(spec, 8)
    # 424 elements in matrices: tests/model/test_flops.py. Beside them 2 norms a block and one at the end, of 4 each.
    assert (model.num_parameters, model.matmul_parameters, model.hidden_parameters) == (424 + 5 * 4, 424, 424 - 40)
    assert model.flops_per_token == 6 * 424 + 12 * 2 * 4 * 8


def test_estimate_of_a_run_adds_up() -> None:
    run = config(
        "workers={min: 2, max: 4}", "checkpoint={every_steps: 10, keep: 2, keep_best: 1}"
    )  # 100 steps of 8 x 2 x 16 tokens
    found = Estimate.of(run, Model(1000, 900, 7000), 32.0)
    assert (found.run, found.steps, found.tokens_per_step, found.tokens_in_all) == ("first", 100, 256, 25_600)
    assert found.training_flops == 7000 * 25_600
    assert found.checkpoint_bytes == CHECKPOINT_BYTES * 1000 == 12_000
    assert found.checkpoints_kept == 3
    assert sum(found.bytes_per_worker.values()) == 24_000
    assert [row.num_workers for row in found.workers] == [2, 3, 4]
    assert found.workers[2].hours == pytest.approx(2 * 100 / 3600)  # a micro-batch a second, two each
    assert (found.worst_efficiency, found.worst_workers) == (pytest.approx(8 / 9), 3)
    assert found.mean_efficiency == pytest.approx((1 + 8 / 9 + 1) / 3)
    assert found.suggestions == ()


def test_muon_keeps_one_moment_of_the_matrices_within() -> None:
    model = Model(1000, 900, 7000, hidden_parameters=800)
    found = Estimate.of(config("optimizer.kind=muon"), model, None)
    assert found.bytes_per_worker == {"weights": 4000, "moments": 8000 - 3200, "gradient": 4000, "accumulator": 8000}
    assert found.checkpoint_bytes == 12_000 - 3200
    fast = Estimate.of(config("optimizer.kind=muon", "reduction.kind=fast"), model, None)
    assert fast.bytes_per_worker == {"measured": 25_300 - 3200}


def test_fast_sums_are_estimated_as_measured() -> None:
    assert Estimate.of(config("reduction.kind=fast"), Model(1000), None).bytes_per_worker == {"measured": 25_300}


def test_operations_of_a_users_model_are_not_known() -> None:
    found = Estimate.of(config(), Model(1000), None)
    assert (found.matmul_parameters, found.flops_per_token, found.training_flops) == (None, None, None)


def test_hours_need_a_speed() -> None:
    assert all(row.hours is None for row in Estimate.of(config(), Model(1000), None).workers)


def test_most_micro_batches_are_as_many_as_a_config_takes() -> None:
    assert batch(MOST_MICRO_BATCHES)
    with pytest.raises(ValidationError):
        batch(MOST_MICRO_BATCHES + 1)
