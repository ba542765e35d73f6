"""Members as real processes without Ray: each runs leases that the test hands it through a pipe.

A stand-in for the coordinator that is as small as possible: it makes a store, sends a lease, fences, reads reports.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from elastic_lm import failpoints
from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.engine.rendezvous import RendezvousServer
from elastic_lm.engine.spec import EngineSpec, OptimizerSpec, ScheduleSpec
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.model.spec import ModelSpec
from elastic_lm.protocol import Generation, Lease, LeaseReport, Phase, StepRecord

multiprocessing.set_forkserver_preload([__name__])

TIMEOUT_S = 60
VOCAB, LENGTH, SIZE, M = 97, 16, 2, 6


def tiny_spec(**changes: Any) -> EngineSpec:
    model = ModelSpec(vocab_size=VOCAB, num_layers=2, num_heads=2, width=32, max_tokens=LENGTH, dropout=0.1)
    fields: dict[str, Any] = {
        "model": model,
        "micro_batches": M,
        "micro_batch_size": SIZE,
        "sequence_length": LENGTH,
        "optimizer": OptimizerSpec(learning_rate=1e-2),
        "schedule": ScheduleSpec(warmup_steps=2, total_steps=20),
        "seed": 7,
    }
    return EngineSpec(**{**fields, **changes})


class SyntheticTokens:
    """A pure function of (step, micro_batch), as the real order is."""

    def tokens(self, step: int, micro_batch: int, cancelled: Any = None) -> np.ndarray:
        rng = np.random.default_rng([step, micro_batch])
        return rng.integers(0, VOCAB, (SIZE, LENGTH + 1), dtype=np.uint16)


class EventControl:
    """LeaseControl driven by the member process's pipe."""

    def __init__(self) -> None:
        self.fenced, self.ending = threading.Event(), threading.Event()
        self.steps: list[int] = []

    def cancelled(self) -> bool:
        return self.fenced.is_set()

    def wants_end(self) -> bool:
        return self.ending.is_set()

    def report(self, phase: Phase) -> None:
        pass

    def committed(self, record: StepRecord, micro_batch_s: float | None) -> None:
        self.steps.append(record.step)


def _main(member_id: str, spec: EngineSpec, armed: tuple[str, ...], pipe: Connection) -> None:
    failpoints.arm(armed, member_id)
    member = Member(member_id, StepRunner(Replica(spec), SyntheticTokens()), restore=lambda step, on_part: {})
    control = EventControl()
    while True:
        kind, argument = pipe.recv()
        if kind == "lease":
            control = EventControl()
            thread = threading.Thread(target=lambda c=control, a=argument: pipe.send(run_lease(member, a, c)))
            thread.start()
        elif kind == "fence":
            control.fenced.set()
        elif kind == "end":
            control.ending.set()
        elif kind == "start over":
            member.start_over(SyntheticTokens())
        elif kind == "digest":
            pipe.send(None if member.state.torn else member.state.digest())
        else:
            os._exit(0)  # a burial may be under way


@dataclass
class Process:
    member_id: str
    process: Any
    pipe: Connection


@dataclass
class Cluster:
    """The members of a test, by name. Generations count up by themselves.

    They come from a server that has imported PyTorch once, which would take each of them 1.5 s. With `method="spawn"` they are
    new interpreters, which have today's environment variables and an order of sets each of its own.
    """

    spec: EngineSpec
    method: str = "forkserver"
    members: dict[str, Process] = field(default_factory=dict)
    number: int = 0
    store: RendezvousServer | None = None

    def start(self, *member_ids: str, armed: tuple[str, ...] = ()) -> None:
        context = multiprocessing.get_context(self.method)
        for member_id in member_ids:
            ours, theirs = context.Pipe()
            process = context.Process(target=_main, args=(member_id, self.spec, armed, theirs), daemon=True)
            process.start()
            theirs.close()
            self.members[member_id] = Process(member_id, process, ours)

    def grant(
        self,
        names: list[str],
        start: int,
        stop: int,
        *,
        source: str | None = None,
        joiners: tuple = (),
        continues: Generation | None = None,
        history: tuple[StepRecord, ...] = (),
    ) -> Lease:
        self.number += 1
        self.store = RendezvousServer("127.0.0.1") if len(names) > 1 and continues is None else None
        count = len(names)
        lease = Lease(
            generation=Generation(0, self.number),
            members=tuple(names),
            rendezvous=self.store.rendezvous if self.store else None,
            start_step=start,
            stop_step=stop,
            assignments=tuple(tuple(range(rank, self.spec.micro_batches, count)) for rank in range(count)),
            source=None if source is None else names.index(source),
            receivers=tuple(names.index(j) for j in joiners),
            continues=continues,
            history=history,
        )
        for name in names:
            self.members[name].pipe.send(("lease", lease))
        return lease

    def tell(self, kind: str, *names: str) -> None:
        for name in names:
            self.members[name].pipe.send((kind, None))

    def fence(self, *names: str) -> None:
        if self.store is not None:
            self.store.close()
        self.tell("fence", *names)

    def report(self, name: str) -> LeaseReport:
        assert self.members[name].pipe.poll(TIMEOUT_S), f"no report from {name}"
        return self.members[name].pipe.recv()

    def reports(self, *names: str) -> dict[str, LeaseReport]:
        return {name: self.report(name) for name in names}

    def digest(self, name: str) -> str | None:
        self.tell("digest", name)
        assert self.members[name].pipe.poll(TIMEOUT_S)
        return self.members[name].pipe.recv()

    def wait_dead(self, name: str) -> None:
        self.members[name].process.join(TIMEOUT_S)
        assert self.members[name].process.exitcode is not None

    def close(self) -> None:
        for member in self.members.values():
            if member.process.is_alive():
                member.process.kill()
            member.process.join(10)
            member.pipe.close()
