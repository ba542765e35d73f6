"""Tokens per second of a text, with a cache of keys and values and by passes over the whole context, by turns in one process.

Behind the same prompt, always the most probable token; without a tokenizer. Each round takes both sides, in an order that
alternates. `--sequence-length` is the model's context, and prompt and text fit into it.
"""

from __future__ import annotations

import argparse
import os
import time

import common
import torch
from torch import Tensor, nn
from workload import Workload

from elastic_lm.engine.build import build
from elastic_lm.engine.spec import CAUSAL
from elastic_lm.generation import Prefix, Sampling
from elastic_lm.trained_model import TrainedModel


class Whole(nn.Module):
    """Hides that the model within may have a cache."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV: Tensor = self._module(tokens_BT)
        return logits_BTV


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt (64)")
    parser.add_argument("--new", type=int, default=192, help="tokens of the text (192)")
    Workload.add_to(parser)
    arguments = parser.parse_args()
    workload = Workload.of(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    module = build(workload.model).eval().to(workload.device)
    prompt = [int(token) for token in workload.tokens(0, 0)[0, : arguments.prompt]]
    sampling, generator = Sampling(temperature=0.0), torch.Generator()

    def text(module: nn.Module) -> list[int]:
        about = None, {}, CAUSAL, workload.sequence_length, workload.vocab_size
        model = TrainedModel(*about, module, 1, "", workload.device)  # type: ignore[arg-type]
        prefix, ids = Prefix(model, prompt, arguments.new), []
        for _ in range(arguments.new):
            ids.append(sampling.draw(prefix.next_logits(), generator))
            prefix.append(ids[-1])
        return ids

    sides = {"whole passes": Whole(module), "cache": module}
    texts = {name: text(side) for name, side in sides.items()}  # warms up, too
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}  # wall and CPU seconds
    for number in range(arguments.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            began = time.perf_counter(), time.process_time()
            text(sides[name])
            taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    print(
        f"{common.machine()}, torch {torch.__version__}; {workload}; {arguments.rounds} rounds of {arguments.new} tokens"
    )
    print(f"behind {len(prompt)}; texts {'alike' if len({tuple(ids) for ids in texts.values()}) == 1 else 'differ'}\n")
    rows = []
    for name, times in taken.items():
        both = list(zip(taken["whole passes"], times, strict=True))
        rates = [arguments.new / wall for wall, _ in times]
        ratios = ([first[clock] / mine[clock] for first, mine in both] for clock in (0, 1))
        rows.append([name, common.spread(rates, 1), *(common.spread(ratio) for ratio in ratios)])
    print("\n".join(common.table(["side", "tokens/s", "ratio in the round", "ratio of CPU time"], rows)))


if __name__ == "__main__":
    main()
