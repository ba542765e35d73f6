"""A cluster that exists only in memory, with a clock of its own: nodes, processes and messages around a real `Control`.

Processes do what real workers do, in the same order: they beat, form a group, copy, compute, reduce and apply, look for
fences between micro-batches, vote for the end of a lease in the sum. Between a complete sum and its update a fence, a
death or a freeze may hit some members and not others, so that their states end up one step apart.

After every action the promises of `control/` are checked against what the processes really are, not against what control
believes: see `_check_*`. A run takes milliseconds, so schedules of faults can be drawn by the hundred.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from elastic_lm.control import actions as act
from elastic_lm.control import events as ev
from elastic_lm.control.controller import Control
from elastic_lm.control.evaluating import fields_of
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import Event, EventKind
from elastic_lm.protocol import (
    Evaluation,
    Generation,
    Heartbeat,
    Lease,
    LeaseEnd,
    LeaseReport,
    Measure,
    Phase,
    ReadyReport,
    ReturnReport,
)

BEAT_S = 0.2
UNRULY_S = 0.05  # how much later than usual a message may come in an unruly cluster
RECONNECT_S = 0.02
START_S = 1_000.0  # monotonic clocks do not begin at 0
Attempt = tuple[int, int]  # at a checkpoint: owner epoch, and the number that its coordinator gave it
WORKING = (Phase.COMPUTE, Phase.REDUCE, Phase.OPTIMIZER)


@dataclass(frozen=True)
class Pace:
    """How long things take. Seconds."""

    micro_batch_s: float = 0.01
    start_s: float = 0.5
    copy_s: float = 0.05
    form_timeout_s: float = 1.0
    reduce_timeout_s: float = 3.0  # the group's own last resort
    save_s: float = 0.2
    log_s: float = 0.1
    message_s: float = 0.004  # the slowest message; the fastest takes a quarter
    tell_death_s: float = 0.03  # until a call to a dead process fails
    tell_lost_node_s: float = 4.0  # the same when its node died with it and no connection was closed
    reap_s: float = 1.0
    more_nodes_s: float = 2.0  # until an unplaced demand brings a new node


@dataclass
class Session:
    """One lease as its members share it: who has come, whose work is in the running sum, whether somebody broke it."""

    lease: Lease
    present: set[str] = field(default_factory=set)
    summed: set[str] = field(default_factory=set)
    voted: bool = False
    broken: bool = False


class Process:
    """One worker. Training and control calls are separate threads: a hang stops the first, a freeze stops both."""

    def __init__(self, cluster: Cluster, member_id: str, avoid_nodes: tuple[str, ...]) -> None:
        self.cluster = cluster
        self.member_id = member_id
        self.avoid_nodes = avoid_nodes
        self.node_id: str | None = None
        self.alive = True
        self.gone = False  # control has killed or retired it
        self.death_told = False
        self.state_told = False  # control has heard that this member has a state
        self.joined = False
        self.frozen = False
        self.still_until = 0.0  # while it is frozen or hung
        self.progress_told: tuple[int, Phase] | None = None
        self.beat_told_at = self.progress_told_at = 0.0
        self.hung = False
        self.micro_batch_s = cluster.pace.micro_batch_s
        self.raises: str | None = None
        self.measures: list[Measure] = []
        self.evaluations: tuple[Evaluation, ...] = ()

        self.whole = False
        self.next_step = 0
        self.content = 0  # stands for the bits of the state

        self.coordinator, self.owner_epoch = cluster.control, cluster.owner_epoch  # whom it obeys, and talks to
        self.returns = False  # a successor waits to hear what it holds
        self.session: Session | None = None
        self.kept: Generation | None = None  # whose group it has not let go of
        self.generation: Generation | None = None
        self.phase = Phase.STARTING
        self.progress = 0
        self.fenced_up_to: Generation | None = None
        self.ending: Generation | None = None
        self.uploading: set[Attempt] = set()
        self._deferred: list[tuple[bool, Callable[[], None]]] = []
        self._delivered_until: dict[bool, float] = {}

    def __repr__(self) -> str:
        return f"{self.member_id}({self.phase}, step {self.next_step}, whole={self.whole}, alive={self.alive})"

    # -- time --------------------------------------------------------------------------------------------------------

    def later(self, delay_s: float, do: Callable[[], None], *, trains: bool = True) -> None:
        self.cluster.at(delay_s, lambda: self._wake(trains, do))

    def _wake(self, trains: bool, do: Callable[[], None]) -> None:
        if not self.alive:
            return
        if self.frozen or (trains and self.hung):
            self._deferred.append((trains, do))
        else:
            do()

    def resume(self) -> None:
        """After a thaw or the end of a hang: everything that was due happens now, in its order."""
        due, self._deferred = self._deferred, []
        for trains, do in due:
            self._wake(trains, do)

    def say(self, event: ev.Input, delay_s: float | None = None) -> None:
        """The lifeline and the answers to calls are two channels; each keeps the order in which it was spoken to.

        In an unruly cluster nothing keeps an order, and some messages come twice.
        """
        cluster, to = self.cluster, self.coordinator
        delay = cluster.latency() if delay_s is None else delay_s
        if cluster.unruly:
            if cluster.random.random() < 0.2:
                cluster.at(cluster.random.uniform(0.0, UNRULY_S), lambda: cluster.tell(event, to))
            cluster.at(delay + cluster.random.uniform(0.0, UNRULY_S), lambda: cluster.tell(event, to))
            return
        channel = isinstance(event, ev.Beat | ev.ConnectionLost | ev.ConnectionRestored)
        until = max(self._delivered_until.get(channel, 0.0), cluster.now + delay)
        self._delivered_until[channel] = until
        cluster.at(until - cluster.now, lambda: cluster.tell(event, to))

    # -- life --------------------------------------------------------------------------------------------------------

    def start(self, node_id: str) -> None:
        self.node_id = node_id
        pace, jitter = self.cluster.pace, self.cluster.random.uniform(0.8, 1.2)
        self.later(0.05, lambda: self.say(ev.MemberStarted(self.member_id, node_id, 4_000)), trains=False)
        self.later(0.06, self._beat, trains=False)
        self.later(pace.start_s * jitter, self._ready)

    def _ready(self) -> None:
        assert self.node_id is not None
        self.phase, self.joined = Phase.WAITING, True
        if self.returns:
            self.come_back()
            return
        self.say(ev.MemberReady(ReadyReport(self.member_id, self.node_id, 4_000, probe="same", startup_s=1.0)))

    def _beat(self) -> None:
        self.beat_now()
        self.later(BEAT_S, self._beat, trains=False)

    def beat_now(self) -> None:
        pace = self.micro_batch_s if self.progress else None
        self.say(ev.Beat(Heartbeat(self.member_id, self.generation, self.phase, self.next_step, self.progress, pace)))

    def blip(self) -> None:
        """The network cuts the lifeline of a living process, which connects anew at once."""
        if self.alive:
            self.say(ev.ConnectionLost(self.member_id))
            self.later(RECONNECT_S, lambda: self.say(ev.ConnectionRestored(self.member_id)), trains=False)

    def die(self, *, closes_connection: bool = True) -> None:
        """`closes_connection`: the kernel lives and tells; otherwise its whole node is gone without a word."""
        if not self.alive:
            return
        self.alive = False
        if self.session is not None:
            self.cluster.break_session(self.session)
        self.cluster.free_slot(self)
        pace = self.cluster.pace
        if closes_connection:
            self.say(ev.ConnectionLost(self.member_id))
        else:
            self.say(ev.MemberFailed(self.member_id, "process unreachable", proof=False))
        for epoch, number in sorted(
            self.uploading
        ):  # calls that wait for an upload fail as all others do, sooner or later
            if epoch == self.owner_epoch:
                self.say(ev.Saved(number, self.member_id, ok=False, error="process died", lost=True))
        proof = ev.MemberFailed(self.member_id, "process died", proof=True)
        self.say(proof, pace.tell_death_s if closes_connection else pace.tell_lost_node_s)
        self.cluster.lost(self)

    # -- what control asks for ---------------------------------------------------------------------------------------

    def adopt(self, coordinator: Control, owner_epoch: int) -> None:
        """Leave the lease, talk to this coordinator, and tell it what is here when nothing runs any more."""
        if owner_epoch <= self.owner_epoch:
            return  # called late
        self.coordinator, self.owner_epoch = coordinator, owner_epoch
        self.fence(Generation(owner_epoch, 0))
        self.returns = True
        self.beat_now()
        self.come_back()

    def come_back(self) -> None:
        if not self.returns or self.session is not None or not self.joined:
            return  # called again when that is over
        self.returns = False
        assert self.node_id is not None
        ready = ReadyReport(self.member_id, self.node_id, 4_000, probe="same", startup_s=1.0)
        pace = self.micro_batch_s if self.progress else None
        returned = ReturnReport(ready, self.next_step, self.whole, micro_batch_s=pace, evaluations=self.evaluations)
        self.say(ev.MemberReturned(returned))

    def fence(self, generation: Generation) -> None:
        if self.fenced_up_to is not None and generation < self.fenced_up_to:
            return  # by a coordinator that is none any more
        self.fenced_up_to = generation
        session = self.session
        if session is not None and self._is_fenced():
            look_s = self.micro_batch_s if self.phase in (Phase.COMPUTE, Phase.EVALUATING) else 0.002
            self.later(self.cluster.random.uniform(0, look_s), lambda: self._leave_if_in(session, LeaseEnd.FENCED))

    def end_lease(self, generation: Generation) -> None:
        self.ending = generation

    def save(self, attempt: Attempt, step: int) -> None:
        cluster, number = self.cluster, attempt[1]
        assert self.session is None and self.whole and self.next_step == step, f"{self} cannot save step {step}"
        content = self.content

        def uploaded() -> None:
            if attempt not in self.uploading:
                return
            self.uploading.discard(attempt)
            if attempt[0] != self.owner_epoch:
                return
            if cluster.num_failing_saves > 0:
                cluster.num_failing_saves -= 1
                self.say(ev.Saved(number, self.member_id, ok=False, error="the store is full"))
                return
            cluster.shares.setdefault(attempt, {})[self.member_id] = content
            self.say(ev.Saved(number, self.member_id, ok=True))

        for earlier in sorted(self.uploading):
            self.cancel_save(earlier)
        self.uploading.add(attempt)
        self.later(cluster.store_s(cluster.pace.save_s), uploaded, trains=False)

    def cancel_save(self, attempt: Attempt) -> None:
        if attempt in self.uploading:
            self.uploading.discard(attempt)
            if attempt[0] == self.owner_epoch:  # otherwise nobody waits for it any more
                self.say(ev.Saved(attempt[1], self.member_id, ok=False, error="the upload was given up"))

    # -- a lease -----------------------------------------------------------------------------------------------------

    def begin(self, session: Session) -> None:
        lease = session.lease
        if self.fenced_up_to is not None and lease.generation <= self.fenced_up_to:
            self.cluster.break_session(session)
            report = LeaseReport(self.member_id, lease.generation, LeaseEnd.FENCED, self.next_step, self.whole)
            self.say(ev.Reported(report))
            return
        assert self.session is None, f"{self} got a lease while it holds one"
        self.session, self.generation = session, lease.generation
        self.measures, self.evaluations = [], lease.evaluations
        if lease.evaluates:
            self._evaluate(session)
        elif self.whole or self._receives():
            self._form()
        else:
            self._enter(Phase.COPYING)
            self.later(self.cluster.pace.copy_s, lambda: self._restored(session))

    def _receives(self) -> bool:
        assert self.session is not None
        return self.session.lease.rank_of(self.member_id) in self.session.lease.receivers

    def _is_fenced(self) -> bool:
        assert self.generation is not None
        return self.fenced_up_to is not None and self.generation <= self.fenced_up_to

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self.progress += 1

    def _restored(self, session: Session) -> None:
        if self.session is not session:
            return
        step = session.lease.restore
        if self.cluster.is_damaged(step):
            self._leave(LeaseEnd.UNRESTORABLE, f"the checkpoint of step {step} is damaged")
            return
        self.content = 0 if step is None else self.cluster.checkpoints[step]
        self.whole, self.next_step = True, step or 0
        self.cluster.got_whole(self)
        self._form()

    def _form(self) -> None:
        session = self.session
        assert session is not None
        kept, self.kept = self.kept, None
        if session.lease.continues is not None:
            assert kept == session.lease.continues, f"{self} is to go on in {session.lease.continues} and has {kept}"
            self._train(session)
            return
        if self._is_fenced():
            self._leave(LeaseEnd.FENCED)
            return
        self._enter(Phase.FORMING)
        session.present.add(self.member_id)
        if session.broken:
            self._notice(session)
        elif len(session.present) == session.lease.world_size:
            for member in self.cluster.team(session):
                member.later(self.cluster.latency(), lambda m=member: m._formed(session))  # type: ignore[misc]
        else:
            self.later(self.cluster.pace.form_timeout_s, lambda: self._give_up_forming(session))

    def _give_up_forming(self, session: Session) -> None:
        if self.session is session and self.phase is Phase.FORMING:
            self._leave(LeaseEnd.BROKEN)

    def _formed(self, session: Session) -> None:
        if self.session is not session or self.phase is not Phase.FORMING:
            return
        if not self._receives():
            self._train(session)
            return
        self._enter(Phase.COPYING)
        self.whole = False
        self.cluster.lost_state()
        self.later(self.cluster.pace.copy_s, lambda: self._received(session))

    def _received(self, session: Session) -> None:
        if self.session is not session:
            return
        assert session.lease.source is not None
        source = self.cluster.processes[session.lease.members[session.lease.source]]
        if session.broken or source.session is not session:
            self._leave(LeaseEnd.BROKEN)
            return
        assert source.whole and source.next_step == session.lease.start_step, f"{source} gave another state"
        self.whole, self.next_step, self.content = True, source.next_step, source.content
        self._train(session)

    def _train(self, session: Session) -> None:
        lease = session.lease
        assert self.whole and lease.start_step <= self.next_step <= lease.stop_step, f"{self} cannot train {lease}"
        if self._is_fenced():
            self._leave(LeaseEnd.FENCED)
        elif not lease.trains and lease.source == lease.rank_of(self.member_id):
            self._see_off(session)
        elif self.next_step == lease.stop_step:
            self._leave(LeaseEnd.COMPLETED)
        elif self.raises is not None:
            error, self.raises = self.raises, None
            self._leave(LeaseEnd.RAISED, error)
        else:
            self._enter(Phase.COMPUTE)
            if self.next_step == lease.start_step:
                self.beat_now()
            mine = lease.assignments[lease.rank_of(self.member_id)]
            self.later(len(mine) * self.micro_batch_s + 0.001, lambda: self._contribute(session))

    def _see_off(self, session: Session) -> None:
        """A source stays until all have its state."""
        lease = session.lease
        if self.session is not session:
            return
        if self._is_fenced():
            self._leave(LeaseEnd.FENCED)
        elif all(self.cluster.processes[lease.members[rank]].whole for rank in lease.receivers):
            self._leave(LeaseEnd.COMPLETED)
        elif session.broken and self.cluster.random.random() < 0.7:
            self._leave(LeaseEnd.BROKEN)
        else:
            self.phase = Phase.REDUCE
            self.later(0.01, lambda: self._see_off(session))

    def _evaluate(self, session: Session) -> None:
        """One batch, and those behind it."""
        lease = session.lease
        if self.session is not session:
            return
        assert self.whole and self.next_step == lease.start_step, f"{self} cannot evaluate at {lease.start_step}"
        mine = lease.assignments[lease.rank_of(self.member_id)]
        if self._is_fenced():
            self._leave(LeaseEnd.FENCED)
        elif len(self.measures) == len(mine):
            self._leave(LeaseEnd.COMPLETED)
        elif self.ending == self.generation and self.measures:
            self._leave(LeaseEnd.ENDED_EARLY)
        elif self.raises is not None:
            error, self.raises = self.raises, None
            self._leave(LeaseEnd.RAISED, error)
        else:
            self._enter(Phase.EVALUATING)
            batch = mine[len(self.measures)]
            self.later(self.micro_batch_s, lambda: self._measured(session, batch))

    def _measured(self, session: Session, batch: int) -> None:
        if self.session is session:
            self.measures.append(measure_of(self.content, batch))
            self._evaluate(session)

    def _contribute(self, session: Session) -> None:
        if self.session is not session:
            return
        if self._is_fenced():
            self._leave(LeaseEnd.FENCED)
            return
        self._enter(Phase.REDUCE)
        if session.broken:
            self._notice(session)
            return
        session.voted |= self.ending == self.generation
        session.summed.add(self.member_id)
        if len(session.summed) == session.lease.world_size:
            self._complete(session)
        else:
            progress = self.progress
            self.later(self.cluster.pace.reduce_timeout_s, lambda: self._give_up_reducing(session, progress))

    def _give_up_reducing(self, session: Session, progress: int) -> None:
        if self.session is session and self.progress == progress:
            self._leave(LeaseEnd.BROKEN)

    def _complete(self, session: Session) -> None:
        """The sum is there; each member applies it in its own time, or is stopped before it does."""
        team = self.cluster.team(session)
        assert len({(m.next_step, m.content) for m in team}) == 1, f"members with different states reduce: {team}"
        session.summed.clear()
        voted = session.voted
        for member in team:
            delay = self.cluster.random.uniform(0.0, 0.005)
            member.later(delay, lambda m=member: m._apply(session, voted))  # type: ignore[misc]

    def _apply(self, session: Session, voted: bool) -> None:
        if self.session is not session:
            return
        self.cluster.commits(self)
        self._enter(Phase.OPTIMIZER)
        if voted:
            self._leave(LeaseEnd.ENDED_EARLY)
        else:
            self._train(session)

    def notice(self, session: Session) -> None:
        """A peer is gone. Who waits for the others learns it sooner or later; who computes, when it is done."""
        if self.session is session and self.phase in (Phase.FORMING, Phase.COPYING, Phase.REDUCE):
            self._notice(session)

    def _notice(self, session: Session) -> None:
        if self.cluster.random.random() < 0.7:  # otherwise it hangs until it is fenced
            delay = self.cluster.random.uniform(0.0, 0.02)
            self.later(delay, lambda: self._leave_if_in(session, LeaseEnd.BROKEN))

    def _leave_if_in(self, session: Session, end: LeaseEnd) -> None:
        if self.session is session:
            self._leave(end)

    def _leave(self, end: LeaseEnd, error: str | None = None) -> None:
        session = self.session
        assert session is not None
        self.session, self.phase = None, Phase.WAITING
        if not session.lease.evaluates:
            self.kept = session.lease.generation if end.agreed else None
        if self.returns:
            if not end.agreed:
                self.cluster.break_session(session)
            self.later(0.0, self.come_back)
            return
        if not end.agreed:
            self.cluster.break_session(session)
        at_step = None if error is None else self.next_step
        self.say(
            ev.Reported(
                LeaseReport(
                    self.member_id,
                    session.lease.generation,
                    end,
                    self.next_step,
                    self.whole,
                    error=error,
                    error_step=at_step,
                    micro_batch_s=self.micro_batch_s,
                    measures=tuple(self.measures),
                )
            )
        )


class Cluster:
    """Nodes, processes, a clock and one run. Everything is a function of the arguments and of what is done to it."""

    def __init__(
        self,
        spec: ControlSpec,
        *,
        nodes: dict[str, int],
        seed: int = 0,
        pace: Pace = Pace(),
        resume_step: int | None = None,
        unruly: bool = False,
    ) -> None:
        self.spec, self.pace, self.unruly = spec, pace, unruly
        self.owner_epoch = 0
        self.random = random.Random(seed)
        self.now = START_S
        self._contents = [0]
        self.control = Control(spec, resume_step=resume_step)
        self.processes: dict[str, Process] = {}
        self.slots = dict(nodes)  # free ones
        self.head = next(iter(self.slots), None)  # where the coordinator is, as far as drains go
        self.draining: set[str] = set()
        self.checkpoints: dict[int, int] = {} if resume_step is None else {resume_step: self.content_of(resume_step)}
        self.shares: dict[Attempt, dict[str, int]] = {}  # of checkpoints that are being written: owner -> content
        self.saves: dict[Attempt, act.SaveCheckpoint] = {}
        self.publishing: dict[Attempt, int] = {}  # those that are not given up, and their steps
        self.saved = {*self.checkpoints}  # those that control has heard of
        self.num_failing_saves = 0
        self.num_stalled_writes = 0  # shares and manifests that are stored only after `stall_s`
        self.stall_s = 100.0
        self.damaged: dict[int, bool] = {}  # checkpoints that are or were, by step; False: replaced, or found to be
        self.resume_step = resume_step

        self.verdict: act.Verdict | None = None
        self.events: list[Event] = []
        self.num_messages: Counter[str] = Counter()  # to members, by kind; a lease for ten members is ten
        self.leases: list[Lease] = []
        self.head: int | None = None  # the newest state that a living member of the run has
        self.commits_of_head: list[int] = []  # steps in the order in which the head passed them
        self.restores: list[int] = []  # steps at which a run that had lost every state went on
        self.num_catch_ups = 0  # leases for those behind only
        self.logged: dict[int, Event] = {}  # evaluations that the log holds, by step
        self.unlogged: list[Event] = []  # those that this coordinator has told and not stored yet

        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._node_numbers = itertools.count()
        self._unplaced: list[Process] = []
        self._reported: set[str] = set()
        self._at_step: list[tuple[int, Callable[[], None]]] = []
        self._history: list[tuple[str, int]] = []  # what became of the head
        self._silent_until = 0.0  # there is no coordinator
        self._deaf_until = 0.0
        self._unheard: list[tuple[ev.Input, Control | None]] = []

    # -- the clock ---------------------------------------------------------------------------------------------------

    def at(self, delay_s: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay_s, next(self._order), do))

    def when_head_reaches(self, step: int, do: Callable[[], None]) -> None:
        """Once; step 0 is reached from the beginning."""
        if step == 0:
            self.at(0.0, do)
        else:
            self._at_step.append((step, do))

    def latency(self) -> float:
        return self.random.uniform(self.pace.message_s / 4, self.pace.message_s)

    def run(self, *, limit_s: float, until: Callable[[], bool] = lambda: False) -> None:
        """Until there is a verdict, or `until`.    Raises: AssertionError after `limit_s` or when a promise breaks."""
        end = self.now + limit_s
        while self.verdict is None and not until():
            deadline = max(self.control.next_deadline(self.now), self._deaf_until, self._silent_until)
            assert min(self.now, deadline) < end, f"nothing came of it in {limit_s} s: {self.control.status()}"
            if self._queue and self._queue[0][0] <= deadline:
                self.now, _, do = heapq.heappop(self._queue)
                do()
            else:
                self.now = max(self.now, deadline)
                self.tell(ev.Tick())

    def tell(self, event: ev.Input, to: Control | None = None) -> None:
        """One event for control, and what it does about it. `to`: for this one alone, which may be none any more."""
        if (to is not None and to is not self.control) or self.now < self._silent_until:
            return
        if self.now < self._deaf_until:
            self._unheard.append((event, to))
            return
        if self.verdict is not None:
            return
        self._note_what_is_told(event)
        for action in self.control.handle(event, self.now):
            assert self.verdict is None, f"{action} after {self.verdict}"
            self._perform(action)

    def _note_what_is_told(self, event: ev.Input) -> None:
        """What control may know from now on: the promises are judged by this, not by what it could not know."""
        match event:
            case ev.Reported(report):
                self.processes[report.member_id].state_told = report.whole
                if self.leases and report.generation == self.leases[-1].generation:
                    self._reported.add(report.member_id)
            case ev.MemberReturned(report):
                for evaluation in report.evaluations:  # what whoever keeps the log does with those that it lacks
                    if evaluation.step not in {*self.logged, *(told.step for told in self.unlogged)}:
                        self._tell_evaluation(
                            Event(EventKind.EVALUATED, "", evaluation.step, fields=fields_of(evaluation))
                        )
                self.processes[report.ready.member_id].state_told = report.whole
                self._reported.add(report.ready.member_id)
            case ev.ConnectionLost(member_id):
                self.processes[member_id].death_told = True
            case ev.MemberFailed(member_id, _, proof):
                self.processes[member_id].death_told |= proof
            case ev.ConnectionRestored(member_id):
                self.processes[member_id].death_told = False
            case ev.Beat(beat):
                process = self.processes[beat.member_id]
                process.death_told = False
                process.beat_told_at = self.now
                if process.progress_told != (beat.progress, beat.phase):
                    process.progress_told, process.progress_told_at = (beat.progress, beat.phase), self.now
                process.state_told |= beat.generation == process.generation and beat.phase in WORKING
            case ev.Published(number, ok):
                if ok:
                    self.saved.add(self.saves[self.owner_epoch, number].step)

    # -- what can happen ---------------------------------------------------------------------------------------------

    def living(self) -> list[Process]:
        """Members of the run whose processes live, the eldest first."""
        return [p for p in self.processes.values() if p.alive and not p.gone and p.node_id is not None]

    def freeze(self, process: Process, for_s: float) -> None:
        self._stand_still(process, for_s)
        process.frozen = True

    def hang(self, process: Process, for_s: float) -> None:
        """It beats and makes no progress."""
        self._stand_still(process, for_s)
        process.hung = True

    def _stand_still(self, process: Process, for_s: float) -> None:
        """Of two such faults that overlap the later end counts."""
        process.still_until = max(process.still_until, self.now + for_s)
        self.at(for_s, lambda: self._thaw(process))

    def _thaw(self, process: Process) -> None:
        if self.now < process.still_until:
            return
        process.frozen = process.hung = False
        process.resume()

    def put_coordinator_to_sleep(self, for_s: float) -> None:
        """Control hears nothing for a while; then it is told how long, and everything that was said meanwhile."""
        if self.now < self._silent_until:
            return  # there is none
        self._deaf_until, sleeper = self.now + for_s, self.control
        self.at(for_s, lambda: self._wake_coordinator(for_s, sleeper))

    def _wake_coordinator(self, slept_s: float, sleeper: Control) -> None:
        self.tell(ev.CoordinatorSlept(slept_s), sleeper)
        unheard, self._unheard = self._unheard, []
        for event, to in unheard:
            self.tell(event, to)

    def replace_coordinator(self, after_s: float) -> None:
        """It dies; another begins after a while, with what storage knows, and calls every process that seems to live."""
        self.control = Control(self.spec)  # nobody is told anything, and it is never asked
        self._deaf_until = 0.0
        self._unheard = []
        self._silent_until = self.now + after_s
        self.at(after_s, self._succeed)

    def _succeed(self) -> None:
        if self.now < self._silent_until:
            return  # the one that follows died too
        self._deaf_until, self._unheard = 0.0, []  # of one before that was put to sleep, should there be two successors
        epoch = self.owner_epoch = self.owner_epoch + 1
        self.saved, self.publishing, self.unlogged = {*self.checkpoints}, {}, []
        newest = max(self.checkpoints, default=None)
        control = self.control = Control(
            self.spec,
            resume_step=newest,
            owner_epoch=epoch,
            first_number=len(self.processes),
            evaluated=self.logged,
        )
        for node_id in self.draining:
            self.tell(ev.NodeDraining(node_id, 0.0, hosts_us=node_id == self.head))
        for process in [p for p in self.processes.values() if not p.gone]:
            if process in self._unplaced:
                self._kill(process)
            elif process.alive:
                assert process.node_id is not None
                process.state_told, process.death_told = process.whole, False
                self.tell(ev.MemberFound(process.member_id, process.node_id, 4_000))
                process.later(self.latency(), lambda p=process: p.adopt(control, epoch), trains=False)  # type: ignore[misc]
            else:
                process.gone = True

    def add_node(self, num_slots: int) -> None:
        self.slots[f"added{next(self._node_numbers)}"] = num_slots
        self._place()

    def drain_node(self, node_id: str) -> None:
        self.draining.add(node_id)
        self.tell(ev.NodeDraining(node_id, 0.0, hosts_us=node_id == self.head))

    def kill_node(self, node_id: str) -> None:
        """Its processes die and nobody is told of closed connections."""
        self.slots.pop(node_id, None)
        for process in [p for p in self.processes.values() if p.node_id == node_id]:
            process.die(closes_connection=False)

    # -- placing -----------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        for process in list(self._unplaced):
            usable = [
                n for n, free in self.slots.items() if free and n not in process.avoid_nodes and n not in self.draining
            ]
            if usable:
                node_id = max(usable, key=lambda n: self.slots[n])
                self.slots[node_id] -= 1
                self._unplaced.remove(process)
                process.start(node_id)

    def _scale_up(self, process: Process) -> None:
        if process in self._unplaced:
            self.add_node(1)

    def free_slot(self, process: Process) -> None:
        if process.node_id in self.slots:
            self.slots[process.node_id] += 1
            self._place()

    # -- actions -----------------------------------------------------------------------------------------------------

    def _perform(self, action: act.Action) -> None:
        self.num_messages[type(action).__name__] += _num_addressed(action)
        match action:
            case act.StartMember(member_id, avoid_nodes):
                assert member_id not in self.processes, f"{member_id} is started a second time"
                process = self.processes[member_id] = Process(self, member_id, avoid_nodes)
                self._unplaced.append(process)
                self._place()
                self.at(self.pace.more_nodes_s, lambda: self._scale_up(process))
            case act.KillMember(member_id):
                self._kill(self.processes[member_id])
            case act.Retire(member_id):
                process = self._member(member_id)
                self._give_up(process)
                process.later(0.01, process.die, trains=False)
            case act.Fence(member_ids, generation):
                for process in map(self._member, member_ids):
                    process.later(self.latency(), lambda p=process: p.fence(generation), trains=False)  # type: ignore[misc]
            case act.Grant(lease):
                self._grant(lease)
            case act.EndLease(generation, member_ids):
                for process in map(self._member, member_ids):
                    process.later(self.latency(), lambda p=process: p.end_lease(generation), trains=False)  # type: ignore[misc]
            case act.AskAfterNode(node_id):
                if node_id not in self.slots:
                    self.at(self.pace.message_s, lambda: self.tell(ev.NodeLost(node_id)))
            case act.SaveCheckpoint(number, member_ids, step):
                attempt = self.owner_epoch, number
                assert attempt not in self.saves and member_ids
                assert self.spec.exact or len(member_ids) == 1, "with fast sums the shares of several are not one state"
                self.saves[attempt] = action
                for process in map(self._member, member_ids):
                    process.later(self.pace.message_s / 4, lambda p=process: p.save(attempt, step))  # type: ignore[misc]
            case act.PublishCheckpoint(number):
                attempt = self.owner_epoch, number
                self.publishing[attempt] = self.saves[attempt].step
                self.at(self.store_s(self.pace.save_s / 4), lambda: self._publish(attempt))
            case act.FindCheckpoint():
                self.at(self.store_s(self.pace.save_s), lambda asking=self.control: self._find(asking))  # type: ignore[misc]
            case act.AbandonCheckpoint(number, member_ids):
                attempt = self.owner_epoch, number
                self.publishing.pop(attempt, None)
                for process in map(self._member, member_ids):
                    process.later(self.latency(), lambda p=process: p.cancel_save(attempt), trains=False)  # type: ignore[misc]
            case act.Emit(event):
                self.events.append(event)
                if event.kind is EventKind.EVALUATED:
                    self._tell_evaluation(event)
            case act.Finish(verdict):
                self.verdict = verdict
                self._log(self.owner_epoch)

    def _tell_evaluation(self, event: Event) -> None:
        self.unlogged.append(event)
        self.at(self.store_s(self.pace.log_s), lambda epoch=self.owner_epoch: self._log(epoch))  # type: ignore[misc]

    def _log(self, epoch: int) -> None:
        """The coordinator's own work, which dies with it."""
        if epoch != self.owner_epoch or self.now < self._silent_until:
            return
        for event in self.unlogged:
            assert event.step is not None and event.step not in self.logged, f"{event} is logged a second time"
            self.logged[event.step] = event
        self.unlogged = []

    def store_s(self, usual_s: float) -> float:
        """How long the store takes for what is written now."""
        if self.num_stalled_writes > 0:
            self.num_stalled_writes -= 1
            return self.stall_s
        return usual_s * self.random.uniform(0.5, 1.5)

    def _publish(self, attempt: Attempt) -> None:
        """The coordinator's own work, so it is told even to one that is deaf to its members, and dies with it."""
        if attempt[0] != self.owner_epoch or self.now < self._silent_until:
            return
        save, shares = self.saves[attempt], self.shares[attempt]
        assert shares.keys() == set(save.member_ids), f"{save} is published with the shares of {sorted(shares)}"
        self._log(attempt[0])  # a checkpoint counts when the log holds all that came before it
        (self.checkpoints[save.step],) = set(shares.values())
        self._mend(save.step)
        self.publishing.pop(attempt, None)
        self.tell(ev.Published(save.number, ok=True))

    def damage(self) -> None:
        """The newest checkpoint; each step's at most once, for one that is damaged again and again ends a run."""
        if self.checkpoints and (step := max(self.checkpoints)) not in self.damaged:
            self.damaged[step] = True

    def _mend(self, step: int) -> None:
        if step in self.damaged:
            self.damaged[step] = False

    def _find(self, asking: Control) -> None:
        """The coordinator's own work, too: what is damaged is set aside."""
        if asking is not self.control or self.now < self._silent_until:
            return
        gone = [step for step in self.checkpoints if self.is_damaged(step)]
        for step in gone:
            del self.checkpoints[step]
            self.saved.discard(step)
            self._mend(step)
        told = tuple(f"passing over the checkpoint of step {step}" for step in gone)
        self.tell(ev.CheckpointFound(max(self.checkpoints, default=None), told))

    def is_damaged(self, step: int | None) -> bool:
        return step is not None and self.damaged.get(step, False)

    def _member(self, member_id: str) -> Process:
        """No action but another kill names a member that is gone."""
        process = self.processes[member_id]
        assert not process.gone, f"{member_id} is gone and still asked for something"
        return process

    def _kill(self, process: Process) -> None:
        if process.gone:
            return
        self._give_up(process)
        if process in self._unplaced:
            self._unplaced.remove(process)
        self.at(self.pace.reap_s if process.frozen else self.latency(), process.die)

    def _give_up(self, process: Process) -> None:
        """A whole state is let go only when its death was told, when another is not known to be lost, or after patience."""
        process.gone = True
        if process.whole and process.state_told and process.alive and not process.death_told:
            others = [p for p in self.processes.values() if p.whole and not p.gone and not p.death_told]
            told_at = min(process.beat_told_at, process.progress_told_at)
            stands_still = self.now < process.still_until + 2 * UNRULY_S  # or has just come back, and is not heard yet
            was_still_s = self.now - told_at if stands_still else 0.0
            waited = was_still_s >= self.spec.progress_timeout_s - BEAT_S
            assert others or waited, f"{process} holds the last state and was given up"
        self.lost(process)

    def _grant(self, lease: Lease) -> None:
        members = [self._member(m) for m in lease.members]
        self._check_order(lease)
        self._check_split(lease)
        self._check_states(lease, members)
        self.leases.append(lease)
        self._reported.clear()
        session = Session(replace(lease, evaluations=tuple(map(_evaluation_of, self.unlogged))))
        for process in members:
            process.progress_told_at = self.now
            if process.alive:
                process.later(self.pace.message_s / 2, lambda p=process: p.begin(session))  # type: ignore[misc]
            else:
                session.broken = True

    # -- what must hold ----------------------------------------------------------------------------------------------

    def _check_order(self, lease: Lease) -> None:
        if not self.leases:
            return
        last = self.leases[-1]
        assert lease.generation > last.generation
        owing = [m for m in last.members if m not in self._reported and not self.processes[m].gone]
        assert not owing, f"{lease.generation} is granted while {owing} may still work in {last.generation}"

    def _check_split(self, lease: Lease) -> None:
        assert len(lease.assignments) == lease.world_size == len(set(lease.members))
        mine = sorted(itertools.chain(*lease.assignments))
        if lease.evaluates:
            assert mine and len(set(mine)) == len(mine) and set(mine) <= set(range(self.spec.num_held_out_batches))
        else:
            assert mine == list(range(self.spec.num_micro_batches))

    def _check_states(self, lease: Lease, members: list[Process]) -> None:
        """Who has a state has the one that the lease starts from; who lacks it gets it; the newest one is not passed by."""
        receivers = [members[rank] for rank in lease.receivers]
        if self.spec.exact:
            assert not any(p.whole and p.alive for p in receivers), f"a whole state is overwritten: {receivers}"
        if lease.source is None:
            assert not receivers
        else:
            source = members[lease.source]
            assert source.whole and source.next_step == lease.start_step and source not in receivers
        others = [p for p in members if p not in receivers and p.alive]
        restoring = [p for p in others if not p.whole]
        assert all(p.next_step == lease.start_step for p in others if p.whole), f"{others} at {lease.start_step}"
        elsewhere = [p for p in self.living() if p.whole and p.next_step > lease.start_step]
        if restoring:
            assert len(restoring) == len(others), f"{restoring} restore beside whole members {others}"
            assert self.head is None, f"a checkpoint is restored while the state of step {self.head} lives"
            assert lease.start_step == (lease.restore or 0) == max(self.saved, default=0)
            assert all(step <= lease.start_step for step in self.publishing.values()), (
                "a newer one was about to be complete"
            )
        elif elsewhere:  # a lease below the head: only those behind, only what they lack, only with exact sums
            assert self.spec.exact and lease.stop_step == lease.start_step + 1
            assert not set(lease.members) & {p.member_id for p in elsewhere}
            self.num_catch_ups += 1

    def commits(self, process: Process) -> None:
        """`process` applies its next step. The head passes every step once; others may follow, none may jump ahead."""
        step = process.next_step
        process.content = _next_content(process.content, step, None if self.spec.exact else process.generation)
        process.next_step += 1
        if process.gone:
            return
        if self.spec.exact:
            assert process.content == self.content_of(process.next_step), f"{process} has other bits"
        assert self.head is not None and step <= self.head, f"{process} applied a step that nobody was at"
        if step < self.head:
            return
        self.head = step + 1
        self.commits_of_head.append(step)
        self._history.append(("commit", step))
        for _, do in [entry for entry in self._at_step if entry[0] <= self.head]:
            self.at(0.0, do)
        self._at_step = [entry for entry in self._at_step if entry[0] > self.head]

    def got_whole(self, process: Process) -> None:
        if process.gone:
            return
        if self.head is None:
            self.restores.append(process.next_step)
            self._history.append(("restore", process.next_step))
        self.head = max(process.next_step, self.head or 0)

    def lost(self, process: Process) -> None:
        if process.whole and process.next_step == self.head:
            self.lost_state()

    def lost_state(self) -> None:
        """Some state is not there any more: the head is the newest of those that are left."""
        newest = max((p.next_step for p in self.processes.values() if p.whole and p.alive and not p.gone), default=None)
        if newest != self.head:
            assert self.head is not None and (newest is None or newest < self.head)
            self.head = newest
            if newest is not None:
                self._history.append(("lost", newest))

    def team(self, session: Session) -> list[Process]:
        return [self.processes[m] for m in session.lease.members if self.processes[m].session is session]

    def break_session(self, session: Session) -> None:
        if not session.broken:
            session.broken = True
            for process in self.team(session):
                process.notice(session)

    def content_of(self, step: int) -> int:
        """The state at `step` of a run with exact sums, whatever happens to it."""
        while len(self._contents) <= step:
            self._contents.append(_next_content(self._contents[-1], len(self._contents) - 1, None))
        return self._contents[step]

    # -- at the end --------------------------------------------------------------------------------------------------

    def check_history(self) -> None:
        """The head passed step after step up to the verdict's; it went back only when those ahead were lost.

        A restore may bring back what it was at before: a checkpoint that was given up may be complete after all.
        """
        expected = furthest = self.resume_step or 0
        for what, step in self._history:
            if what == "commit":
                assert step == expected, f"step {step} instead of {expected}: {self._history}"
                expected, furthest = step + 1, max(step + 1, furthest)
            else:
                limit = furthest if what == "restore" else expected
                assert step <= limit, f"the head went from {expected} to {step} by {what}: {self._history}"
                expected = step
        assert self.verdict is not None
        if self.verdict.kind == "done":
            assert self.verdict.step == expected == self.spec.total_steps
            assert self.spec.total_steps in self.saved
            self._check_evaluations()

    def _check_evaluations(self) -> None:
        """Each that was due was told once, of the state that was there: with exact sums that is one state."""
        every, first = self.spec.evaluate_every, self.resume_step or 0
        if every is None:
            return
        due = {s for s in range(max(1, first), self.spec.total_steps) if s % every == 0} | {self.spec.total_steps}
        left_out = {event.step for event in self.events if " is left out: " in event.message}
        assert due - left_out <= self.logged.keys() <= due, (
            f"evaluated at {sorted(self.logged)} instead of {sorted(due)}"
        )
        for step, event in self.logged.items() if self.spec.exact else ():
            measures = [measure_of(self.content_of(step), batch) for batch in range(self.spec.num_held_out_batches)]
            assert event.fields["loss"] == Evaluation.of(step, measures).loss, f"another loss at step {step}"

    def kinds(self) -> Counter[EventKind]:
        return Counter(event.kind for event in self.events)


def _next_content(content: int, step: int, generation: Generation | None) -> int:
    """With fast sums the bits of a step depend on who computed it."""
    return hash((content, step, generation))


def _evaluation_of(event: Event) -> Evaluation:
    assert event.step is not None
    return Evaluation(step=event.step, **event.fields)


def measure_of(content: int, batch: int) -> Measure:
    """Stands for the bits of a loss."""
    return Measure(batch, hash((content, batch)) % 2**40 / 2**20, 10, 3)


def _num_addressed(action: act.Action) -> int:
    """How many members this action sends a message to."""
    match action:
        case act.Fence(member_ids) | act.EndLease(_, member_ids):
            return len(member_ids)
        case act.SaveCheckpoint(_, member_ids) | act.AbandonCheckpoint(_, member_ids):
            return len(member_ids)
        case act.Grant(lease):
            return lease.world_size
        case act.StartMember() | act.KillMember() | act.Retire():
            return 1
    return 0
