"""Shared memory: who meets in it and who does not, sums that are right whatever the sizes, messages that wait for the slow."""

from __future__ import annotations

import datetime
import gc
import itertools
import json
import mmap
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lm.engine import kernel, shared
from elastic_lm.engine.group import form_group, wait_until
from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.engine.operations import GroupBroken, Operation
from elastic_lm.engine.rendezvous import Place
from elastic_lm.engine.shared import NUM_SLOTS, SLOT_BYTES, SharedMemory, meet
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.protocol import Generation, Lease, LeaseEnd, Rendezvous
from tests.engine.members import M, SyntheticTokens, tiny_spec
from tests.engine.test_group import DEADLINE_S, FencedAt, Meeting, eventually, never

torch.set_num_threads(1)

CPU = torch.device("cpu")
SUM_BYTES = 1 << 20


class Hosted(Meeting):
    """A place to meet, and a store that nobody of those who meet has to host."""

    def __init__(self) -> None:
        super().__init__("auto")
        self.store = client("127.0.0.1", 0, is_master=True)


def client(host: str, port: int, *, is_master: bool = False) -> dist.TCPStore:
    timeout = datetime.timedelta(seconds=DEADLINE_S)
    return dist.TCPStore(host, port, is_master=is_master, timeout=timeout, wait_for_workers=False)


def watch(store: Hosted) -> dist.TCPStore:
    """A connection of one's own."""
    return client("127.0.0.1", store.store.port)


@pytest.fixture
def store() -> Iterator[Hosted]:
    store = Hosted()
    yield store
    store.close()


def meet_all(store: Hosted, world_size: int, sum_bytes: int = SUM_BYTES) -> list[SharedMemory]:
    """The members of a group, all in this process."""
    with ThreadPoolExecutor(world_size) as pool:
        found = list(pool.map(lambda rank: meet(watch(store), rank, world_size, sum_bytes), range(world_size)))
    members = [memory for memory in found if memory is not None]
    assert len(members) == world_size
    return members


def add_up(members: list[SharedMemory], tensors: list[Tensor]) -> list[Tensor]:
    parts = [
        m.zeros(tensor.numel(), tensor.dtype, CPU).copy_(tensor) for m, tensor in zip(members, tensors, strict=True)
    ]
    finish([member.all_reduce(part) for member, part in zip(members, parts, strict=True)])
    return parts


def finish(operations: list[Operation]) -> None:
    """Look at all in turn, as members do side by side."""

    def over() -> bool:
        looked = [operation.done() for operation in operations]
        return all(looked)

    wait_until(over, never)


def segments_in_this_process() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:elastic-lm")


# -- sums ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "size"),
    [
        (1, 5),
        (2, 1),  # fewer elements than members: some have nothing to add
        (7, 3),
        (2, 4097),  # slices that are no multiple of the kernel's block
        (3, 10_000),
        (5, 12_345),
    ],
)
def test_every_member_has_the_sum(world_size: int, size: int, store: Hosted) -> None:
    generator = torch.Generator().manual_seed(size)
    tensors = [torch.randint(-(2**62), 2**62, (size,), generator=generator) for _ in range(world_size)]
    for part in add_up(meet_all(store, world_size), tensors):
        assert torch.equal(part, torch.stack(tensors).sum(0))  # wraps where torch's sum does


def test_every_member_has_the_same_bits_of_a_float_sum(store: Hosted) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(10_001, generator=generator) for _ in range(5)]
    parts = add_up(meet_all(store, 5), tensors)
    assert all(torch.equal(part, parts[0]) for part in parts)
    torch.testing.assert_close(parts[0], torch.stack(tensors).sum(0))  # another order of adding


def test_sum_is_not_done_before_the_last_member_has_added_its_slice(store: Hosted) -> None:
    members = meet_all(store, 3)
    parts = [member.zeros(9, torch.int64, CPU).fill_(1) for member in members]
    first, second = members[0].all_reduce(parts[0]), members[1].all_reduce(parts[1])
    assert not first.done()
    assert not second.done()
    assert parts[0].tolist() == [1] * 9  # not a part is missing of what it brought
    third = members[2].all_reduce(parts[2])  # adds its slice at once, for all parts are there
    assert not third.done()
    assert not first.done()  # has added its own by this look
    assert second.done()
    assert third.done()
    assert first.done()
    assert [part.tolist() for part in parts] == [[3] * 9] * 3


def test_pieces_of_one_tensor_are_added_up_apart(store: Hosted) -> None:
    members = meet_all(store, 2)
    wholes = [member.zeros(100, torch.int64, CPU).fill_(1) for member in members]
    finish([member.all_reduce(whole[40:60]) for member, whole in zip(members, wholes, strict=True)])
    assert wholes[0].tolist() == wholes[1].tolist() == [1] * 40 + [2] * 20 + [1] * 40


def test_tensors_do_not_overlap_and_are_zero(store: Hosted) -> None:
    (member,) = meet_all(store, 1)
    first, second = member.zeros(3, torch.int64, CPU), member.zeros(5, torch.float32, CPU)
    assert first.tolist() == [0] * 3
    first.fill_(-1)
    assert second.tolist() == [0.0] * 5


@pytest.mark.parametrize("strange", [torch.zeros(4, dtype=torch.int64), "every second"])
def test_only_pieces_of_its_own_tensors_can_be_added_up(strange: Any, store: Hosted) -> None:
    (member,) = meet_all(store, 1)
    own = member.zeros(8, torch.int64, CPU)
    with pytest.raises(ValueError, match="what `zeros` returned"):
        member.all_reduce(own[::2] if isinstance(strange, str) else strange)


def test_more_than_was_announced_is_refused(store: Hosted) -> None:
    (member,) = meet_all(store, 1, sum_bytes=64)
    member.zeros(8, torch.int64, CPU)
    with pytest.raises(MemoryError, match="of a segment of"):
        member.zeros(1, torch.int64, CPU)


def test_member_that_left_before_adding_breaks_the_sum(store: Hosted) -> None:
    members = meet_all(store, 2)
    parts = [member.zeros(9, torch.int64, CPU) for member in members]
    operation = members[0].all_reduce(parts[0])
    members[1].abort()
    with pytest.raises(GroupBroken, match="member 1 has left"):
        operation.done()


def test_member_that_left_after_adding_breaks_nothing(store: Hosted) -> None:
    members = meet_all(store, 2)
    parts = [member.zeros(9, torch.int64, CPU).fill_(1) for member in members]
    operations = [member.all_reduce(part) for member, part in zip(members, parts, strict=True)]
    members[1].abort()
    assert operations[0].done()
    assert parts[0].tolist() == [2] * 9
    with pytest.raises(GroupBroken, match="this member has left"):
        operations[1].done()


def test_late_sum_of_a_member_that_was_frozen_touches_only_its_own_generation(store: Hosted, monkeypatch: Any) -> None:
    """It thaws when the others are in the next generation, and adds its slice: into memory that nobody reads any more."""
    survivor, zombie = meet_all(store, 2)
    old = survivor.zeros(8, torch.int64, CPU).fill_(1)
    survivor.all_reduce(old)
    survivor.abort()
    next_store = Hosted()
    (alone,) = meet_all(next_store, 1)
    new = alone.zeros(8, torch.int64, CPU).fill_(5)
    finish([alone.all_reduce(new)])
    zombie.all_reduce(zombie.zeros(8, torch.int64, CPU).fill_(100))
    assert 101 in old.tolist()  # it did add
    assert new.tolist() == [5] * 8
    next_store.close()


# -- messages --------------------------------------------------------------------------------------------------------


def message(number: int) -> Tensor:
    return torch.full((1000,), float(number))


def test_slot_is_not_filled_again_before_the_slowest_has_taken_it(store: Hosted) -> None:
    members = meet_all(store, 3)
    sent: list[int] = []
    (sending,) = members[0].send([message(number) for number in range(10)], (1, 2), sent.append)
    for number in range(NUM_SLOTS):  # the fast one goes as far as it can
        operation, tensor = members[1].receive(message(0), 0, number)
        finish([operation])
        assert torch.equal(tensor, message(number))
    ahead, _ = members[1].receive(message(0), 0, NUM_SLOTS)
    eventually(lambda: len(sent) == NUM_SLOTS + 1)  # it has got the next one ready, and waits
    assert not ahead.done()
    for number in range(10):
        operation, tensor = members[2].receive(message(0), 0, number)
        if number > NUM_SLOTS:
            members[1].receive(message(0), 0, number)
        finish([operation])
        assert torch.equal(tensor, message(number))
    finish([sending])


def test_sender_is_done_when_nothing_more_has_to_be_read_from_its_tensors(store: Hosted) -> None:
    members = meet_all(store, 2)
    tensors = [message(number) for number in range(NUM_SLOTS)]
    finish(members[0].send(tensors, (1,), lambda number: None))
    for tensor in tensors:
        tensor.fill_(-1)
    for number in range(NUM_SLOTS):
        operation, tensor = members[1].receive(message(0), 0, number)
        finish([operation])
        assert torch.equal(tensor, message(number))


@pytest.mark.parametrize("leaves", [0, 1])
def test_message_of_or_for_somebody_who_left_breaks(leaves: int, store: Hosted) -> None:
    members = meet_all(store, 2)
    under_way: list[Operation]
    if leaves == 0:
        under_way = [members[1].receive(message(0), 0, 0)[0]]
    else:
        under_way = list(members[0].send([message(0)] * (NUM_SLOTS + 1), (1,), lambda number: None))
    members[leaves].abort()
    with pytest.raises(GroupBroken, match=f"member {leaves} has left"):
        finish(under_way)


def test_message_longer_than_a_slot_is_refused(store: Hosted) -> None:
    members = meet_all(store, 2)
    with pytest.raises(ValueError, match="is the most"):
        finish(members[0].send([torch.zeros(SLOT_BYTES + 1, dtype=torch.uint8)], (1,), lambda number: None))


# -- meeting ---------------------------------------------------------------------------------------------------------


def claimed(store: Hosted, rank: int) -> dict[str, Any]:
    return dict(json.loads(watch(store).get(f"claim/{rank}")))


def meet_a_stranger(store: Hosted, **changes: Any) -> tuple[SharedMemory | None, str]:
    """Rank 0 meets a second member that claims what it does, but for `changes`; and what rank 0 said of it."""
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(meet, watch(store), 0, 2, SUM_BYTES)
        strangers = watch(store)
        strangers.set("claim/1", json.dumps({**claimed(store, 0), **changes}))
        strangers.set("found/1", "True")
        memory = meeting.result()
    return memory, watch(store).get("found/0").decode() if strangers.check(["found/0"]) else "nothing"


def test_members_of_one_machine_share(store: Hosted) -> None:
    memory, said = meet_a_stranger(store)  # the stranger claims rank 0's own segment
    assert memory is not None
    assert said == "True"


@pytest.mark.parametrize("machine", ["another", None])
def test_members_of_two_machines_do_not_share(machine: str | None, store: Hosted) -> None:
    assert meet_a_stranger(store, machine=machine) == (None, "nothing")


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},  # beyond the last process id that Linux gives
        {"file": 999_999},
        {"key": 1},  # somebody else's file has its number by now
    ],
)
def test_segment_that_cannot_be_reached_is_said_to_all(changes: dict[str, Any], store: Hosted) -> None:
    assert meet_a_stranger(store, **changes) == (None, "False")


def test_one_who_could_not_map_keeps_all_from_sharing(store: Hosted) -> None:
    with ThreadPoolExecutor(1) as pool:
        meeting = pool.submit(meet, watch(store), 0, 2, SUM_BYTES)
        other = watch(store)
        other.set("claim/1", json.dumps(claimed(store, 0)))
        other.set("found/1", "False")
        assert meeting.result() is None


def test_member_without_the_kernel_keeps_all_from_sharing(store: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "available", lambda device: False)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: meet(watch(store), rank, 2, SUM_BYTES), range(2))) == [None, None]


def test_members_that_want_different_sizes_are_told_so_and_share_nothing(store: Hosted) -> None:
    with ThreadPoolExecutor(2) as pool:
        meeting = [pool.submit(meet, watch(store), rank, 2, SUM_BYTES * (rank + 1)) for rank in range(2)]
        for future in meeting:
            with pytest.raises(RuntimeError, match="models of different sizes"):
                future.result()


def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")  # a Python that was built for an old C library


def _refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def memfd_create(*_: Any) -> int:
        raise PermissionError("a sandbox")

    monkeypatch.setattr(os, "memfd_create", memfd_create)


def _too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def ftruncate(*_: Any) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", ftruncate)


def _not_mapped_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = mmap.mmap, itertools.count()

    def limited(*arguments: Any) -> mmap.mmap:
        if next(calls) == 3:  # the second member's view of the first
            raise OSError(12, "Cannot allocate memory")
        return real(*arguments)

    monkeypatch.setattr(mmap, "mmap", limited)


@pytest.mark.parametrize("breaks", [_missing, _refused, _too_large, _not_mapped_by_one])
def test_members_that_cannot_share_all_add_up_over_sockets(
    breaks: Callable[[pytest.MonkeyPatch], None], store: Hosted, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda rank: meet(watch(store), rank, 2, SUM_BYTES), range(2))) == [None, None]


def test_large_generation_does_not_even_ask() -> None:
    assert meet(None, 0, shared.MAX_MEMBERS + 1, SUM_BYTES) is None  # type: ignore[arg-type]


def test_group_that_cannot_share_adds_up_over_sockets(store: Hosted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "available", lambda device: False)
    with ThreadPoolExecutor(2) as pool:
        groups = list(pool.map(lambda rank: form(store.rendezvous, rank), range(2)))
        parts = [group.zeros(4, torch.int64, CPU).fill_(1) for group in groups]
        pending = [group.all_reduce(part) for group, part in zip(groups, parts, strict=True)]
        list(pool.map(lambda rank: groups[rank].wait([pending[rank]], never), range(2)))
    assert [part.tolist() for part in parts] == [[2] * 4] * 2
    for group in groups:
        group.drop()


def form(rendezvous: Rendezvous, rank: int) -> Any:
    return form_group(
        rendezvous,
        Generation(0, 1),
        rank,
        2,
        timeout_s=20,
        cancelled=never,
        collectives="auto",
        sum_bytes=SUM_BYTES,
    )


def test_nothing_stays_mapped_or_open_when_all_is_dropped(store: Hosted) -> None:
    files, segments = len(os.listdir("/proc/self/fd")), segments_in_this_process()
    members = meet_all(store, 3)
    parts = add_up(members, [torch.ones(5)] * 3)
    assert segments_in_this_process() > segments
    del members, parts
    eventually(lambda: segments_in_this_process() == segments and len(os.listdir("/proc/self/fd")) <= files)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed is freed by counting references: a collection may be thousands of steps away."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_send_that_was_given_up_leaves_nothing_mapped(store: Hosted, no_collector: None) -> None:
    segments = segments_in_this_process()
    members = meet_all(store, 2)
    (sending,) = members[0].send([message(0)] * (NUM_SLOTS + 1), (1,), lambda number: None)
    members[0].abort()
    with pytest.raises(GroupBroken):
        finish([sending])
    del members, sending
    eventually(lambda: segments_in_this_process() == segments)


def test_broken_lease_leaves_nothing_mapped(store: Hosted, no_collector: None) -> None:
    segments = segments_in_this_process()
    member = Member("a", StepRunner(Replica(tiny_spec()), SyntheticTokens()), lambda step: {})
    lease = Lease(Generation(0, 1), ("a", "b"), store.rendezvous, 0, 3, (tuple(range(M)), ()))
    with ThreadPoolExecutor(1) as pool:
        training = pool.submit(run_lease, member, lease, FencedAt(None))
        size = member.runner.replica.sum_bytes
        theirs = client(*Place(store.rendezvous, Generation(0, 1), DEADLINE_S).ask())
        other = meet(dist.PrefixStore("0.1/shared", theirs), 1, 2, size)
        assert other is not None
        other.abort()
        assert training.result().end is LeaseEnd.BROKEN
    del other
    eventually(lambda: segments_in_this_process() == segments)


# -- processes -------------------------------------------------------------------------------------------------------


def _member_process(rendezvous: Rendezvous, rank: int, pipe: Any) -> None:
    """Adds up once, tells the result, brings its part to a second sum and stays there."""
    group = form(rendezvous, rank)
    part = group.zeros(100_000, torch.int64, CPU).fill_(10**rank)
    group.wait([group.all_reduce(part)], never)
    pipe.send(part.unique().tolist())
    group.all_reduce(part)
    pipe.recv()


def test_processes_add_up_and_a_killed_one_leaves_nothing(store: Hosted) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    other = context.Process(target=_member_process, args=(store.rendezvous, 1, theirs))
    other.start()
    segments = segments_in_this_process()
    group = form(store.rendezvous, 0)
    part = group.zeros(100_000, torch.int64, CPU).fill_(1)
    group.wait([group.all_reduce(part)], never)
    assert part.unique().tolist() == ours.recv() == [11]
    assert other.pid is not None
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert part.unique().tolist() == [11]  # its memory is still ours
    group.drop()
    del group, part
    eventually(lambda: segments_in_this_process() == segments)
