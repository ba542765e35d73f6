"""Loss after a fixed number of tokens: the engine in each precision and reduction against a plain fp32 loop.

The corpus is the Python standard library's own source. All sides have the same initial weights, order of samples and learning
rates; the plain loop is trained from other seeds too, which tells what noise is. Each side is a process of one thread. The
curves go to `bench/curves/quality.csv`.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import statistics
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
from workload import Workload

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.windows import LocalTokens
from elastic_lm.engine.cross_entropy import loss_at
from elastic_lm.engine.schedule import learning_rate
from elastic_lm.engine.spec import EngineSpec, OptimizerSpec, ScheduleSpec
from elastic_lm.storage import Storage

CURVES = common.HERE / "curves" / "quality.csv"
WORKLOAD = Workload("mini", vocab_size=1024, sequence_length=128, micro_batches=8, micro_batch_size=2)
PEAK = 1e-3
HELD_OUT_BATCHES = 8
SEEDS = (0, 1, 2, 3)
TOLD = 5  # times that a curve is in the table


@dataclass(frozen=True)
class Side:
    """Who trains, and from which seed."""

    precision: str = "fp32"
    reduction: str | None = None  # None: the plain loop
    seed: int = 0

    @property
    def name(self) -> str:
        if self.reduction is None:
            return f"plain loop, {self.precision}, seed {self.seed}"
        return f"{self.precision}, {self.reduction}"


SIDES = [
    *(Side(precision, reduction) for precision in ("fp16", "bf16", "fp32") for reduction in ("exact", "fast")),
    Side("bf16"),
    *(Side(seed=seed) for seed in SEEDS),
]


@dataclass(frozen=True)
class OnCorpus(Workload):
    """The work on prepared tokens, in the order of a seed."""

    url: str = ""
    seed: int = 0
    held_out: bool = False

    def __post_init__(self) -> None:
        storage = Storage.open(self.url)
        manifest = Manifest.load(storage)
        part = manifest.held_out_part() if self.held_out else manifest
        order = part.order(
            sequence_length=self.sequence_length,
            micro_batches=self.micro_batches,
            micro_batch_size=self.micro_batch_size,
            seed=self.seed,
        )
        object.__setattr__(self, "_tokens", LocalTokens(storage, part, order))

    def tokens(self, step: int, micro_batch: int, cancelled: Any = None) -> Any:
        return self._tokens.tokens(step, micro_batch)  # type: ignore[attr-defined]


class Evaluation:
    """The loss on documents that are not trained on, in fp32."""

    def __init__(self, workload: OnCorpus) -> None:
        self._workload = replace(workload, held_out=True, seed=0)

    def loss(self, model: Any) -> float:
        """Nats per token."""
        import torch

        losses = []
        model.eval()
        with torch.no_grad():
            for step in range(HELD_OUT_BATCHES):
                for micro_batch in range(self._workload.micro_batches):
                    tokens_BS = torch.from_numpy(self._workload.tokens(step, micro_batch).astype("int64"))
                    targets_N = tokens_BS[:, 1:].flatten()
                    losses.append(float(loss_at(model, tokens_BS[:, :-1], targets_N)) / len(targets_N))
        model.train()
        return statistics.fmean(losses)


def engine_spec(workload: OnCorpus, side: Side, steps: int) -> EngineSpec:
    return EngineSpec(
        model=workload.model,
        micro_batches=workload.micro_batches,
        micro_batch_size=workload.micro_batch_size,
        sequence_length=workload.sequence_length,
        optimizer=OptimizerSpec(learning_rate=PEAK),
        schedule=ScheduleSpec(warmup_steps=steps // 20, total_steps=steps),
        seed=side.seed,
        precision=side.precision,  # type: ignore[arg-type]
        reduction=side.reduction or "exact",  # type: ignore[arg-type]
    )


def curve(side: Side, workload: OnCorpus, steps: int, every: int) -> list[tuple[int, float]]:
    """Held-out losses over steps."""
    workload = replace(workload, precision=side.precision, seed=side.seed)
    evaluation = Evaluation(workload)
    train = plain_loop if side.reduction is None else engine
    return [
        (step, evaluation.loss(model))
        for step, model in train(side, workload, steps)
        if step % every == 0 or step == steps
    ]


def engine(side: Side, workload: OnCorpus, steps: int) -> Iterator[tuple[int, Any]]:
    from memory import Still

    from elastic_lm.engine.step import Replica, StepRunner
    from elastic_lm.protocol import Generation

    replica = Replica(engine_spec(workload, side, steps))
    replica.initialise()
    runner, buffer = StepRunner(replica, workload), replica.new_reduction()
    for step in range(steps):
        runner.run_step(tuple(range(workload.micro_batches)), buffer, None, Still(), Generation(1, 1))
        yield step + 1, replica.model


def plain_loop(side: Side, workload: OnCorpus, steps: int) -> Iterator[tuple[int, Any]]:
    sys.path.insert(0, str(common.HERE / "rivals"))
    import work

    from elastic_lm.engine.step import Replica

    spec = engine_spec(workload, side, steps)
    initial = Replica(spec)
    initial.initialise()
    replica = work.Work(workload)
    replica.model.load_state_dict(initial.model.state_dict())
    for step in range(steps):
        for group in replica.optimizer.param_groups:
            group["lr"] = learning_rate(spec.schedule, PEAK, step)
        replica.gradient(replica.model, step, replica.split(0, 1))
        replica.update()
        yield step + 1, replica.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="steps between two looks at held-out documents")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = f"file://{folder}/tokens"
        source = os.path.join(sysconfig.get_paths()["stdlib"], "*.py")
        manifest = prepare([source], Storage.open(url), PrepareOptions(vocab_size=WORKLOAD.vocab_size, held_out=0.05))
        workload = OnCorpus(**{**vars(WORKLOAD), "url": url})
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(curve, side, workload, arguments.steps, arguments.every) for side in SIDES]
            curves = {side: job.result() for side, job in zip(SIDES, jobs, strict=True)}
    save(curves)
    report(curves, manifest)


def save(curves: dict[Side, list[tuple[int, float]]]) -> None:
    """A line per side and look: side, tokens, held-out loss."""
    Path(CURVES).parent.mkdir(exist_ok=True)
    with CURVES.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["side", "tokens", "held_out_loss"])
        for side, points in curves.items():
            writer.writerows([side.name, step * WORKLOAD.tokens_per_step, f"{loss:.6f}"] for step, loss in points)


def report(curves: dict[Side, list[tuple[int, float]]], manifest: Manifest) -> None:
    plain = curves[Side()]
    last = {side: points[-1][1] for side, points in curves.items()}
    seeds = [last[Side(seed=seed)] for seed in SEEDS]
    print(f"{common.machine()}; {' '.join(WORKLOAD.options())}; {manifest.num_tokens:,} tokens prepared\n")
    looks = [round((number + 1) * len(plain) / TOLD) - 1 for number in range(TOLD)]
    head = [
        "side",
        *(f"{plain[look][0] * WORKLOAD.tokens_per_step:,} tokens" for look in looks),
        "beyond plain fp32",
    ]
    rows = [
        [side.name, *(f"{points[look][1]:.4f}" for look in looks), f"{last[side] - last[Side()]:+.4f}"]
        for side, points in curves.items()
    ]
    print("\n".join(common.table(head, rows)))
    print(f"\nnoise: the plain fp32 loop's seeds differ by a standard deviation of {statistics.stdev(seeds):.4f}")


if __name__ == "__main__":
    main()
