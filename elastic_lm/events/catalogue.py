"""The catalogue of events: what each kind means, and the fields that it carries.

One place, so that whoever reads a log need not read who writes it: `python -m elastic_lm.events.catalogue` prints
docs/events.md, and tests fail when the file is out of date or an event is written with other fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from elastic_lm.events.types import Event, EventKind


@dataclass(frozen=True)
class Kind:
    """Meaning, and `fields`: name -> meaning with unit."""

    meaning: str
    fields: dict[str, str] = field(default_factory=dict)


_MEMBER = {"member_id": "the worker"}
_NODE = {"node_id": "the node"}

CATALOGUE: dict[EventKind, Kind] = {
    EventKind.RUN_STARTED: Kind(
        "An attempt begins.",
        {
            "resume_step": "step of the checkpoint that it goes on from; null: from the beginning",
            "config": "the whole resolved config",
            "flops_per_token": "FLOPs that the model needs for a token, forward and backward; null: unknown",
        },
    ),
    EventKind.MEMBER_STARTED: Kind("A worker's process runs.", {**_MEMBER, **_NODE, "pid": "its process id there"}),
    EventKind.MEMBER_READY: Kind(
        "A worker is warmed up and computes the run's bits.",
        {
            **_MEMBER,
            **_NODE,
            "startup_s": "seconds since its process began",
            "environment": "what its bits may depend on: PyTorch build, device, instruction set, threads",
        },
    ),
    EventKind.MEMBER_RETURNED: Kind(
        "A worker that served an earlier coordinator goes on under this one, with what it holds; after a rewind that is nothing.",
        {
            **_MEMBER,
            **_NODE,
            "pid": "its process id there",
            "whole": "whether it holds a state; `step` is the next one of it",
            "environment": "as when it became ready",
        },
    ),
    EventKind.MEMBER_REFUSED: Kind(
        "A worker computes other bits than the run, and is ended.",
        {**_MEMBER, "environment": "its own", "expected": "that of the run's first worker"},
    ),
    EventKind.MEMBER_LOST: Kind(
        "A worker is gone, or is treated so for good.",
        {**_MEMBER, **_NODE, "cause": "why, in words; `preemption` when its node was going away"},
    ),
    EventKind.MEMBER_LEFT: Kind(
        "A worker left between two leases.", {**_MEMBER, "cause": "`drain`, `resize` or `preemption`"}
    ),
    EventKind.NODE_DRAINING: Kind("A node with workers of the run is about to go.", {**_NODE}),
    EventKind.NODE_LOST: Kind(
        "Ray gave up a node after workers of the run were lost there.",
        {**_NODE, "members": "the workers that were lost there lately"},
    ),
    EventKind.NODE_QUARANTINED: Kind(
        "A node lost too many workers in a short time; no more are placed there for now.",
        {**_NODE, "failures": "how many"},
    ),
    EventKind.LEASE_GRANTED: Kind(
        "A generation begins to train.",
        {
            "members": "its workers, in rank order",
            "start_step": "its first step",
            "stop_step": "the step after its last",
            "shares": "micro-batches of each step, by rank",
            "world_size": "number of its workers",
        },
    ),
    EventKind.REFORMED: Kind(
        "Training stood still and goes on.",
        {
            "cause": "why; the values are in [metrics.md](metrics.md)",
            "lost_s": "seconds for which nobody trained",
            "world_size": "number of workers that go on",
        },
    ),
    EventKind.STEP_COMMITTED: Kind(
        "A step is applied. Told once for each step.",
        {
            "step": "the step, from 0",
            "loss": "nats: sum over targets by number of targets",
            "num_targets": "targets of the step",
            "learning_rate": "learning rate",
            "grad_norm": "global L2 norm of the gradient before clipping",
            "sample_hash": "hash of the tokens that entered it",
            "refused": "elements that were not finite or out of range",
            "generation": "who trained it",
            "world_size": "how many trained it",
            "step_s": "its seconds, on the worker that told it; so are the parts",
            "compute_s": "forward and backward",
            "data_wait_s": "waiting for tokens",
            "reduce_wait_s": "waiting for the sum",
            "optimizer_s": "the update",
        },
    ),
    EventKind.STEP_MISMATCH: Kind(
        "ALARM: a step was computed again and came out with other bits.",
        {"logged": "the step's fields in the log", "told": "what came out now"},
    ),
    EventKind.WORKER_PACES: Kind(
        "How fast every worker is, told now and then.",
        {"paces": "by worker: [seconds per micro-batch, micro-batches per step]"},
    ),
    EventKind.STRAGGLER: Kind(
        "A worker is much slower than the median.",
        {**_MEMBER, "micro_batch_s": "its seconds per micro-batch", "median_s": "the median"},
    ),
    EventKind.CHECKPOINT_SAVED: Kind(
        "A checkpoint is complete; the event's step is the number of steps in it.",
        {"seconds": "from the copy of the state to the manifest"},
    ),
    EventKind.CHECKPOINT_FAILED: Kind("A checkpoint was abandoned.", {"error": "why"}),
    EventKind.EVALUATED: Kind(
        "The held-out text was measured with the weights before `step`.",
        {
            "loss": "nats per target",
            "loss_stderr": "its standard error over batches, too small where documents are longer than samples; null: of one",
            "num_targets": "tokens that were predicted",
            "num_correct": "how many were the most probable token; null: the objective does not tell",
            "num_bytes": "UTF-8 bytes of text that the targets stand for; null: they are not all of it",
        },
    ),
    EventKind.REWOUND: Kind(
        "The run went back to before a spike; `step` is the number of steps that stay. Those from there on that were told "
        "before are not the run's any more.",
        {
            "number": "how often it has, from 1",
            "cause": "`loss`, `gradient norm`, or `poisoned`: a step that came to nothing",
            "first_step": "first step of the spike",
            "last_step": "last step of the spike",
            "left_out": "half-open ranges of batches that are left out from now on, and were not before",
            "skip": "all ranges that are left out, as in `training.skip`",
            "num_steps": "steps that were committed and are given up",
        },
    ),
    EventKind.READER_REPLACED: Kind(
        "A reader died or fell silent.",
        {"reader_id": "which", "replacement": "who serves in its place", "cause": "why"},
    ),
    EventKind.RESIZED: Kind(
        "Somebody changed how many workers the run wants.", {"min_workers": "at least", "max_workers": "at most"}
    ),
    EventKind.NOTE: Kind(
        "A sentence for people.",
        {
            "member_id": "the worker that it is about",
            "have": "workers that are ready, of a run that waits",
            "wanted": "workers that it waits for",
        },
    ),
    EventKind.RUN_FINISHED: Kind(
        "The verdict; the event's step is the number of committed steps.",
        {"verdict": "as in `RunResult`", "reason": "its message there"},
    ),
}
OPTIONAL = {(EventKind.NOTE, name) for name in CATALOGUE[EventKind.NOTE].fields}  # not in every event of the kind


def markdown() -> str:
    """docs/events.md."""
    lines = [
        "# Events",
        "",
        "Generated by `make docs` from `elastic_lm/events/catalogue.py`; edit there.",
        "",
        "The event log is a run's truth: one JSON object a line, in the order of what happened, in segments",
        "`events/NNNNNNNNNNNN.jsonl` of its folder, named by the number of their first event and never changed. A segment is",
        "created where the one before it ends: when another owner has taken over the run and opened the log, the name that the",
        "earlier one would write next is taken, so whatever it does it adds nothing more.",
        "`Run.open(RUN).events()` yields them as `Event` objects. Kinds and fields may be added by later versions; what is",
        "here keeps its meaning.",
        "",
        f"Every event has {', '.join(f'`{f.name}`' for f in dataclasses.fields(Event))}:",
        "`message` is a sentence with numbers, `step` the step that it is about or null, `generation` the current list of",
        "workers or null, `time_s` unix seconds, `elapsed_s` monotonic seconds since the attempt began, `attempt` which life",
        "of the coordinator, from 1, `owner_epoch` which owner of the run told it, 0 where there was none. `fields` is an",
        "object that depends on the kind:",
        "",
        "| kind | meaning | fields |",
        "| --- | --- | --- |",
    ]
    for kind, entry in CATALOGUE.items():
        told = [
            f"`{name}`{' (not always)' if (kind, name) in OPTIONAL else ''}: {meaning}"
            for name, meaning in entry.fields.items()
        ]
        lines.append(f"| `{kind}` | {entry.meaning} | {'<br>'.join(told)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    print(markdown(), end="")
