"""The next lease as a function of the members: who has the state, who needs it, who must catch up, how far to go."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_lm.control.leases import catch_up_lease, common_lease, evaluation_lease, standing, stop_step
from elastic_lm.control.membership import Member
from elastic_lm.control.spec import ControlSpec
from elastic_lm.protocol import Generation, Lease

GENERATION = Generation(0, 7)


def make_spec(**fields: Any) -> ControlSpec:
    sizes = {"min_workers": 1, "max_workers": 4, "num_micro_batches": 8, "total_steps": 100}
    return ControlSpec(**{**sizes, **fields})


def member(number: int, next_step: int | None = None, micro_batch_s: float | None = None) -> Member:
    """A member with a whole state at `next_step`, or without one."""
    whole = next_step is not None
    return Member(f"w{number}", number, 0.0, whole=whole, next_step=next_step or 0, micro_batch_s=micro_batch_s)


def ids(members: tuple[Member, ...]) -> list[str]:
    return [m.member_id for m in members]


def common(members: list[Member], spec: ControlSpec, *, restore: int | None = None) -> Lease:
    return common_lease(members, standing(members, exact=spec.exact), GENERATION, spec, restore=restore)


def test_evaluation_is_shared_by_speed_among_those_with_the_newest_state() -> None:
    members = [member(0, 6, 1.0), member(1, 6, 3.0), member(2)]
    lease = evaluation_lease(standing(members, exact=True), GENERATION, (1, 4, 5, 7))
    assert (lease.members, lease.rendezvous, lease.start_step, lease.stop_step) == (("w0", "w1"), None, 6, 6)
    assert lease.assignments == ((1, 4, 5), (7,))


MEMBERS = st.lists(st.none() | st.integers(0, 6), min_size=1, max_size=6).map(
    lambda steps: [member(number, step) for number, step in enumerate(steps)]
)

# -- standing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_nobody_with_a_state_has_no_head(exact: bool) -> None:
    now = standing([member(0), member(1)], exact=exact)
    assert (now.head, now.behind, ids(now.lacking), now.whole) == (None, (), ["w0", "w1"], ())


@pytest.mark.parametrize("exact", [True, False])
def test_head_is_the_newest_whole_state(exact: bool) -> None:
    torn = member(2)
    torn.next_step = 9  # a torn state's step says nothing
    now = standing([member(0, 5), member(1, 5), torn], exact=exact)
    assert (now.head, now.behind, ids(now.lacking), ids(now.whole)) == (5, (), ["w2"], ["w0", "w1"])


def test_exact_sums_let_those_behind_catch_up() -> None:
    now = standing([member(0, 5), member(1, 6), member(2, 4)], exact=True)
    assert now.head == 6
    assert (ids(now.behind), ids(now.lacking), ids(now.whole)) == (["w0", "w2"], [], ["w0", "w1", "w2"])


def test_fast_sums_overwrite_those_behind() -> None:
    now = standing([member(0, 5), member(1, 6), member(2)], exact=False)
    assert now.head == 6
    assert now.behind == ()
    assert sorted(ids(now.lacking)) == ["w0", "w2"]
    assert ids(now.whole) == ["w1"]


@given(members=MEMBERS, exact=st.booleans())
def test_every_member_stands_somewhere(members: list[Member], exact: bool) -> None:
    now = standing(members, exact=exact)
    assert sorted(ids(now.whole) + ids(now.lacking)) == sorted(m.member_id for m in members)
    assert set(ids(now.behind)) <= set(ids(now.whole))
    assert all(m.next_step < (now.head or 0) for m in now.behind)
    if exact:
        assert not any(m.whole for m in now.lacking)


# -- catching up -------------------------------------------------------------------------------------------------------


def test_catch_up_takes_only_those_furthest_behind_for_one_step() -> None:
    members = [member(0, 6), member(1, 4), member(2, 5), member(3, 4)]
    lease = catch_up_lease(standing(members, exact=True), GENERATION, make_spec())
    assert lease.members == ("w1", "w3")
    assert (lease.start_step, lease.stop_step) == (4, 5)
    assert (lease.source, lease.receivers, lease.restore) == (None, (), None)
    assert [len(part) for part in lease.assignments] == [4, 4]


@given(members=MEMBERS, num_micro_batches=st.integers(1, 20))
def test_catch_up_never_moves_anybody_past_the_head(members: list[Member], num_micro_batches: int) -> None:
    """Repeated, it brings every whole member to the head."""
    spec = make_spec(num_micro_batches=num_micro_batches)
    for _ in range(7):  # steps are at most 6 apart
        now = standing(members, exact=True)
        if not now.behind:
            break
        lease = catch_up_lease(now, GENERATION, spec)
        team = [m for m in members if m.member_id in lease.members]
        assert now.head is not None and lease.stop_step <= now.head
        assert [m.next_step for m in team] == [lease.start_step] * len(team)
        assert sorted(i for part in lease.assignments for i in part) == list(range(num_micro_batches))
        for m in team:
            m.next_step = lease.stop_step
    assert standing(members, exact=True).behind == ()


# -- everybody ---------------------------------------------------------------------------------------------------------


def test_first_lease_begins_with_the_initial_state() -> None:
    lease = common([member(0), member(1)], make_spec())
    assert (lease.members, lease.start_step, lease.stop_step) == (("w0", "w1"), 0, 100)
    assert (lease.source, lease.receivers, lease.restore) == (None, (), None)
    assert lease.generation == GENERATION
    assert lease.rendezvous is None


def test_without_a_state_in_memory_all_restore_the_checkpoint() -> None:
    lease = common([member(0), member(1)], make_spec(), restore=40)
    assert (lease.start_step, lease.restore, lease.source, lease.receivers) == (40, 40, None, ())


def test_everybody_whole_copies_nothing() -> None:
    lease = common([member(0, 30), member(1, 30)], make_spec(), restore=20)
    assert (lease.start_step, lease.source, lease.receivers) == (30, None, ())


def test_eldest_whole_member_gives_its_state_to_those_without() -> None:
    lease = common([member(5), member(4, 30), member(2, 30), member(1)], make_spec())
    assert lease.members == ("w1", "w2", "w4", "w5")
    assert lease.start_step == 30
    assert lease.source == 1
    assert lease.receivers == (0, 3)


def test_fast_sums_give_the_head_to_those_behind() -> None:
    lease = common([member(0, 29), member(1, 30), member(2)], make_spec(exact=False))
    assert (lease.start_step, lease.source, lease.receivers) == (30, 1, (0, 2))


def test_work_is_split_by_speed_in_rank_order() -> None:
    lease = common([member(1, 3, 3.0), member(0, 3, 1.0)], make_spec())
    assert lease.members == ("w0", "w1")
    assert [len(part) for part in lease.assignments] == [6, 2]


@given(members=MEMBERS, exact=st.booleans(), restore=st.none() | st.integers(0, 99))
def test_common_lease_leaves_nobody_without_the_state_it_starts_from(
    members: list[Member], exact: bool, restore: int | None
) -> None:
    now = standing(members, exact=exact)
    if now.behind:
        return
    lease = common(members, make_spec(exact=exact), restore=restore)
    assert sorted(lease.members) == sorted(m.member_id for m in members)
    receivers = {lease.members[rank] for rank in lease.receivers}
    if now.head is None:
        assert (lease.start_step, lease.source, receivers) == (restore or 0, None, set())
        return
    has_it = {m.member_id for m in members if m.whole and m.next_step == lease.start_step}
    assert lease.start_step == now.head
    assert receivers == set(lease.members) - has_it
    assert (lease.source is None) == (not receivers)
    assert lease.source is None or lease.members[lease.source] in has_it


# -- how far -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "fields", "expected"),
    [
        (0, {}, 100),
        (0, {"lease_steps": 30}, 30),
        (90, {"lease_steps": 30}, 100),
        (0, {"checkpoint_every": 25}, 25),
        (24, {"checkpoint_every": 25}, 25),
        (25, {"checkpoint_every": 25}, 50),  # on a checkpoint, the next one counts
        (80, {"checkpoint_every": 30}, 90),
        (90, {"checkpoint_every": 30}, 100),  # the end comes before the next checkpoint
        (0, {"checkpoint_every": 25, "lease_steps": 10}, 10),
        (100, {}, 100),  # resumed at the end: nothing to train
    ],
)
def test_stop_step_is_the_nearest_of_end_checkpoint_and_length(
    start: int, fields: dict[str, Any], expected: int
) -> None:
    assert stop_step(start, make_spec(**fields)) == expected


@given(
    total=st.integers(1, 200), every=st.none() | st.integers(1, 50), length=st.integers(1, 50), resumed=st.integers(0, 199)
)  # fmt: skip
def test_leases_one_after_the_other_stop_at_every_checkpoint_and_reach_the_end(
    total: int, every: int | None, length: int, resumed: int
) -> None:
    spec = make_spec(total_steps=total, checkpoint_every=every, lease_steps=length)
    step, stops = min(resumed, total), set()
    begin = step
    while step < total:
        following = stop_step(step, spec)
        assert step < following <= min(total, step + length)
        step = following
        stops.add(step)
    if every:
        assert {s for s in range(begin + 1, total) if s % every == 0} <= stops


# -- going on in the same group ----------------------------------------------------------------------------------------


def after(settled: Lease | None, *members: Member) -> Generation | None:
    now = standing(list(members), exact=True)
    return common_lease(list(members), now, GENERATION, make_spec(), restore=None, settled=settled).continues


def test_same_members_go_on_in_the_group_of_a_settled_lease() -> None:
    settled = common([member(0, 5), member(1, 5)], make_spec())
    assert after(settled, member(0, 9), member(1, 9)) == settled.generation
    assert after(None, member(0, 9), member(1, 9)) is None


def test_other_members_meet_anew() -> None:
    settled = common([member(0, 5), member(1, 5)], make_spec())
    assert after(settled, member(0, 9), member(2, 9)) is None
    assert after(settled, member(0, 9), member(1, 9), member(2)) is None
    alone = common([member(0, 5)], make_spec())
    assert after(alone, member(0, 9)) is None  # it has no group


def test_members_that_lost_their_state_meet_anew() -> None:
    settled = common([member(0, 5), member(1, 5)], make_spec())
    assert after(settled, member(0, 9), member(1)) is None
    assert after(settled, member(0), member(1)) is None
