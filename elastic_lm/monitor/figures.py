"""The values of the catalogue's metrics, computed from events.

Invariant: a counter never goes back, and a step that is told or trained twice is counted once, unless the run went back from it
and trained another one in its place; so a restarted run that first replays its log exports the same series as one that never
stopped.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.goodput import Goodput
from elastic_lm.monitor.held_out import HeldOutScore
from elastic_lm.monitor.metrics import CAUSES, LEAVES, LOSSES, PHASES, RECENT_STEPS, VERDICTS, by_name
from elastic_lm.monitor.mfu import Mfu
from elastic_lm.monitor.task_results import TaskResult

logger = logging.getLogger(__name__)

Labels = tuple[str, ...]

# Events that are counted one by one.
COUNTED = {
    EventKind.MEMBER_READY: "members_ready_total",
    EventKind.MEMBER_REFUSED: "members_refused_total",
    EventKind.NODE_LOST: "nodes_lost_total",
    EventKind.NODE_QUARANTINED: "nodes_quarantined_total",
    EventKind.STRAGGLER: "stragglers_total",
    EventKind.READER_REPLACED: "readers_replaced_total",
    EventKind.STEP_MISMATCH: "step_mismatches_total",
    EventKind.CHECKPOINT_SAVED: "checkpoints_saved_total",
    EventKind.CHECKPOINT_FAILED: "checkpoints_failed_total",
    EventKind.EVALUATED: "evaluations_total",
    EventKind.REWOUND: "rewinds_total",
}

# Metric, and the field of the run's configuration that it tells.
CONFIGURED = (
    ("steps_planned", "training", "steps"),
    ("workers_min", "workers", "min"),
    ("workers_max", "workers", "max"),
    ("checkpoint_interval_steps", "checkpoint", "every_steps"),
)

TASK_METRICS = ("task_figure", "task_figure_low", "task_figure_high", "task_step")


class Figures:
    """Fed with every event of a run in order. What an event of another version lacks is left out, with a warning."""

    def __init__(self, run: str, version: str, num_micro_batches: int) -> None:
        self.goodput = Goodput(num_micro_batches)
        self._metrics = by_name()
        self._values: dict[str, dict[Labels, float]] = {name: {} for name in self._metrics}
        self._mfu = Mfu()
        self._run = run
        self._next_step = 0
        self._resume_step: int | None = None
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._set("run_info", 1, run, version)
        self._end("")
        self._begin_counters()

    @property
    def has_ended(self) -> bool:
        """Whether there is a verdict, and no attempt since."""
        return any(self._values["run_ended"].values())

    def observe(self, event: Event) -> None:
        """Take the event into account."""
        try:
            self.goodput.observe(event)
            self._observe(event)
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("Metrics leave out an event of kind %s: %r", event.kind, error)

    def _observe(self, event: Event) -> None:
        fields = event.fields
        self._mfu.observe(event)
        if event.kind in COUNTED:
            self._add(COUNTED[event.kind], 1)
        match event.kind:
            case EventKind.RUN_STARTED:
                self._begin(event)
            case EventKind.RUN_FINISHED:
                self._end(fields["verdict"])
            case EventKind.RESIZED:
                self._set("workers_min", fields["min_workers"])
                self._set("workers_max", fields["max_workers"])
            case EventKind.STEP_COMMITTED:
                self._commit(event)
            case EventKind.LEASE_GRANTED:
                self._set("world_size", fields.get("world_size", len(fields["members"])))
                self._set("generation", int((event.generation or "0").rpartition(".")[2]))
            case EventKind.REFORMED:
                cause = fields["cause"] if fields["cause"] in CAUSES else "other"
                self._add("rescales_total", 1, cause)
                self._add("lost_seconds_total", fields["lost_s"], cause)
            case EventKind.MEMBER_LOST:
                self._add("members_lost_total", 1, _loss(fields["cause"]))
            case EventKind.MEMBER_LEFT:
                self._add("members_left_total", 1, fields["cause"] if fields["cause"] in LEAVES else "drain")
            case EventKind.WORKER_PACES:
                self._compare([seconds for seconds, _ in fields["paces"].values()])
            case EventKind.CHECKPOINT_SAVED:
                if event.step is not None:
                    self._set("checkpoint_step", event.step)
                self._set("checkpoint_timestamp_seconds", event.time_s)
                self._set("checkpoint_seconds", fields["seconds"])
            case EventKind.EVALUATED:
                self._evaluate(event)
            case EventKind.REWOUND if event.step is not None:
                self._add("steps_given_up_total", fields["num_steps"])
                self._go_back(event.step)
            case _:
                pass

    def _go_back(self, step: int) -> None:
        self._next_step = min(self._next_step, step)
        self._set("step", self._next_step)
        told = {name: self._values[name].get((), 0) for name in ("checkpoint_step", "evaluation_step")}
        if (
            told["checkpoint_step"] > step
        ):  # it is deleted; the one that the run goes on from is told with its beginning
            self._values["checkpoint_step"] = {} if self._resume_step is None else {(): self._resume_step}
        if told["evaluation_step"] > step:
            for name in self._values:
                if name.startswith("evaluation_") and not name.endswith("_total"):
                    self._values[name] = {}

    def _evaluate(self, event: Event) -> None:
        found = HeldOutScore.of(event)
        told = {
            "step": event.step,
            "loss_nats": found.loss,
            "loss_error_nats": found.loss_stderr,
            "accuracy_ratio": found.accuracy,
            "nats_per_byte": found.nats_per_byte,
        }
        for name, number in told.items():
            self._values[f"evaluation_{name}"] = {} if number is None else {(): number}

    def tell_tasks(self, results: Iterable[TaskResult]) -> None:
        """These, and none that were told before, are what the run's model came to when it was asked alone."""
        told: dict[str, dict[Labels, float]] = {name: {} for name in TASK_METRICS}
        for result in results:
            told["task_step"][(result.task,)] = result.step
            for figure in result.figures:
                for name, number in (("", figure.value), ("_low", figure.low), ("_high", figure.high)):
                    if number is not None:
                        told[f"task_figure{name}"][(result.task, figure.name)] = number
        self._values.update(told)

    def values(self) -> Iterator[tuple[str, Labels, float]]:
        """(name without prefix, label values, value), in the order of the catalogue."""
        self._ask_goodput()
        for name in self._metrics:
            for labels, value in list(self._values[name].items()):  # the scraper's thread reads, another one writes
                yield name, labels, value

    def gauges(self) -> dict[str, float]:
        """Value by name of all gauges without labels that have one."""
        return {name: value for name, labels, value in self.values() if not labels and not name.endswith("_total")}

    def value(self, name: str, *labels: str) -> float | None:
        """One value now; None when there is none yet."""
        return next((value for n, given, value in self.values() if n == name and given == labels), None)

    def _begin(self, event: Event) -> None:
        """An attempt: what it is configured to do replaces what the last one was."""
        self._end("")
        self._set("attempt", event.attempt)
        self._resume_step = event.fields.get("resume_step")
        for name, part, field in CONFIGURED:
            value = event.fields["config"].get(part, {}).get(field)
            self._values[name] = {} if value is None else {(): value}

    def _end(self, verdict: str) -> None:
        """The run has ended so; with no verdict, it goes on."""
        told = verdict if verdict in VERDICTS or not verdict else "other"
        for known in VERDICTS:
            self._set("run_ended", known == told, self._run, known)

    def _commit(self, event: Event) -> None:
        assert event.step is not None
        fields = event.fields
        told = {"learning_rate": "learning_rate", "step_seconds": "step_s", "world_size": "world_size"}
        if not fields.get("refused"):
            told |= {"loss_nats": "loss", "gradient_norm": "grad_norm"}
        for name, field in told.items():
            self._set(name, fields[field])
        self._set("step", event.step + 1)
        if event.step < self._next_step:
            return
        self._next_step = event.step + 1
        self._recent_s.append(fields["step_s"])
        self._set("recent_step_seconds", statistics.median(self._recent_s), "median")
        self._set("recent_step_seconds", _p95(self._recent_s), "p95")
        self._add("steps_total", 1)
        self._add("steps_left_out_total", bool(fields.get("refused")))
        self._add("tokens_total", self.goodput.num_tokens(event))
        self._add("data_wait_seconds_total", fields["data_wait_s"])
        parts = (fields["data_wait_s"], fields["compute_s"], fields["reduce_wait_s"], fields["optimizer_s"])
        for phase, seconds in zip(PHASES, parts, strict=True):
            self._add("step_phase_seconds_total", seconds, phase)

    def _compare(self, seconds: list[float]) -> None:
        """Workers, by what they need for a micro-batch."""
        for statistic, of in (("fastest", min), ("median", statistics.median), ("slowest", max)):
            self._set("worker_micro_batch_seconds", of(seconds), statistic)

    def _ask_goodput(self) -> None:
        """Replaced whole: what goodput does not know any more must not stay."""
        held, tokens_per_s = self.goodput.members_held, self.goodput.tokens_per_s()
        self._set("members_held", held)
        self._set("held_worker_seconds_total", self.goodput.held_worker_s)
        for name, value in (
            ("tokens_per_second", tokens_per_s),
            ("remaining_seconds", self._remaining_s()),
            ("mfu_ratio", self._mfu.ratio(tokens_per_s, held)),
            ("goodput_ratio", self.goodput.ratio()),
        ):
            self._values[name] = {} if value is None else {(): value}
        lost = self.goodput.lost_worker_s()
        self._values["lost_worker_seconds"] = {(cause,): seconds for cause, seconds in lost.items()}

    def _remaining_s(self) -> float | None:
        steps_per_s, planned = self.goodput.steps_per_s(), self._values["steps_planned"].get(())
        if not steps_per_s or planned is None:
            return None
        return max(0, planned - self._next_step) / steps_per_s

    def _begin_counters(self) -> None:
        """Counters exist from the start: a series that appears with its first count hides it from `rate`."""
        label_values = {"rescales_total": CAUSES, "lost_seconds_total": CAUSES, "members_lost_total": LOSSES}
        label_values["members_left_total"] = LEAVES
        label_values["step_phase_seconds_total"] = PHASES
        for metric in self._metrics.values():
            if metric.kind == "counter":
                for value in label_values.get(metric.name, ()):
                    self._set(metric.name, 0, value)
                if not metric.labels:
                    self._set(metric.name, 0)

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._values[name][labels] = value

    def _add(self, name: str, amount: float, *labels: str) -> None:
        assert amount >= 0
        self._values[name][labels] = self._values[name].get(labels, 0) + amount


def _p95(seconds: Iterable[float]) -> float:
    """The least of them that 95 in 100 do not exceed."""
    ordered = sorted(seconds)
    return ordered[math.ceil(0.95 * len(ordered)) - 1]


def _loss(cause: str) -> str:
    """A cause in words, as one of few label values."""
    if cause == "preemption":
        return "preemption"
    return "hang" if cause.startswith(("silent", "no progress", "hung")) else "crash"
