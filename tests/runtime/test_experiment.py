"""An experiment on a Ray cluster: a learning rate that is a hundred times too high is mended by a plan that may lower it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from elastic_lm import Experiment, Run
from elastic_lm.runtime.cluster import LocalCluster
from tests.faults.harness import assert_nothing_left
from tests.solo import solo_config

pytestmark = pytest.mark.ray

STEPS, GOOD = 60, 0.05


def test_learning_rate_a_hundred_times_too_high_is_mended(
    cluster: LocalCluster, held_out_corpus: str, tmp_path: Path
) -> None:
    rate = {"optimizer": {"learning_rate": 100 * GOOD}}
    base = solo_config(held_out_corpus, f"file://{tmp_path}", "base", steps=STEPS, workers={"min": 1, "max": 2}, **rate)
    (tmp_path / "base.yaml").write_text(base.to_yaml())
    plan = {
        "name": "mended",
        "base": "base.yaml",
        "target": "held_out.perplexity <= 14",
        "budget": {"tokens": 1e6, "hours": 1},
        "grid": {"optimizer.learning_rate": [10 * GOOD, GOOD, GOOD / 10]},
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    result = Experiment.open(tmp_path / "plan.yaml", quiet=True).run()
    assert (result.verdict, result.best and result.best.run) == ("reached", "mended-02")
    scores = [attempt.score for attempt in result.attempts]
    assert scores[0] is not None and scores[0] > 14
    assert scores[2] is not None and scores[2] <= 14
    assert [attempt.state for attempt in result.attempts] == ["done", "done", "done", "not begun"]
    assert result.tokens == 3 * STEPS * base.batch.tokens
    runs = [Run.open(f"{base.storage}/runs/mended-{number:02d}") for number in range(3)]
    before = [len(list(run.events())) for run in runs]

    told: list[str] = []
    again = Experiment.open(tmp_path / "plan.yaml", tell=told.append, quiet=True).run()
    assert again == result
    assert told == []
    assert [len(list(run.events())) for run in runs] == before
    assert_nothing_left(cluster)
