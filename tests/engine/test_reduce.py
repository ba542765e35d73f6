"""The reduction: the commit vector says what it should, nothing of an earlier step survives, and our own bugs are noticed.

A group is faked: it adds what a second member, in this process, had put into its buffer.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_lm.engine import reduce
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.engine.fixed_point import gradient_unit, loss_unit
from elastic_lm.engine.reduce import HASH_MASK, Commit, InconsistentSum, Reduction
from elastic_lm.engine.state import ReplicaState

torch.set_num_threads(1)

M, TARGETS = 4, 64
STATE = ReplicaState(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7)))  # 35 + padding, 7, 7, 7
SLOTS = STATE.slots


def make_reduction(*, exact: bool = True) -> Reduction:
    return Reduction(
        SLOTS,
        STATE.size,
        exact=exact,
        gradient_unit=gradient_unit(TARGETS, M),
        loss_unit=loss_unit(M),
        device=torch.device("cpu"),
    )


class Recorder:
    """A group that only keeps what its member put in."""

    world_size = 1

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.clone())
        return tensor

    def wait(self, pending: list[Any], cancelled: Any) -> None:
        assert len(pending) == len(self.sent)


class WithPeers(Recorder):
    """A group whose sum is the caller's tensors and those recorded of others."""

    def __init__(self, *peers: Recorder) -> None:
        super().__init__()
        self.peers, self.world_size = peers, 1 + len(peers)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        for peer in self.peers:
            tensor += peer.sent[len(self.sent)]
        return super().all_reduce(tensor)


def never() -> bool:
    return False


def gradients(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(slot.shape, generator=generator) for slot in SLOTS]


def fill(reduction: Reduction, seed: int, *, step: int = 3, loss: float = 1.5, sample_hash: int = 5) -> list[Tensor]:
    """One member's step of one micro-batch."""
    reduction.begin(step)
    mine = gradients(seed)
    for index, gradient in enumerate(mine):
        reduction.add_gradient(index, gradient)
    reduction.add_micro_batch(torch.tensor(loss), 16, sample_hash)
    return mine


def complete(reduction: Reduction, group: Recorder | None = None, *, wants_end: bool = False) -> Commit:
    return reduction.complete(group, wants_end, never)  # type: ignore[arg-type]


def peer(seed: int, *, exact: bool = True, wants_end: bool = False, **fields: Any) -> tuple[Recorder, list[Tensor]]:
    """Another member that has computed one micro-batch."""
    reduction, group = make_reduction(exact=exact), Recorder()
    mine = fill(reduction, seed, **fields)
    complete(reduction, group, wants_end=wants_end)
    return group, mine


def flat_total(reduction: Reduction) -> Tensor:
    dtype = torch.int64 if reduction.exact else torch.float32
    return torch.frombuffer(bytearray(reduction.raw_total()), dtype=dtype)


def mean_gradient(reduction: Reduction, commit: Commit) -> list[Tensor]:
    flat = reduction.gradient(commit, torch.full((STATE.size,), math.nan))
    assert not flat.isnan().any()
    return [slot.of(flat).view(slot.shape) for slot in SLOTS]


def test_loss_of_one_element_is_one_whatever_its_shape() -> None:
    """An objective of the user's own may keep a dimension; backward takes it, too."""
    reduction = make_reduction()
    reduction.begin(3)
    reduction.add_micro_batch(torch.tensor([2.25]), 16, 0)
    reduction.add_micro_batch(torch.tensor([[0.5]]), 15, 0)
    assert complete(reduction).loss_units == int(2.75 * 2**30)


@pytest.mark.parametrize("exact", [True, False])
def test_commit_of_one_member_holds_the_sums_of_its_micro_batches(exact: bool) -> None:
    reduction = make_reduction(exact=exact)
    reduction.begin(3)
    reduction.add_micro_batch(torch.tensor(2.25), 16, 1000)
    reduction.add_micro_batch(torch.tensor(0.5), 15, 24)
    commit = complete(reduction, wants_end=True)
    assert commit == Commit(
        loss_units=int(2.75 * 2**30),
        num_targets=31,
        micro_batches=2,
        refused=0,
        refused_losses=0,
        sample_hash=1024,
        end_votes=1,
    )
    assert reduction.loss(commit) == 2.75 / 31


@pytest.mark.parametrize("exact", [True, False])
def test_commit_of_three_members_is_the_sum_of_theirs(exact: bool) -> None:
    others = [
        peer(1, exact=exact, loss=2.0, sample_hash=10, wants_end=True)[0],
        peer(2, exact=exact, loss=3.0, sample_hash=20, wants_end=True)[0],
    ]
    reduction = make_reduction(exact=exact)
    fill(reduction, 0, loss=1.0, sample_hash=30)
    commit = complete(reduction, WithPeers(*others))
    assert commit == Commit(
        loss_units=6 * 2**30, num_targets=48, micro_batches=3, refused=0, refused_losses=0, sample_hash=60, end_votes=2
    )


def test_a_refused_loss_is_told_from_a_refused_gradient() -> None:
    reduction = make_reduction()
    reduction.begin(0)
    reduction.add_gradient(0, torch.full(SLOTS[0].shape, math.inf))
    reduction.add_micro_batch(torch.tensor(math.nan), 16, 0)
    commit = complete(reduction)
    assert (commit.refused, commit.refused_losses) == (SLOTS[0].size + 1, 1)


@pytest.mark.parametrize("exact", [True, False])
def test_gradient_is_the_mean_over_all_targets_of_the_sum_over_members(exact: bool) -> None:
    other, theirs = peer(1, exact=exact)
    reduction = make_reduction(exact=exact)
    ours = fill(reduction, 0)
    commit = complete(reduction, WithPeers(other))
    for found, a, b in zip(mean_gradient(reduction, commit), ours, theirs, strict=True):
        # Exact: one rounding to fp32. Fast: the sum is rounded as well. Both are 2^-24 of the larger term.
        torch.testing.assert_close(found.double(), (a.double() + b.double()) / 32, rtol=0, atol=2**-24 * 8 / 32)


def test_both_members_end_with_the_same_bits_whoever_adds_first() -> None:
    first, second = make_reduction(), make_reduction()
    fill(first, 0)
    fill(second, 1)
    complete(first, WithPeers(peer(1)[0]))
    complete(second, WithPeers(peer(0)[0]))
    assert first.raw_total() == second.raw_total()
    assert flat_total(first).count_nonzero() > 40


def test_exact_sum_of_many_micro_batches_does_not_depend_on_their_order() -> None:
    forwards, backwards = make_reduction(), make_reduction()
    for reduction, seeds in ((forwards, [0, 1, 2, 3]), (backwards, [3, 2, 1, 0])):
        reduction.begin(0)
        for seed in seeds:
            for index, gradient in enumerate(gradients(seed)):
                reduction.add_gradient(index, gradient * 10.0 ** (-seed))
        complete(reduction)
    assert forwards.raw_total() == backwards.raw_total()


@pytest.mark.parametrize("exact", [True, False])
def test_slots_without_a_gradient_are_zero_and_the_others_are_not(exact: bool) -> None:
    reduction = make_reduction(exact=exact)
    fill(reduction, 0)
    complete(reduction)
    before = flat_total(reduction)
    assert all(slot.of(before).count_nonzero() > 0 for slot in SLOTS)  # something was there
    reduction.begin(4)
    reduction.add_gradient(1, torch.ones(SLOTS[1].shape))
    reduction.add_micro_batch(torch.tensor(1.0), 1, 0)
    mean = mean_gradient(reduction, complete(reduction))
    assert torch.equal(mean[1], torch.ones(SLOTS[1].shape))
    assert [m.count_nonzero() for i, m in enumerate(mean) if i != 1] == [0, 0, 0]


@pytest.mark.parametrize("exact", [True, False])
def test_padding_between_slots_stays_zero(exact: bool) -> None:
    reduction = make_reduction(exact=exact)
    fill(reduction, 0)
    complete(reduction, WithPeers(peer(1, exact=exact)[0]))
    total = flat_total(reduction)
    for slot in SLOTS:
        slot.of(total).zero_()
    assert len(total) == STATE.size > sum(slot.size for slot in SLOTS)
    assert total.count_nonzero() == 0


@pytest.mark.parametrize("exact", [True, False])
def test_begin_forgets_everything_that_was_added(exact: bool) -> None:
    fresh, used = make_reduction(exact=exact), make_reduction(exact=exact)
    fill(used, 5, loss=math.nan, sample_hash=77)
    used.add_gradient(0, torch.full(SLOTS[0].shape, math.inf))
    complete(used, wants_end=True)
    fill(fresh, 0)
    fill(used, 0)
    assert complete(used) == complete(fresh)
    assert used.raw_total() == fresh.raw_total()


def test_a_step_given_up_half_way_leaves_nothing_in_the_next() -> None:
    fresh, used = make_reduction(), make_reduction()
    used.begin(2)
    used.add_gradient(0, torch.full(SLOTS[0].shape, math.nan))  # then its member was fenced
    fill(fresh, 0)
    fill(used, 0)
    assert complete(used) == complete(fresh)
    assert used.raw_total() == fresh.raw_total()


@pytest.mark.parametrize("exact", [True, False])
def test_members_at_different_steps_are_noticed(exact: bool) -> None:
    reduction = make_reduction(exact=exact)
    fill(reduction, 0, step=3)
    with pytest.raises(InconsistentSum, match="members or steps do not agree"):
        complete(reduction, WithPeers(peer(1, exact=exact, step=4)[0]))


def test_a_contribution_counted_twice_is_noticed() -> None:
    other = peer(1)[0]
    group = WithPeers(other, other)
    group.world_size = 2
    reduction = make_reduction()
    fill(reduction, 0)
    with pytest.raises(InconsistentSum):
        complete(reduction, group)


def test_a_missing_contribution_is_noticed() -> None:
    group = Recorder()
    group.world_size = 2
    reduction = make_reduction()
    fill(reduction, 0)
    with pytest.raises(InconsistentSum):
        complete(reduction, group)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refused_gradients_of_one_member_are_counted_by_all(bad: float) -> None:
    poisoned, theirs = make_reduction(), Recorder()
    poisoned.begin(3)
    gradient = torch.ones(SLOTS[0].shape)
    gradient[2, 3] = gradient[4, 1] = bad
    poisoned.add_gradient(0, gradient)
    poisoned.add_micro_batch(torch.tensor(1.0), 16, 0)
    complete(poisoned, theirs)
    reduction = make_reduction()
    fill(reduction, 0)
    assert complete(reduction, WithPeers(theirs)).refused == 2


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2.0**40])
def test_refused_losses_are_counted_and_add_nothing(bad: float, exact: bool) -> None:
    other, _ = peer(1, exact=exact, loss=bad)
    reduction = make_reduction(exact=exact)
    fill(reduction, 0, loss=1.0)
    commit = complete(reduction, WithPeers(other))
    assert (commit.refused, commit.loss_units) == (1, 2**30)


def test_fast_and_exact_agree_to_single_precision() -> None:
    means = {}
    for exact in (True, False):
        reduction = make_reduction(exact=exact)
        fill(reduction, 0)
        means[exact] = mean_gradient(reduction, complete(reduction, WithPeers(peer(1, exact=exact)[0])))
    for exact, fast in zip(means[True], means[False], strict=True):
        torch.testing.assert_close(fast, exact, rtol=0, atol=2**-24 * 8 / 32)


def test_a_non_finite_gradient_stays_visible_in_a_fast_sum() -> None:
    """Nothing is refused there; the step finds it in the norm."""
    reduction = make_reduction(exact=False)
    reduction.begin(0)
    reduction.add_gradient(0, torch.full(SLOTS[0].shape, math.nan))
    reduction.add_micro_batch(torch.tensor(1.0), 16, 0)
    commit = complete(reduction)
    assert commit.refused == 0
    assert reduction.gradient(commit, torch.empty(STATE.size)).isnan().any()


@pytest.mark.parametrize("num_members", [1, 3, 8])
def test_hashes_are_added_modulo_2_to_63(num_members: int) -> None:
    """Sums of 62-bit numbers overflow the 64 bits that travel, more than once."""
    values = [2**62 - 1 - 12_345 * n for n in range(num_members)]
    others = [peer(n, sample_hash=value)[0] for n, value in enumerate(values[1:])]
    reduction = make_reduction()
    reduction.begin(3)
    for _ in range(5):
        reduction.add_micro_batch(torch.tensor(0.0), 1, values[0])
    commit = complete(reduction, WithPeers(*others))
    assert commit.sample_hash == (5 * values[0] + sum(values[1:])) % 2**63
    assert 0 <= commit.sample_hash <= HASH_MASK


@pytest.mark.parametrize("exact", [True, False])
def test_buckets_cover_the_whole_buffer_and_the_header_once(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduce, "BUCKET_ELEMENTS", 24)  # does not divide the size
    other, theirs = peer(1, exact=exact)
    assert len(other.sent) >= 4
    assert sum(len(sent) for sent in other.sent) == reduce.HEADER + STATE.size
    reduction = make_reduction(exact=exact)
    ours = fill(reduction, 0)
    commit = complete(reduction, WithPeers(other))
    assert commit.micro_batches == 2
    for found, a, b in zip(mean_gradient(reduction, commit), ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), (a.double() + b.double()) / 32, rtol=0, atol=2**-24 * 8 / 32)


def test_a_fence_while_reducing_leaves_complete() -> None:
    class Fenced(Recorder):
        def wait(self, pending: list[Any], cancelled: Any) -> None:
            assert cancelled()
            raise Cancelled

    reduction = make_reduction()
    fill(reduction, 0)
    with pytest.raises(Cancelled):
        reduction.complete(Fenced(), False, lambda: True)  # type: ignore[arg-type]


# -- buckets that leave while backward still runs --------------------------------------------------------------------


class Noted(Recorder):
    """Keeps where each bucket lies, too."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.places.append(tensor.data_ptr())
        return super().all_reduce(tensor)


@pytest.fixture
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slots in one bucket, several buckets to one slot, and the commit vector with a piece of the first slot."""
    monkeypatch.setattr(reduce, "BUCKET_ELEMENTS", 24)


def run_early(
    reduction: Reduction, group: Recorder | None, orders: list[list[int]], *, early: bool = True
) -> tuple[Commit, list[int]]:
    """Micro-batches with seeds 0, 1, …, whose gradients come in the given orders; the last one sends early.

    Returns: the commit, and how many buckets had left after each gradient of the last micro-batch.
    """
    reduction.begin(3)
    left = []
    for seed, order in enumerate(orders):
        last = seed == len(orders) - 1
        if last and early:
            reduction.send_early(group)  # type: ignore[arg-type]
        for index in order:
            reduction.add_gradient(index, gradients(seed)[index])
            if last:
                left.append(len(group.sent) if group else 0)
        reduction.add_micro_batch(torch.tensor(1.5), 16, 5)
    return complete(reduction, group), left


FORWARDS, BACKWARDS = [0, 1, 2, 3], [3, 2, 1, 0]


@pytest.mark.usefixtures("_small_buckets")
@pytest.mark.parametrize("exact", [True, False])
def test_buckets_leave_in_one_order_whatever_the_order_of_gradients_and_the_vector_last(exact: bool) -> None:
    reduction = make_reduction(exact=exact)
    orders = []
    for order in permutations(range(len(SLOTS))):
        group = Noted()
        run_early(reduction, group, [list(order)])
        orders.append(group.places)
    late, idle = Noted(), Noted()
    run_early(reduction, late, [FORWARDS], early=False)
    reduction.begin(3)  # a member without micro-batches
    complete(reduction, idle)
    assert all(order == orders[0] for order in [*orders, late.places, idle.places])
    assert len(set(orders[0])) == len(orders[0]) >= 4
    vector = idle.sent[-1][: reduce.HEADER]
    assert vector[reduce.Field.MEMBERS] == 1 and vector[reduce.Field.STEPS] == 4
    assert all(sent.count_nonzero() == 0 for sent in idle.sent[:-1])


@pytest.mark.usefixtures("_small_buckets")
@pytest.mark.parametrize("exact", [True, False])
def test_buckets_leave_early_but_never_before_their_last_gradient(exact: bool) -> None:
    reduction, group = make_reduction(exact=exact), Noted()
    _, left = run_early(reduction, group, [BACKWARDS, BACKWARDS])
    assert 0 < left[-1] < len(group.sent)  # some left within backward, not the vector
    assert left == sorted(left)
    late = Recorder()
    run_early(make_reduction(exact=exact), late, [BACKWARDS, BACKWARDS], early=False)
    for early_bucket, late_bucket in zip(group.sent, late.sent, strict=True):
        assert torch.equal(early_bucket, late_bucket)


@pytest.mark.usefixtures("_small_buckets")
@pytest.mark.parametrize("exact", [True, False])
def test_no_bucket_leaves_before_the_last_micro_batch(exact: bool) -> None:
    reduction, group = make_reduction(exact=exact), Recorder()
    reduction.begin(3)
    for seed in range(3):
        for index, gradient in enumerate(gradients(seed)):
            reduction.add_gradient(index, gradient)
    assert group.sent == []
    reduction.send_early(group)  # type: ignore[arg-type]
    assert group.sent == []


@pytest.mark.usefixtures("_small_buckets")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("missing", range(len(SLOTS)))
def test_slot_without_a_gradient_in_the_last_micro_batch_is_still_summed(missing: int, exact: bool) -> None:
    """Its gradient of an earlier micro-batch counts, and so do its peers'."""
    others = [index for index in BACKWARDS if index != missing]
    theirs = Recorder()
    run_early(make_reduction(exact=exact), theirs, [BACKWARDS])
    reduction = make_reduction(exact=exact)
    commit, _ = run_early(reduction, WithPeers(theirs), [BACKWARDS, others])
    mean = mean_gradient(reduction, commit)
    for index, found in enumerate(mean):
        terms = [gradients(0)[index].double()] * 2 + [gradients(1)[index].double()] * (index != missing)
        torch.testing.assert_close(found.double(), sum(terms, torch.zeros(())) / 48, rtol=0, atol=2**-24 * 16 / 48)


@pytest.mark.usefixtures("_small_buckets")
@pytest.mark.parametrize("exact", [True, False])
def test_slot_that_never_had_a_gradient_brings_zeros_not_the_last_steps(exact: bool) -> None:
    reduction = make_reduction(exact=exact)
    run_early(reduction, Recorder(), [BACKWARDS])
    commit, _ = run_early(reduction, Recorder(), [[3, 0]])
    assert [bool(mean.count_nonzero()) for mean in mean_gradient(reduction, commit)] == [True, False, False, True]


@pytest.mark.usefixtures("_small_buckets")
@pytest.mark.parametrize("exact", [True, False])
def test_second_gradient_of_a_slot_in_the_last_micro_batch_is_noticed(exact: bool) -> None:
    """Its bucket may have left: the total would be wrong on the others."""
    reduction = make_reduction(exact=exact)
    reduction.begin(3)
    for _ in range(2):  # a sum over micro-batches is what the buffer is for
        reduction.add_gradient(1, gradients(0)[1])
    reduction.send_early(Recorder())  # type: ignore[arg-type]
    reduction.add_gradient(1, gradients(0)[1])
    with pytest.raises(InconsistentSum, match=rf"^{SLOTS[1].name} got two gradients.*use_reentrant=False"):
        reduction.add_gradient(1, gradients(0)[1])
    reduction.begin(4)
    reduction.add_gradient(1, gradients(0)[1])


@pytest.mark.usefixtures("_small_buckets")
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("order", [FORWARDS, BACKWARDS, [2, 0, 3, 1]])
def test_sending_early_leaves_the_same_bits(order: list[int], exact: bool) -> None:
    totals, commits = set(), set()
    for mine_early in (True, False):
        for theirs_early in (True, False):
            theirs = Recorder()
            run_early(make_reduction(exact=exact), theirs, [BACKWARDS], early=theirs_early)
            reduction = make_reduction(exact=exact)
            commit, _ = run_early(reduction, WithPeers(theirs), [FORWARDS, order], early=mine_early)
            totals.add(reduction.raw_total())
            commits.add(commit)
    assert len(totals) == len(commits) == 1


@pytest.mark.usefixtures("_small_buckets")
def test_alone_sending_early_is_nothing() -> None:
    reduction = make_reduction()
    commit, left = run_early(reduction, None, [FORWARDS, BACKWARDS])
    expected = make_reduction()
    assert run_early(expected, None, [FORWARDS, BACKWARDS], early=False)[0] == commit
    assert reduction.raw_total() == expected.raw_total()
    assert left == [0] * len(SLOTS)
