"""A member of the elastic set: the Ray actor that holds one replica and obeys leases.

All training is in `engine/`; this file gives it a life on a cluster. Threads: Ray's default one runs leases (and whatever
must be ordered with them), the `control` group answers fences at once, the lifeline says that the process lives. A
member never restarts: its replacement is a new member with a new name.

A member outlives its coordinator: it is a detached actor, keeps its state, and goes on with its lease. A successor calls it
by name (`adopt`, `come_back`); from then on it obeys no coordinator of a lower epoch. Without any it ends itself. Invariant:
the order of batches that it trains by is that of the highest epoch it has heard of, and so are its leases. When that order is
another one, because the run has gone back, all that it holds is of no use, and it begins as a new member does.

This module imports no torch: the actor's process shows a sign of life first and imports while it warms up.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from elastic_lm import failpoints
from elastic_lm.protocol import (
    Generation,
    Lease,
    LeaseEnd,
    LeaseReport,
    Phase,
    ReadyReport,
    ReturnReport,
    StepRecord,
)
from elastic_lm.runtime.cluster import NAMESPACE
from elastic_lm.runtime.lifeline import Lifeline
from elastic_lm.runtime.pulse import Pulse
from elastic_lm.runtime.upload import Attempt, Uploads

if TYPE_CHECKING:
    from elastic_lm.checkpoint.layout import Part
    from elastic_lm.data.held_out import HeldOut
    from elastic_lm.data.order import Order
    from elastic_lm.engine.spec import EngineSpec
    from elastic_lm.runtime.window_client import WindowClient
    from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

# A joiner's start-up slowed its neighbours by 10-60 % on two cores at equal priority. Ray starts workers at 15 already.
WARM_UP_NICENESS = 4
LOWEST_PRIORITY = 19


@dataclass(frozen=True)
class Summons:
    """A coordinator's call: what to train, where to send heartbeats, whom to ask for tokens, and how high it stands."""

    owner_epoch: int
    order: Order
    lifeline_address: tuple[str, int]
    lifeline_secret: str
    readers: tuple[Any, ...]
    held_out: HeldOut | None


@dataclass(frozen=True)
class WorkerBoot:
    """All that a worker needs to know before its first lease."""

    member_id: str
    summons: Summons
    orphaned_after_s: float
    spec: EngineSpec
    corpus: str  # its address
    reader_timeout_s: float
    storage_timeout_s: float
    run_storage: Storage
    heartbeat_interval_s: float
    form_timeout_s: float
    failpoints: tuple[str, ...] = ()
    init: tuple[Storage, str] | None = None  # weights to begin from, and their sha256


class LeaseControl:
    """How the coordinator reaches into a running lease: the fence, the vote to end early, and the member's progress."""

    def __init__(self, lease: Lease, member_id: str, pulse: Pulse, lifeline: Lifeline) -> None:
        self.generation = lease.generation
        self._pulse, self._lifeline = pulse, lifeline
        self._tells_records = lease.rank_of(member_id) == 0
        self._works = False
        self._fenced = threading.Event()
        self._end = threading.Event()
        pulse.next_step = lease.start_step

    def fence(self) -> None:
        self._fenced.set()

    def end_early(self) -> None:
        self._end.set()

    def cancelled(self) -> bool:
        return self._fenced.is_set()

    def wants_end(self) -> bool:
        return self._end.is_set()

    def report(self, phase: Phase) -> None:
        """The member has entered `phase`; every call counts as progress."""
        self._pulse.phase = phase
        self._pulse.progress += 1
        if phase is Phase.COMPUTE and not self._works:
            self._works = True
            self._lifeline.beat_now()  # the coordinator measures how long the interruption was

    def committed(self, record: StepRecord, micro_batch_s: float | None) -> None:
        """One more step is applied."""
        self._pulse.next_step = record.step + 1
        self._pulse.micro_batch_s = micro_batch_s
        if self._tells_records:
            self._pulse.tell(record)


class Worker:
    """The actor. Methods of the default group run one at a time, in the order in which the coordinator called them."""

    def __init__(self, boot: WorkerBoot) -> None:
        self._boot = boot
        self._pulse = Pulse(boot.member_id)
        self._obeying = threading.RLock()  # whom it obeys changes in one piece: two threads answer `control` calls
        self._owner_epoch = boot.summons.owner_epoch
        self._order = boot.summons.order
        self._readers = boot.summons.readers
        self._held_out = boot.summons.held_out
        self._held_out_source: Any = None
        self._ready: ReadyReport | None = None
        self._tokens: Any = None  # once it has warmed up
        self._control: LeaseControl | None = None
        self._lowest_generation: Generation | None = None
        self._ending_generation: Generation | None = None
        self._started_at = time.monotonic()
        self._uploads = Uploads(boot.run_storage)
        failpoints.arm(boot.failpoints, boot.member_id)
        self._lifeline = Lifeline(
            boot.summons.lifeline_address,
            boot.summons.lifeline_secret,
            boot.member_id,
            self._pulse.beat,
            interval_s=boot.heartbeat_interval_s,
            orphaned_after_s=boot.orphaned_after_s,
            on_connected=self._pulse.tell_again,
            on_orphaned=lambda: os._exit(1),
        )

    # -- default group: ordered with leases --------------------------------------------------------------------------

    def locate(self) -> tuple[str, int]:
        """Node id and process id, before anything heavy happens."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def warm_up(self) -> ReadyReport:
        """Import torch, build the replica and compute the probe, at low priority: others are training beside us."""
        if self._ready is not None:  # two coordinators asked
            return self._ready
        report: list[ReadyReport | BaseException] = []

        def run() -> None:
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + WARM_UP_NICENESS  # never less than now: that takes rights
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(niceness, LOWEST_PRIORITY))
            try:
                report.append(self._build())
            except BaseException as error:  # noqa: BLE001 - carried to the caller's thread below
                report.append(error)

        # A thread's niceness can be raised but not lowered again, so the low priority ends with the thread.
        thread = threading.Thread(target=run, name="warm-up")
        thread.start()
        thread.join()
        if isinstance(report[0], BaseException):
            raise report[0]
        self._pulse.phase = Phase.WAITING
        self._ready = report[0]
        return report[0]

    def _build(self) -> ReadyReport:
        from elastic_lm.engine.lease import Member
        from elastic_lm.engine.probe import environment, probe
        from elastic_lm.engine.step import Replica, StepRunner

        boot = self._boot
        replica = Replica(boot.spec)
        digest = probe(replica)
        failpoints.hit("warm_up")
        tokens = self._tokens_of(self._order)
        self._member = Member(boot.member_id, StepRunner(replica, tokens), self._restore, boot.form_timeout_s)
        self._use(tokens)
        self._member.initial = None if boot.init is None else self._initial
        node_id, pid = self.locate()
        found = environment(boot.spec.threads, boot.spec.device, compiles=boot.spec.compile)
        return ReadyReport(boot.member_id, node_id, pid, digest, found, startup_s=time.monotonic() - self._started_at)

    def _tokens_of(self, order: Order) -> WindowClient:
        from elastic_lm.runtime.window_client import WindowClient

        boot = self._boot
        return WindowClient(
            order,
            boot.corpus,
            list(self._readers),
            reader_timeout_s=boot.reader_timeout_s,
            storage_timeout_s=boot.storage_timeout_s,
        )

    def _use(self, tokens: WindowClient) -> None:
        self._tokens = tokens
        tokens.set_readers(list(self._readers))  # others may have been told since it was made

    def run_lease(self, lease: Lease) -> LeaseReport:
        """Train as the lease says. Always returns a report; see `engine/lease.py`.

        A lease of a generation that is over is not begun: what this member keeps belongs to a later one.
        """
        from elastic_lm.engine.determinism import prepare
        from elastic_lm.engine.lease import run_lease

        if not self._is_granted(lease.generation):
            return self._refusal(lease)
        prepare(self._boot.spec)  # it is per thread
        if lease.evaluates:
            self._member.held_out = self._source_of_held_out()
        control = LeaseControl(lease, self._boot.member_id, self._pulse, self._lifeline)
        self._pulse.generation = lease.generation
        self._control = control
        # The fence or the vote may have overtaken the lease; either this look or theirs at `_control` sees the other.
        if self._is_over(lease.generation):
            control.fence()
        if self._ending_generation == lease.generation:
            control.end_early()
        report = run_lease(self._member, lease, control)
        if lease.evaluates and self._member.held_out is not None:
            self._held_out_source.rest()
        self._pulse.phase = Phase.WAITING
        return report

    def _source_of_held_out(self) -> Any:
        """Of the batches that the coordinator of now wants: the one before it may have wanted others."""
        from elastic_lm.engine.spec import CAUSAL
        from elastic_lm.runtime.held_out_client import HeldOutClient

        boot, wanted, source = self._boot, self._held_out, self._held_out_source
        if wanted is None:
            return None
        if source is None or source.held_out != wanted:
            is_all_text = boot.spec.objective == CAUSAL
            source = HeldOutClient(boot.corpus, wanted, boot.storage_timeout_s, is_all_text=is_all_text)
        self._held_out_source = source
        return source

    def _is_over(self, generation: Generation) -> bool:
        return self._lowest_generation is not None and generation < self._lowest_generation

    def _is_granted(self, generation: Generation) -> bool:
        """Whether the coordinator that this member obeys has granted it."""
        return generation.owner_epoch == self._owner_epoch and not self._is_over(generation)

    def _refusal(self, lease: Lease) -> LeaseReport:
        state = self._member.state
        return LeaseReport(
            self._boot.member_id, lease.generation, LeaseEnd.FENCED, state.next_step, whole=not state.torn
        )

    def come_back(self, summons: Summons, logged_step: int) -> ReturnReport:
        """As `adopt`, when whatever ran for the earlier coordinator has ended: what this member holds of what it is to train.

        Args: `logged_step`: the event log holds every step before this one.
        """
        self.adopt(summons)  # which may be the first that is heard of it
        ready = self._ready or self.warm_up()
        member, order = self._member, self._order
        if self._tokens.order != order:  # the run has gone back
            tokens = self._tokens_of(order)
            member.start_over(tokens)
            self._use(tokens)
        return ReturnReport(
            ready,
            member.state.next_step,
            whole=not member.state.torn,
            records=tuple(record for record in member.records if record.step >= logged_step),
            micro_batch_s=self._pulse.micro_batch_s,
            evaluations=member.evaluations,
        )

    def _restore(self, step: int, on_part: Callable[[], None]) -> dict[str, Any]:
        """Tensors of the checkpoint at `step`, verified."""
        from elastic_lm.checkpoint import store
        from elastic_lm.runtime.patience import Patience

        control = self._control
        assert control is not None
        patience = Patience(self._boot.storage_timeout_s)
        return patience.outlast(
            f"checkpoint of step {step}",
            lambda _: store.load(self._boot.run_storage, step, on_part=on_part).tensors,
            control.cancelled,
        )

    def _initial(self, on_part: Callable[[], None]) -> dict[str, Any]:
        """The weights that the run begins from, verified."""
        from elastic_lm.errors import ConfigError, DataError
        from elastic_lm.huggingface import initial
        from elastic_lm.model.spec import ModelSpec
        from elastic_lm.runtime.patience import Patience

        control, spec = self._control, self._boot.spec.model
        assert control is not None and self._boot.init is not None and isinstance(spec, ModelSpec)
        folder, digest = self._boot.init
        patience = Patience(self._boot.storage_timeout_s)
        try:
            return patience.outlast(
                "initial weights", lambda _: initial.read(folder, spec, digest, on_part)[0], control.cancelled
            )
        except ConfigError as error:  # it was in order when the run was planned
            raise DataError(str(error)) from error

    def snapshot(self, attempt: Attempt, step: int, share: int, num_shares: int) -> None:
        """Copy a share of the state that is to be saved, and begin to upload it. Ends before the next lease begins."""
        self._uploads.begin(attempt, step, self._member.state, share=share, num_shares=num_shares)

    def digests(self) -> dict[str, str]:
        """sha256 of this replica's state and of its weights alone."""
        state = self._member.state
        return {"state": state.digest(), "weights": state.weights_digest()}

    def holds(self) -> int | None:
        """The step that this replica's state is at; None when it has none."""
        state = self._member.state
        return None if state.torn else state.next_step

    def keep(self, url: str, meta: dict[str, Any]) -> str:
        """Write the whole state as a checkpoint, to a folder of this node.    Returns: the node's address."""
        from elastic_lm.checkpoint import store
        from elastic_lm.storage import Storage

        state = self._member.state
        store.save(Storage.open(url), state.next_step, state.tensors(), {**meta, "digest": self.digests()})
        return str(ray.util.get_node_ip_address())

    # -- other groups: answered while a lease runs --------------------------------------------------------------------

    @ray.method(concurrency_group="save")
    def saved(self, attempt: Attempt) -> tuple[Part, ...]:
        """Wait for the upload of this attempt; returns the parts that are stored."""
        return self._uploads.result(attempt)

    @ray.method(concurrency_group="control")
    def cancel_save(self, attempt: Attempt) -> None:
        """This attempt at a checkpoint was given up."""
        self._uploads.cancel(attempt)

    @ray.method(concurrency_group="control")
    def adopt(self, summons: Summons) -> None:
        """Leave whatever an earlier coordinator wanted, and obey this one from now on."""
        with self._obeying:
            if summons.owner_epoch <= self._owner_epoch:
                return  # called late: it is not the newest
            if summons.order != self._order:  # what was trained by another one is nothing to tell this coordinator of
                self._pulse.first_generation = Generation(summons.owner_epoch, 0)
            self._owner_epoch, self._order, self._held_out = summons.owner_epoch, summons.order, summons.held_out
            self.fence(Generation(summons.owner_epoch, 0))
            self._uploads.cancel((summons.owner_epoch, 0))
            self.set_readers(summons.owner_epoch, summons.readers)
            self._lifeline.move(summons.lifeline_address, summons.lifeline_secret)

    @ray.method(concurrency_group="control")
    def reassure(self) -> None:
        """There is no coordinator at the moment, and there will be one."""
        self._lifeline.reassure()

    @ray.method(concurrency_group="control")
    def fence(self, generation: Generation) -> None:
        """Leave every generation up to and including this one, now."""
        lowest = Generation(generation.owner_epoch, generation.number + 1)
        with self._obeying:
            if self._is_over(lowest):
                return  # by an earlier coordinator, which cannot know of later generations
            self._lowest_generation = lowest
        control = self._control
        if control is not None and control.generation <= generation:
            control.fence()

    @ray.method(concurrency_group="control")
    def end_lease(self, generation: Generation) -> None:
        """Vote in the next reduction to end this generation's lease after that step."""
        self._ending_generation = generation
        control = self._control
        if control is not None and control.generation == generation:
            control.end_early()

    @ray.method(concurrency_group="control")
    def set_readers(self, owner_epoch: int, readers: tuple[Any, ...]) -> None:
        """The readers to ask from now on. They may be replaced while this worker warms up."""
        with self._obeying:
            if owner_epoch < self._owner_epoch:
                return
            self._readers = readers
            if self._tokens is not None:
                self._tokens.set_readers(list(readers))

    @ray.method(concurrency_group="control")
    def leave(self, owner_epoch: int) -> None:
        """End this process in peace, if this is still the coordinator's to decide."""
        if owner_epoch < self._owner_epoch:
            return
        self._lifeline.close()
        os._exit(0)


def start_worker(boot: WorkerBoot, name: str, options: dict[str, Any]) -> Any:
    """Ask Ray for one worker. Returns its handle at once; the actor is placed when there is room for it.

    `name`: under which a later coordinator finds it; it lives on when this one and its job die.
    """
    actor = ray.remote(concurrency_groups={"control": 2, "save": 1})(Worker).options(
        max_restarts=0,
        max_task_retries=0,
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        **options,
    )
    return actor.remote(boot)
