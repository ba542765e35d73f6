"""The catalogue of metrics: every name that a run exports, with kind, unit, meaning and labels.

One place, so that exporter, dashboards and docs/metrics.md cannot disagree: `python -m elastic_lm.monitor.metrics` prints
the document, and a test fails when the file is out of date. Labels have few values, never a step, path or sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "elastic_lm_"
RECENT_STEPS = 100


@dataclass(frozen=True)
class Metric:
    """One name. A counter's name ends with `_total`; `unit` is the base unit, empty for plain counts."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()


# Causes for which training stood still. Whatever else control says is counted as `other`.
CAUSES = (
    "start",
    "failure",
    "hang",
    "error",
    "coordinator",
    "rewind",
    "wait",
    "join",
    "drain",
    "resize",
    "straggler",
    "checkpoint",
    "evaluation",
    "lease",
    "other",
)
LOSSES = ("crash", "hang", "preemption")
LEAVES = ("drain", "resize", "preemption")
PHASES = ("data", "compute", "reduce", "optimizer")
# Of the last steps, and of all workers: few values, however many there are.
STEP_STATISTICS = ("median", "p95")
WORKER_STATISTICS = ("fastest", "median", "slowest")
# Tasks that are told, and figures of each.
MOST_TASKS = 16
MOST_FIGURES = 4
# How a run ends. Whatever else control says is told as `other`.
VERDICTS = ("done", "stopped", "failed_bug", "poisoned", "spiked", "data_error", "unavailable", "failed", "other")

CATALOGUE = (
    Metric("run_info", "gauge", "", "Always 1; says which run this is.", ("run", "version")),
    Metric(
        "run_ended",
        "gauge",
        "",
        "Is 1 for the verdict with which the run has ended, 0 for the others, and for all while it goes on.",
        ("run", "verdict"),
    ),
    Metric("attempt", "gauge", "", "Which life of the run's coordinator this is, from 1."),
    Metric("steps_planned", "gauge", "steps", "Steps that the whole run is to have."),
    Metric("steps_total", "counter", "steps", "Committed steps of the run, those before a restart included."),
    Metric(
        "steps_left_out_total", "counter", "steps", "Those of them that changed no weights: gradients were not finite."
    ),
    Metric("rewinds_total", "counter", "", "How often the run went back to before a spike."),
    Metric(
        "steps_given_up_total", "counter", "steps", "Committed steps that it went back from; they count in the others."
    ),
    Metric(
        "tokens_total",
        "counter",
        "tokens",
        "Tokens that committed steps have read, each step counted once, and again only after a rewind.",
    ),
    Metric("step", "gauge", "steps", "The next step to commit."),
    Metric("loss_nats", "gauge", "nats", "Loss of the last committed step: sum over targets by number of targets."),
    Metric("evaluation_step", "gauge", "steps", "Steps that the weights had at the last evaluation on held-out text."),
    Metric("evaluation_loss_nats", "gauge", "nats", "Held-out loss then: sum over targets by number of targets."),
    Metric(
        "evaluation_loss_error_nats",
        "gauge",
        "nats",
        "Its standard error over batches; too small where documents are longer than a sample.",
    ),
    Metric("evaluation_accuracy_ratio", "gauge", "", "Held-out targets that were the most probable token, 0 to 1."),
    Metric(
        "evaluation_nats_per_byte", "gauge", "nats/byte", "Held-out loss by UTF-8 byte, which compares over tokenizers."
    ),
    Metric("evaluations_total", "counter", "", "Evaluations on held-out text."),
    Metric(
        "task_figure",
        "gauge",
        "",
        "What `elastic-lm evaluate` last found, in the figure's own unit.",
        ("task", "figure"),
    ),
    Metric("task_figure_low", "gauge", "", "Lower end of its 95 % interval.", ("task", "figure")),
    Metric("task_figure_high", "gauge", "", "Upper end of its 95 % interval.", ("task", "figure")),
    Metric("task_step", "gauge", "steps", "Steps that the weights had then.", ("task",)),
    Metric("gradient_norm", "gauge", "", "Global L2 norm of the last gradient before clipping."),
    Metric("learning_rate", "gauge", "", "Learning rate of the last committed step."),
    Metric("tokens_per_second", "gauge", "tokens/s", "Committed tokens by wall time, over the last half minute."),
    Metric("remaining_seconds", "gauge", "s", "Time to the last step of the run at the rate of the last half minute."),
    Metric(
        "mfu_ratio", "gauge", "", "FLOPs/s that the model needs by the peak of the devices held, 0 to 1; where known."
    ),
    Metric("step_seconds", "gauge", "s", "Wall time of the last committed step, on the member that told it."),
    Metric(
        "recent_step_seconds",
        "gauge",
        "s",
        f"Wall time of the last {RECENT_STEPS} committed steps, on the members that told them.",
        ("statistic",),
    ),
    Metric(
        "step_phase_seconds_total",
        "counter",
        "s",
        "Where step time went, on the member that told the step.",
        ("phase",),
    ),
    Metric(
        "data_wait_seconds_total", "counter", "s", "Time for which a step waited for tokens, on the telling member."
    ),
    Metric("world_size", "gauge", "workers", "Workers of the current generation."),
    Metric("workers_min", "gauge", "workers", "Workers that the run needs to start; survivors go on below it."),
    Metric("workers_max", "gauge", "workers", "Workers that the run wants; more are never started."),
    Metric("generation", "gauge", "", "Number of the current generation; each re-forming adds one."),
    Metric("members_held", "gauge", "workers", "Workers that hold resources: training, ready or starting."),
    Metric("rescales_total", "counter", "", "How often training stood still and went on with a new lease.", ("cause",)),
    Metric("lost_seconds_total", "counter", "s", "Wall time for which training stood still.", ("cause",)),
    Metric("members_ready_total", "counter", "workers", "Workers that finished warming up."),
    Metric("members_lost_total", "counter", "workers", "Workers that died, hung or were preempted.", ("cause",)),
    Metric("members_left_total", "counter", "workers", "Workers that left in peace between two leases.", ("cause",)),
    Metric("members_refused_total", "counter", "workers", "Workers that compute other bits than the run."),
    Metric("nodes_lost_total", "counter", "nodes", "Nodes that died while workers of the run were on them."),
    Metric("nodes_quarantined_total", "counter", "nodes", "Nodes that lost too many workers in a short time."),
    Metric(
        "worker_micro_batch_seconds",
        "gauge",
        "s",
        "Time that a worker computes for a micro-batch, as last told: every few seconds at first, later every 5 minutes.",
        ("statistic",),
    ),
    Metric("stragglers_total", "counter", "", "How often a worker was named as slow."),
    Metric("readers_replaced_total", "counter", "readers", "Readers that died or fell silent."),
    Metric("step_mismatches_total", "counter", "steps", "Steps told twice with different bits. Alarm: never above 0."),
    Metric("checkpoint_step", "gauge", "steps", "Steps in the newest checkpoint of this run."),
    Metric("checkpoint_timestamp_seconds", "gauge", "s", "Unix time at which the newest checkpoint was complete."),
    Metric(
        "checkpoint_interval_steps",
        "gauge",
        "steps",
        "Steps between checkpoints, as configured; absent when there is only one at the end.",
    ),
    Metric("checkpoint_seconds", "gauge", "s", "Time the newest checkpoint took from copy to manifest."),
    Metric("checkpoints_saved_total", "counter", "", "Checkpoints completed."),
    Metric("checkpoints_failed_total", "counter", "", "Checkpoints abandoned."),
    Metric(
        "goodput_ratio", "gauge", "", "Committed tokens by what the held worker-seconds could have committed, 0 to 1."
    ),
    Metric("held_worker_seconds_total", "counter", "s", "Worker-seconds held, from a process's start to its end."),
    Metric("lost_worker_seconds", "gauge", "s", "Held worker-seconds that committed nothing, by cause.", ("cause",)),
)


def by_name() -> dict[str, Metric]:
    return {metric.name: metric for metric in CATALOGUE}


def markdown() -> str:
    """docs/metrics.md."""
    lines = [
        "# Metrics",
        "",
        "Generated by `make docs` from `elastic_lm/monitor/metrics.py`; edit there.",
        "",
        "One Prometheus endpoint per run, on the head node, at `metrics.port` (9464 unless changed; the next free port when",
        "it is taken, which the run says when it starts). Every value is computed from the run's events, and a later",
        "attempt of the same run reads the earlier ones first: counters never go back. Ray's own endpoints cover nodes and",
        "GPUs.",
        "",
        "| metric | kind | unit | labels | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for metric in CATALOGUE:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "–"
        lines.append(f"| `{PREFIX}{metric.name}` | {metric.kind} | {metric.unit or '–'} | {labels} | {metric.help} |")
    lines += [
        "",
        f"`cause` of `rescales_total` and `lost_seconds_total`: {', '.join(CAUSES)}.",
        f"`cause` of `members_lost_total`: {', '.join(LOSSES)}; of `members_left_total`: {', '.join(LEAVES)}.",
        "`cause` of `lost_worker_seconds`: the same as of `lost_seconds_total`, and `warm_up` (workers that start while",
        "others train), `data` (steps waiting for tokens), `uneven` (micro-batches that do not divide among the workers),",
        "`rewind` (steps that the run went back from, and the standstill) and `unnamed` (the rest).",
        "`task` and `figure`: as in `evaluations/step-*/TASK.json` of the run's folder, which is looked at every minute: of",
        f"each task the newest step, of up to {MOST_TASKS} tasks up to {MOST_FIGURES} finite figures: your own tasks before",
        "groups of the harness, these before its single tasks, and then those that were asked last. The report has them all.",
        f"`phase`: {', '.join(PHASES)}.",
        f"`statistic` of `recent_step_seconds`: {', '.join(STEP_STATISTICS)} (95 of 100 steps took no longer).",
        f"`statistic` of `worker_micro_batch_seconds`: {', '.join(WORKER_STATISTICS)}, of the workers that train.",
        f"`verdict`: {', '.join(VERDICTS)}.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(), end="")
