"""The order of samples: each exactly once per epoch, from its arguments alone, in any corpus and batch shape."""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data.order import Order, SampleAt, permutation, permute
from elastic_lm.errors import ConfigError


def order_of(**fields: Any) -> Order:
    shape = {
        "num_full_blocks": 10,
        "samples_per_block": 3,
        "tail_samples": 2,
        "window_blocks": 4,
        "seed": 1,
        "micro_batches": 2,
        "micro_batch_size": 2,
        "sequence_length": 8,
    }
    return Order(**{**shape, **fields})


@st.composite
def orders(draw: st.DrawFn) -> Order:
    samples_per_block = draw(st.integers(1, 6))
    num_full_blocks = draw(st.integers(0, 25))
    return order_of(
        num_full_blocks=num_full_blocks,
        samples_per_block=samples_per_block,
        tail_samples=draw(st.integers(0 if num_full_blocks else 1, samples_per_block)),
        window_blocks=draw(st.integers(1, 30)),
        seed=draw(st.integers(0, 2**63)),
        micro_batches=draw(st.integers(1, 4)),
        micro_batch_size=draw(st.integers(1, 4)),
    )


def samples_of_epochs(order: Order, num_epochs: int) -> list[SampleAt]:
    return [order.locate(position) for position in range(num_epochs * order.num_samples)]


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_permutation_is_permute_of_every_index(size: int, key: int) -> None:
    assert permutation(size, key).tolist() == [permute(index, size, key) for index in range(size)]


@given(orders(), st.integers(0, 10**6))
def test_spans_are_the_places_of_the_micro_batch(order: Order, step: int) -> None:
    for micro_batch in range(order.micro_batches):
        samples = order.micro_batch(step, micro_batch)
        expected = [(sample.epoch, sample.window, order.offset_in_window(sample)) for sample in samples]
        spans = order.spans(step, micro_batch)
        assert [(span.epoch, span.window, int(at)) for span in spans for at in span.offsets] == expected


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(orders(), st.integers(0, 2))
@settings(max_examples=60)
def test_epoch_holds_every_sample_once(order: Order, epoch: int) -> None:
    start = epoch * order.num_samples
    samples = [order.locate(position) for position in range(start, start + order.num_samples)]
    expected = {(b, i) for b in range(order.num_full_blocks) for i in range(order.samples_per_block)}
    expected |= {(order.num_full_blocks, i) for i in range(order.tail_samples)}
    assert Counter((s.block, s.index_in_block) for s in samples) == Counter(expected)
    assert {s.epoch for s in samples} == {epoch}


@given(orders())
@settings(max_examples=60)
def test_windows_follow_each_other_and_hold_their_blocks(order: Order) -> None:
    samples = samples_of_epochs(order, 1)
    assert [s.window for s in samples] == sorted(s.window for s in samples)
    assert {s.window for s in samples} == set(range(order.num_windows))
    for sample in samples:
        assert order.window_blocks_of(0, sample.window)[sample.slot] == sample.block
    for window in range(order.num_windows):
        assert sum(s.window == window for s in samples) == order.window_samples(window)


@given(orders(), st.integers(0, 30))
@settings(max_examples=60)
def test_micro_batches_of_steps_are_the_sequence_cut_in_pieces(order: Order, step: int) -> None:
    rows = [s for j in range(order.micro_batches) for s in order.micro_batch(step, j)]
    size = order.micro_batches * order.micro_batch_size
    assert rows == [order.locate(step * size + i) for i in range(size)]
    windows = order.windows_of(step)
    assert windows == sorted(set(windows))
    assert {(s.epoch, s.window) for s in rows} == set(windows)


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=4),
    st.integers(0, 40),
)
def test_skipped_batches_are_stepped_over(gaps: list[tuple[int, int]], step: int) -> None:
    skip, end = [], 0
    for gap, length in gaps:
        skip.append((end + gap, end + gap + length))
        end += gap + length
    kept = [b for b in range(200) if not any(start <= b < stop for start, stop in skip)]
    assert order_of(skip=tuple(skip)).batch(step) == kept[step]


def test_seed_and_epoch_change_the_order() -> None:
    first, second = (samples_of_epochs(order_of(seed=seed), 2) for seed in (1, 2))
    assert first != second
    epochs = [[(s.block, s.index_in_block) for s in first if s.epoch == e] for e in (0, 1)]
    assert epochs[0] != epochs[1]


def test_shuffle_shows_no_trend() -> None:
    """Mean of the block ids in each tenth of an epoch: within 4 standard deviations of a fair shuffle's."""
    num = 10_000
    places = [permute(i, num, 42) for i in range(num)]
    deviation = num / 12**0.5 / 1_000**0.5
    for start in range(0, num, 1_000):
        assert abs(sum(places[start : start + 1_000]) / 1_000 - num / 2) < 4 * deviation


def test_far_positions_cost_no_more_and_keep_their_place() -> None:
    # A regression row: these values are part of what resuming a run relies on.
    order = order_of(num_full_blocks=10**10, window_blocks=32)
    samples = order.micro_batch(10**12, 1)
    assert samples == pickle.loads(pickle.dumps(order)).micro_batch(10**12, 1)
    assert [(s.epoch, s.window, s.slot, s.block, s.index_in_block) for s in samples] == [
        (133, 104166663, 2, 8668235740, 0),
        (133, 104166663, 18, 8585427247, 0),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_blocks": 0}, "window_blocks=0"),
        ({"samples_per_block": 0}, "8 \\+ 1 tokens"),
        ({"num_full_blocks": 0, "tail_samples": 0}, "8 \\+ 1 tokens"),
        ({"tail_samples": 4}, "exceed"),
        ({"tail_samples": -1}, "negative"),
        ({"skip": ((3, 3),)}, "half-open"),
        ({"skip": ((5, 7), (6, 8))}, "7 or later"),
    ],
)
def test_impossible_order_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        order_of(**fields)


def test_place_outside_is_refused() -> None:
    with pytest.raises(ValueError, match="micro-batch 2"):
        order_of().micro_batch(0, 2)
    with pytest.raises(ValueError, match="window 3"):
        order_of().window_blocks_of(0, 3)
