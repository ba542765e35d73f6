"""What is worth an alarm: alerts, and the series that they stand on, as data. rules.py writes them for Prometheus and people.

In expressions `$name` is the catalogue's metric of that name. Every alert carries the run's name as the label `run`.
Trade-off: thresholds are constants that suit most runs; whoever knows better edits the copy that Prometheus reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elastic_lm.monitor.history import ROUTINE

RUNBOOK = "docs/runbooks.md"


@dataclass(frozen=True)
class Recording:
    """A series that Prometheus computes; `elastic_lm:<what>:<how>`, so that no metric has such a name."""

    name: str
    expression: str
    help: str


@dataclass(frozen=True)
class Alert:
    """`lasts`: for how long the expression holds before it is told. `means` and `remedies` become the runbook's section."""

    name: str
    expression: str
    lasts: str
    severity: Literal["critical", "warning", "info"]
    summary: str
    means: str
    remedies: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """Of its section in the runbook."""
        return f"{RUNBOOK}#{self.name.lower()}"


def _of_run(expression: str) -> str:
    """With the run's name as a label: one target tells of one run at a time."""
    return f"({expression}) * on (job, instance) group_left (run) $run_info"


RECORDINGS = (
    Recording(
        "elastic_lm:loss_nats:avg5m",
        "avg_over_time($loss_nats[5m])",
        "Mean of the losses that scrapes of five minutes saw.",
    ),
    Recording(
        "elastic_lm:tokens_per_worker:rate5m",
        "rate($tokens_total[5m]) / avg_over_time($world_size[5m])",
        "Committed tokens per second by workers of the generation.",
    ),
    Recording(
        "elastic_lm:data_wait:rate10m",
        "rate($data_wait_seconds_total[10m])",
        "Share of wall time for which steps waited for tokens, 0 to 1.",
    ),
    # Goodput of the whole run is tokens / (held x undisturbed rate): that gives the rate, and the rate the window's goodput.
    Recording(
        "elastic_lm:goodput:ratio1h",
        "clamp_max(increase($tokens_total[1h]) / increase($held_worker_seconds_total[1h]) * $goodput_ratio * "
        "$held_worker_seconds_total / $tokens_total, 1)",
        "Goodput of the last hour, 0 to 1; the metric itself is that of the whole run.",
    ),
)

ALERTS = (
    Alert(
        "ElasticLmNoStep",
        _of_run("$steps_total == $steps_total offset 10m and $step < $steps_planned"),
        "1m",
        "critical",
        "No step for ten minutes",
        "The coordinator answers and has steps left, but none was committed for ten minutes: it waits for workers, "
        "for tokens or for storage, or every try to go on fails. A run that is younger than ten minutes is left "
        "alone, and so is one whose last checkpoint is being written.",
        (
            "`elastic-lm status RUN` says what it waits for, `elastic-lm logs RUN` how it came to that.",
            "\"Waiting for n workers\": Ray finds no room. `ray status` shows what is asked for. `elastic-lm scale "
            "RUN --workers 1..8` lowers the minimum.",
            "Waiting for tokens: look at the storage's own monitoring. Training goes on by itself when storage is "
            "back.",
            "Steps, or an evaluation, that take longer than ten minutes are not meant: raise the window in your copy of "
            "the rules, or measure fewer held-out samples (`evaluation.samples`).",
        ),
    ),
    Alert(
        "ElasticLmTargetAbsent",
        "max by (job, instance, run) (last_over_time($run_ended[1h])) == 0 unless on (run) $run_info"
        " unless on (run) max by (run) (max_over_time($run_ended[1h])) == 1",
        "5m",
        "critical",
        "The run's endpoint is gone, and it told no verdict",
        "A run that was scraped within the last hour has not been seen for five minutes, neither there nor under "
        "another address, and its last scrape said that it goes on. Its coordinator or the head node is dead or cut "
        "off, or Prometheus cannot reach it. A run that ends lets one more scrape see its verdict before it closes "
        "its endpoint, so one that ended in peace is not told of, wherever it had moved. An hour after the last "
        "scrape this falls silent.",
        (
            "`elastic-lm status RUN` reads storage, so it answers from any machine.",
            "The head node is gone: give the same command again; the run goes on from its newest checkpoint.",
            "The run trains on: `up` of the target and Prometheus's page of targets say why it is not reached. The "
            "endpoint listens on 127.0.0.1 unless `metrics.host` says otherwise, and on another port when its own was "
            "taken, which the run says when it starts.",
            "The process was killed without warning (SIGKILL) after you stopped it: nothing is lost beyond the newest "
            "checkpoint.",
        ),
    ),
    Alert(
        "ElasticLmLossNotFinite",
        'max by (job, instance, run) (max_over_time($run_ended{verdict="poisoned"}[10m])) == 1'
        " or " + _of_run("$loss_nats != $loss_nats or abs($loss_nats) == Inf"),
        "0m",
        "critical",
        "The loss or a gradient is not finite, and the run has stopped",
        "A step came out with a loss or a gradient that is not finite or is out of range. Nothing of that step was "
        "applied, and the run has ended with the verdict `poisoned`. Told for ten minutes.",
        (
            "The same command would meet the same step with the same bits again. What was trained since the newest "
            "checkpoint is not saved. With `training.on_nonfinite: skip` it leaves the step out and goes on; a run that "
            "ended all the same has left out ten steps on end.",
            "A lower learning rate, or `training.skip` for the batch, is another identity and so a new run.",
            "With `training.precision: fp16` the loss scale has then fallen to its least; bf16 has the range of fp32.",
        ),
    ),
    Alert(
        "ElasticLmRunFailed",
        "max by (job, instance, run, verdict)"
        ' (max_over_time($run_ended{verdict!~"done|stopped|poisoned"}[10m])) == 1',
        "0m",
        "critical",
        "The run has ended with the verdict {{ $labels.verdict }}",
        "The run has given up. `done` and `stopped` are no failures, and `poisoned` has an alert of its own. Told for "
        "ten minutes.",
        (
            "`elastic-lm status RUN` has the verdict's message; [operations.md](operations.md#what-to-do-when) has a "
            "paragraph for each verdict.",
        ),
    ),
    Alert(
        "ElasticLmStepMismatch",
        _of_run("$step_mismatches_total > 0"),
        "0m",
        "critical",
        "A step was told twice with different bits",
        "The same step was computed again and came out otherwise, which exact sums promise never happens. A machine "
        "that computes wrongly is likelier than a fault of ours, and both matter: what was trained since is not what "
        "it should be.",
        (
            "Stop the run and keep its event log: the events `step_mismatch` hold both results.",
            "Find out which nodes trained that step (`elastic-lm logs RUN`) and test their memory and GPUs.",
            "Go on from a checkpoint before that step.",
        ),
    ),
    Alert(
        "ElasticLmLossSpike",
        _of_run("elastic_lm:loss_nats:avg5m > 1.1 * min_over_time(elastic_lm:loss_nats:avg5m[1h]) + 0.1"),
        "2m",
        "warning",
        "The loss is more than a tenth above the hour's best",
        "The mean loss of five minutes is above the lowest such mean of the last hour by a tenth and 0.1 nats. Single "
        "steps do not count, and neither does a loss that falls slowly. After the end of a warm-up some rise may be "
        "meant.",
        (
            "`elastic-lm report RUN` shows loss, gradient norm and learning rate over the steps.",
            "A gradient norm that rose first: the learning rate is too high, or `optimizer.clip_norm` is not set.",
            "A loss that rose at once and recovers: look at what the batch holds; `training.skip` leaves it out of a "
            "new run, and `spikes.policy: rewind` goes back by itself when it happens.",
            "It does not come from workers that came or went: their number does not change the result.",
        ),
    ),
    Alert(
        "ElasticLmRewound",
        _of_run("increase($rewinds_total[1h]) > 0"),
        "0m",
        "warning",
        "The run went back to before a loss spike",
        "Loss or gradient stood out for some steps, or a gradient was not finite, and the run went back to a checkpoint from "
        "before that; the batches around it are left out (`spikes`). Training goes on by itself. Told for an hour.",
        (
            "`elastic-lm runs show RUN` says why, and which batches are left out; `elastic-lm data show RUN --step N "
            "--before-rewind 1 --loss` shows the text that they hold.",
            "Again and again: text is seldom the reason then. The learning rate is too high, or the warm-up too short; that is "
            "another run (`elastic-lm fork`). After `spikes.max_rewinds` times the run ends.",
        ),
    ),
    Alert(
        "ElasticLmThroughputDrop",
        _of_run(
            "elastic_lm:tokens_per_worker:rate5m < 0.7 * quantile_over_time(0.5, elastic_lm:tokens_per_worker:rate5m[6h])"
        ),
        "10m",
        "warning",
        "Tokens per second and worker are a third below what they were",
        "For ten minutes a worker has brought less than 0.7 of the tokens per second that it brought in the median of "
        "the last six hours. The number of workers is taken out, but not how well the micro-batches divide among "
        "them.",
        (
            "`elastic-lm report RUN` says where the time of steps goes: data, compute, reduce, optimizer.",
            "One slow worker holds up all: it is named in the log as a straggler. Drain its node if it stays slow.",
            "Waiting for the sum grew on all workers: look at the network between the nodes.",
            "The number of workers has changed: choose `batch.micro_batches` as a multiple of the numbers that you "
            "mean to have.",
        ),
    ),
    Alert(
        "ElasticLmWorldBelowMinimum",
        _of_run("$world_size < $workers_min or $members_held < $workers_min"),
        "5m",
        "warning",
        "Fewer workers than the run's minimum for five minutes",
        "The run trains with the workers that survived, or waits until there are `workers.min` of them: no more came "
        "for five minutes.",
        (
            "`ray status` shows what the run asks for and what the nodes have; the cluster's autoscaler says why it "
            "adds none.",
            "A node that kept losing workers gets none for ten minutes: the log names it.",
            "`elastic-lm scale RUN --workers 1..8` changes what is wanted without a restart.",
        ),
    ),
    Alert(
        "ElasticLmWorldBelowWanted",
        _of_run("$world_size < $workers_max"),
        "30m",
        "info",
        "Fewer workers than wanted for half an hour",
        "The run trains, with fewer workers than `workers.max`. Nothing is wrong but that it takes longer.",
        ("`ray status` shows the pending demand.", "`elastic-lm scale RUN --workers 2..4` says that fewer are wanted."),
    ),
    Alert(
        "ElasticLmRescaleStorm",
        _of_run(f'sum without (cause) (increase($rescales_total{{cause!~"start|{"|".join(ROUTINE)}"}}[10m])) > 10'),
        "1m",
        "warning",
        "Training stood still more than ten times in ten minutes",
        "Workers come and go faster than once a minute. Each change costs a fraction of a second, so the run "
        "survives, but something is unsteady: a node that kills what is placed there, an autoscaler that changes its "
        "mind, or preemptions in series.",
        (
            "`elastic_lm_rescales_total` by `cause` says which: `failure` and `hang` are faults, `join` and `drain` "
            "are scaling.",
            "`elastic-lm logs RUN` names workers and nodes. A node that lost four workers in a minute is left out by "
            "itself; drain one that is slower in it: `elastic-lm drain RUN NODE`.",
            "Preemptions: other kinds of machines, or a lower `workers.max` until it is calm.",
        ),
    ),
    Alert(
        "ElasticLmCheckpointStale",
        _of_run(
            "$step - $checkpoint_step > 2 * $checkpoint_interval_steps"
            " or ($step unless $checkpoint_step) > 2 * $checkpoint_interval_steps"
        ),
        "10m",
        "warning",
        "The newest checkpoint is more than two intervals old",
        "Steps since the newest checkpoint exceed twice `checkpoint.every_steps`: that is what would be computed "
        "again if every worker were lost now. Runs that save only at the end are left alone.",
        (
            "`elastic-lm logs RUN` says what became of the last tries.",
            "Checkpoints that take longer than the interval (`elastic_lm_checkpoint_seconds`): raise "
            "`checkpoint.every_steps`.",
            "Storage that hangs is given up after `checkpoint.timeout_s`; ask the storage's own monitoring.",
        ),
    ),
    Alert(
        "ElasticLmCheckpointFailing",
        # `increase` extrapolates: two read as a little more than 2, three may read as a little less than 3.
        _of_run("increase($checkpoints_failed_total[1h]) > 2.5"),
        "0m",
        "warning",
        "Three checkpoints or more have failed within an hour",
        "Storage does not take checkpoints. Training goes on, and every failure makes the loss of all workers dearer.",
        (
            "The events `checkpoint_failed` hold what storage said: `elastic-lm logs RUN`.",
            "Permissions and space of the bucket; [operations.md](operations.md#what-a-run-may-do-in-storage) says "
            "what is needed.",
            "With `checkpoint.fallback` the last state is kept on a node when the run ends meanwhile.",
        ),
    ),
    Alert(
        "ElasticLmDataStall",
        _of_run("elastic_lm:data_wait:rate10m > 0.1"),
        "5m",
        "warning",
        "More than a tenth of the time goes into waiting for tokens",
        "Steps wait for tokens. One that waits without end is not in here, as it is not committed: that is "
        "ElasticLmNoStep.",
        (
            "`data.readers`: two are enough for eight GPUs at 124M parameters; more of them, or more CPU on their "
            "nodes.",
            "Storage that is slow to the cluster: bring the corpus into the same region.",
            "Readers that die are named in the log (`elastic_lm_readers_replaced_total`).",
        ),
    ),
    Alert(
        "ElasticLmGoodputLow",
        _of_run("elastic_lm:goodput:ratio1h < 0.8"),
        "30m",
        "warning",
        "Less than 0.8 of the held worker time becomes committed tokens",
        "Over the last hour the workers that you hold could have committed a quarter more tokens or beyond that. In a "
        "run's first hour, its start counts too.",
        (
            "`elastic_lm_lost_worker_seconds` by `cause` says where it went, and so does `elastic-lm report RUN`.",
            "`warm_up`: workers come and go too often for what their start costs. `uneven`: micro-batches do not "
            "divide among the workers. `data`: readers or storage.",
            "`unnamed`: steps are slower than the median of their like; look for stragglers.",
        ),
    ),
)  # fmt: skip
