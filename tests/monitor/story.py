"""Events as a run would tell them, for tests that look at one through metrics, goodput or progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from elastic_lm.evaluation_file import Figure
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.metrics import CAUSES
from elastic_lm.monitor.task_results import TaskResult


def at(elapsed_s: float, kind: EventKind, *, attempt: int = 0, step: int | None = None, **fields: Any) -> Event:
    return Event(kind, f"{kind} happened.", step, "1.1", fields, time_s=1e9 + elapsed_s, elapsed_s=elapsed_s,
                 attempt=attempt)  # fmt: skip


def started(elapsed_s: float, member_id: str, **more: Any) -> Event:
    return at(elapsed_s, EventKind.MEMBER_STARTED, member_id=member_id, node_id="n0", pid=1, **more)


def ready(elapsed_s: float, member_id: str, **more: Any) -> Event:
    return at(elapsed_s, EventKind.MEMBER_READY, member_id=member_id, node_id="n0", startup_s=1.0, **more)


def lost(elapsed_s: float, member_id: str, cause: str = "its process died", **more: Any) -> Event:
    return at(elapsed_s, EventKind.MEMBER_LOST, member_id=member_id, cause=cause, node_id="n0", **more)


def left(elapsed_s: float, member_id: str, **more: Any) -> Event:
    return at(elapsed_s, EventKind.MEMBER_LEFT, member_id=member_id, cause="drain", **more)


def reformed(elapsed_s: float, cause: str, lost_s: float, **more: Any) -> Event:
    return at(elapsed_s, EventKind.REFORMED, cause=cause, lost_s=lost_s, world_size=2, **more)


def rewound(elapsed_s: float, step: int, *, num_steps: int = 3, **more: Any) -> Event:
    """Back to before this step."""
    fields = {"number": 1, "cause": "loss", "first_step": step, "last_step": step, "left_out": [[step, step + 1]]}
    event = at(
        elapsed_s, EventKind.REWOUND, step=step, skip=fields["left_out"], num_steps=num_steps, **{**fields, **more}
    )
    return replace(event, message="The run went back.")


def committed(
    elapsed_s: float, step: int, *, world_size: int = 2, step_s: float = 1.0, tokens: int = 400, **more: Any
) -> Event:
    """A step; what its time went on adds up to `step_s`."""
    data_wait_s = more.pop("data_wait_s", 0.0)
    fields = {
        "step": step,
        "loss": 2.5,
        "num_targets": tokens,
        "learning_rate": 3e-4,
        "grad_norm": 0.75,
        "sample_hash": 1,
        "refused": 0,
        "generation": "1.1",
        "world_size": world_size,
        "step_s": step_s,
        "data_wait_s": data_wait_s,
        "compute_s": (step_s - data_wait_s) * 0.5,
        "reduce_wait_s": (step_s - data_wait_s) * 0.375,
        "optimizer_s": (step_s - data_wait_s) * 0.125,
    }
    attempt = more.pop("attempt", 0)
    event = at(elapsed_s, EventKind.STEP_COMMITTED, attempt=attempt, **{k: v for k, v in fields.items() if k != "step"})
    return Event(event.kind, event.message, step, "1.1", {**fields, **more}, event.time_s, elapsed_s, attempt)


CONFIG = {
    "training": {"steps": 20, "precision": "bf16"},
    "workers": {"min": 1, "max": 2},
    "checkpoint": {"every_steps": 5},
}


def evaluated(now_s: float, step: int, **changes: object) -> Event:
    fields = {"loss": 2.0, "loss_stderr": 0.1, "num_targets": 100, "num_correct": 40, "num_bytes": 400}
    return at(now_s, EventKind.EVALUATED, step=step, **{**fields, **changes})


def storm(num_workers: int) -> Iterator[Event]:
    """All workers join and are lost, one after the other, but for the last; every kind of trouble comes with each."""
    config = {
        "training": {"steps": num_workers, "precision": "bf16"},
        "workers": {"min": 1, "max": num_workers},
        "checkpoint": {"every_steps": 1},
    }
    yield at(0, EventKind.RUN_STARTED, config=config, flops_per_token=10**9)
    names = [f"w{number}" for number in range(num_workers)]
    yield from (started(0, name) for name in names)
    yield from (ready(1, name, environment={"gpu": "NVIDIA H100 80GB HBM3"}) for name in names)
    for cause in (*CAUSES, "one that nobody knows"):
        yield reformed(2, cause, lost_s=0.1)
    for step, name in enumerate(names):
        now_s = 3.0 + 2 * step
        members = names[step:]
        yield at(now_s, EventKind.LEASE_GRANTED, members=members, world_size=len(members))
        yield committed(now_s, step, world_size=len(members), data_wait_s=0.1)
        yield at(now_s, EventKind.WORKER_PACES, paces={member: [0.5, 1] for member in members})
        yield at(now_s, EventKind.STRAGGLER, member_id=name, micro_batch_s=2.0, median_s=1.0)
        yield at(now_s, EventKind.CHECKPOINT_SAVED, step=step, seconds=0.5)
        yield at(now_s, EventKind.CHECKPOINT_FAILED, step=step, error=f"no room for step {step}")
        yield evaluated(now_s, step)
        yield at(now_s, EventKind.READER_REPLACED, reader_id=f"r{step}", replacement=f"r{step + 1}", cause="died")
        yield at(now_s, EventKind.NODE_LOST, node_id=f"n{step}", members=[name])
        if len(members) == 1:
            return
        yield lost(now_s, name, ("process died", "silent for 2 s", "preemption")[step % 3])
        yield reformed(now_s + 1, "failure", lost_s=0.5)


# Two workers, of whom one is lost after five steps; the run goes on with the other.
HISTORY = [
    at(0, EventKind.RUN_STARTED, config=CONFIG, flops_per_token=10**9),
    started(0, "w0"),
    started(0, "w1"),
    ready(2, "w0", environment={"gpu": "NVIDIA H100 80GB HBM3"}),
    ready(2, "w1", environment={"gpu": "NVIDIA H100 80GB HBM3"}),
    Event(EventKind.LEASE_GRANTED, "", 0, "1.1", {"members": ["w0", "w1"], "world_size": 2}, elapsed_s=3),
    reformed(3, "start", lost_s=3),
    *(committed(4 + step, step) for step in range(5)),
    at(9, EventKind.CHECKPOINT_SAVED, step=5, seconds=0.5),
    evaluated(9, 5),
    at(9, EventKind.WORKER_PACES, paces={"w0": [0.25, 2], "w1": [0.5, 2]}),
    lost(9.5, "w1"),
    reformed(10, "failure", lost_s=0.5),
    *(committed(11 + step, 5 + step, world_size=1, step_s=2.0) for step in range(3)),
]

# What the run's model came to when it was asked alone.
TASK_RESULTS = (
    TaskResult("capitals", 2, (Figure("accuracy", 0.5, 0.25, 0.75), Figure("accuracy_per_byte", 0.25, None, None))),
    TaskResult("held_out", 4, (Figure("loss", 2.5, 2.25, 2.75),)),
)
