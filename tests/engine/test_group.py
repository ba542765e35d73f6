"""Groups: formed with a real store, over real gloo and in shared memory, and given up without waiting for anybody.

The members of a group are threads of this process. Where a test says that something does not block, what it does not wait
for would take `FOR_EVER`, which is longer than a test may run.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lm.engine import reduce
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.engine.group import Group, form_group, wait_until
from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.engine.operations import GroupBroken, Operation, Transfer
from elastic_lm.engine.rendezvous import Place, RendezvousServer
from elastic_lm.engine.spec import Collectives
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.protocol import Generation, Lease, LeaseEnd, Phase, Rendezvous
from tests.engine.members import M, SyntheticTokens, tiny_spec

pytestmark = pytest.mark.slow

torch.set_num_threads(1)

FOR_EVER = 600.0
DEADLINE_S = 30.0
SUM_BYTES = 1 << 20


def never() -> bool:
    return False


def at_once() -> bool:
    return True


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    wait_until(lambda: condition() or time.monotonic() > deadline, never)
    assert condition()


class Meeting(RendezvousServer):
    """A place to meet, and what those who meet there add up with."""

    def __init__(self, collectives: Collectives) -> None:
        super().__init__("127.0.0.1")
        self.collectives = collectives


@pytest.fixture(params=["gloo", "auto"])
def store(request: pytest.FixtureRequest) -> Iterator[Meeting]:
    """Closed afterwards, which ends whatever is still forming. `auto`: shared memory, for all members are in one process."""
    store = Meeting(request.param)
    yield store
    store.close()


@pytest.fixture
def gloo_store() -> Iterator[Meeting]:
    store = Meeting("gloo")
    yield store
    store.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def begin(
    pool: ThreadPoolExecutor,
    store: Meeting,
    rank: int,
    world_size: int,
    *,
    number: int = 1,
    timeout_s: float = 20,
) -> Future[Group]:
    return pool.submit(
        form_group,
        store.rendezvous,
        Generation(0, number),
        rank,
        world_size,
        timeout_s=timeout_s,
        cancelled=never,
        collectives=store.collectives,
        sum_bytes=SUM_BYTES,
    )


def form(world_size: int, store: Meeting, *, number: int = 1, timeout_s: float = 20) -> list[Group]:
    with ThreadPoolExecutor(world_size) as pool:
        forming = [
            begin(pool, store, rank, world_size, number=number, timeout_s=timeout_s) for rank in range(world_size)
        ]
        return [future.result() for future in forming]


def drop(groups: list[Group]) -> None:
    for group in groups:
        group.drop()


def part(group: Group, tensor: Tensor) -> Tensor:
    """What this member brings to a sum."""
    return group.zeros(tensor.numel(), tensor.dtype, tensor.device).copy_(tensor)


def add_up(groups: list[Group], tensors: list[Tensor]) -> list[Tensor]:
    """Every member's all-reduce, to the end: side by side, for one that waits does its share meanwhile."""
    parts = [part(group, tensor) for group, tensor in zip(groups, tensors, strict=True)]
    pending = [group.all_reduce(tensor) for group, tensor in zip(groups, parts, strict=True)]
    wait_all(groups, pending)
    return parts


def wait_all(groups: list[Group], pending: list[Operation], cancelled: Callable[[], bool] = never) -> None:
    with ThreadPoolExecutor(len(groups)) as pool:
        for future in [pool.submit(group.wait, [one], cancelled) for group, one in zip(groups, pending, strict=True)]:
            future.result()


def watch(store: Meeting, number: int) -> Callable[[], int]:
    """How many keys the members of this generation have written, as soon as one of them hosts the store."""
    timeout = datetime.timedelta(seconds=DEADLINE_S)
    connected: list[dist.TCPStore] = []
    unused = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False).num_keys()

    def connect() -> None:
        host, port = Place(store.rendezvous, Generation(0, number), DEADLINE_S).ask()
        connected.append(dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False))

    threading.Thread(target=connect, daemon=True).start()
    return lambda: connected[0].num_keys() - unused if connected else 0


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


# -- forming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_members_add_up_what_each_brings(world_size: int, dtype: torch.dtype, store: Meeting) -> None:
    groups = form(world_size, store)
    assert [(group.rank, group.world_size) for group in groups] == [(rank, world_size) for rank in range(world_size)]
    tensors = [torch.arange(100, dtype=dtype) * 10**rank for rank in range(world_size)]
    for tensor in add_up(groups, tensors):
        assert torch.equal(tensor, torch.arange(100, dtype=dtype) * int("1" * world_size))
    drop(groups)


def test_integers_are_added_exactly(store: Meeting) -> None:
    """Beyond what a double holds."""
    groups = form(2, store)
    sums = add_up(groups, [torch.tensor([2**61 + 1]), torch.tensor([2**61 + 2])])
    assert [tensor.item() for tensor in sums] == [2**62 + 3] * 2
    drop(groups)


def test_many_sums_are_under_way_at_once(store: Meeting) -> None:
    groups = form(2, store)
    tensors = [[part(groups[rank], torch.full((1000,), 1 + n + rank)) for n in range(10)] for rank in range(2)]
    pending = [[group.all_reduce(t) for t in mine] for group, mine in zip(groups, tensors, strict=True)]
    for number in range(10):
        wait_all(groups, [ours[number] for ours in pending])
    assert all((tensors[rank][number] == 2 * number + 3).all() for rank in range(2) for number in range(10))
    drop(groups)


def test_generations_on_one_store_do_not_meet(store: Meeting, pool: ThreadPoolExecutor) -> None:
    """Members arrive mixed; each finds its own."""
    forming = {(number, rank): begin(pool, store, rank, 2, number=number) for rank in (0, 1) for number in (1, 2, 3)}
    for number in (1, 2, 3):
        groups = [forming[number, rank].result() for rank in (0, 1)]
        tensors = add_up(groups, [torch.tensor([number]), torch.tensor([10 * number])])
        assert tensors[0].item() == tensors[1].item() == 11 * number
        drop(groups)


def test_a_formed_group_outlives_its_store(store: Meeting) -> None:
    groups = form(2, store)
    store.close()
    tensors = add_up(groups, [torch.ones(5), torch.ones(5)])
    assert tensors[0].tolist() == [2.0] * 5
    drop(groups)


def test_a_missing_peer_breaks_the_group_within_its_timeout(store: Meeting) -> None:
    with pytest.raises(GroupBroken, match=r"^forming generation 0\.7: \w+: wait timeout after 2000ms") as caught:
        form_group(store.rendezvous, Generation(0, 7), 0, 2, timeout_s=2.0, cancelled=never)
    assert "\n" not in str(caught.value)


def test_a_fence_while_forming_is_obeyed_at_once(store: Meeting) -> None:
    num_written = watch(store, 8)
    with pytest.raises(Cancelled):
        form_group(
            store.rendezvous,
            Generation(0, 8),
            0,
            2,
            timeout_s=FOR_EVER,
            cancelled=lambda: num_written() > 0,
        )
    store.close()
    eventually(lambda: not threads("form-0.8"))


def test_a_fence_before_the_store_is_reached_is_obeyed_at_once(store: Meeting) -> None:
    with pytest.raises(Cancelled):
        form_group(store.rendezvous, Generation(0, 8), 0, 2, timeout_s=2, cancelled=at_once)


def test_name_lookups_give_up_a_lost_packet_after_a_second(
    store: Meeting, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its logs c10d looks up the name of every address. One lost packet of DNS stopped a forming for 5 s."""
    monkeypatch.setenv("RES_OPTIONS", "to be removed")
    monkeypatch.delenv("RES_OPTIONS")
    begin(pool, store, 0, 1).result().drop()
    assert os.environ["RES_OPTIONS"] == "timeout:1 attempts:2"


def test_resolver_options_that_somebody_chose_are_kept(store: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RES_OPTIONS", "timeout:3")
    form_group(store.rendezvous, Generation(0, 1), 0, 1, timeout_s=20, cancelled=never).drop()
    assert os.environ["RES_OPTIONS"] == "timeout:3"


def test_closing_the_store_breaks_those_who_are_forming(store: Meeting, pool: ThreadPoolExecutor) -> None:
    num_written = watch(store, 9)
    forming = [begin(pool, store, rank, 3, number=9, timeout_s=FOR_EVER) for rank in (0, 1)]  # of three
    eventually(lambda: num_written() >= 2)
    store.close()
    for future in forming:
        with pytest.raises(GroupBroken, match=r"forming generation 0\.9"):
            future.result()
    eventually(lambda: not threads("form-0.9"))


def test_a_store_that_is_gone_breaks_the_group(store: Meeting) -> None:
    store.close()
    with pytest.raises(GroupBroken):
        form_group(store.rendezvous, Generation(0, 1), 0, 2, timeout_s=0.1, cancelled=never)


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_a_fence_while_waiting_is_obeyed_at_once(store: Meeting) -> None:
    groups = form(2, store, timeout_s=FOR_EVER)
    pending = groups[0].all_reduce(part(groups[0], torch.ones(5)))
    with pytest.raises(Cancelled):
        groups[0].wait([pending], at_once)
    drop(groups)


def test_what_is_done_is_not_cancelled(store: Meeting) -> None:
    """A completed sum is the true one, fence or not."""
    groups = form(2, store)
    tensors = [part(group, torch.ones(5)) for group in groups]
    pending = [group.all_reduce(tensor) for group, tensor in zip(groups, tensors, strict=True)]
    eventually(lambda: all(one.done() for one in pending))
    for group, one in zip(groups, pending, strict=True):
        group.wait([one], at_once)
    assert tensors[0].tolist() == [2.0] * 5
    drop(groups)


@pytest.mark.parametrize("world_size", [2, 3])
def test_peers_that_leave_break_a_sum_under_way(world_size: int, store: Meeting) -> None:
    groups = form(world_size, store, timeout_s=FOR_EVER)
    pending = groups[0].all_reduce(part(groups[0], torch.ones(5)))
    drop(groups[1:])
    with pytest.raises(GroupBroken) as caught:
        groups[0].wait([pending], never)
    assert "\n" not in str(caught.value)
    groups[0].drop()


def test_a_sum_after_the_peers_left_is_broken(store: Meeting) -> None:
    groups = form(2, store, timeout_s=FOR_EVER)
    groups[1].drop()
    eventually(lambda: not threads("group-burial"))
    with pytest.raises(GroupBroken):
        groups[0].wait([groups[0].all_reduce(part(groups[0], torch.ones(5)))], never)
    groups[0].drop()


class Scripted:
    """An operation that is done, or broken, after so many looks."""

    def __init__(self, looks: float, *, broken: bool = False) -> None:
        self.looks, self.broken = looks, broken

    def done(self) -> bool:
        self.looks -= 1
        if self.looks < 0 and self.broken:
            raise GroupBroken("a peer is gone")
        return self.looks < 0


class PatientFor:
    """Not cancelled for so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def __call__(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def test_a_broken_operation_is_noticed_behind_one_that_hangs() -> None:
    """One connection may be broken while the other waits for a peer that is no neighbour of the dead one."""
    operations: list[Any] = [Scripted(float("inf")), Scripted(3, broken=True)]
    with pytest.raises(GroupBroken):
        Group(None, None, 0, 4).wait(operations, PatientFor(50))


def test_waiting_ends_when_the_last_operation_is_done_in_any_order() -> None:
    operations: list[Any] = [Scripted(2), Scripted(9), Scripted(0)]
    Group(None, None, 0, 2).wait(operations, PatientFor(50))
    assert all(operation.looks < 0 for operation in operations)


# -- dropping --------------------------------------------------------------------------------------------------------


def test_dropping_with_a_sum_under_way_waits_for_nobody(store: Meeting) -> None:
    groups = form(2, store, timeout_s=FOR_EVER)
    groups[0].all_reduce(part(groups[0], torch.ones(5)))
    groups[0].drop()  # its peer never comes; FOR_EVER is longer than this test may take
    groups[1].drop()  # and lets the burial end
    eventually(lambda: not threads("group-burial"))


def test_dropping_with_messages_under_way_waits_for_nobody(store: Meeting) -> None:
    groups = form(2, store, timeout_s=FOR_EVER)
    groups[0].receive(torch.ones(5), 1, 0)
    groups[0].drop()
    groups[1].drop()
    eventually(lambda: not threads("group-burial") and not threads("receive-from"))


def test_buffer_of_a_dropped_group_lives_until_gloo_lets_go_of_it(gloo_store: Meeting) -> None:
    """A sum that was given up still writes when its peer comes: into memory that nobody else may have."""
    groups = form(2, gloo_store, timeout_s=FOR_EVER)
    buffer = torch.ones(5)
    alive = weakref.ref(buffer)
    groups[0].all_reduce(buffer)
    groups[0].drop()
    del buffer
    assert alive() is not None
    theirs = torch.full((5,), 2.0)
    groups[1].wait([groups[1].all_reduce(theirs)], never)  # the peer sees success
    assert theirs.tolist() == [3.0] * 5
    eventually(lambda: alive() is None)
    groups[1].drop()


class FencedAt:
    """A lease's control: fenced as soon as the member waits for the sum."""

    def __init__(self, phase: Phase | None) -> None:
        self.phase, self.fenced = phase, False

    def cancelled(self) -> bool:
        return self.fenced

    def wants_end(self) -> bool:
        return False

    def report(self, phase: Phase) -> None:
        self.fenced |= phase is self.phase

    def committed(self, record: Any, micro_batch_s: float | None) -> None:
        pass


def test_a_zombies_sum_is_written_into_nobodys_live_tensor(gloo_store: Meeting, pool: ThreadPoolExecutor) -> None:
    """A peer thaws in the middle of the next generation and completes the last one's sum: no bit of the state moves."""
    members = [
        Member(name, StepRunner(Replica(tiny_spec(collectives="gloo")), SyntheticTokens()), lambda step, on_part: {})
        for name in "ab"
    ]
    everything = (tuple(range(M)),)
    for member in members:
        alone = Lease(Generation(0, 1), (member.member_id,), None, 0, 1, everything)
        run_lease(member, alone, FencedAt(None))
    member, undisturbed = members
    zombie = begin(pool, gloo_store, 1, 2, number=2)
    both = Lease(Generation(0, 2), ("a", "z"), gloo_store.rendezvous, 1, 3, (tuple(range(M)), ()))
    assert run_lease(member, both, FencedAt(Phase.REDUCE)).end is LeaseEnd.FENCED
    again = Lease(Generation(0, 3), ("a",), None, 1, 2, everything)
    assert run_lease(member, again, FencedAt(None)).end is LeaseEnd.COMPLETED
    garbage = torch.full((reduce.HEADER + member.state.size,), 10**12)  # one bucket, as the member's
    before = garbage.clone()
    group = zombie.result()
    group.wait([group.all_reduce(garbage)], never)
    assert not torch.equal(garbage, before)  # the sum was completed, by gloo alone
    again = Lease(Generation(0, 4), ("a",), None, 2, 3, everything)
    assert run_lease(member, again, FencedAt(None)).end is LeaseEnd.COMPLETED
    run_lease(undisturbed, Lease(Generation(0, 2), ("b",), None, 1, 3, everything), FencedAt(None))
    assert member.state.digest() == undisturbed.state.digest()
    group.drop()


def test_generations_share_no_memory_with_each_other_or_the_state() -> None:
    replica = Replica(tiny_spec())
    first, second = replica.new_reduction(), replica.new_reduction()
    first.begin(0)
    second.begin(0)
    weights = replica.state.weights.clone()
    first.add_gradient(0, torch.ones(replica.state.slots[0].shape))
    assert first.raw_total() != second.raw_total()
    assert torch.equal(replica.state.weights, weights)


def counts() -> tuple[int, int]:
    """Open files and threads of this process, those of C++ included."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("collectives", ["gloo", "auto"])
def test_open_files_and_threads_stay_flat_over_many_generations(collectives: Collectives) -> None:
    def cycle(number: int) -> None:
        store = Meeting(collectives)
        groups = form(2, store, number=number)
        add_up(groups, [torch.ones(5), torch.ones(5)])
        if number % 2:
            groups[0].all_reduce(part(groups[0], torch.ones(5)))  # given up
        drop(groups)
        store.close()
        eventually(lambda: not threads("group-burial"))

    for number in range(3):  # what the first ones open for good
        cycle(number)
    files, tasks = counts()
    for number in range(30):
        cycle(number)
    eventually(lambda: counts()[0] <= files and counts()[1] <= tasks)


@pytest.fixture
def no_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collections")
def test_a_host_that_was_fenced_before_it_could_tell_anybody_keeps_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    tell = Place.host

    def in_vain(number: int) -> None:
        listener, hosts, fenced = socket.create_server(("127.0.0.1", 0)), threading.Event(), threading.Event()
        there = Rendezvous(*listener.getsockname())

        def closed_meanwhile(place: Place, address: tuple[str, int]) -> None:
            hosts.set()
            fenced.wait(FOR_EVER)
            listener.close()
            tell(place, address)

        monkeypatch.setattr(Place, "host", closed_meanwhile)
        with pytest.raises(Cancelled):
            form_group(there, Generation(0, number), 0, 2, timeout_s=FOR_EVER, cancelled=hosts.is_set)
        fenced.set()
        eventually(lambda: not threads("form-"))

    in_vain(0)  # c10d opens some files for good
    files, tasks = counts()
    in_vain(1)
    eventually(lambda: counts()[0] <= files and counts()[1] <= tasks)


@pytest.mark.usefixtures("no_collections")
def test_a_message_that_failed_keeps_nothing_of_its_group() -> None:
    kept: list[weakref.ref[Tensor]] = []

    def fail() -> None:
        tensor = torch.ones(5)
        kept.append(weakref.ref(tensor))
        try:
            raise ValueError("what gloo says")
        except ValueError as error:
            raise GroupBroken("a peer is gone") from error

    transfer = Transfer(fail, "fails")
    eventually(lambda: not threads("fails"))
    assert kept[0]() is None
    with pytest.raises(GroupBroken, match="a peer is gone"):
        transfer.done()


# -- messages --------------------------------------------------------------------------------------------------------


def test_messages_arrive_in_order_and_in_new_memory(store: Meeting) -> None:
    groups = form(2, store)
    sent = [torch.arange(5) + 10 * number for number in range(4)]
    seen: list[int] = []
    sending = groups[0].send(sent, (1,), seen.append)
    like = torch.full((5,), -1)
    for number in range(4):
        transfer, received = groups[1].receive(like, 0, number)
        groups[1].wait([transfer], never)
        assert torch.equal(received, sent[number])
    groups[0].wait(sending, never)
    assert seen == [0, 1, 2, 3]
    assert like.tolist() == [-1] * 5
    drop(groups)


def test_one_sender_serves_several_receivers_at_once(store: Meeting) -> None:
    groups = form(3, store)
    sent = [torch.arange(5), torch.arange(5) * 2]
    sending = groups[0].send(sent, (1, 2))
    for number in (0, 1):
        for rank in (2, 1):
            transfer, received = groups[rank].receive(torch.empty(5, dtype=torch.int64), 0, number)
            groups[rank].wait([transfer], never)
            assert torch.equal(received, sent[number])
    groups[0].wait(sending, never)
    drop(groups)


def test_messages_travel_through_host_memory(store: Meeting) -> None:
    """Gloo sends and receives nothing else, so a state on a GPU goes over the host. `meta` stands for the GPU."""
    groups = form(2, store)
    sending = groups[0].send([torch.arange(5)], (1,))
    transfer, received = groups[1].receive(torch.empty(5, dtype=torch.int64, device="meta"), 0, 0)
    assert received.device.type == "cpu"
    groups[1].wait([transfer], never)
    groups[0].wait(sending, never)
    assert received.tolist() == [0, 1, 2, 3, 4]
    drop(groups)


def test_a_fence_while_receiving_is_obeyed_at_once(store: Meeting) -> None:
    groups = form(2, store, timeout_s=FOR_EVER)
    transfer, _ = groups[1].receive(torch.empty(5), 0, 0)
    with pytest.raises(Cancelled):
        groups[1].wait([transfer], at_once)
    drop(groups)


@pytest.mark.parametrize("receives", [True, False])
def test_peer_that_leaves_breaks_a_message_under_way(receives: bool, store: Meeting) -> None:
    groups = form(2, store, timeout_s=FOR_EVER)
    large = [torch.zeros(1 << 20)] * 8  # more than sockets and slots hold
    under_way = [groups[0].receive(large[0], 1, 0)[0]] if receives else groups[0].send(large, (1,))
    groups[1].drop()
    with pytest.raises(GroupBroken):
        groups[0].wait(under_way, never)
    groups[0].drop()


def test_what_the_sender_does_before_a_message_may_raise(store: Meeting) -> None:
    def fails(number: int) -> None:
        raise ValueError(f"before message {number}")

    groups = form(2, store)
    with pytest.raises(ValueError, match="before message 0"):
        groups[0].wait(groups[0].send([torch.ones(5)], (1,), fails), never)
    drop(groups)
    eventually(lambda: not threads("group-burial"))


def test_a_send_that_raised_does_not_disturb_the_burial(store: Meeting, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(number: int) -> None:
        raise ValueError

    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    groups = form(2, store)
    (transfer,) = groups[0].send([torch.ones(5)], (1,), fails)
    with contextlib.suppress(ValueError):
        wait_until(transfer.done, never)
    drop(groups)
    eventually(lambda: not threads("group-burial"))
    assert raised == []


def test_members_may_be_further_apart_than_forming_may_take(store: Meeting, pool: ThreadPoolExecutor) -> None:
    """The time-out of forming is not that of operations: a peer may have a long micro-batch to finish."""
    groups = form(2, store, timeout_s=2)
    tensor = part(groups[0], torch.ones(5))
    early = groups[0].all_reduce(tensor)
    time.sleep(2.5)  # not a wait for something: the peer's own work
    assert not early.done()
    late = groups[1].all_reduce(part(groups[1], torch.ones(5)))
    wait_all(groups, [early, late])
    assert tensor.tolist() == [2.0] * 5
    drop(groups)
