"""Elastic members as processes without Ray: the engine alone. Rank 0 prints a JSON line per step, until ended.

python bench/members.py --world-size 2 --reduction exact
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from typing import Any

from workload import Workload, peak_memory

from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.engine.rendezvous import RendezvousServer
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.protocol import Generation, Lease, Phase, StepRecord

FOR_EVER = 1_000_000


def make_spec(workload: Workload, arguments: argparse.Namespace) -> EngineSpec:
    """The benchmark's run."""
    return EngineSpec(
        model=workload.model,
        micro_batches=workload.micro_batches,
        micro_batch_size=workload.micro_batch_size,
        sequence_length=workload.sequence_length,
        precision=workload.precision,  # type: ignore[arg-type]
        reduction=arguments.reduction,
        recompute=arguments.recompute,
        compile=arguments.compile,
        device=workload.device,
        collectives=arguments.collectives,
        threads=int(os.environ.get("OMP_NUM_THREADS", "1")),
    )


class Tokens:
    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def tokens(self, step: int, micro_batch: int, cancelled: Any) -> Any:
        return self._workload.tokens(step, micro_batch)


class Printer:
    """A lease control that nobody reaches into."""

    def __init__(self, rank: int, device: str) -> None:
        self._rank = rank
        self._device = device
        self._began = time.monotonic()

    def cancelled(self) -> bool:
        return False

    def wants_end(self) -> bool:
        return False

    def report(self, phase: Phase) -> None:
        pass

    def committed(self, record: StepRecord, micro_batch_s: float | None) -> None:
        ended = time.monotonic()
        if self._rank == 0:
            parts = {name: getattr(record, name) for name in ("compute_s", "reduce_wait_s", "optimizer_s")}
            line = {"step": record.step, "began": self._began, "ended": ended, "loss": record.loss, "parts": parts}
            print(json.dumps({**line, "peak_bytes": peak_memory(self._device)}), flush=True)
        self._began = ended


def member(rank: int, lease: Lease, spec: EngineSpec, workload: Workload) -> None:
    """One process."""
    runner = StepRunner(Replica(spec), Tokens(workload))
    itself = Member(lease.members[rank], runner, restore=lambda step, on_part: {})
    report = run_lease(itself, lease, Printer(rank, spec.device))
    raise SystemExit(f"the lease ended: {report.end}, {report.error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--reduction", choices=("exact", "fast"), default="exact")
    parser.add_argument("--collectives", choices=("auto", "gloo", "nccl"), default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    Workload.add_to(parser)
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    world_size = arguments.world_size
    store = RendezvousServer("127.0.0.1") if world_size > 1 else None
    lease = Lease(
        generation=Generation(1, 1),
        members=tuple(f"w{rank}" for rank in range(world_size)),
        rendezvous=None if store is None else store.rendezvous,
        start_step=0,
        stop_step=FOR_EVER,
        assignments=tuple(tuple(range(rank, workload.micro_batches, world_size)) for rank in range(world_size)),
    )
    context = multiprocessing.get_context("spawn")
    spec = make_spec(workload, arguments)
    processes = [context.Process(target=member, args=(rank, lease, spec, workload)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
