"""Elastic members as processes without Ray: the engine alone. Prints the step times of rank 0 as JSON.

python bench/members.py --world-size 2 --reduction exact
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from typing import Any

import common

from elastic_lm.engine.group import RendezvousStore
from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.model.spec import ModelSpec
from elastic_lm.protocol import Generation, Lease, LeaseEnd, Phase, StepRecord


def make_spec(reduction: str, device: str = "cpu") -> EngineSpec:
    """The benchmark's run."""
    return EngineSpec(
        model=ModelSpec(vocab_size=common.VOCAB_SIZE, max_tokens=common.SEQUENCE_LENGTH, **common.MODEL),
        micro_batches=common.MICRO_BATCHES,
        micro_batch_size=common.MICRO_BATCH_SIZE,
        sequence_length=common.SEQUENCE_LENGTH,
        reduction=reduction,  # type: ignore[arg-type]
        device=device,
        threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
    )


class Tokens:
    def tokens(self, step: int, micro_batch: int, cancelled: Any) -> Any:
        return common.synthetic_tokens(step, micro_batch)


class Watch:
    """A lease control that nobody reaches into: collects when steps were committed."""

    def __init__(self) -> None:
        self.at = [time.perf_counter()]
        self.records: list[StepRecord] = []

    def cancelled(self) -> bool:
        return False

    def wants_end(self) -> bool:
        return False

    def report(self, phase: Phase) -> None:
        pass

    def committed(self, record: StepRecord, micro_batch_s: float | None) -> None:
        self.at.append(time.perf_counter())
        self.records.append(record)


def member(rank: int, lease: Lease, spec: EngineSpec, answers: Any) -> None:
    """One process."""
    replica = Replica(spec)
    watch = Watch()
    report = run_lease(
        Member(lease.members[rank], StepRunner(replica, Tokens()), restore=lambda step: {}), lease, watch
    )
    assert report.end is LeaseEnd.COMPLETED, report.error
    answers.put(
        {
            "rank": rank,
            "step_s": [b - a for a, b in zip(watch.at, watch.at[1:], strict=False)],
            "parts": {
                name: [getattr(record, name) for record in watch.records]
                for name in ("compute_s", "reduce_wait_s", "optimizer_s")
            },
            "digest": replica.state.digest(),
            "parameters": sum(p.numel() for p in replica.model.parameters()),
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--reduction", choices=("exact", "fast"), default="exact")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    world_size, total = arguments.world_size, arguments.warm_up + arguments.steps
    store = RendezvousStore("127.0.0.1") if world_size > 1 else None
    lease = Lease(
        generation=Generation(1, 1),
        members=tuple(f"w{rank}" for rank in range(world_size)),
        rendezvous=None if store is None else store.rendezvous,
        start_step=0,
        stop_step=total,
        assignments=tuple(tuple(range(rank, common.MICRO_BATCHES, world_size)) for rank in range(world_size)),
    )
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    spec = make_spec(arguments.reduction, arguments.device)
    processes = [context.Process(target=member, args=(rank, lease, spec, answers)) for rank in range(world_size)]
    for process in processes:
        process.start()
    told = sorted((answers.get(timeout=600) for _ in processes), key=lambda answer: answer["rank"])
    for process in processes:
        process.join(60)
    first = told[0]
    first["same_digest"] = len({answer["digest"] for answer in told}) == 1
    first["step_s"] = first["step_s"][arguments.warm_up :]
    first["parts"] = {name: values[arguments.warm_up :] for name, values in first["parts"].items()}
    print(json.dumps(first))


if __name__ == "__main__":
    main()
