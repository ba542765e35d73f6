"""The recorder: what happened goes into the event log, and from there to everybody who watches.

Control's decisions and the members' step records become events with a time; each is appended to the log, and told as news
to whoever follows the mailbox. What the log holds goes on to the metrics and to the run's trackers. Nothing here can raise
into training. Trade-off: the metrics are a flush of the log behind, so that no counter jumps back when this process dies and
its successor begins with what the log holds.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import takewhile
from typing import Any

from elastic_lm import __version__
from elastic_lm.config import RunConfig
from elastic_lm.control.evaluating import fields_of, sentence
from elastic_lm.control.membership import number_of
from elastic_lm.events.log import EventLog, read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment.rewinds import Rewind
from elastic_lm.experiment.spikes import MOST_LEFT_OUT, Spike
from elastic_lm.monitor.exporter import Exporter
from elastic_lm.monitor.figures import Figures
from elastic_lm.monitor.progress import News, Snapshot, news_of
from elastic_lm.protocol import Evaluation, Generation, StepRecord
from elastic_lm.runtime.ledger import Ledger, Mismatch
from elastic_lm.runtime.spike_watch import SpikeWatch
from elastic_lm.storage import Storage
from elastic_lm.tracking.trackers import Trackers

logger = logging.getLogger(__name__)

PUBLISH_S = 0.25  # a publication costs about 1 ms of CPU on each side
CLOSE_S = 30.0
FLUSH_S = 10.0
LOSS_STEPS = 100  # a step's loss is mostly its batch's; a mean of a hundred is ten times as steady
# Workers' speeds are noted often in a short run and seldom in a long one: each time is a share of the run so far.
PACES_SHARE = 0.01
PACES_S = (2.0, 300.0)  # at the soonest and at the latest


class Recorder:
    """One attempt's record, continued from what the log holds of earlier attempts, whoever made them.

    Args: `started` opens this attempt in the log, before what earlier ones left there is read: so all of that is known here.
    `on_superseded` gets a sentence when another owner of the run has opened the log; nothing more is stored from then on.
    `rewinds`: all that were decided so far; those that the log does not tell yet are told now.
    Raises (constructor only): SupersededError when one has already; StorageError.
    """

    def __init__(
        self,
        config: RunConfig,
        run_storage: Storage,
        mailbox: Any,
        started: Event,
        *,
        owner_epoch: int = 0,
        on_superseded: Callable[[str], None] = lambda sentence: None,
        rewinds: Sequence[Rewind] = (),
    ) -> None:
        self._mailbox = mailbox
        self._attempt = 1
        self._began = time.monotonic()
        self._ledger = Ledger()
        self._run_url = config.run_url
        self._total_steps = config.training.steps
        self._news: list[News] = []
        self._last_event_s = 0.0
        self._last_status: dict[str, Any] = {}
        self._published: dict[str, Any] = {}
        self._next_publication = 0.0
        self._next_paces_s = 0.0
        self.logged_step = 0
        self.num_members = 0  # that earlier attempts have started
        self.too_many_left_out: str | None = None  # why the run is to end, in a sentence
        self._num_left_out = 0  # steps on end, up to the last one, that nobody has looked at
        self._accepts = config.spikes.accepts
        self.evaluated: set[int] = set()  # steps before which held-out text was measured, by this attempt or before
        self._last_evaluation: Evaluation | None = None
        self._unlogged_evaluations: dict[int, Evaluation] = {}
        self._spikes = SpikeWatch(config)
        self._figures = Figures(config.name, __version__, config.batch.micro_batches)
        self._exporter = Exporter(config.name, config.batch.micro_batches)
        self._log = EventLog(
            run_storage.child("events"),
            owner_epoch=owner_epoch,
            opening=lambda newest: self._opening(started, newest),
            on_stored=self._on_stored,
            on_superseded=on_superseded,
        )
        self._recall(run_storage.child("events"))
        metrics = config.metrics
        # Now, and not before: a scrape never sees a counter that was behind.
        self._exporter.open(metrics.host, metrics.port, metrics.tls_certificate, metrics.tls_key)
        self._exporter.watch(run_storage)
        self._trackers = Trackers(config, lambda: self._earlier(run_storage.child("events")))
        self._news.append(News(self._exporter.sentence))
        if (news := news_of(started)) is not None:
            self._news.append(news)
        self._begin_at(started.fields["resume_step"] or 0)
        self._num_rewinds = len(rewinds)
        for rewind in rewinds[self._spikes.num_rewinds :]:
            self.emit(_rewound(rewind, self._ledger.next_step))
            self._go_back(rewind.to_step)

    def _begin_at(self, step: int) -> None:
        """Where nothing is logged yet, as in a fork, the log begins with the first step that this run trains."""
        if self._ledger.next_step > 0 or step == 0:
            return
        self._ledger.skip_to(step)
        self.logged_step = step
        told = f"The log begins at step {step}; those before a fork are its parent's."
        self.emit(Event(EventKind.NOTE, told, step=step))

    def _opening(self, started: Event, newest: Event | None) -> Event:
        self._attempt = newest.attempt + 1 if newest is not None else 1
        return self._stamped(started)

    def _recall(self, storage: Storage) -> None:
        """Take up the log where earlier attempts left it: counters go on, steps trained again are compared."""
        before = policy = None  # training.on_nonfinite
        for event in read(storage):
            self._figures.observe(event)
            self._exporter.observe(event)
            if event.kind is EventKind.MEMBER_STARTED:
                self.num_members = max(self.num_members, number_of(event.fields["member_id"]) + 1)
            if event.kind is EventKind.EVALUATED and event.step is not None:
                self.evaluated.add(event.step)
                with contextlib.suppress(KeyError):  # of another version
                    self._last_evaluation = evaluation_of(event)
            if event.kind is EventKind.STEP_COMMITTED:
                self._ledger.restore(record := record_of(event))
                self._count(record)
            if event.kind is EventKind.REWOUND and event.step is not None:
                self._go_back(event.step)
            self._spikes.recall(event)
            if event.kind is EventKind.RUN_STARTED:
                before, policy = policy, event.fields["config"].get("training", {}).get("on_nonfinite")
                if before != policy:
                    self._num_left_out, self.too_many_left_out = 0, None  # whoever changed it has seen them
        self.logged_step = self._ledger.next_step

    def _go_back(self, step: int) -> None:
        """What was told of steps from this one on is not the run's any more."""
        self._ledger.go_back(step)
        kept = self._ledger.kept()
        self._num_left_out = sum(1 for _ in takewhile(self._counts_as_left_out, reversed(kept)))
        self.too_many_left_out = None
        self._spikes.go_back(kept)
        self.logged_step = min(self.logged_step, step)
        self.evaluated = {evaluated for evaluated in self.evaluated if evaluated <= step}
        if self._last_evaluation is not None and self._last_evaluation.step > step:
            self._last_evaluation = None

    @property
    def spike(self) -> Spike | None:
        """The one that the run has to heed: nothing was done about it yet."""
        return self._spikes.found

    def _earlier(self, storage: Storage) -> Iterator[Event]:
        """What the log holds of earlier attempts: no more can come of them."""
        return (event for event in read(storage, on_problem=lambda told: None) if event.attempt < self._attempt)

    # -- what comes in -----------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """Something was decided or happened."""
        event = self._stamped(event)
        if event.kind is EventKind.EVALUATED and event.step is not None:
            self.evaluated.add(event.step)
            self._last_evaluation = self._unlogged_evaluations[event.step] = evaluation_of(event)
        self._log.append(event)
        self._figures.observe(event)
        self._last_event_s = event.elapsed_s
        if (news := news_of(event)) is not None:
            self._news.append(news)

    def _stamped(self, event: Event) -> Event:
        elapsed_s = time.monotonic() - self._began
        return replace(event, time_s=time.time(), elapsed_s=elapsed_s, attempt=self._attempt)

    def enter(self, records: tuple[StepRecord, ...], evaluations: tuple[Evaluation, ...] = ()) -> None:
        """A member told of steps, and of evaluations that an earlier coordinator may not have stored: each before its step."""
        waiting = sorted((e for e in evaluations if e.step not in self.evaluated), key=lambda e: e.step, reverse=True)
        committed, mismatches = self._ledger.add(records)
        for record in committed:
            while waiting and waiting[-1].step <= record.step:
                self.emit(_evaluated(waiting.pop()))
            self._commit(record)
        while waiting:
            self.emit(_evaluated(waiting.pop()))
        for mismatch in mismatches:
            self.emit(_mismatch(mismatch))

    def skip_to(self, step: int) -> None:
        """Training goes on at this step, and everybody who is left has told what led to it: what is missing stays missing."""
        known, missing = self._ledger.skip_to(step)
        if missing:
            told = (
                f"{len(missing)} steps from {missing[0]} to {missing[-1]} are missing in the log: whoever could tell of "
                "them is lost."
            )
            self.emit(Event(EventKind.NOTE, told, step=step))
        for record in known:
            self._commit(record)

    def _commit(self, record: StepRecord) -> None:
        self.emit(_committed(record))
        self._count(record)
        if record.refused:
            told = f"Step {record.step} was left out: {record.refused:,} values were not finite or out of range."
            self.emit(Event(EventKind.NOTE, told, step=record.step))

    def _count(self, record: StepRecord) -> None:
        """A run that leaves out step after step learns nothing; one whose loss stands out learns worse."""
        self._spikes.observe(record)
        self._num_left_out = self._num_left_out + 1 if self._counts_as_left_out(record) else 0
        if self._num_left_out >= MOST_LEFT_OUT and self.too_many_left_out is None:
            self.too_many_left_out = (
                f"the last {self._num_left_out} steps up to {record.step} were left out, for their gradients or losses "
                "are not finite or out of range; lower optimizer.learning_rate, or look at their data. To train on all the "
                f"same, resume it with --set spikes.accept_until={record.step + 1}"
            )

    def _counts_as_left_out(self, record: StepRecord) -> bool:
        return record.refused > 0 and not self._accepts(record.step)

    def unlogged(self) -> tuple[StepRecord, ...]:
        """Records of the steps that the log does not hold yet."""
        return self._ledger.since(self.logged_step)

    def unlogged_evaluations(self) -> tuple[Evaluation, ...]:
        """Those that the log does not hold yet."""
        return tuple(self._unlogged_evaluations.copy().values())

    def note_paces(self, paces: Callable[[], dict[str, tuple[float, int]]]) -> None:
        """Now and then, how fast every worker is."""
        elapsed_s = time.monotonic() - self._began
        if elapsed_s < self._next_paces_s or not (found := paces()):
            return
        shortest_s, longest_s = PACES_S
        self._next_paces_s = elapsed_s + min(longest_s, max(shortest_s, PACES_SHARE * elapsed_s))
        told = ", ".join(f"{member_id} {seconds:.3f} s x {count}" for member_id, (seconds, count) in found.items())
        fields = {"paces": {member_id: list(pace) for member_id, pace in found.items()}}
        self.emit(
            Event(EventKind.WORKER_PACES, f"Per micro-batch: {told}.", step=self._ledger.next_step, fields=fields)
        )

    def _on_stored(self, events: list[Event]) -> None:
        for event in events:
            self._exporter.observe(event)
            if event.kind is EventKind.STEP_COMMITTED and event.step is not None:
                self.logged_step = event.step + 1
            if event.kind is EventKind.EVALUATED and event.step is not None:
                self._unlogged_evaluations.pop(event.step, None)
        self._trackers.offer(events)

    # -- what goes out -----------------------------------------------------------------------------------------------

    @property
    def next_step(self) -> int:
        return self._ledger.next_step

    def mean_loss(self, step: int) -> float | None:
        """Of the `LOSS_STEPS` steps before this one; None when nobody logged them."""
        return self._ledger.mean_loss(step, LOSS_STEPS)

    def publish(self, status_of_control: Callable[[], dict[str, Any]], *, at_once: bool = False) -> None:
        """Tell the mailbox what is new, a few times a second at most."""
        now = time.monotonic()
        if now < self._next_publication and not at_once:
            return
        self._next_publication = now + PUBLISH_S
        for problem in self._trackers.new_problems():
            self.emit(Event(EventKind.NOTE, problem))
        status = {
            **status_of_control(),
            "step": self._ledger.next_step,
            "num_rewinds": self._num_rewinds,
            "metrics_address": self._exporter.address,
            "run_url": self._run_url,
        }
        if at_once or status != self._last_status or self._news:
            self._published = {**status, "snapshot": self._snapshot(status)}
            self._mailbox.publish.remote(self._news, self._published)
            self._news, self._last_status = [], status

    def _snapshot(self, status: dict[str, Any]) -> Snapshot:
        return Snapshot.of(
            status,
            self._figures.gauges(),
            step=self._ledger.next_step,
            total_steps=self._total_steps,
            elapsed_s=self._last_event_s,
        )

    def figures(self) -> dict[str, Any]:
        """The run so far, in numbers."""
        last, evaluation = self._ledger.last(), self._last_evaluation
        is_of_the_end = evaluation is not None and evaluation.step == self._ledger.next_step
        return {
            "loss": None if last is None else last.loss,
            "held_out_loss": evaluation.loss if evaluation is not None and is_of_the_end else None,
            "tokens_per_s": self._figures.goodput.tokens_per_s(),
            "goodput": self._figures.goodput.ratio(),
            "lost_worker_s": self._figures.goodput.lost_worker_s(),
        }

    def flush(self) -> bool:
        """Store what happened so far.    Returns: whether that is done; storage may be away."""
        return self._log.flush(FLUSH_S)

    def keep_unstored(self, run_folder: Storage) -> int:
        """Write the events that storage does not take to another folder for the run.    Returns: their number."""
        return 0 if self.flush() else self._log.keep_unstored(run_folder.child("events"))

    def close(self) -> None:
        """Store what is not stored yet; give the trackers their last; end the endpoint."""
        self._log.close(CLOSE_S)
        self._trackers.close()
        news = [News(problem, "bad") for problem in self._trackers.new_problems()]
        if (wait_s := self._exporter.farewell_s) > 1:
            news.append(News(f"Metrics stay until they were scraped once more, {wait_s:.0f} s at most; all is stored."))
        if news:  # the log is closed, and ends with the verdict
            self._mailbox.publish.remote(news, self._published)
        self._exporter.close()


def _committed(record: StepRecord) -> Event:
    fields = {**asdict(record), "generation": str(record.generation)}
    message = f"Step {record.step}: loss {record.loss:.4f}."
    return Event(EventKind.STEP_COMMITTED, message, record.step, str(record.generation), fields)


def record_of(event: Event) -> StepRecord:
    owner_epoch, number = event.fields["generation"].split(".")
    return StepRecord(**{**event.fields, "generation": Generation(int(owner_epoch), int(number))})


def _evaluated(evaluation: Evaluation) -> Event:
    """One that an earlier coordinator had told."""
    return Event(EventKind.EVALUATED, sentence(evaluation), evaluation.step, fields=fields_of(evaluation))


def _rewound(rewind: Rewind, next_step: int) -> Event:
    fields = {
        "number": rewind.number,
        "cause": rewind.cause,
        "first_step": rewind.first_step,
        "last_step": rewind.last_step,
        "left_out": rewind.left_out,
        "skip": rewind.after,
        "num_steps": max(0, next_step - rewind.to_step),
    }
    return Event(EventKind.REWOUND, f"{rewind}.", rewind.to_step, fields=fields)


def evaluation_of(event: Event) -> Evaluation:
    assert event.step is not None
    names = ("loss", "loss_stderr", "num_targets", "num_correct", "num_bytes")
    return Evaluation(step=event.step, **{name: event.fields[name] for name in names})


def _mismatch(mismatch: Mismatch) -> Event:
    logged, told = mismatch.logged, mismatch.told
    return Event(
        EventKind.STEP_MISMATCH,
        f"ALARM: step {logged.step} was logged with loss {logged.loss!r} and came out as {told.loss!r} in generation "
        f"{told.generation}: the bits are not the same.",
        step=logged.step,
        generation=str(told.generation),
        fields={"logged": asdict(logged), "told": asdict(told)},
    )
