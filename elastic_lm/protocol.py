"""The words that the coordinator and its members exchange.

Everything here is a frozen stdlib dataclass, so that `control/` can decide with them in milliseconds, `engine/` can obey
them where only torch is installed, and `runtime/` can send them through Ray. Nothing here does I/O or imports a package.

A *step* is one optimizer update, counted from 0; `next_step` is the first step that a state has not applied. A *whole*
state is one that no optimizer write or copy is half way through. A *generation* is one agreed list of members.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, order=True)
class Generation:
    """One agreed member list. A later owner of the run (`owner_epoch`) outranks every number of an earlier one."""

    owner_epoch: int
    number: int

    def __str__(self) -> str:
        return f"{self.owner_epoch}.{self.number}"


@dataclass(frozen=True)
class Rendezvous:
    """Where the members of a generation meet: the coordinator's key-value store for this generation."""

    host: str
    port: int


@dataclass(frozen=True)
class Lease:
    """What every member of a generation does: train steps [start_step, stop_step) together.

    `members` are in rank order. `assignments[rank]` are the micro-batches that rank computes in every step; together they
    are each of range(M) exactly once. Members in `receivers` (ranks) hold no state and get it from rank `source` before
    they compute; `source` is None when nobody needs it. `restore` says where a member without a state takes it from
    when there is no source: a checkpoint's step, or None for the initial state that the seed determines.
    `logged_step`: the event log holds every step before this one, so members may forget those records. `history`: the
    records from there to `start_step`, for `receivers`: whoever holds a state can tell the log what led to it.
    `continues`: the members are those of this earlier generation, which ended in agreement; they go on in its group, and
    there is no rendezvous.
    `evaluates`: nothing is trained. The members, who are all at `start_step`, measure held-out batches, which `assignments`
    are then; each for itself, and nobody waits for another.
    `evaluations`: those that the log does not hold yet, for the members to remember.
    """

    generation: Generation
    members: tuple[str, ...]
    rendezvous: Rendezvous | None
    start_step: int
    stop_step: int
    assignments: tuple[tuple[int, ...], ...]
    source: int | None = None
    receivers: tuple[int, ...] = ()
    restore: int | None = None
    logged_step: int = 0
    continues: Generation | None = None
    history: tuple[StepRecord, ...] = ()
    evaluates: bool = False
    evaluations: tuple[Evaluation, ...] = ()

    @property
    def world_size(self) -> int:
        return len(self.members)

    @property
    def trains(self) -> bool:
        """Whether there is a step in it: one that evaluates has none, nor one that only brings a state to its members."""
        return self.start_step < self.stop_step

    def rank_of(self, member_id: str) -> int:
        return self.members.index(member_id)


class Phase(StrEnum):
    """What a member is doing, as its heartbeat says. Those in DATA or REDUCE wait for others, and owe no progress."""

    STARTING = "starting"
    WAITING = "waiting"  # for a lease
    FORMING = "forming"
    COPYING = "copying"
    DATA = "data"  # waiting for what storage has: tokens, or the checkpoint that it goes on from
    COMPUTE = "compute"
    REDUCE = "reduce"
    OPTIMIZER = "optimizer"
    SAVING = "saving"
    EVALUATING = "evaluating"


class LeaseEnd(StrEnum):
    """Why a member came back from a lease."""

    @property
    def agreed(self) -> bool:
        """All members that come back so do it after the same step, and none of them has let go of the others."""
        return self in (LeaseEnd.COMPLETED, LeaseEnd.ENDED_EARLY)

    COMPLETED = "completed"  # stop_step reached
    ENDED_EARLY = "ended_early"  # a vote carried by the reduction
    FENCED = "fenced"  # the coordinator said so
    BROKEN = "broken"  # forming, copying or reducing failed: some peer is gone
    RAISED = "raised"  # an exception of the model, objective or our own code
    POISONED = "poisoned"  # refused (non-finite or out of range) contributions and the policy is to stop
    DATA_ERROR = "data_error"  # data that must not be trained on, or is missing for good
    UNAVAILABLE = "unavailable"  # storage gave nothing for as long as the run waits for it
    UNRESTORABLE = "unrestorable"  # the checkpoint to go on from is damaged, or gone


@dataclass(frozen=True)
class StepRecord:
    """One committed step as one member saw it.

    The first group is the same on every member, in every world size, to the bit; the second is that member's own clock.
    `loss` is the sum over targets divided by the global number of targets, in nats. `sample_hash` is the sum over the
    step's micro-batches of a 62-bit hash of (step, micro_batch, tokens that entered forward), modulo 2^63. `refused`: values
    that were not finite or out of range; with some the step was left out, and `loss` is of the rest.
    """

    step: int
    loss: float
    num_targets: int
    learning_rate: float
    grad_norm: float
    sample_hash: int
    refused: int

    generation: Generation
    world_size: int
    step_s: float
    compute_s: float
    data_wait_s: float
    reduce_wait_s: float
    optimizer_s: float

    def same_bits(self, other: StepRecord) -> bool:
        """Whether the part that the promise covers is equal."""
        mine = (
            self.step,
            self.loss,
            self.num_targets,
            self.learning_rate,
            self.grad_norm,
            self.sample_hash,
            self.refused,
        )
        return mine == (
            other.step,
            other.loss,
            other.num_targets,
            other.learning_rate,
            other.grad_norm,
            other.sample_hash,
            other.refused,
        )


@dataclass(frozen=True)
class Measure:
    """What one batch of held-out samples came to: the loss in nats, summed over its targets, and how many of these were the
    most probable token; None where the objective does not tell, or the loss is not finite. `num_bytes`: of the text that the
    targets stand for; None where they are not all of it, or it is not known.
    """

    batch: int
    loss: float
    num_targets: int
    num_correct: int | None
    num_bytes: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """What all held-out batches came to with the weights before `step`.

    `loss`: nats per target. `loss_stderr`: its standard error, from how batches differ (a ratio's, Cochran 1977, chapter 6);
    None of a single batch. It is too small where documents are longer than a sample: then batches are not independent.
    """

    step: int
    loss: float
    loss_stderr: float | None
    num_targets: int
    num_correct: int | None
    num_bytes: int | None = None

    @classmethod
    def of(cls, step: int, measures: Iterable[Measure]) -> Evaluation:
        """The same bits in whatever order the measures come: sums are rounded once, at the end."""
        found = list(measures)
        num_targets = sum(m.num_targets for m in found)
        loss = math.fsum(m.loss for m in found) / num_targets
        stderr = None
        if len(found) > 1:
            squares = math.fsum((m.loss - loss * m.num_targets) ** 2 for m in found)
            stderr = math.sqrt(squares * len(found) / (len(found) - 1)) / num_targets
        hits, sizes = ([getattr(m, name) for m in found] for name in ("num_correct", "num_bytes"))
        return cls(
            step,
            loss,
            stderr,
            num_targets,
            num_correct=None if None in hits else sum(hits),
            num_bytes=None if None in sizes else sum(sizes),
        )


@dataclass(frozen=True)
class LeaseReport:
    """A member's answer to a lease. It always comes, unless the member is dead or frozen.

    `next_step` is meaningful when `whole`. `records`: the step records that the log may not hold yet.
    `error` is a message for people; `error_step` the step during which it arose.
    `micro_batch_s`: seconds per micro-batch of this member in this lease (median), None when it computed none.
    `measures`: of the held-out batches that it came to, whatever ended the lease.
    """

    member_id: str
    generation: Generation
    end: LeaseEnd
    next_step: int
    whole: bool
    records: tuple[StepRecord, ...] = ()
    error: str | None = None
    error_step: int | None = None
    micro_batch_s: float | None = None
    measures: tuple[Measure, ...] = ()


@dataclass(frozen=True)
class Heartbeat:
    """Sent several times a second by a thread of the member that does nothing else.

    `progress` counts everything useful (micro-batches, reductions, copies, steps); it never goes back.
    `records` are new step records; only rank 0 of a generation sends them.
    """

    member_id: str
    generation: Generation | None
    phase: Phase
    next_step: int
    progress: int
    micro_batch_s: float | None = None
    records: tuple[StepRecord, ...] = ()


@dataclass(frozen=True)
class ReadyReport:
    """A joiner has built its model, warmed up and may enter between leases.

    `probe` is the digest of the gradient of one fixed micro-batch on the initial weights; `environment` what it may
    depend on (torch build, device, instruction set, threads). Equal bits are checked by the first, explained by the second.
    """

    member_id: str
    node_id: str
    pid: int
    probe: str
    environment: dict[str, str] = field(default_factory=dict)
    startup_s: float = 0.0


@dataclass(frozen=True)
class ReturnReport:
    """What a member holds that served an earlier coordinator: it has left its lease, and waits for the next one.

    `ready` is what it reported after its warm-up; the rest means the same as in a `LeaseReport`.
    """

    ready: ReadyReport
    next_step: int
    whole: bool
    records: tuple[StepRecord, ...] = ()
    micro_batch_s: float | None = None
    evaluations: tuple[Evaluation, ...] = ()
