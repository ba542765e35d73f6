"""What the dashboard shows of a run: rows of panels, each with its queries, unit, limits and a sentence that explains it.

Data alone: promql.py makes the expressions, dashboards.py what Grafana reads. A test holds every metric of the catalogue against
what is shown here, so that a new one is not forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastic_lm.monitor.history import ROUTINE
from elastic_lm.monitor.metrics import RECENT_STEPS
from elastic_lm.monitor.promql import counted, mean, rate, value

# Units as Grafana calls them.
NUMBER = "short"
SHARE = "percentunit"
SECONDS = "s"
DURATION = "dtdurations"
DATE_MS = "dateTimeAsLocal"
RATE = "si:tokens/s"  # any name after `si:`


@dataclass(frozen=True)
class Query:
    """An expression, and what its lines are called: a text, or a label's name in double braces."""

    expression: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One figure. `limits`: (value from which on, color), for what is good or bad; `words`: a value's name."""

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str = NUMBER
    kind: Literal["timeseries", "stat", "bargauge"] = "timeseries"
    width: int = 8
    limits: tuple[tuple[float, str], ...] = ()
    words: tuple[tuple[str, str], ...] = ()
    stacked: bool = False
    highest: float | None = None


@dataclass(frozen=True)
class Row:
    """Panels under one heading. A row of the grid is 24 wide."""

    title: str
    panels: tuple[Panel, ...]
    height: int = 8


@dataclass(frozen=True)
class Mark:
    """Something that happens at a moment, as a line through all graphs; `text` names labels like a legend."""

    name: str
    expression: str
    text: str
    color: str


# Goodput is useful by held worker-seconds. What is useful of late: new tokens by what a worker-second committed at the
# undisturbed rate, which follows from the whole run's goodput.
LATE_GOODPUT = (
    f"clamp_max({rate('tokens_total')} / {rate('held_worker_seconds_total')}"
    f" * {value('goodput_ratio')} * {value('held_worker_seconds_total')} / {value('tokens_total')}, 1)"
)
GOODPUT_LIMITS = ((0.0, "red"), (0.8, "yellow"), (0.9, "green"))
CAUSE = "{{cause}}"

PROGRESS = Row(
    "Progress",
    (
        Panel(
            "State",
            "Whether the run has told its verdict. Its endpoint goes away afterwards.",
            (Query(value("run_ended"), "state"),),
            kind="stat",
            width=3,
            words=(("0", "training"), ("1", "ended")),
        ),
        Panel(
            "Done",
            "Committed steps by those that the whole run is to have.",
            (Query(f"{value('step')} / {value('steps_planned')}", "done"),),
            unit=SHARE,
            kind="stat",
            width=3,
            highest=1,
        ),
        Panel(
            "Time left",
            "To the last step, at the rate of the last half minute.",
            (Query(value("remaining_seconds"), "left"),),
            unit=DURATION,
            kind="stat",
            width=3,
        ),
        Panel(
            "Ends",
            "When the last step is due, at the rate of the last half minute.",
            (Query(f"(time() + {value('remaining_seconds')}) * 1000", "end"),),
            unit=DATE_MS,
            kind="stat",
            width=3,
        ),
        Panel(
            "Tokens",
            "That committed steps have read, each step counted once.",
            (Query(value("tokens_total"), "tokens"),),
            kind="stat",
            width=3,
        ),
        Panel(
            "Generation",
            "Number of the current list of workers; each re-forming adds one.",
            (Query(value("generation"), "generation"),),
            kind="stat",
            width=3,
        ),
        Panel(
            "Attempt",
            "Which life of the run's coordinator this is, from 1.",
            (Query(value("attempt"), "attempt"),),
            kind="stat",
            width=3,
        ),
        Panel(
            "Mismatched steps",
            "Steps that came out with other bits when they were computed again. Never above 0: stop, and keep the log.",
            (Query(value("step_mismatches_total"), "steps"),),
            kind="stat",
            width=3,
            limits=((0, "green"), (1, "red")),
        ),
    ),
    height=4,
)

LEARNING = Row(
    "Learning",
    (
        Panel(
            "Loss",
            "Nats per target: the last committed step, and the mean over some scrapes.",
            (Query(value("loss_nats"), "last step"), Query(mean("loss_nats"), "mean")),
        ),
        Panel(
            "Gradient norm",
            "Global L2 norm of the gradient before clipping, of the last committed step. So far: steps left out, times that the "
            "run went back to before a spike, and steps given up by that.",
            (
                Query(value("gradient_norm"), "norm"),
                Query(value("steps_left_out_total"), "steps left out"),
                Query(value("rewinds_total"), "rewinds"),
                Query(value("steps_given_up_total"), "steps given up"),
            ),
        ),
        Panel("Learning rate", "Of the last committed step.", (Query(value("learning_rate"), "learning rate"),)),
    ),
)

HELD_OUT = Row(
    "Held-out text",
    (
        Panel(
            "Held-out loss",
            "Nats per target on text that is never trained on, ± 1.96 standard errors over batches; beside it the training loss.",
            (
                Query(value("evaluation_loss_nats"), "held out"),
                Query(f"{value('evaluation_loss_nats')} + 1.96 * {value('evaluation_loss_error_nats')}", "at most"),
                Query(f"{value('evaluation_loss_nats')} - 1.96 * {value('evaluation_loss_error_nats')}", "at least"),
                Query(mean("loss_nats"), "training, mean"),
            ),
        ),
        Panel(
            "Perplexity, accuracy, bits per byte",
            "The last evaluation. Bits per byte compares models with different tokenizers; masked models have none.",
            (
                Query(f"exp({value('evaluation_loss_nats')})", "perplexity"),
                Query(f"100 * {value('evaluation_accuracy_ratio')}", "% right"),
                Query(f"{value('evaluation_nats_per_byte')} / 0.693147", "bits per byte"),
            ),
            kind="stat",
        ),
        Panel(
            "Steps since the last evaluation",
            "How many evaluations there were, and how old the last one is.",
            (
                Query(f"{value('step')} - {value('evaluation_step')}", "steps since"),
                Query(value("evaluations_total"), "evaluations"),
            ),
        ),
    ),
)

TASKS = Row(
    "Tasks",
    (
        Panel(
            "Figures",
            "What `elastic-lm evaluate` last found of each task, in the figure's own unit, with its 95 % interval.",
            (
                Query(value("task_figure", "task, figure"), "{{task}} {{figure}}"),
                Query(value("task_figure_low", "task, figure"), "{{task}} {{figure}}, at least"),
                Query(value("task_figure_high", "task, figure"), "{{task}} {{figure}}, at most"),
            ),
            width=16,
        ),
        Panel(
            "Step of the weights",
            "Of each task, how long the weights were trained that it was last asked of.",
            (Query(value("task_step", "task"), "{{task}}"),),
            kind="bargauge",
        ),
    ),
)

SPEED = Row(
    "Speed",
    (
        Panel(
            "Tokens per second",
            "Committed tokens by wall time, over the last half minute.",
            (Query(value("tokens_per_second"), "all workers"),),
            unit=RATE,
        ),
        Panel(
            "Tokens per second and worker",
            "The same by the workers of the current generation: level while the run grows and shrinks, if scaling is good.",
            (Query(f"{value('tokens_per_second')} / {value('world_size')}", "a worker"),),
            unit=RATE,
        ),
        Panel(
            "MFU",
            "FLOPs per second that the model needs, by the peak of the devices held. Only for GPUs whose peak is known.",
            (Query(value("mfu_ratio"), "MFU"),),
            unit=SHARE,
            highest=1,
        ),
        Panel(
            "Step time",
            f"Wall time of the last {RECENT_STEPS} committed steps, and of the very last, on the member that told it.",
            (
                Query(value("recent_step_seconds", statistic="median"), "p50"),
                Query(value("recent_step_seconds", statistic="p95"), "p95"),
                Query(value("step_seconds"), "last step"),
            ),
            unit=SECONDS,
        ),
        Panel(
            "Where a step's time goes",
            "Mean seconds of a step by phase, on the member that told it. Long waits for the sum mean uneven workers.",
            (
                Query(
                    f"{rate('step_phase_seconds_total', 'phase')} / on () group_left () {rate('steps_total')}",
                    "{{phase}}",
                ),
            ),
            unit=SECONDS,
            stacked=True,
        ),
        Panel(
            "Data stall",
            "Share of step time for which the member that told the step waited for tokens. Above a tenth: more readers.",
            (
                Query(
                    f"{rate('data_wait_seconds_total')} / sum({rate('step_phase_seconds_total', 'phase')})", "waiting"
                ),
            ),
            unit=SHARE,
            limits=((0, "green"), (0.1, "red")),
        ),
    ),
)

WORKERS = Row(
    "Workers",
    (
        Panel(
            "World size",
            "Workers that train, those that hold resources (also starting or ready ones), and the range that the run may have.",
            (
                Query(value("world_size"), "training"),
                Query(value("members_held"), "held"),
                Query(value("workers_min"), "least"),
                Query(value("workers_max"), "most"),
            ),
            width=12,
        ),
        Panel(
            "Spread of workers",
            "Seconds that a worker computes for a micro-batch. Told every few seconds at first, later every 5 minutes.",
            tuple(
                Query(value("worker_micro_batch_seconds", statistic=statistic), statistic)
                for statistic in ("slowest", "median", "fastest")
            ),
            unit=SECONDS,
            width=12,
        ),
        Panel(
            "Slowest by median",
            "A worker above the straggler factor, 1.5 unless changed, is named in the log and gets fewer micro-batches.",
            (
                Query(
                    f"{value('worker_micro_batch_seconds', statistic='slowest')}"
                    f" / {value('worker_micro_batch_seconds', statistic='median')}",
                    "ratio",
                ),
            ),
            kind="stat",
            width=4,
            limits=((0, "green"), (1.5, "red")),
        ),
        Panel(
            "Rescales by cause",
            "How often training stood still and went on with a new lease, since the run began. `lease` is the usual renewal.",
            (Query(f"{value('rescales_total', 'cause')} > 0", CAUSE),),
            kind="bargauge",
        ),
        Panel(
            "What happened to workers",
            "Counts since the run began, of workers, their nodes and their readers.",
            (
                Query(value("members_ready_total"), "became ready"),
                Query(value("members_lost_total", "cause"), f"lost: {CAUSE}"),
                Query(value("members_left_total", "cause"), f"left in peace: {CAUSE}"),
                Query(value("members_refused_total"), "refused"),
                Query(value("stragglers_total"), "named as slow"),
                Query(value("nodes_lost_total"), "nodes lost"),
                Query(value("nodes_quarantined_total"), "nodes quarantined"),
                Query(value("readers_replaced_total"), "readers replaced"),
            ),
            kind="bargauge",
            width=12,
        ),
    ),
)

GOODPUT = Row(
    "Goodput",
    (
        Panel(
            "Goodput",
            "Committed tokens by what the held worker-seconds could have committed at the undisturbed rate.",
            (Query(value("goodput_ratio"), "whole run"), Query(LATE_GOODPUT, "lately")),
            unit=SHARE,
            highest=1,
            limits=GOODPUT_LIMITS,
        ),
        Panel(
            "Held time lost, by cause",
            "Share of the held worker-seconds that committed nothing, since the run began. With goodput it makes 100 %.",
            (
                Query(
                    f"{value('lost_worker_seconds', 'cause')}"
                    f" / on () group_left () {value('held_worker_seconds_total')}",
                    CAUSE,
                ),
            ),
            unit=SHARE,
            stacked=True,
        ),
        Panel(
            "Training stood still, by cause",
            "Wall time since the run began, whatever the number of workers.",
            (Query(f"{value('lost_seconds_total', 'cause')} > 0", CAUSE),),
            unit=SECONDS,
            kind="bargauge",
        ),
    ),
)

CHECKPOINTS = Row(
    "Checkpoints",
    (
        Panel(
            "Steps",
            "Committed, in the newest checkpoint, and planned. What is between the first two is computed again if all is lost.",
            (
                Query(value("step"), "committed"),
                Query(value("checkpoint_step"), "in the newest checkpoint"),
                Query(value("steps_planned"), "planned"),
            ),
            width=6,
        ),
        Panel(
            "Steps since the newest checkpoint",
            "Beside the configured interval, which it passes by a little while a checkpoint is written, by more when some fail.",
            (
                Query(f"{value('step')} - {value('checkpoint_step')}", "since"),
                Query(value("checkpoint_interval_steps"), "interval"),
            ),
            width=6,
        ),
        Panel(
            "Age and duration",
            "Time since the newest checkpoint was complete, and how long it took from copy to manifest.",
            (
                Query(f"time() - {value('checkpoint_timestamp_seconds')}", "age"),
                Query(value("checkpoint_seconds"), "duration"),
            ),
            unit=SECONDS,
            width=6,
        ),
        Panel(
            "Saved and failed",
            "Checkpoints since the run began.",
            (Query(value("checkpoints_saved_total"), "saved"), Query(value("checkpoints_failed_total"), "failed")),
            kind="bargauge",
            width=6,
        ),
    ),
)

ROWS = (PROGRESS, LEARNING, HELD_OUT, TASKS, SPEED, WORKERS, GOODPUT, CHECKPOINTS)

MARKS = (
    Mark("Rescales", counted("rescales_total", "cause", without=ROUTINE), CAUSE, "blue"),
    Mark("Workers lost", counted("members_lost_total", "cause"), CAUSE, "red"),
)
