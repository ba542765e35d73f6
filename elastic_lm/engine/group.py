"""A generation's process group: formed and used without ever blocking on a peer.

Facts this rests on: a group's constructor and its destructor block until a timeout when a peer is missing or frozen;
closing the store (which the first member hosts; rendezvous.py) ends a forming group at once; an all-reduce that was given
up can still write when the peer thaws. So forming runs on a helper thread, waiting is polling, and a dropped group is buried
on a thread of its own together with the buffers it may still write to.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lm.engine import nccl, shared
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.engine.operations import GroupBroken, Operation, first_line
from elastic_lm.engine.process_group import Gloo
from elastic_lm.engine.rendezvous import Place
from elastic_lm.engine.spec import Collectives
from elastic_lm.errors import without_frames
from elastic_lm.protocol import Generation, Rendezvous

IsCancelled = Callable[[], bool]

STORE_TIMEOUT_S = 15.0
# The backend's own last resort. Fences come long before it, and members may be minutes apart within a step: one that does
# little waits for one that does much, or that shares its machine with others.
OPERATION_TIMEOUT_S = 1800.0
BURIAL_POLL_S = 0.05
POLL_MIN_S, POLL_MAX_S = 20e-6, 1e-3
RESOLVER = "timeout:1 attempts:2"  # two lookups of 1 s in place of two of 5 s


class Sums(Protocol):
    """What adds up over the members."""

    def zeros(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor: ...

    def all_reduce(self, tensor: Tensor) -> Operation: ...

    def abort(self) -> None: ...


class Messages(Protocol):
    """What carries tensors from one member to others, through the host's memory."""

    def send(
        self, tensors: list[Tensor], ranks: tuple[int, ...], before_each: Callable[[int], None]
    ) -> Sequence[Operation]: ...

    def receive(self, like: Tensor, rank: int, number: int) -> tuple[Operation, Tensor]: ...

    def abort(self) -> None: ...


class Group:
    """A formed group of `world_size` members. Tensors must stay untouched until their operation is done or buried."""

    def __init__(self, messages: Messages, sums: Sums, rank: int, world_size: int) -> None:
        self._messages, self._sums = messages, sums
        self.rank, self.world_size = rank, world_size
        self._pending: list[Operation] = []

    def zeros(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor that can be added up. Every member must ask for the same ones, in one order."""
        return self._sums.zeros(size, dtype, device)

    def all_reduce(self, tensor: Tensor) -> Operation:
        """Sum over the members, in place. `tensor`: a contiguous piece of what `zeros` returned.    Raises: GroupBroken."""
        operation = self._sums.all_reduce(tensor)
        self._pending.append(operation)
        return operation

    def send(
        self, tensors: list[Tensor], ranks: tuple[int, ...], before_each: Callable[[int], None] = lambda number: None
    ) -> Sequence[Operation]:
        """Send `tensors` one after the other to each of `ranks`. Once in a generation, by one member.

        They must not change until all operations are done. `before_each` gets the message's number, on another thread.
        """
        operations = self._messages.send(tensors, ranks, before_each)
        self._pending += operations
        return operations

    def receive(self, like: Tensor, rank: int, number: int) -> tuple[Operation, Tensor]:
        """Receive the message `number`, counted from 0, and the tensor that holds it when the operation is done.

        It is on the host, has the shape and type of `like`, and is valid until the next message is asked for.
        """
        operation, tensor = self._messages.receive(like, rank, number)
        self._pending.append(operation)
        return operation, tensor

    def wait(self, pending: Sequence[Operation], cancelled: IsCancelled) -> None:
        """Until all are done.    Raises: Cancelled, GroupBroken."""
        under_way = list(pending)

        def over() -> bool:
            left: list[Operation] = []
            for operation in under_way:  # each is looked at: a broken one ends a hanging one
                if left and cancelled():
                    raise Cancelled  # a look may take its time: it is the member's share of a sum
                if not operation.done():
                    left.append(operation)
            under_way[:] = left
            return not left

        wait_until(over, cancelled)
        over_now = set(map(id, pending))
        self._pending = [p for p in self._pending if id(p) not in over_now]

    def drop(self) -> None:
        """Give the group up without waiting. What it may still write to lives until gloo has let go of it."""
        grave: list[Any] = [self._sums, self._messages, self._pending]
        del self._sums, self._messages
        self._pending = []
        threading.Thread(target=_bury, args=(grave,), name="group-burial", daemon=True).start()


def _bury(grave: list[Any]) -> None:
    sums, messages, pending = grave
    grave.clear()
    deadline = time.monotonic() + 2 * OPERATION_TIMEOUT_S
    sums.abort()
    if messages is not sums:
        messages.abort()
    while (pending := [p for p in pending if not _over(p)]) and time.monotonic() < deadline:
        time.sleep(BURIAL_POLL_S)
    del sums, messages  # a destructor may block; it holds no interpreter lock


def _over(pending: Operation) -> bool:
    try:
        return pending.done()
    except Exception:  # noqa: BLE001 - told to whoever waited, if anybody did; here it only matters that it is over
        return True


def wait_until(condition: Callable[[], bool], cancelled: IsCancelled) -> None:
    """Poll, ever more slowly up to once a millisecond.    Raises: Cancelled."""
    pause = POLL_MIN_S
    while not condition():
        if cancelled():
            raise Cancelled
        time.sleep(pause)
        pause = min(2 * pause, POLL_MAX_S)


def form_group(
    rendezvous: Rendezvous,
    generation: Generation,
    rank: int,
    world_size: int,
    *,
    timeout_s: float,
    cancelled: IsCancelled,
    collectives: Collectives = "gloo",
    sum_bytes: int = 0,
) -> Group:
    """Meet the other members. `sum_bytes`: of all that is going to be added up, for `collectives="auto"`.

    Raises: Cancelled; GroupBroken when a peer is missing or the store is closed.
    """
    _limit_name_lookups()
    formed: list[Any] = []

    def form() -> None:
        try:
            formed.append(_connect(rendezvous, generation, rank, world_size, timeout_s, collectives, sum_bytes))
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread below
            formed.append(without_frames(error))  # which hold what was half formed

    threading.Thread(target=form, name=f"form-{generation}", daemon=True).start()
    wait_until(lambda: bool(formed), cancelled)
    if isinstance(formed[0], RuntimeError):
        raise GroupBroken(f"forming generation {generation}: {first_line(formed[0])}") from formed.pop()
    if isinstance(formed[0], BaseException):
        raise formed.pop()
    messages, sums = formed[0]
    return Group(messages, sums, rank, world_size)


def _connect(
    rendezvous: Rendezvous,
    generation: Generation,
    rank: int,
    world_size: int,
    timeout_s: float,
    collectives: Collectives,
    sum_bytes: int,
) -> tuple[Messages, Sums]:
    """(messages, sums). The time-out is that of forming; operations have their own."""
    timeout, last_resort = datetime.timedelta(seconds=timeout_s), datetime.timedelta(seconds=OPERATION_TIMEOUT_S)
    place, address = Place(rendezvous, generation, timeout_s), _own_address(rendezvous)
    host, port = _host_store(place, address) if rank == 0 else place.ask()
    store = dist.TCPStore(host, port, timeout=timeout, wait_for_workers=False)

    def part(name: str) -> dist.Store:
        return dist.PrefixStore(f"{generation}/{name}", store)

    if collectives == "auto":
        memory = shared.meet(part("shared"), rank, world_size, sum_bytes)
        if memory is not None:
            return memory, memory
    gloo = Gloo.form(part("gloo"), rank, world_size, address, timeout=timeout, operation_timeout=last_resort)
    if collectives == "nccl":
        return gloo, nccl.form(part("nccl"), rank, world_size, last_resort)
    return gloo, gloo


def _host_store(place: Place, address: str) -> tuple[str, int]:
    """Host the key-value store until the meeting place is closed.    Returns: where it is."""
    timeout = datetime.timedelta(seconds=STORE_TIMEOUT_S)
    hosted = [dist.TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)]
    port = hosted[0].port

    def end() -> None:
        place.await_end()
        hosted.clear()

    place.host((address, port))
    threading.Thread(target=end, name="store-host", daemon=True).start()
    return address, port


def _limit_name_lookups() -> None:
    """For its logs c10d looks up the name of every address that it connects to or accepts, and it waits for the answer.

    Where DNS lost 2 % of its packets, every fifth group of five took 5 s to form. Read by threads that begin afterwards.
    """
    os.environ.setdefault("RES_OPTIONS", RESOLVER)


def _own_address(rendezvous: Rendezvous) -> str:
    """This machine's address on the network on which the coordinator is. Nothing is sent."""
    family = socket.AF_INET6 if ":" in rendezvous.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((rendezvous.host, rendezvous.port))
        return str(probe.getsockname()[0])


def synchronize(device: torch.device) -> None:
    """Wait on the host for everything queued on the device: part of the protocol, not a measurement."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
