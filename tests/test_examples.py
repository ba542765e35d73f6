"""Every config in examples/ is valid as it stands and trains: its own model, objective, precision and kind of sum.

The real steps of one replica, without Ray, on a small corpus; fewer micro-batches and no warm-up, so that three steps show
that something is learned.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.experiment.plan import Plan
from elastic_lm.experiments import Experiment
from elastic_lm.storage import Storage
from tests.faults.oracle import undisturbed
from tests.solo import without_ray

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
PLANS = sorted((Path(__file__).parents[1] / "examples/experiments").glob("*.yaml"))
STEPS = 3

each_example = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)


@each_example
def test_example_says_what_it_shows_and_is_valid(path: Path) -> None:
    assert path.read_text().startswith("# ")
    config = RunConfig.load(path)
    assert config.name == path.stem.replace("_", "-"), "examples keep apart in runs/ by their names"
    assert config.batch.micro_batches % config.workers.max == 0, "no worker of an example waits for an uneven share"


@each_example
def test_example_trains(path: Path, corpus: str, tmp_path: Path) -> None:
    config = RunConfig.load(
        path,
        [
            f"data.tokens={corpus}",
            f"storage={tmp_path}",
            f"training.steps={STEPS}",
            "schedule.warmup_steps=0",
            "batch.micro_batches=4",
        ],
    )
    _, steps = undisturbed(config)
    losses = [loss for _, loss, *_ in steps]
    guessing = math.log(Manifest.load(Storage.open(corpus)).vocab_size)
    assert len(losses) == STEPS
    assert losses[0] == pytest.approx(guessing, rel=0.1)  # an untrained model knows nothing
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_example_of_an_experiment_is_carried_out(path: Path, held_out_corpus: str, tmp_path: Path) -> None:
    assert path.read_text().startswith("# ")
    plan = Plan.load(path)
    assert plan.name == path.stem.replace("_", "-")
    base = plan.base_config().replace(
        f"data.tokens={held_out_corpus}",
        f"storage={tmp_path}",
        "batch.micro_batches=2",
        "batch.micro_batch_size=1",
        f"training.steps={STEPS}",
        "schedule.total_steps=100",  # beyond the warm-up
    )
    (tmp_path / "base.yaml").write_text(base.to_yaml())
    with without_ray():
        result = Experiment.open(
            plan.model_copy(update={"base": f"{tmp_path}/base.yaml", "samples": 4}), quiet=True
        ).run()
    assert result.verdict == "exhausted", "three steps reach nothing"
    assert [attempt.state for attempt in result.attempts] == ["done"] * len(plan.attempts())
    full = plan.base_config()
    needed = len(plan.attempts()) * full.batch.tokens * full.training.steps
    assert plan.budget.tokens is not None and needed <= plan.budget.tokens
