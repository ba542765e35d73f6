"""Memory that the members of a generation have in common when all are processes of one machine: sums and messages in it.

Each member has a segment, an anonymous file that all of them map. It has no name, so nothing stays behind, whoever dies.
A sum sends nothing: a member counts itself in, adds up its own slice of everybody's tensor when all are in, and the sum is
complete when everybody's slice is. A message is put into a slot of the sender's segment, and stays there until everybody
it is for has taken it. Nobody blocks: a look at an operation moves it on as far as the others allow.

Like every buffer a segment belongs to one generation: a member that was frozen may still write into it.
"""

from __future__ import annotations

import functools
import json
import logging
import mmap
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lm.engine import kernel
from elastic_lm.engine.operations import GroupBroken, Operation, Transfer

logger = logging.getLogger(__name__)

MAX_MEMBERS = 64  # of a generation that looks whether it may share: more processes than one machine can use
LINE_BYTES = 64  # a cell has a cache line of its own, so that two members' counts do not slow each other
SLOT_BYTES = 1 << 22  # the longest message; a few of these stay in the last-level cache between sender and receiver
NUM_SLOTS = 4
PAUSE_S, LONGEST_PAUSE_S = 50e-6, 1e-3  # a sender's, when all slots are full


class _Cell(IntEnum):
    """What a segment's owner tells the others, each a 64-bit integer."""

    KEY = 0  # names the segment: the mapped file is the one that was meant
    BROUGHT = 1  # sums for which its part is there
    ADDED = 2  # sums of which it has added up its slice
    SENT = 3  # messages that it has put into its slots
    TAKEN = 4  # messages that it has taken out of the sender's
    LEFT = 5  # it takes no further part


SLOTS_BEGIN = 4096
SUMS_BEGIN = SLOTS_BEGIN + NUM_SLOTS * SLOT_BYTES


class _Segment:
    """One member's memory as this process sees it."""

    def __init__(self, file: int, size_bytes: int) -> None:
        self.memory = torch.frombuffer(mmap.mmap(file, size_bytes), dtype=torch.uint8)
        self.address = self.memory.data_ptr()

    def load(self, cell: _Cell) -> int:
        return kernel.load(self.address + cell * LINE_BYTES)

    def store(self, cell: _Cell, value: int) -> None:
        kernel.store(self.address + cell * LINE_BYTES, value)


class SharedMemory:
    """One member's end of it. Used like a process group, but by one thread, and one more that sends."""

    def __init__(self, rank: int, segments: list[_Segment]) -> None:
        self._rank, self._segments = rank, segments
        self._mine = segments[rank]
        self._used = SUMS_BEGIN
        self._to_add: deque[tuple[int, Tensor]] = deque()  # (offset in the segment, tensor) of sums that are begun
        self._num_brought = self._num_added = 0
        self._aborted = False

    # -- sums --------------------------------------------------------------------------------------------------------

    def zeros(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor on the CPU that can be added up. Every member must ask for the same ones, in one order."""
        assert device.type == "cpu"
        stop = self._used + size * dtype.itemsize
        tensor = self._mine.memory[self._used : stop].view(dtype)
        if tensor.numel() < size:
            raise MemoryError(f"{stop} bytes are wanted of a segment of {len(self._mine.memory)}")
        self._used = _aligned(stop)
        return tensor

    def all_reduce(self, tensor: Tensor) -> Operation:
        """Sum over the members, in place. `tensor`: a contiguous piece of what `zeros` returned. In one order on all."""
        offset = tensor.data_ptr() - self._mine.address
        if not (SUMS_BEGIN <= offset < self._used and tensor.is_contiguous()):
            raise ValueError("only contiguous pieces of what `zeros` returned can be added up")
        self._to_add.append((offset, tensor))
        self._num_brought += 1
        self._mine.store(_Cell.BROUGHT, self._num_brought)
        self._add_up()
        return _Counted(self, _Cell.ADDED, range(len(self._segments)), self._num_brought)

    def _add_up(self) -> None:
        """Add up this member's slice of the next sum if all parts of it are there. One at a time: a fence may wait."""
        if not self._to_add or min(segment.load(_Cell.BROUGHT) for segment in self._segments) <= self._num_added:
            return
        offset, tensor = self._to_add.popleft()
        start, stop = (tensor.numel() * rank // len(self._segments) for rank in (self._rank, self._rank + 1))
        kernel.add_up([segment.address + offset for segment in self._segments], tensor.dtype, start, stop)
        self._num_added += 1
        self._mine.store(_Cell.ADDED, self._num_added)

    # -- messages ----------------------------------------------------------------------------------------------------

    def send(self, tensors: list[Tensor], ranks: tuple[int, ...], before_each: Callable[[int], None]) -> list[Transfer]:
        """Send `tensors` one after the other to all of `ranks`; each has `SLOT_BYTES` at most.

        A sender that is fenced may put one more message into a slot, while its tensors change already: nobody takes it,
        for a receiver that is fenced reports before its next lease, and that one has other segments.
        """

        def run() -> None:
            for number, tensor in enumerate(tensors):
                before_each(number)
                room = _Counted(self, _Cell.TAKEN, ranks, number - NUM_SLOTS + 1)
                pause_s = PAUSE_S
                while not room.done():
                    time.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                self._slot(self._mine, tensor, number).copy_(tensor)
                self._mine.store(_Cell.SENT, number + 1)

        return [Transfer(run, f"send-from-{self._rank}")]

    def receive(self, like: Tensor, rank: int, number: int) -> tuple[Operation, Tensor]:
        """The message `number` of `rank`, where the sender puts it; to ask for it gives back the one before."""
        self._mine.store(_Cell.TAKEN, number)
        tensor = self._slot(self._segments[rank], like, number)
        return _Counted(self, _Cell.SENT, (rank,), number + 1), tensor

    def _slot(self, segment: _Segment, like: Tensor, number: int) -> Tensor:
        size_bytes = like.numel() * like.dtype.itemsize
        if size_bytes > SLOT_BYTES:
            raise ValueError(f"a message of {size_bytes} bytes; {SLOT_BYTES} is the most")
        start = SLOTS_BEGIN + number % NUM_SLOTS * SLOT_BYTES
        return segment.memory[start : start + size_bytes].view(like.dtype).view(like.shape)

    # -- both --------------------------------------------------------------------------------------------------------

    def reached(self, cell: _Cell, ranks: Sequence[int], count: int) -> bool:
        """Whether the cells of `ranks` have come to `count`.    Raises: GroupBroken when one of them never will."""
        if self._aborted:
            raise GroupBroken("this member has left the group")
        if cell is _Cell.ADDED:
            if count > self._num_added + 1:
                return False  # the one before it comes first
            self._add_up()
        left = [rank for rank in ranks if self._segments[rank].load(_Cell.LEFT)]
        if all(self._segments[rank].load(cell) >= count for rank in ranks):
            return True  # looked at after `left`: who leaves after the work broke nothing
        if left:
            raise GroupBroken(f"member {left[0]} has left the group")
        return False

    def abort(self) -> None:
        """Take no further part, and say so."""
        self._aborted = True
        self._mine.store(_Cell.LEFT, 1)


class _Counted:
    """Done when the cells of some members have come to a count."""

    def __init__(self, memory: SharedMemory, cell: _Cell, ranks: Sequence[int], count: int) -> None:
        self._memory, self._cell, self._ranks, self._count = memory, cell, ranks, count

    def done(self) -> bool:
        return self._memory.reached(self._cell, self._ranks, self._count)


def meet(store: dist.Store, rank: int, world_size: int, sum_bytes: int) -> SharedMemory | None:
    """Share memory with the other members; None, for all alike, when they are not on one machine.

    `sum_bytes`: of all tensors that are going to be asked for.

    Blocks until all have come: call it on a thread.    Raises: RuntimeError when the store is closed or time is up.
    """
    if world_size > MAX_MEMBERS:
        return None
    with _own_segment(SUMS_BEGIN + sum_bytes) as (mine, claim):
        claims = [json.loads(told) for told in _exchange(store, "claim", rank, world_size, json.dumps(claim))]
        sizes = {other["bytes"] for other in claims}
        if len(sizes) > 1:
            raise RuntimeError(f"members want segments of {sorted(sizes)} bytes: they train models of different sizes")
        if mine is None or claim["machine"] is None or any(other["machine"] != claim["machine"] for other in claims):
            return None
        found = [mine if other == rank else _map(claims[other]) for other in range(world_size)]
        segments = [segment for segment in found if segment is not None]
        # The file stays open until everybody has it. And all must agree: who did not would wait for sums over sockets.
        all_found = str(len(segments) == world_size)
        if set(_exchange(store, "found", rank, world_size, all_found)) != {"True"}:
            return None
    return SharedMemory(rank, segments)


@contextmanager
def _own_segment(size_bytes: int) -> Iterator[tuple[_Segment | None, dict[str, Any]]]:
    """This member's segment, and how others find it. Its file is open inside; what is mapped stays."""
    claim: dict[str, Any] = {
        "machine": None,
        "pid": os.getpid(),
        "file": -1,
        "bytes": size_bytes,
        "key": secrets.randbits(62),
    }
    with ExitStack() as stack:
        segment = None
        if kernel.available(torch.device("cpu")):
            try:
                claim["file"] = os.memfd_create("elastic-lm", os.MFD_CLOEXEC)
                stack.callback(os.close, claim["file"])
                os.ftruncate(claim["file"], size_bytes)  # sparse: only what is touched takes memory
                segment = _Segment(claim["file"], size_bytes)
                segment.store(_Cell.KEY, claim["key"])
                claim["machine"] = _machine()
            except (OSError, AttributeError) as error:  # a limit, a sandbox, or a Python without memfd_create
                logger.info("No memory to share with others of this machine: %s.", error)
        yield segment, claim


def _map(claim: dict[str, Any]) -> _Segment | None:
    """Another member's segment, or None when it cannot be reached after all."""
    try:
        file = os.open(f"/proc/{claim['pid']}/fd/{claim['file']}", os.O_RDWR | os.O_CLOEXEC)
        try:
            if os.fstat(file).st_size != claim["bytes"]:
                return None
            segment = _Segment(file, claim["bytes"])
        finally:
            os.close(file)
    except OSError as error:
        logger.info("Another member's memory cannot be reached: %s.", error)
        return None
    return segment if segment.load(_Cell.KEY) == claim["key"] else None


def _exchange(store: dist.Store, what: str, rank: int, world_size: int, mine: str) -> list[str]:
    """What every member says, by rank."""
    store.set(f"{what}/{rank}", mine)
    return [told.decode() for told in store.multi_get([f"{what}/{other}" for other in range(world_size)])]


@functools.cache
def _machine() -> str | None:
    """Names a kernel, its view of processes and a user: members with one name can open each other's memory."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}/{os.getuid()}"
    except (OSError, AttributeError):  # not Linux, or a sandbox that hides it
        return None


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // LINE_BYTES) * LINE_BYTES
