"""Bytes that a worker holds: per parameter, by reduction and optimizer, and per token of a micro-batch, by recomputation.

Each process trains two steps and tells its peak resident memory. Two models that differ in depth alone, on sequences so short
that activations do not count, differ by what their parameters cost; two micro-batches of one model differ by what their
tokens cost. Libraries and buffers of a fixed size cancel out. Needs torch and nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
from dataclasses import dataclass, replace
from typing import Any

import common
from workload import DEFAULT, Workload, peak_memory

from elastic_lm.engine.spec import EngineSpec, OptimizerSpec
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.protocol import Generation

LITTLE, MUCH = 4, 12  # layers; and samples of a micro-batch


@dataclass(frozen=True)
class Side:
    """What is chosen, and what the table calls it."""

    name: str
    reduction: str = "exact"
    optimizer: str = "adamw"
    precision: str = "fp32"
    recompute: bool = False


PER_PARAMETER = (
    Side("exact sums, AdamW"),
    Side("fast sums, AdamW", "fast"),
    Side("exact sums, Muon", optimizer="muon"),
)
PER_TOKEN = (Side("fp32"), Side("fp32, recompute", recompute=True), Side("bf16", precision="bf16"),
             Side("bf16, recompute", precision="bf16", recompute=True))  # fmt: skip


class Still:
    """A step's control that nobody reaches into."""

    def cancelled(self) -> bool:
        return False

    def wants_end(self) -> bool:
        return False

    def report(self, phase: object) -> None:
        pass


class Tokens:
    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def tokens(self, step: int, micro_batch: int, cancelled: object) -> object:
        return self._workload.tokens(step, micro_batch)


def train(side: Side, workload: Workload, layers: int, answers: Any) -> None:
    shape: dict[str, Any] = {
        "model": replace(workload.model, num_layers=layers),
        "micro_batches": workload.micro_batches,
        "micro_batch_size": workload.micro_batch_size,
        "sequence_length": workload.sequence_length,
        "optimizer": OptimizerSpec(kind=side.optimizer),  # type: ignore[arg-type]
        "reduction": side.reduction,
        "precision": side.precision,
        "recompute": side.recompute,
    }
    replica = Replica(EngineSpec(**shape))
    replica.initialise()
    runner, buffer = StepRunner(replica, Tokens(workload)), replica.new_reduction()
    for _ in range(2):
        runner.run_step(tuple(range(workload.micro_batches)), buffer, None, Still(), Generation(1, 1))
    answers.put((replica.state.num_parameters, peak_memory("cpu")))


def measure(side: Side, workload: Workload, layers: int) -> tuple[int, int]:
    """Parameters and peak bytes, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=train, args=(side, workload, layers, answers))
    process.start()
    told: tuple[int, int] = answers.get(timeout=300)
    process.join()
    return told


def per_parameter(side: Side) -> float:
    """Bytes."""
    workload = replace(DEFAULT, micro_batches=2, micro_batch_size=1, sequence_length=8)
    (few, little), (many, much) = (measure(side, workload, layers) for layers in (LITTLE, MUCH))
    return (much - little) / (many - few)


def per_token(side: Side) -> float:
    """Bytes, of a model with `MUCH` layers."""
    sizes = [replace(DEFAULT, micro_batches=1, micro_batch_size=samples) for samples in (LITTLE, MUCH)]
    little, much = (measure(side, workload, MUCH)[1] for workload in sizes)
    return (much - little) / ((MUCH - LITTLE) * DEFAULT.sequence_length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(f"{common.machine()}, {rounds} rounds\n")
    rows = [[side.name, common.spread([per_parameter(side) for _ in range(rounds)], 1)] for side in PER_PARAMETER]
    print("\n".join(common.table(["sums and optimizer", "bytes per parameter"], rows)), flush=True)
    rows = [[side.name, common.spread([per_token(side) / 1e3 for _ in range(rounds)], 1)] for side in PER_TOKEN]
    head = ["precision", f"kB per token of a micro-batch ({MUCH} layers of width {DEFAULT.model.width})"]
    print("\n" + "\n".join(common.table(head, rows)))


if __name__ == "__main__":
    main()
