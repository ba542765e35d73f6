"""Tokens per second of an evaluation: the engine's measure of held-out batches against a plain forward-only loop, by turns.

Both have the same model, batches and precision, in one process; each round takes them one after the other, in an order that
alternates. The plain loop computes the mean loss from all logits at once, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F
from workload import Workload

from elastic_lm.engine.spec import EngineSpec
from elastic_lm.engine.step import Replica
from elastic_lm.protocol import Evaluation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    Workload.add_to(parser)
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    replica = Replica(
        EngineSpec(
            model=workload.model,
            micro_batches=workload.micro_batches,
            micro_batch_size=workload.micro_batch_size,
            sequence_length=workload.sequence_length,
            precision=workload.precision,  # type: ignore[arg-type]
            device=workload.device,
        )
    )
    replica.initialise()
    batches = [workload.tokens(0, number) for number in range(workload.micro_batches)]

    def ours() -> float:
        return Evaluation.of(1, (replica.measure(tokens, number) for number, tokens in enumerate(batches))).loss

    def plain() -> float:
        model = replica.model.eval()
        losses = []
        with torch.no_grad(), replica._autocast():
            for tokens in batches:
                tokens_BS = torch.from_numpy(tokens.astype("int64")).to(replica.device)
                logits_NV = model(tokens_BS[:, :-1]).flatten(0, 1)
                losses.append(F.cross_entropy(logits_NV.float(), tokens_BS[:, 1:].flatten()).item())
        return statistics.fmean(losses)

    sides: dict[str, Callable[[], float]] = {"plain loop, forward only": plain, "elastic, measures": ours}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = {name: side() for name, side in sides.items()}  # warms up, too
    for number in range(arguments.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            began = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - began)
    print(f"{common.machine()}, torch {torch.__version__}; {workload}; {arguments.rounds} rounds\n")
    first = seconds["plain loop, forward only"]
    rows = []
    for name, taken in seconds.items():
        rates = [workload.tokens_per_step / s for s in taken]
        ratios = [mine / s for mine, s in zip(first, taken, strict=True)]
        rows.append([name, common.spread(rates, 0), common.spread(ratios, 3), f"{losses[name]:.6f}"])
    print("\n".join(common.table(["side", "tokens/s", "ratio in the round", "loss"], rows)))


if __name__ == "__main__":
    main()
