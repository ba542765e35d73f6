"""Bytes that a worker holds per parameter, for both reductions and optimizers: from two models that differ in depth alone.

Each process trains one step on sequences so short that activations do not count, and tells its peak resident memory. The
difference between the two models, by the difference in parameters, is what a parameter costs; libraries and buffers of a
fixed size cancel out. Needs torch and nothing else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource

import common

from elastic_lm.engine.spec import EngineSpec, OptimizerSpec
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.model.spec import ModelSpec
from elastic_lm.protocol import Generation

DEPTHS = (4, 12)
SIDES = (("exact", "exact", "adamw"), ("fast", "fast", "adamw"), ("exact, muon", "exact", "muon"))
LENGTH, MICRO_BATCHES = 8, 2


class Still:
    """A step's control that nobody reaches into."""

    def cancelled(self) -> bool:
        return False

    def wants_end(self) -> bool:
        return False

    def report(self, phase: object) -> None:
        pass


class Tokens:
    def tokens(self, step: int, micro_batch: int, cancelled: object) -> object:
        return common.synthetic_tokens(step, micro_batch)[:1, : LENGTH + 1]


def train(depth: int, reduction: str, optimizer: str, answers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    model = ModelSpec(vocab_size=common.VOCAB_SIZE, max_tokens=LENGTH, **{**common.MODEL, "num_layers": depth})
    chosen = OptimizerSpec(kind=optimizer)  # type: ignore[arg-type]
    replica = Replica(EngineSpec(model, MICRO_BATCHES, 1, LENGTH, chosen, reduction=reduction))  # type: ignore[arg-type]
    replica.initialise()
    runner, buffer = StepRunner(replica, Tokens()), replica.new_reduction()
    for _ in range(2):
        runner.run_step(tuple(range(MICRO_BATCHES)), buffer, None, Still(), Generation(1, 1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answers.put((replica.state.num_parameters, peak))


def measure(depth: int, reduction: str, optimizer: str) -> tuple[int, int]:
    """Parameters and peak bytes, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=train, args=(depth, reduction, optimizer, answers))
    process.start()
    told: tuple[int, int] = answers.get(timeout=120)
    process.join()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for name, reduction, optimizer in SIDES:
        found = []
        for _ in range(arguments.rounds):
            (few, little), (many, much) = (measure(depth, reduction, optimizer) for depth in DEPTHS)
            found.append((much - little) / (many - few))
        rows.append([name, common.spread(found, 1), f"{few / 1e6:.1f} M and {many / 1e6:.1f} M"])
    print(f"{common.machine()}, {arguments.rounds} rounds\n")
    print("\n".join(common.table(["reduction", "bytes per parameter", "models"], rows)))


if __name__ == "__main__":
    main()
