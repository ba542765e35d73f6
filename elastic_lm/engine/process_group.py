"""PyTorch's process groups as a generation's backend: sums over gloo or NCCL, messages over gloo.

Gloo's send and receive complete only inside `wait()`, so they run on threads of their own; its sums are polled.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_lm.engine.operations import GroupBroken, Pending, Transfer, first_line

NUM_DEVICES = 2  # buckets go alternately through two connections: a quarter faster than through one


class ProcessGroup:
    """Sums over a c10d backend."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def zeros(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat tensor that can be added up."""
        return torch.zeros(size, dtype=dtype, device=device)

    def all_reduce(self, tensor: Tensor) -> Pending:
        """Sum over the members, in place.    Raises: GroupBroken."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(dist.ReduceOp.SUM)
        try:
            return Pending(self._backend.allreduce([tensor], options), tensor)
        except RuntimeError as error:
            raise GroupBroken(first_line(error)) from error

    def abort(self) -> None:
        """Give up whatever is under way."""
        self._backend.abort()


class Gloo(ProcessGroup):
    """Sums and messages over sockets."""

    @classmethod
    def form(
        cls,
        store: dist.Store,
        rank: int,
        world_size: int,
        address: str,
        *,
        timeout: datetime.timedelta,
        operation_timeout: datetime.timedelta,
    ) -> Gloo:
        """Connect with the others from `address` of this machine. Blocks until all have come: call it on a thread."""
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address) for _ in range(NUM_DEVICES)]
        backend = dist.ProcessGroupGloo(store, rank, world_size, options)
        backend._set_default_timeout(operation_timeout)
        return cls(backend)

    def send(self, tensors: list[Tensor], ranks: tuple[int, ...], before_each: Callable[[int], None]) -> list[Transfer]:
        """Send `tensors` one after the other to each of `ranks`, over the host: gloo sends nothing else."""

        def send_to(rank: int) -> None:
            for number, tensor in enumerate(tensors):
                before_each(number)
                _deliver(self._backend.send, tensor.cpu(), rank, number)

        return [Transfer(lambda rank=rank: send_to(rank), f"send-to-{rank}") for rank in ranks]  # type: ignore[misc]

    def receive(self, like: Tensor, rank: int, number: int) -> tuple[Transfer, Tensor]:
        """Receive a message into a new tensor: a receive that was given up may still be written when its sender thaws."""
        tensor = torch.empty_like(like, device="cpu")
        receive = self._backend.recv
        return Transfer(lambda: _deliver(receive, tensor, rank, number), f"receive-from-{rank}"), tensor


def _deliver(send_or_receive: Callable[..., Any], tensor: Tensor, rank: int, number: int) -> None:
    """Carry one message.    Raises: GroupBroken."""
    try:
        send_or_receive([tensor], rank, number).wait()
    except RuntimeError as error:
        raise GroupBroken(first_line(error)) from error
