"""Whether the work of a lease is still split well: members are named as slow, and another split is asked for.

Trade-off: an end of a lease costs everybody a moment, so a split is changed only when today's speeds would gain clearly.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from elastic_lm.control.assignment import shares, step_seconds
from elastic_lm.control.emit import Emit
from elastic_lm.control.membership import Member
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import Lease


class Balance:
    """Looks at the speeds of a lease's members every `rebalance_every_s`. `emit` takes the events that follow."""

    def __init__(self, spec: ControlSpec, emit: Emit) -> None:
        self._spec, self._emit = spec, emit
        self._looked_at = 0.0

    def began(self, now: float) -> None:
        """A lease begins, with a split for today's speeds."""
        self._looked_at = now

    def wants_another(self, lease: Lease | None, members: Mapping[str, Member], now: float) -> bool:
        """Whether the lease's split is clearly worse than today's speeds allow."""
        spec = self._spec
        if lease is None or now - self._looked_at < spec.rebalance_every_s:
            return False
        self._looked_at = now
        told = [members[m].micro_batch_s if m in members else None for m in lease.members]
        if any(seconds is None for seconds in told) or len(told) < 2:
            return False
        self._name_stragglers(lease, [seconds for seconds in told if seconds is not None])
        present = step_seconds([len(part) for part in lease.assignments], told)
        best = step_seconds(shares(spec.num_micro_batches, told), told)
        return best < present * (1 - spec.rebalance_gain)

    def _name_stragglers(self, lease: Lease, seconds: list[float]) -> None:
        usual = statistics.median_low(seconds)  # of two members, the faster one's
        for member_id, pace in zip(lease.members, seconds, strict=True):
            if pace > self._spec.straggler_factor * usual:
                self._emit(EventKind.STRAGGLER,
                           f"{member_id} needs {pace:.2f} s per micro-batch, the median is {usual:.2f} s.",
                           member_id=member_id, micro_batch_s=pace, median_s=usual)  # fmt: skip
