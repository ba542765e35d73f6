"""What a rewind is worth: loss at the end with noise in the corpus that is gone back from, trained through, or was never there.

A run that rewound is, bit for bit, one which had left the batches out from its beginning (tests/faults/test_rewinds.py), so all
sides are trained by the engine alone, a seed in a process. A seed is the initial weights and the order of samples, the same for
all of its sides. The noise is in batches 60 to 65 of that order; which ones the rewind leaves out follows from the losses with
the noise, by the detector and the rules of a run.

What differs: a side that leaves batches out trains on others in their place, from behind, so its last steps have other batches
and other losses by that alone. The fourth side has the rewound one's batches, without noise. The held-out loss is of the same
text for all.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import common
import torch
from memory import Still

sys.path.insert(0, str(common.HERE.parent))

from elastic_lm.config import RunConfig
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.windows import LocalTokens
from elastic_lm.engine.determinism import make_deterministic
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.experiment.rewinds import Rewind, Rewinds, rules_of, with_skip
from elastic_lm.experiment.skip import ranges_told
from elastic_lm.experiment.spikes import Spike, SpikeDetector
from elastic_lm.protocol import Evaluation, Generation
from elastic_lm.runtime.held_out_client import HeldOutClient
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.data.corpora import texts, with_noise, write_lines
from tests.faults.harness import make_config
from tests.faults.test_rewinds import BAD, CHANGES

NUM_DOCUMENTS = 3_000
HELD_OUT = 0.1
LAST = 30  # steps that a mean is over
CLEAN, REWOUND, THROUGH, SHIFTED = (
    "no noise",
    "noise, rewound",
    "noise, trained through",
    "no noise, the rewound run's batches",
)
FIGURES = (f"mean loss of the last {LAST} steps", "held-out loss")
Z_975 = 1.959964


@dataclass(frozen=True)
class Outcome:
    """What one run came to. `figures`: in the order of FIGURES; `losses` and `norms`: of each step."""

    figures: tuple[float, ...]
    losses: tuple[float, ...]
    norms: tuple[float, ...]

    def spikes(self, config: RunConfig) -> list[Spike]:
        """All that the detector finds in it."""
        rules = rules_of(config)
        assert rules is not None
        detector = SpikeDetector(rules)
        each = enumerate(zip(self.losses, self.norms, strict=True))
        return [spike for step, (loss, norm) in each if (spike := detector.observe(step, loss, norm)) is not None]


@dataclass(frozen=True)
class Trial:
    """All sides of one seed. `left_out`: batches, by so many rewinds.

    `num_false`: spikes that are found without noise; `num_left`: tokens of noise that the rewound run has trained on, because a
    sample ends with the first token of the next one.
    """

    figures: dict[str, tuple[float, ...]]
    left_out: tuple[tuple[int, int], ...]
    num_rewinds: int
    num_false: int
    num_left: int


def run_config(tokens: str, seed: int, steps: int) -> RunConfig:
    more = {"training": {"seed": seed}, "evaluation": {"every": steps}}
    return make_config(tokens, "file:///nowhere", "any", steps=steps, **CHANGES, **more)


def trained(config: RunConfig) -> Outcome:
    """By one replica."""
    make_deterministic("cpu", exact=True, threads=1)
    plan = make_plan(config)
    assert plan.held_out is not None
    replica = Replica(plan.spec)
    replica.initialise()
    runner, buffer = StepRunner(replica, LocalTokens(*plan.start_reader.args)), replica.new_reduction()
    slots = tuple(range(plan.spec.micro_batches))
    records = [
        runner.run_step(slots, buffer, None, Still(), Generation(1, 1)).record for _ in range(config.training.steps)
    ]
    source = HeldOutClient(config.data.tokens, plan.held_out, 60.0, is_all_text=True)
    batches = ((source.batch(number, lambda: False), number) for number in range(plan.held_out.num_batches))
    held_out = Evaluation.of(config.training.steps, [replica.measure(*batch) for batch in batches])
    losses = tuple(record.loss for record in records)
    return Outcome((statistics.fmean(losses[-LAST:]), held_out.loss), losses, tuple(r.grad_norm for r in records))


def rewound(config: RunConfig, through: Outcome) -> tuple[RunConfig, Outcome, int]:
    """(its config in the end, what it came to, how often it went back), given what the run came to that did not."""
    outcome, made = through, Rewinds()
    while (found := outcome.spikes(config)) and len(made) < config.spikes.max_rewinds:
        rewind = Rewind.of(found[0], config, number=len(made) + 1, floor=made.floor(0))
        made = Rewinds((*made.made, rewind))
        config = with_skip(config, rewind.after)
        outcome = trained(config)
    return config, outcome, len(made)


def num_different(one: RunConfig, other: RunConfig) -> int:
    """Tokens in which two runs' samples differ, over all steps."""
    sources = [LocalTokens(*make_plan(config).start_reader.args) for config in (one, other)]
    places = ((s, m) for s in range(one.training.steps) for m in range(one.batch.micro_batches))
    return sum(int((sources[0].tokens(*place) != sources[1].tokens(*place)).sum()) for place in places)


def trial(corpus: str, seed: int, steps: int) -> Trial:
    clean = run_config(corpus, seed, steps)
    with tempfile.TemporaryDirectory() as folder:
        noisy = run_config(with_noise(corpus, Path(folder), clean, BAD), seed, steps)
        through, without = trained(noisy), trained(clean)
        gone_back, outcome, num_rewinds = rewound(noisy, through)
        shifted = with_skip(clean, gone_back.training.skip)
        figures = {CLEAN: without, REWOUND: outcome, THROUGH: through, SHIFTED: trained(shifted)}
        return Trial(
            {name: each.figures for name, each in figures.items()},
            gone_back.training.skip,
            num_rewinds,
            len(without.spikes(clean)),
            num_different(gone_back, shifted),
        )


def interval(differences: Sequence[float]) -> str:
    """Mean and 95 % interval, by Student's t."""
    half = t_975(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    mean = statistics.fmean(differences)
    return f"{mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"


def t_975(freedom: int) -> float:
    """The quantile of Student's t, by three terms of Abramowitz and Stegun 26.7.5: 0.0003 too little at 9."""
    z, v = Z_975, freedom
    terms = (
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
    )
    return z + sum(terms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = f"file://{folder}/tokens"
        source = write_lines(Path(folder) / "text.jsonl", texts(NUM_DOCUMENTS))
        options = PrepareOptions(vocab_size=300, block_tokens=1025, held_out=HELD_OUT)
        manifest = prepare([source], Storage.open(corpus), options)
        with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(trial, corpus, seed, arguments.steps) for seed in range(arguments.seeds)]
            trials = [job.result() for job in jobs]
        num_batches = manifest.num_tokens // run_config(corpus, 0, arguments.steps).batch.tokens
    print(
        f"{common.machine()}, torch {torch.__version__}; {arguments.steps} steps, {num_batches} batches, {len(trials)} seeds\n"
    )
    report(trials)


def report(trials: Sequence[Trial]) -> None:
    for place, figure in enumerate(FIGURES):
        of = {name: [trial.figures[name][place] for trial in trials] for name in trials[0].figures}
        rows = [
            [
                name,
                f"{statistics.fmean(values):.4f}",
                f"{statistics.stdev(values):.4f}",
                *(
                    "" if name == other else interval([a - b for a, b in zip(values, of[other], strict=True)])
                    for other in (CLEAN, SHIFTED)
                ),
            ]
            for name, values in of.items()
        ]
        head = [figure, "mean", "SD over seeds", f"less: {CLEAN}", f"less: {SHIFTED}"]
        print("\n".join(common.table(head, rows)), end="\n\n")
    head = ["seed", *(f"held-out loss: {name}" for name in trials[0].figures)]
    head += ["rewinds", "left out", "tokens of noise left", "spikes without noise"]
    rows = [
        [
            str(seed),
            *(f"{figures[-1]:.4f}" for figures in each.figures.values()),
            str(each.num_rewinds),
            ranges_told(each.left_out),
            str(each.num_left),
            str(each.num_false),
        ]
        for seed, each in enumerate(trials)
    ]
    print("\n".join(common.table(head, rows)))


if __name__ == "__main__":
    main()
