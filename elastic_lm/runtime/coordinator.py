"""The coordinator: one loop that hands events to `control/` and does what it answers.

Invariant: it decides nothing. Every choice is made by `Control`, which is tested in milliseconds; here are only the hands
(Ray actors, stores, storage) and the ears (lifelines, futures, mailbox, news of nodes). The step path never waits for
this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import ray

from elastic_lm import __version__, failpoints
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.config import RunConfig
from elastic_lm.control import actions as act
from elastic_lm.control import events as ev
from elastic_lm.control.controller import Control
from elastic_lm.control.spec import ControlSpec
from elastic_lm.data.held_out import HeldOut
from elastic_lm.data.order import Order
from elastic_lm.engine.rendezvous import RendezvousServer
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.errors import CheckpointError, StorageError, SupersededError
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment import rewinds
from elastic_lm.experiment.rewinds import Rewind, Rewinds, retention_of
from elastic_lm.model.flops import training_flops_per_token
from elastic_lm.model.spec import ModelSpec
from elastic_lm.ownership import Ownership
from elastic_lm.protocol import Lease
from elastic_lm.result import RunResult
from elastic_lm.runtime import way_back
from elastic_lm.runtime.claim import birth_of
from elastic_lm.runtime.fallback import Fallback
from elastic_lm.runtime.lifeline import LifelineServer
from elastic_lm.runtime.mailbox import Command
from elastic_lm.runtime.members import Members
from elastic_lm.runtime.nodes import NodeWatcher
from elastic_lm.runtime.patience import Patience
from elastic_lm.runtime.placement import worker_options
from elastic_lm.runtime.publisher import Publisher
from elastic_lm.runtime.reader_pool import ReaderNews, ReaderPool
from elastic_lm.runtime.recorder import Recorder
from elastic_lm.runtime.restorable import RestorableSearch
from elastic_lm.runtime.rewinding import Rewinding
from elastic_lm.runtime.roster import Found, Roster
from elastic_lm.runtime.worker import Summons, WorkerBoot
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

IDLE_S = 0.25  # the longest the loop sleeps: bounds how late a verdict on silence can be
AWAY_S = 2.0  # a coordinator that did nothing for so long looks whether it still is one
SLEPT_S = 0.2  # oversleeping by more than this counts as the coordinator's own absence


@dataclass(frozen=True)
class Plan:
    """All that a coordinator needs, settled and checked before any actor starts."""

    config: RunConfig
    spec: EngineSpec
    order: Order
    run_storage: Storage
    start_reader: Callable[[], Any]  # -> actor handle
    newest: CheckpointInfo | None  # the newest complete checkpoint
    skipped: tuple[str, ...] = ()  # sentences about newer ones that cannot be used, and about what may be missed
    init: tuple[Storage, str] | None = None  # the folder of weights to begin from, and their sha256
    held_out: HeldOut | None = None
    begins_at: int = 0  # step of a fork, before which the run has nothing
    problem: CheckpointError | None = None  # why it cannot begin, unless workers hold its state
    rewinds: Rewinds = Rewinds()  # `config` leaves out their batches

    def control_spec(self) -> ControlSpec:
        """For the control path."""
        num_batches = 0 if self.held_out is None else self.held_out.num_batches
        return replace(self.config.control_spec(), num_held_out_batches=num_batches)

    def environment_changes(self, now: dict[str, str]) -> list[str]:
        """What bits depend on and is not as it was: one `name was -> is` each. None where no bits are promised."""
        before = None if self.newest is None else self.newest.meta.get("environment")
        if not isinstance(before, dict) or self.config.reduction.kind != "exact":
            return []  # an earlier version did not write it down
        before = {name: str(value) for name, value in before.items()}
        names = sorted({*before, *now})
        return [f"{name} {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]

    @property
    def resume_step(self) -> int | None:
        """Steps that the newest complete checkpoint has applied, which is the next one to train; None without one."""
        return None if self.newest is None else self.newest.step


@dataclass
class Legacy:
    """What an attempt that decides to go back leaves to the next one in its process: readers serve any order of batches."""

    readers: ReaderPool | None = None

    @property
    def is_left(self) -> bool:
        """The attempt before has left it."""
        return self.readers is not None

    def take(self) -> ReaderPool | None:
        readers, self.readers = self.readers, None
        return readers

    def close(self) -> None:
        """Nobody comes any more."""
        if (readers := self.take()) is not None:
            readers.close()


class Coordinator:
    """Runs one attempt of a run, from the first member's start to the verdict. `legacy`: taken, and left."""

    def __init__(self, plan: Plan, mailbox: Any, owner: Ownership, legacy: Legacy) -> None:
        self._plan = plan
        self._mailbox = mailbox
        self._owner = owner
        self._legacy = legacy
        self._after_rewind = legacy.is_left
        self._superseded: str | None = None
        self._awake_at = time.monotonic()
        self._inbox: queue.Queue[ev.Input] = queue.Queue()
        self._host = ray.util.get_node_ip_address()
        self._meeting: RendezvousServer | None = None
        self._verdict: act.Verdict | None = None
        self._taker = secrets.token_hex(8)  # of commands
        config = plan.config
        self._meta: dict[str, Any] = {
            "fingerprint": config.identity_fingerprint(),
            "config": config.model_dump(mode="json"),
        }
        self._last_event: Event | None = None  # tells the verdict
        self._found: CheckpointInfo | None = None  # by the search
        self._rewinding = Rewinding(config, plan.rewinds, plan.begins_at)

    def run(self) -> RunResult:
        """Train until there is a verdict, and leave nothing running then. Without one, the workers wait for a successor.

        Returns: `REWOUND` as the verdict when the run is to go on, from before a spike and by another plan: so do the workers.
        Raises: SupersededError when another owner has taken over; StorageError.
        """
        with ExitStack() as stack:
            self._open(stack)
            while self._verdict is None:
                self._turn()
            if self._verdict.kind == act.REWOUND and (result := self._go_back()) is not None:
                return result
            self._close_publisher()
            result = self._result(self._verdict, self._keep_unsaved(self._verdict))
            self._recorder.publish(lambda: {**self._status(), "verdict": result.verdict}, at_once=True)
        return result

    def _go_back(self) -> RunResult | None:
        """Before this is stored nothing is decided: whoever comes after finds the spike again.

        Returns: None, and the verdict is another one, where there is no state to go back to.
        """
        verdict, rewind = self._verdict, self._rewinding.decided
        assert verdict is not None and rewind is not None
        self._verdict = None  # the workers stay for a successor if this fails
        self._recorder.publish(self._status, at_once=True)
        self._mailbox.hand_over.remote()  # what is asked for from now on is for who comes next
        failpoints.hit("coordinator.rewind")
        self._publisher.close()  # what is being stored may be what the run goes on from
        patience = Patience(self._plan.config.data.storage_timeout_s)
        obstacle = patience.outlast(f"checkpoint in {self._plan.config.run_url}", lambda _: self._obstacle(rewind))
        if obstacle is not None:
            self._end_at_spike(rewind, obstacle)
            return None
        patience.outlast(f"place for a rewind in {self._plan.config.run_url}", lambda _: self._decide(rewind))
        failpoints.hit("coordinator.rewound")
        self._verdict = verdict
        return RunResult(verdict.kind, verdict.message, verdict.step)

    def _obstacle(self, rewind: Rewind) -> str | None:
        """Why the run cannot go back.    Raises: StorageError; SupersededError."""
        plan = self._plan
        return way_back.obstacle(
            plan.run_storage,
            plan.config,
            Rewinds((*plan.rewinds.made, rewind)),
            begins_at=plan.begins_at,
            check=self._check_owner,
        )

    def _end_at_spike(self, rewind: Rewind, obstacle: str) -> None:
        """The run stays where its newest checkpoint is."""
        step = max(self._publisher.newest_step, self._plan.resume_step or 0)
        self._verdict = self._rewinding.end(rewind, obstacle, step)
        self._last_event = self._verdict.event(self._control.status()["generation"])

    def _check_owner(self) -> None:
        """Raises: StorageError; SupersededError."""
        if self._superseded is not None:
            raise SupersededError(self._superseded)
        self._owner.check()

    def _decide(self, rewind: Rewind) -> None:
        """Raises: StorageError; SupersededError."""
        self._check_owner()
        if not self._recorder.flush():
            raise StorageError("the event log does not hold the spike")
        self._owner.check()
        rewinds.decide(self._plan.run_storage, rewind)

    # -- services ----------------------------------------------------------------------------------------------------

    def _open(self, stack: ExitStack) -> None:
        plan, config = self._plan, self._plan.config
        roster = roster_of(plan)
        found = roster.found()
        if plan.problem is not None and not any(worker.is_ours for worker in found):
            raise plan.problem
        self._recorder = Recorder(
            config,
            plan.run_storage,
            self._mailbox,
            _run_started(plan, sum(worker.is_ours for worker in found), after_rewind=self._after_rewind),
            owner_epoch=self._owner.epoch,
            on_superseded=self._supersede,
            rewinds=plan.rewinds.made,
        )
        stack.callback(self._recorder.close)
        self._control = Control(
            plan.control_spec(),
            resume_step=plan.resume_step,
            owner_epoch=self._owner.epoch,
            first_number=self._recorder.num_members,
            evaluated=self._recorder.evaluated,
            begins_elsewhere=plan.begins_at > 0 or plan.problem is not None,
            after_rewind=self._after_rewind,
        )
        for sentence in plan.skipped:
            self._recorder.emit(Event(EventKind.NOTE, sentence))
        self._readers = self._legacy.take() or ReaderPool(
            plan.start_reader, config.data.readers, timeout_s=config.data.reader_timeout_s
        )
        self._readers.on_news = self._on_reader_news
        stack.callback(self._leave_readers)
        self._readers.warm_up(plan.order, plan.resume_step or 0)
        self._open_checkpoints(stack)
        self._open_members(stack, roster, found)
        here = ray.get_runtime_context().get_node_id()
        self._nodes = NodeWatcher(
            on_draining=lambda node_id, deadline: self._inbox.put(ev.NodeDraining(node_id, deadline, node_id == here)),
            on_lost=lambda node_id: self._inbox.put(ev.NodeLost(node_id)),
        )
        stack.callback(self._nodes.close)
        self._await_command()

    def _open_checkpoints(self, stack: ExitStack) -> None:
        plan, config = self._plan, self._plan.config
        self._publisher = Publisher(
            plan.run_storage,
            retention_of(config),
            self._meta,
            self._inbox.put,
            owner_epoch=self._owner.epoch,
            check=self._check_before_publishing,
            wanted=plan.rewinds.keep,
        )
        stack.callback(self._publisher.close)
        self._search = RestorableSearch(
            plan.run_storage,
            config.data.storage_timeout_s,
            self._owner.check,
            self._on_restorable,
            lambda verdict, error: self._inbox.put(ev.CheckpointFound(None, (), verdict, error)),
            plan.rewinds.keep,
        )

    def _open_members(self, stack: ExitStack, roster: Roster, found: list[Found]) -> None:
        """Their lifelines, and those who are there: control hears of them before it hears of anything else."""
        secret = secrets.token_hex(16)
        lifelines = LifelineServer(
            self._host,
            secret,
            on_beat=lambda beat: self._inbox.put(ev.Beat(beat)),
            on_connected=lambda member_id: self._inbox.put(ev.ConnectionRestored(member_id)),
            on_lost=lambda member_id: self._inbox.put(ev.ConnectionLost(member_id)),
        )
        stack.callback(lifelines.close)
        self._members = Members(
            self._boot(
                Summons(
                    self._owner.epoch,
                    self._plan.order,
                    lifelines.address,
                    secret,
                    self._readers.readers,
                    self._plan.held_out,
                )
            ),
            roster,
            worker_options(self._plan.config),
            self._inbox.put,
            retire_timeout_s=self._plan.config.control.retire_timeout_s,
        )
        stack.callback(self._close_meeting)
        stack.callback(self._end_members)
        failpoints.hit("coordinator.open")
        self._members.adopt(found, self._recorder.logged_step)
        failpoints.hit("coordinator.adopted")

    def _supersede(self, sentence: str) -> None:
        """Another owner has opened the log.    On the log's thread."""
        self._superseded = sentence

    def _check_before_publishing(self, step: int | None) -> None:
        """A checkpoint counts for an owner only, and when the log holds every step before it; none of steps that are given up.

        On the publisher's thread.
        """
        decided = self._rewinding.decided
        if decided is not None and (step is None or step > decided.to_step):
            raise StorageError("the run goes back to before a spike")
        if not self._recorder.flush():
            raise StorageError("the event log does not hold all steps before it")
        self._owner.check()

    def _end_members(self) -> None:
        if self._verdict is None:
            return
        if self._verdict.kind == act.REWOUND:
            self._members.hand_on()
        else:
            self._members.end_all()

    def _leave_readers(self) -> None:
        if self._verdict is not None and self._verdict.kind == act.REWOUND:
            self._legacy.readers = self._readers
        else:
            self._readers.close()

    def _boot(self, summons: Summons) -> WorkerBoot:
        plan, config = self._plan, self._plan.config
        return WorkerBoot(
            member_id="",
            summons=summons,
            orphaned_after_s=config.control.orphaned_after_s,
            spec=plan.spec,
            corpus=config.data.tokens,
            reader_timeout_s=config.data.reader_timeout_s,
            storage_timeout_s=config.data.storage_timeout_s,
            run_storage=plan.run_storage,
            heartbeat_interval_s=config.control.heartbeat_interval_s,
            form_timeout_s=config.control.form_timeout_s,
            failpoints=tuple(config.failpoints),
            init=plan.init,
        )

    def _on_reader_news(self, news: ReaderNews) -> None:
        self._inbox.put(ev.ReaderReplaced(news.lost, news.replacement, news.cause))

    def _on_restorable(self, newest: CheckpointInfo | None, skipped: list[str]) -> None:
        """On the search's thread, while nobody trains."""
        self._found = newest
        self._inbox.put(ev.CheckpointFound(None if newest is None else newest.step, tuple(skipped)))

    def _await_command(self) -> None:
        """Long-poll the mailbox: the next command arrives as an event. Asking for it says that the one before is seen to."""

        def done(future: Any) -> None:
            # The mailbox lives as long as the driver; without it there are no commands, and with a successor none for us.
            if future.exception() is None and (command := future.result()) is not None:
                self._inbox.put(_input_of(command))

        self._mailbox.take.remote(self._taker).future().add_done_callback(done)

    # -- the loop ----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Wait for something to happen, tell control everything that did, then let it look at the clock."""
        now = time.monotonic()
        timeout = min(IDLE_S, max(0.0, self._control.next_deadline(now) - now))
        event: ev.Input | None = None
        self._check_awake()
        with contextlib.suppress(queue.Empty):
            event = self._inbox.get(timeout=timeout)
        overslept = time.monotonic() - now - timeout
        self._check_awake(timeout)
        if overslept > SLEPT_S:
            self._tell(ev.CoordinatorSlept(overslept))
        commanded = False
        while event is not None:
            self._tell(event)
            commanded |= isinstance(event, ev.COMMANDS)
            event = self._inbox.get_nowait() if not self._inbox.empty() else None
        self._tell(ev.Tick())
        self._members.tend()
        self._recorder.note_paces(self._control.paces)
        self._recorder.publish(self._status, at_once=commanded)
        if commanded and self._verdict is None:
            self._await_command()

    def _check_awake(self, waited_s: float = 0.0) -> None:
        """Before anything is done: whoever was away for long may have a successor, whose workers are not ours to kill.

        What cannot be known while storage is away is not waited for: an outage ends no run.
        """
        now = time.monotonic()
        away_s, self._awake_at = now - self._awake_at - waited_s, now
        if away_s > AWAY_S:
            try:
                self._owner.check()
            except StorageError as error:
                logger.warning("Away for %.1f s, and it cannot be known who owns the run now: %s", away_s, error)
            self._awake_at = time.monotonic()
        if (told := self._superseded or self._owner.superseded) is not None:
            raise SupersededError(told)

    def _status(self) -> dict[str, Any]:
        coordinator = {"pid": os.getpid(), "node_id": ray.get_runtime_context().get_node_id()}
        return {**self._control.status(), "coordinator": coordinator}

    def _tell(self, event: ev.Input) -> None:
        if isinstance(event, ev.Beat):
            self._recorder.enter(event.heartbeat.records)
        elif isinstance(event, ev.Reported):
            self._recorder.enter(event.report.records)
        elif isinstance(event, ev.MemberReturned):
            self._recorder.enter(event.report.records, event.report.evaluations)
            self._note_environment(event.report.ready.environment)
        elif isinstance(event, ev.MemberReady):
            self._note_environment(event.report.environment)
        elif isinstance(event, ev.ReaderReplaced):
            self._members.set_readers(self._readers.readers)
        told = self._judge(event)
        if isinstance(told, ev.SpikeFound):  # before control can call it the run's end
            self._handle(told)
        self._handle(event)
        if isinstance(told, ev.Spoiled):  # when control knows of everybody who holds what is to be saved
            self._handle(told)

    def _judge(self, event: ev.Input) -> ev.SpikeFound | ev.Spoiled | None:
        """Whether there is a point in training on."""
        if self._recorder.spike is not None:
            return self._rewinding.judge(self._recorder.spike)
        if self._recorder.too_many_left_out is not None:
            return ev.Spoiled("poisoned", self._recorder.too_many_left_out)
        if isinstance(event, ev.Reported) and self._control.heeds(event.report):
            return self._rewinding.judge_report(event.report)
        return None

    def _handle(self, event: ev.Input) -> None:
        for action in self._control.handle(event, time.monotonic()):
            self._check_awake()
            self._perform(action)

    def _note_environment(self, environment: dict[str, str]) -> None:
        """The first worker's goes into the checkpoints. Of those that come later control refuses any with other bits."""
        if "environment" not in self._meta:
            self._meta["environment"] = environment
            self._tell_environment()

    def _tell_environment(self) -> None:
        """Whether it is that of the checkpoint from which the run goes on."""
        if changes := self._plan.environment_changes(self._meta["environment"]):
            told = (
                f"Bits are no longer promised: the checkpoint of step {self._plan.resume_step} was written in another "
                f"environment: {'; '.join(changes)}."
            )
            self._recorder.emit(Event(EventKind.NOTE, told))

    def _perform(self, action: act.Action) -> None:
        match action:
            case act.StartMember(member_id, avoid_nodes):
                self._members.start(member_id, tuple(avoid_nodes))
            case act.KillMember(member_id):
                self._members.kill(member_id)
            case act.Retire(member_id):
                self._members.retire(member_id)
            case act.Fence(member_ids, generation):
                failpoints.hit("coordinator.fence")
                self._close_meeting()
                self._members.fence(member_ids, generation)
            case act.Grant(lease):
                self._grant(lease)
            case act.EndLease(generation, member_ids):
                self._members.end_lease(member_ids, generation)
            case act.AskAfterNode(node_id):
                self._nodes.ask_after(node_id)
            case act.SaveCheckpoint(number, _, step):
                failpoints.hit("coordinator.save", step)
                self._publisher.begin(number, step, self._recorder.mean_loss(step))
                self._members.save(action, self._publisher.add)
            case act.PublishCheckpoint(number):
                failpoints.hit("coordinator.publish")
                self._publisher.publish(number)
            case act.FindCheckpoint():
                self._search.begin()
            case act.GoBack(step):
                self._plan = replace(self._plan, newest=self._found)
                self._publisher.go_back(step)
                self._tell_environment()
            case act.AbandonCheckpoint(number, member_ids):
                self._publisher.abandon(number)
                self._members.cancel_save(number, member_ids)
            case act.Emit(Event(kind=EventKind.RUN_FINISHED) as event):
                self._last_event = event
            case act.Emit(event):
                self._recorder.emit(event)
            case act.Finish(verdict):
                failpoints.hit("coordinator.finish", verdict.step)
                self._verdict = verdict

    def _close_publisher(self) -> None:
        """What became of a manifest that was being written when the verdict fell is told before the verdict is."""
        self._publisher.close()
        while not self._inbox.empty():
            if isinstance(event := self._inbox.get_nowait(), ev.Published):
                self._tell(event)
        if self._last_event is not None:
            self._recorder.emit(self._last_event)

    def _keep_unsaved(self, verdict: act.Verdict) -> str:
        """Where the last state and events are that storage does not take; nothing when there is nothing to say."""
        if self._plan.config.checkpoint.fallback is None:
            return ""
        fallback, told = Fallback(self._plan.config, self._meta), []
        if verdict.step > max(self._publisher.newest_step, self._plan.resume_step or 0):
            told.append(fallback.keep_state(self._members.handles(), verdict.step))
        told.append(fallback.keep_events(self._recorder))
        return "".join(f"; {sentence}" for sentence in told if sentence)

    def _grant(self, lease: Lease) -> None:
        failpoints.hit("coordinator.grant", lease.start_step)
        self._recorder.skip_to(lease.start_step)
        self._close_meeting()
        rendezvous = None
        if lease.world_size > 1 and lease.continues is None and not lease.evaluates:
            self._meeting = RendezvousServer(self._host)
            rendezvous = self._meeting.rendezvous
        logged_step = self._recorder.logged_step
        history = self._recorder.unlogged() if lease.receivers else ()
        self._members.grant(
            replace(
                lease,
                rendezvous=rendezvous,
                logged_step=logged_step,
                history=history,
                evaluations=self._recorder.unlogged_evaluations(),
            )
        )

    def _close_meeting(self) -> None:
        """Closing a generation's meeting place cancels its forming at once; a group that is formed does without it."""
        if self._meeting is not None:
            self._meeting.close()
            self._meeting = None

    def _result(self, verdict: act.Verdict, kept: str) -> RunResult:
        newest, step = self._publisher.newest, self._publisher.newest_step
        if not newest:
            newest, step = _told(self._plan.newest), self._plan.resume_step or 0
        digests = newest if step == verdict.step else {}
        return RunResult(
            verdict=verdict.kind,
            message=verdict.message + kept,
            last_step=verdict.step,
            metrics=self._recorder.figures(),
            checkpoint=newest.get("url"),
            digest={name: digests[name] for name in ("state", "weights") if name in digests},
        )


def _told(checkpoint: CheckpointInfo | None) -> dict[str, str]:
    """Its address, and the digests that its writer gave it."""
    return {} if checkpoint is None else {"url": checkpoint.url, **checkpoint.meta.get("digest", {})}


def roster_of(plan: Plan) -> Roster:
    """The run's workers, by what they train; those from before a rewind are told of it and go on."""
    birth, config = birth_of(plan.run_storage), plan.config
    ours = [config, *plan.rewinds.earlier_configs(config)]
    return Roster(config.name, *(roster_fingerprint(each, birth) for each in ours))


def roster_fingerprint(config: RunConfig, birth: str) -> str:
    """Of what a worker's state belongs to: the run's identity, its folder and birth there, the code that trains it, and what it
    does to a step that all have to treat alike.
    """
    policy = config.training.on_nonfinite
    told = f"{config.identity_fingerprint()} {config.run_url} {birth} {__version__} {policy}"
    return hashlib.sha256(told.encode()).hexdigest()


def _run_started(plan: Plan, num_found: int, *, after_rewind: bool) -> Event:
    name, step = plan.config.name, plan.resume_step
    how = "starts at step 0" if step is None else f"goes on from the checkpoint of step {step}"
    workers = f"{num_found} worker{'s' if num_found != 1 else ''}"
    if after_rewind:
        how += f", with the {workers} that it has"
    elif num_found:
        how = f"is taken over with {workers}"
    fields = {
        "resume_step": step,
        "config": plan.config.model_dump(mode="json"),
        "flops_per_token": _flops_per_token(plan.spec),
    }
    return Event(EventKind.RUN_STARTED, f"Run {name} {how}.", step=step, fields=fields)


def _flops_per_token(spec: EngineSpec) -> int | None:
    """Of a model that we know; None for one of the user's own."""
    if not isinstance(spec.model, ModelSpec):
        return None
    predicted = 1.0 if spec.masking is None else spec.masking.ratio
    return training_flops_per_token(spec.model, spec.sequence_length, predicted)


def _input_of(command: Command) -> ev.Input:
    if command.kind == "scale":
        return ev.Resized(**command.arguments)
    if command.kind == "drain":
        return ev.DrainRequested(**command.arguments)
    return ev.StopRequested(**command.arguments)
