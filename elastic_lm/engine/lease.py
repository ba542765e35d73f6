"""A member's whole work in one lease: meet, receive or give a state, train, report.

Invariant: a report always comes back, and says truthfully which step the state is at and whether it is whole. A whole
state is never overwritten by a copy; only members without one receive.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic_lm import failpoints
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.engine.group import Group, form_group
from elastic_lm.engine.operations import GroupBroken, Operation
from elastic_lm.engine.reduce import Reduction
from elastic_lm.engine.shared import SLOT_BYTES
from elastic_lm.engine.state import ReplicaState
from elastic_lm.engine.step import Control, PoisonedStep, StepRunner, TokenSource
from elastic_lm.errors import CheckpointError, DataError, UnavailableError
from elastic_lm.protocol import Evaluation, Generation, Lease, LeaseEnd, LeaseReport, Measure, Phase, StepRecord

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = SLOT_BYTES // 4  # of fp32, per message of a state's copy
RECORDS_OF_FOLLOWERS = 1024  # members other than rank 0 tell only these: rank 0 may die before it tells its last steps
HELD_RECORDS = 1 << 16

Restore = Callable[[int, Callable[[], None]], dict[str, Tensor]]
Initial = Callable[[Callable[[], None]], dict[str, Tensor]]


class LeaseControl(Control, Protocol):
    """A step's control, and somebody to tell of committed steps."""

    def committed(self, record: StepRecord, micro_batch_s: float | None) -> None: ...


class HeldOutSource(Protocol):
    """Where held-out batches come from."""

    def batch(self, number: int, cancelled: Callable[[], bool]) -> Any:
        """Tokens [samples, T+1] of any integer dtype, as a NumPy array or tensor."""

    def num_bytes(self, tokens: Any) -> int | None:
        """Of the text that a batch's targets stand for, where they are all of it."""


@dataclass(frozen=True)
class Kept:
    """A group that outlives the lease of its generation, and the buffer in its memory."""

    generation: Generation
    group: Group
    reduction: Reduction


@dataclass
class Member:
    """What a member keeps between leases."""

    member_id: str
    runner: StepRunner
    restore: Restore  # step, and what to call after each part -> the tensors of that checkpoint
    form_timeout_s: float = 15.0
    records: deque[StepRecord] = field(default_factory=lambda: deque(maxlen=HELD_RECORDS))
    kept: Kept | None = None
    initial: Initial | None = None  # what to call after each part -> weights to begin from, by name; None: the seed's
    held_out: HeldOutSource | None = None
    evaluations: tuple[Evaluation, ...] = ()  # those that the log did not hold when the last lease began

    @property
    def state(self) -> ReplicaState:
        return self.runner.replica.state

    def start_over(self, tokens: TokenSource) -> None:
        """Train other batches from now on. Nothing that it holds is of them, so it is as one that has just started."""
        self.state.lose()
        self.records.clear()
        self.evaluations = ()
        kept, self.kept = self.kept, None
        self.runner.tokens = tokens
        if kept is not None:
            kept.group.drop()


def run_lease(member: Member, lease: Lease, control: LeaseControl) -> LeaseReport:
    """Obey `lease`. Never raises: what went wrong is in the report."""
    session = _Session(member, lease, control)
    error: BaseException | None = None
    end = LeaseEnd.RAISED
    try:
        end = session.run()
    except Cancelled:
        end = LeaseEnd.FENCED
    except GroupBroken as broken:
        end, error = LeaseEnd.BROKEN, broken
    except PoisonedStep as poisoned:
        end, error = LeaseEnd.POISONED, poisoned
    except DataError as bad_data:
        end, error = LeaseEnd.DATA_ERROR, bad_data
    except UnavailableError as no_answer:
        end, error = LeaseEnd.UNAVAILABLE, no_answer
    except CheckpointError as damaged:
        end, error = LeaseEnd.UNRESTORABLE, damaged
    except Exception as raised:  # a bug of the model, the objective or our own: told in full, judged by control
        logger.exception("An exception at step %d.", member.state.next_step)
        error = raised
    finally:
        session.close(end)
    failpoints.hit("lease.end", member.state.next_step)
    try:
        return session.report(end, error)
    finally:
        error = None  # its traceback holds this frame, which would keep the generation's memory until a collection


class _Session:
    """One lease under way."""

    def __init__(self, member: Member, lease: Lease, control: LeaseControl) -> None:
        self._member, self._lease, self._control = member, lease, control
        self._rank = lease.rank_of(member.member_id)
        self._micro_batches = lease.assignments[self._rank]
        self._group: Group | None = None
        self._reduction: Reduction | None = None
        self._sends: Sequence[Operation] = ()
        self._micro_batch_s: list[float] = []
        self._measures: list[Measure] = []
        member.evaluations = lease.evaluations
        if self._rank in lease.receivers:
            member.records.clear()
            member.records.extend(lease.history)
        while member.records and member.records[0].step < lease.logged_step:
            member.records.popleft()

    def run(self) -> LeaseEnd:
        lease, state = self._lease, self._member.state
        failpoints.hit("lease.begin", lease.start_step)
        if lease.evaluates:
            return self._evaluate()
        if state.torn and self._rank not in lease.receivers:
            self._restore()
        self._reduction = self._meet()
        if self._rank in lease.receivers:
            self._receive()
        elif self._rank == lease.source:
            self._begin_sends()
        if state.next_step != lease.start_step:
            raise RuntimeError(f"told to train from step {lease.start_step}, but this state is at {state.next_step}")
        return self._train(self._reduction)

    def _restore(self) -> None:
        """From the checkpoint that the lease names, or from the seed, or from the weights that the run begins from."""
        member, step = self._member, self._lease.restore
        weights = None
        if step is not None or member.initial is not None:
            self._control.report(Phase.DATA)  # storage may be away: that is waited for, and is nobody's hang
        if step is not None:
            member.state.load(member.restore(step, self._restored_part), step)
            return
        if member.initial is not None:
            weights = member.initial(self._restored_part)
        self._control.report(Phase.COPYING)
        member.runner.replica.initialise(weights)

    def _restored_part(self) -> None:
        """What is large takes minutes: a fence does not wait for the rest."""
        if self._control.cancelled():
            raise Cancelled("fenced while it restored")
        self._control.report(Phase.DATA)

    def _meet(self) -> Reduction:
        """Form the group, and make its buffer; or go on with those of an earlier lease of the same members."""
        lease, member = self._lease, self._member
        kept, member.kept = member.kept, None
        if kept is not None and kept.generation == lease.continues:
            self._group = kept.group
            return kept.reduction
        if kept is not None:
            kept.group.drop()
            kept = None  # and its buffer, before there is another
        if lease.continues is not None:
            raise GroupBroken(f"{member.member_id} has no group of generation {lease.continues} to go on in")
        self._form()
        return member.runner.replica.new_reduction(self._group)

    def _form(self) -> None:
        lease = self._lease
        if lease.world_size == 1:
            return
        assert lease.rendezvous is not None
        self._control.report(Phase.FORMING)
        failpoints.hit("form.begin", lease.start_step)
        self._group = form_group(
            lease.rendezvous,
            lease.generation,
            self._rank,
            lease.world_size,
            timeout_s=self._member.form_timeout_s,
            cancelled=self._control.cancelled,
            collectives=self._member.runner.replica.spec.collectives,
            sum_bytes=self._member.runner.replica.sum_bytes,
        )
        failpoints.hit("form.end", lease.start_step)

    # -- copying a state ---------------------------------------------------------------------------------------------

    def _begin_sends(self) -> None:
        """Hand the state to the network and go on: the weights do not change before the optimizer, which waits for this."""
        assert self._group is not None
        chunks = _chunks(self._member.state)

        def before_each(number: int) -> None:
            if number == len(chunks) // 2:
                failpoints.hit("copy.send", self._lease.start_step)

        self._sends = self._group.send(chunks, self._lease.receivers, before_each)

    def _finish_sends(self) -> None:
        if self._sends:
            assert self._group is not None
            self._group.wait(self._sends, self._control.cancelled)
            self._sends = ()

    def _receive(self) -> None:
        assert self._group is not None and self._lease.source is not None
        state = self._member.state
        with state.writing(self._lease.start_step):
            chunks = _chunks(state)
            for number, chunk in enumerate(chunks):
                if number == len(chunks) // 2:
                    failpoints.hit("copy.receive", self._lease.start_step)
                self._control.report(Phase.COPYING)
                transfer, received = self._group.receive(chunk, self._lease.source, number)
                self._group.wait([transfer], self._control.cancelled)
                chunk.copy_(received)

    # -- training ----------------------------------------------------------------------------------------------------

    def _train(self, reduction: Reduction) -> LeaseEnd:
        lease, member = self._lease, self._member
        while member.state.next_step < lease.stop_step:
            outcome = member.runner.run_step(
                self._micro_batches, reduction, self._group, self._control, lease.generation, self._finish_sends
            )
            record = outcome.record
            member.records.append(record)
            if self._micro_batches:
                self._micro_batch_s.append(record.compute_s / len(self._micro_batches))
            self._control.committed(record, self._micro_batch_s[-1] if self._micro_batch_s else None)
            if outcome.ends:
                return LeaseEnd.ENDED_EARLY
        if self._sends:  # of a lease without a step
            self._control.report(Phase.REDUCE)  # who waits for others owes no progress
            self._finish_sends()
        return LeaseEnd.COMPLETED

    def _evaluate(self) -> LeaseEnd:
        """Measure my batches; the group that was kept stays for the lease behind."""
        lease, member, control = self._lease, self._member, self._control
        if member.state.torn or member.state.next_step != lease.start_step or member.held_out is None:
            raise RuntimeError(f"told to evaluate at step {lease.start_step}, which this member is not at")
        for batch in self._micro_batches:
            if control.cancelled():
                raise Cancelled
            control.report(Phase.DATA)
            tokens = member.held_out.batch(batch, control.cancelled)
            control.report(Phase.EVALUATING)
            failpoints.hit("evaluate", lease.start_step)
            measure = member.runner.replica.measure(tokens, batch)
            self._measures.append(replace(measure, num_bytes=member.held_out.num_bytes(tokens)))
            if control.wants_end():  # behind a batch: however often a lease is cut short, there is an end
                return LeaseEnd.ENDED_EARLY
        return LeaseEnd.COMPLETED

    def close(self, end: LeaseEnd) -> None:
        """Keep the group for the same members' next lease; drop it unless all of them have come this far."""
        group, reduction = self._group, self._reduction
        self._group = self._reduction = None
        if group is not None and reduction is not None and end.agreed:
            self._member.kept = Kept(self._lease.generation, group, reduction)
        elif group is not None:
            group.drop()

    def report(self, end: LeaseEnd, error: BaseException | None) -> LeaseReport:
        member = self._member
        records = list(member.records)
        if self._rank != 0:
            records = records[-RECORDS_OF_FOLLOWERS:]
        return LeaseReport(
            member_id=member.member_id,
            generation=self._lease.generation,
            end=end,
            next_step=member.state.next_step,
            whole=not member.state.torn,
            records=tuple(records),
            error=None if error is None else f"{type(error).__name__}: {error}",
            error_step=None if error is None else member.state.next_step,
            micro_batch_s=statistics.median(self._micro_batch_s[-100:]) if self._micro_batch_s else None,
            measures=tuple(self._measures),
        )


def _chunks(state: ReplicaState) -> list[Tensor]:
    """The messages of a copy, in order: views into the state."""
    with torch.no_grad():
        return [chunk for flat in state.flats() for chunk in flat.split(CHUNK_ELEMENTS)]
