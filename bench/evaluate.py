"""Tokens per second of an evaluation against a plain forward-only loop, by turns: of a worker's, and of those asked alone.

All have the same model, batches and precision, in one process; each round takes them one after the other, in an order that
alternates. The plain loop computes the mean loss from all logits at once, and nothing else. `alone` is a piece of
`elastic-lm evaluate`, which is always of fp32; `likelihoods` are of the same samples, as choices, pairs and tasks of
lm-evaluation-harness ask for them, and read in batches of their own: with `--micro-batch-size 4` the plain loop's are alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import common
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from workload import Workload

from elastic_lm.engine.spec import CAUSAL, EngineSpec
from elastic_lm.engine.step import Replica
from elastic_lm.evaluate.held_out import Batches
from elastic_lm.evaluate.likelihood import Reading, log_likelihoods
from elastic_lm.protocol import Evaluation
from elastic_lm.trained_model import TrainedModel


class Made:
    """Batches that are there already: reading them is bench/reader.py's."""

    def __init__(self, batches: list[NDArray[np.uint16]]) -> None:
        self._batches = batches

    def batch(self, number: int) -> NDArray[np.uint16]:
        return self._batches[number]


class OneByteTokens:
    """A tokenizer of synthetic tokens."""

    def bytes_by_token(self, vocab_size: int) -> NDArray[np.int64]:
        return np.ones(vocab_size, dtype=np.int64)


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
    vocabulary = OneByteTokens(), {}, CAUSAL, workload.sequence_length, workload.vocab_size
    trained = TrainedModel(*vocabulary, replica.model, 1, "", workload.device)  # type: ignore[arg-type]
    piece = Batches(Made(batches), CAUSAL, None, 0, len(batches))  # type: ignore[arg-type]

    def ours() -> float:
        return Evaluation.of(1, (replica.measure(tokens, number) for number, tokens in enumerate(batches))).loss

    def alone() -> float:
        answer = piece.answer(trained)
        return sum(measured.loss for measured, _ in answer) / sum(measured.num_targets for measured, _ in answer)

    places = tuple(range(workload.sequence_length))
    samples = [sample.tolist() for tokens in batches for sample in tokens]
    readings = [Reading(tuple(sample[:-1]), places, tuple(sample[1:])) for sample in samples]

    def likelihoods() -> float:
        return -sum(log_likelihoods(trained, readings)) / workload.tokens_per_step

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
    if workload.precision == "fp32":
        sides |= {"elastic, alone": alone, "elastic, likelihoods": likelihoods}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}  # wall and CPU seconds
    losses = {name: side() for name, side in sides.items()}  # warms up, too
    for number in range(arguments.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            began = time.perf_counter(), time.process_time()
            sides[name]()
            taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    print(f"{common.machine()}, torch {torch.__version__}; {workload}; {arguments.rounds} rounds\n")
    rows = []
    for name, times in taken.items():
        both = list(zip(taken["plain loop, forward only"], times, strict=True))
        rates = [workload.tokens_per_step / wall for wall, _ in times]
        ratios = ([first[clock] / mine[clock] for first, mine in both] for clock in (0, 1))
        told = (common.spread(ratio, 3) for ratio in ratios)
        rows.append([name, common.spread(rates, 0), *told, f"{losses[name]:.6f}"])
    head = ["side", "tokens/s", "ratio in the round", "ratio of CPU time", "loss"]
    print("\n".join(common.table(head, rows)))


if __name__ == "__main__":
    main()
