"""What members add up in a step: the gradients and, in the same reduction, the commit vector.

A buffer belongs to one generation and is never a parameter's `.grad`: an operation that was given up may write into it
later. Exact: everything is integers, so the total depends on nothing but its terms. Fast: gradients are fp32, the commit
vector stays in integers.

The commit vector is ledger, agreement on non-finite values, assignment check and early-end vote in one.

The sum is made in buckets. In a member's last micro-batch of a step a bucket is on its way as soon as backward is done
with it, always in one order, which every member follows; the bucket with the commit vector is the last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from elastic_lm.engine import fixed_point
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.engine.fixed_point import Unit
from elastic_lm.engine.group import Group, IsCancelled
from elastic_lm.engine.operations import Operation
from elastic_lm.engine.state import Slot

HEADER = 16  # integers before the gradients: two cache lines
HASH_MASK = (1 << 63) - 1
BUCKET_ELEMENTS = 1 << 20  # 8 MiB of int64


class Field(IntEnum):
    """Places in the commit vector."""

    LOSS = 0
    TARGETS = 1
    MICRO_BATCHES = 2
    REFUSED = 3
    SAMPLE_HASH = 4
    END_VOTES = 5
    MEMBERS = 6
    STEPS = 7  # every member adds step + 1: all must be at the same step
    REFUSED_LOSSES = 8  # of those refused


@dataclass(frozen=True)
class Commit:
    """The completed vector of one step."""

    loss_units: int
    num_targets: int
    micro_batches: int
    refused: int
    refused_losses: int
    sample_hash: int
    end_votes: int


@dataclass(frozen=True)
class _Bucket:
    """A piece of the buffer that is added up in one operation, the slots in it, and the least of their numbers."""

    part: Tensor
    slots: frozenset[int]
    earliest: int


def size_bytes(size: int, *, exact: bool) -> int:
    """Memory of a reduction of `size` gradients, the commit vector included."""
    return HEADER * 8 + size * (8 if exact else 4)


def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


class InconsistentSum(RuntimeError):
    """A completed sum that breaks a rule that only our own bug can break."""


class Reduction:
    """One generation's buffer."""

    def __init__(
        self,
        slots: list[Slot],
        size: int,
        *,
        exact: bool,
        gradient_unit: Unit,
        loss_unit: Unit,
        device: torch.device,
        group: Group | None = None,
    ) -> None:
        zeros = _zeros if group is None else group.zeros
        self.exact = exact
        self._slots = slots
        self._gradient_unit, self._loss_unit = gradient_unit, loss_unit
        self.loss_exponent: int | None = None  # of a loss that is scaled
        self._scaled_unit = gradient_unit
        if exact:
            self._buffer = zeros(HEADER + size, torch.int64, device)
            self._header, self._total = self._buffer[:HEADER], self._buffer[HEADER:]
        else:
            self._header = zeros(HEADER, torch.int64, device)
            self._total = zeros(size, torch.float32, device)
            self._buffer = self._total
        self._mine = [0] * HEADER
        self._refused: int | Tensor = 0
        self._losses: list[Tensor] = []
        self._untouched: set[int] = set()
        self._buckets = self._cut()
        self._early: Group | None = None  # the group, in the last micro-batch
        self._over: set[int] = set()  # slots that have had their last gradient of the step
        self._pending: list[Operation] = []  # of the first buckets

    def _cut(self) -> list[_Bucket]:
        """The buckets in the order of sending: about the order in which backward is done with them."""
        header = HEADER if self.exact else 0
        buckets = []
        for number, part in enumerate(self._buffer.split(BUCKET_ELEMENTS)):
            start = number * BUCKET_ELEMENTS - header
            inside = [i for i, s in enumerate(self._slots) if s.start < start + len(part) and start < s.start + s.size]
            buckets.append(_Bucket(part, frozenset(inside), min((self._slots[i].number for i in inside), default=-1)))
        if self.exact:
            vector = buckets.pop(0)
        else:
            vector = _Bucket(self._header, frozenset(), -1)
        return [*sorted(buckets, key=lambda bucket: -bucket.earliest), vector]

    def begin(self, step: int, loss_exponent: int | None = None) -> None:
        """Forget what was added; the first contribution to each slot overwrites it.

        Gradients of a scaled loss come times 2^loss_exponent, and are added up without it.
        """
        unit = self._gradient_unit
        self._scaled_unit = replace(unit, fraction_bits=unit.fraction_bits - (loss_exponent or 0))
        self.loss_exponent = loss_exponent
        self._mine = [0] * HEADER
        self._mine[Field.MEMBERS] = 1
        self._mine[Field.STEPS] = step + 1
        self._refused, self._losses = 0, []
        self._untouched = set(range(len(self._slots)))
        self._early, self._over, self._pending = None, set(), []

    def send_early(self, group: Group | None) -> None:
        """The last micro-batch begins: each parameter's next gradient is its last one in this step."""
        self._early = group

    def add_gradient(self, index: int, gradient: Tensor) -> None:
        """Fold one parameter's gradient (of the loss sum of one micro-batch).    Raises: GroupBroken."""
        if index in self._over:
            raise InconsistentSum(
                f"{self._slots[index].name} got two gradients in one backward pass; a model that checkpoints activations "
                "must do so with use_reentrant=False"
            )
        total = self._slots[index].of(self._total)
        first = index in self._untouched
        self._untouched.discard(index)
        values = gradient.detach().flatten()
        if self.exact:
            self._refused = self._refused + fixed_point.fold(total, values, self._scaled_unit, first=first)
        else:
            self._add_fast(total, values, first=first)
        if self._early is not None:
            self._over.add(index)
            while len(self._pending) < len(self._buckets) - 1 and self._next_bucket.slots <= self._over:
                self._send_next(self._early)

    def _add_fast(self, total: Tensor, values: Tensor, *, first: bool) -> None:
        if self.loss_exponent is not None:
            self._refused = self._refused + values.isfinite().logical_not_().sum()
            values = values * 2.0**-self.loss_exponent
        if first:
            total.copy_(values)
        else:
            total.add_(values)

    @property
    def _next_bucket(self) -> _Bucket:
        return self._buckets[len(self._pending)]

    def _send_next(self, group: Group) -> None:
        self._pending.append(group.all_reduce(self._next_bucket.part))

    def add_micro_batch(self, loss: Tensor, num_targets: int, sample_hash: int) -> None:
        """What a micro-batch came to. `loss` (one element) is read when all are done; no device is waited for before."""
        self._losses.append(loss.detach().reshape(()))
        self._mine[Field.TARGETS] += num_targets
        self._mine[Field.MICRO_BATCHES] += 1
        self._mine[Field.SAMPLE_HASH] = (self._mine[Field.SAMPLE_HASH] + sample_hash) & HASH_MASK

    def complete(self, group: Group | None, wants_end: bool, cancelled: IsCancelled) -> Commit:
        """Add up over the group; afterwards the buffer holds the sum over all members.

        Raises: Cancelled, GroupBroken: the buffer is then lost to this generation and nothing was applied.
        """
        self._read_losses()
        self._mine[Field.END_VOTES] = int(wants_end)
        self._mine[Field.REFUSED] += int(self._refused)
        for index in self._untouched:
            self._slots[index].of(self._total).zero_()
        self._header.copy_(torch.tensor(self._mine, dtype=torch.int64))
        if group is not None:
            while len(self._pending) < len(self._buckets):
                self._send_next(group)
                if len(self._pending) < len(self._buckets) and cancelled():
                    raise Cancelled
            group.wait(self._pending, cancelled)
        total = self._header.tolist()
        return self._checked(total, 1 if group is None else group.world_size)

    def _read_losses(self) -> None:
        for loss in torch.stack(self._losses).tolist() if self._losses else ():
            units = fixed_point.number_to_units(loss, self._loss_unit)
            self._mine[Field.LOSS] += units or 0
            self._mine[Field.REFUSED] += units is None
            self._mine[Field.REFUSED_LOSSES] += units is None
        self._losses = []

    def _checked(self, total: list[int], world_size: int) -> Commit:
        if total[Field.MEMBERS] != world_size or total[Field.STEPS] != self._mine[Field.STEPS] * world_size:
            raise InconsistentSum(f"members or steps do not agree: {total[:8]} in a world of {world_size}")
        return Commit(
            loss_units=total[Field.LOSS],
            num_targets=total[Field.TARGETS],
            micro_batches=total[Field.MICRO_BATCHES],
            refused=total[Field.REFUSED],
            refused_losses=total[Field.REFUSED_LOSSES],
            sample_hash=total[Field.SAMPLE_HASH] & HASH_MASK,
            end_votes=total[Field.END_VOTES],
        )

    def raw_total(self) -> bytes:
        """The bytes of what was added so far on this member."""
        return self._total.cpu().numpy().tobytes()

    def loss(self, commit: Commit) -> float:
        """Mean loss per target, in nats."""
        return commit.loss_units / self._loss_unit.scale / commit.num_targets

    def gradient(self, commit: Commit, out: Tensor) -> Tensor:
        """The mean gradient per target, into `out` (flat fp32)."""
        if self.exact:
            return fixed_point.to_float(self._total, self._gradient_unit, commit.num_targets, out)
        return torch.div(self._total, commit.num_targets, out=out)
