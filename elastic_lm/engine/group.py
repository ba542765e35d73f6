"""A generation's process group: formed and used without ever blocking on a peer.

Facts this rests on: a group's constructor and its destructor block until a timeout when a peer is missing or frozen;
closing the store ends a forming group at once; an all-reduce that was given up can still write when the peer thaws. So
forming runs on a helper thread, waiting is polling, and a dropped group is buried on a thread of its own together with
the buffers it may still write to.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lm.engine import nccl
from elastic_lm.engine.spec import Collectives
from elastic_lm.protocol import Generation, Rendezvous

IsCancelled = Callable[[], bool]

STORE_TIMEOUT_S = 15.0
# The backend's own last resort. Fences come long before it, and members may be minutes apart within a step: one that does
# little waits for one that does much, or that shares its machine with others.
OPERATION_TIMEOUT_S = 1800.0
BURIAL_POLL_S = 0.05
NUM_DEVICES = 2  # buckets go alternately through two connections: a quarter faster than through one
POLL_MIN_S, POLL_MAX_S = 20e-6, 1e-3
RESOLVER = "timeout:1 attempts:2"  # two lookups of 1 s in place of two of 5 s


class Cancelled(Exception):
    """The coordinator fenced this generation."""


class GroupBroken(Exception):
    """A peer is gone, or the group could not be formed."""


class RendezvousStore:
    """The coordinator's end: the key-value store through which one generation's members find each other."""

    def __init__(self, host: str) -> None:
        _limit_name_lookups()
        timeout = datetime.timedelta(seconds=STORE_TIMEOUT_S)
        self._store: dist.TCPStore | None = dist.TCPStore(
            host, 0, is_master=True, timeout=timeout, wait_for_workers=False
        )
        self.rendezvous = Rendezvous(host, self._store.port)

    def close(self) -> None:
        """Members that are still forming fail at once; a formed group lives on."""
        self._store = None


class Pending:
    """A collective under way, and the tensor it reads or writes."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor

    def done(self) -> bool:
        """Raises: GroupBroken when the operation failed."""
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()  # completed: does not block, raises what went wrong
        except RuntimeError as error:
            raise GroupBroken(_first_line(error)) from error
        return True


class Transfer:
    """Point-to-point messages under way on a thread of their own: gloo's send and receive complete only inside `wait()`."""

    def __init__(self, run: Callable[[], None], name: str) -> None:
        self._run_messages = run
        self._outcome: list[BaseException | None] = []
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def _run(self) -> None:
        try:
            self._run_messages()
        except BaseException as error:  # noqa: BLE001 - raised by `done` in the thread that waits
            self._outcome.append(error)
        else:
            self._outcome.append(None)

    def done(self) -> bool:
        """Raises: GroupBroken when a message failed."""
        if not self._outcome:
            return False
        if self._outcome[0] is not None:
            raise self._outcome[0]
        return True


Operation = Pending | Transfer


class Group:
    """A formed group of `world_size` members. Tensors must stay untouched until their operation is done or buried.

    `messages` carries states between two members (gloo, over the host), `sums` adds up (gloo or NCCL).
    """

    def __init__(self, messages: Any, sums: Any, rank: int, world_size: int) -> None:
        self._messages, self._sums = messages, sums
        self.rank, self.world_size = rank, world_size
        self._pending: list[Operation] = []

    def all_reduce(self, tensor: Tensor) -> Pending:
        """Sum over the members, in place."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
        try:
            pending = Pending(self._sums.allreduce([tensor], options), tensor)
        except RuntimeError as error:
            raise GroupBroken(_first_line(error)) from error
        self._pending.append(pending)
        return pending

    def send(
        self, tensors: list[Tensor], rank: int, before_each: Callable[[int], None] = lambda number: None
    ) -> Transfer:
        """Send `tensors` one after the other, over the host: gloo sends nothing else. They must not change until done."""
        messages = self._messages

        def run() -> None:
            for number, tensor in enumerate(tensors):
                before_each(number)
                _deliver(messages.send, tensor.cpu(), rank, number)

        return self._begin(Transfer(run, f"send-to-{rank}"))

    def receive(self, like: Tensor, rank: int, number: int) -> tuple[Transfer, Tensor]:
        """Receive the message `number` from `rank` into a new tensor on the host, complete when the transfer is done.

        A new tensor, because a receive that was given up may still be written when its sender thaws.
        """
        messages, tensor = self._messages, torch.empty_like(like, device="cpu")
        transfer = Transfer(lambda: _deliver(messages.recv, tensor, rank, number), f"receive-from-{rank}")
        return self._begin(transfer), tensor

    def _begin(self, transfer: Transfer) -> Transfer:
        self._pending.append(transfer)
        return transfer

    def wait(self, pending: Sequence[Operation], cancelled: IsCancelled) -> None:
        """Until all are done.    Raises: Cancelled, GroupBroken."""
        under_way = list(pending)

        def over() -> bool:
            under_way[:] = [p for p in under_way if not p.done()]  # each is looked at: a broken one ends a hanging one
            return not under_way

        wait_until(over, cancelled)
        over_now = set(map(id, pending))
        self._pending = [p for p in self._pending if id(p) not in over_now]

    def drop(self) -> None:
        """Give the group up without waiting. What it may still write to lives until gloo has let go of it."""
        grave: list[Any] = [self._sums, self._messages, self._pending]
        self._sums, self._messages, self._pending = None, None, []
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


def _deliver(send_or_receive: Callable[..., Any], tensor: Tensor, rank: int, number: int) -> None:
    """Carry one message.    Raises: GroupBroken."""
    try:
        send_or_receive([tensor], rank, number).wait()
    except RuntimeError as error:
        raise GroupBroken(_first_line(error)) from error


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
) -> Group:
    """Meet the other members.    Raises: Cancelled; GroupBroken when a peer is missing or the store is closed."""
    _limit_name_lookups()
    formed: list[Any] = []

    def form() -> None:
        try:
            formed.append(_connect(rendezvous, generation, rank, world_size, timeout_s, collectives))
        except BaseException as error:  # noqa: BLE001 - carried to the waiting thread below
            formed.append(error)

    threading.Thread(target=form, name=f"form-{generation}", daemon=True).start()
    wait_until(lambda: bool(formed), cancelled)
    if isinstance(formed[0], RuntimeError):
        raise GroupBroken(f"forming generation {generation}: {_first_line(formed[0])}") from formed[0]
    if isinstance(formed[0], BaseException):
        raise formed[0]
    messages, sums = formed[0]
    return Group(messages, sums, rank, world_size)


def _connect(
    rendezvous: Rendezvous,
    generation: Generation,
    rank: int,
    world_size: int,
    timeout_s: float,
    collectives: Collectives,
) -> tuple[Any, Any]:
    """(messages, sums). The time-out is that of forming; operations have their own."""
    timeout, last_resort = datetime.timedelta(seconds=timeout_s), datetime.timedelta(seconds=OPERATION_TIMEOUT_S)
    store = dist.TCPStore(rendezvous.host, rendezvous.port, timeout=timeout, wait_for_workers=False)
    messages = _gloo(dist.PrefixStore(f"{generation}/gloo", store), rank, world_size, timeout, _own_address(rendezvous))
    messages._set_default_timeout(last_resort)
    if collectives == "gloo":
        return messages, messages
    return messages, nccl.form(dist.PrefixStore(f"{generation}/nccl", store), rank, world_size, last_resort)


def _gloo(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta, address: str) -> Any:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address) for _ in range(NUM_DEVICES)]
    return dist.ProcessGroupGloo(store, rank, world_size, options)


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


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def synchronize(device: torch.device) -> None:
    """Wait on the host for everything queued on the device: part of the protocol, not a measurement."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
