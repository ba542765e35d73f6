"""What a run went back from is nobody's: all who read a run take the same checkpoints, and say why another one does not do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest as Corpus
from elastic_lm.errors import CheckpointError
from elastic_lm.evaluate.pieces import Subject
from elastic_lm.experiment import catalogue, standing
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.run import Run
from elastic_lm.sample_loss import SampleLoss
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.experiment.gone_back import decided, late
from tests.test_cli import run
from tests.test_imports import MODULES

GIVEN_UP = "the run went back to step 2, leaving out batches 2:6"
# Who trains a run, deletes from it or looks at its bytes has more to do with its checkpoints than to read them.
CHOOSERS = {
    "elastic_lm.checkpoint.", "elastic_lm.runtime.", "elastic_lm.experiment.rewinds", "elastic_lm.experiment.standing",
    "elastic_lm.cli_checkpoints",
}  # fmt: skip


@pytest.fixture(params=["decided", "stored late"])
def config(request: pytest.FixtureRequest, held_out_corpus: str, tmp_path: Path) -> RunConfig:
    """Its checkpoint of step 4 is one that it went back from."""
    config = decided(held_out_corpus, f"file://{tmp_path}")
    if request.param == "stored late":
        late(config)
    return config


def test_readers_pass_over_what_the_run_went_back_from(config: RunConfig, tmp_path: Path) -> None:
    folder, opened = Storage.open(config.run_url), Run.open(config)
    assert {one.step: one.state for one in standing.found(folder)} == {2: "complete", 4: "given up"}
    assert [result.step for result in opened.evaluate(samples=2)] == [2]
    assert Subject(folder, config).pinned().step == 2
    assert TrainedModel.load(folder, opened.config).step == 2
    assert SampleLoss(folder, config, Corpus.load(Storage.open(config.data.tokens)), before=5).step == 2
    assert catalogue.look(folder, folder.list(), 0.0).checkpoint == 2
    assert opened.result is not None and str(opened.result.checkpoint).endswith(folder_of(2))
    assert run("fork", config.run_url, "--name", "other").exit_code == 0
    assert folder_of(2) in "".join(Storage.open(f"{tmp_path}/runs/other").list())
    assert opened.export_model(tmp_path / "model") == 2


@pytest.mark.parametrize("command", [["evaluate"], ["generate"], ["fork", "--name", "other"]])
def test_step_that_the_run_went_back_from_is_refused_and_others_are_named(
    command: list[str], config: RunConfig
) -> None:
    name, *options = command
    told = run(name, f"{config.run_url}@4", *options)
    assert (told.exit_code, told.stdout) == (2, "")
    assert f"given up: {GIVEN_UP}" in told.stderr and "the only one is of step 2" in told.stderr


def test_lists_say_what_the_run_went_back_from(config: RunConfig) -> None:
    listed = run("checkpoints", "list", config.run_url).stdout.splitlines()
    assert [line.split()[1] for line in listed] == ["complete", "given"]
    assert listed[1].endswith(GIVEN_UP)
    shown = json.loads(run("runs", "show", config.run_url, "--json").stdout)
    assert [(one["step"], one["state"]) for one in shown["checkpoints"]] == [(2, "complete"), (4, "given up")]
    assert re.search(r"step 4 +given up", run("runs", "show", config.run_url).stdout)


def test_pruning_keeps_what_the_run_goes_on_from(config: RunConfig) -> None:
    assert run("checkpoints", "prune", config.run_url, "--keep", "1").exit_code == 0
    assert [one.step for one in registry.found(Storage.open(config.run_url))] == [2]


def test_run_that_went_back_behind_all_of_them_has_none(config: RunConfig) -> None:
    folder = Storage.open(config.run_url)
    for path in folder.list(folder_of(2)):
        folder.delete(path)
    with pytest.raises(
        CheckpointError, match="no complete checkpoint since it went back to step 2; wait for its first"
    ):
        standing.step_of(folder)
    with pytest.raises(CheckpointError, match=r"of step 4 \(given up: .*; it has no other one either"):
        standing.step_of(folder, 4)


def test_damaged_rewind_is_refused_where_weights_are_read_and_can_be_forked_from(config: RunConfig) -> None:
    Storage.open(config.run_url).write("rewinds/0001.json", b"{")
    told = run("evaluate", config.run_url)
    assert (
        told.exit_code == 2 and "rewinds/0001.json cannot be read" in told.stderr and "elastic-lm fork" in told.stderr
    )
    assert run("checkpoints", "prune", config.run_url, "--keep", "1").exit_code == 2
    assert run("checkpoints", "list", config.run_url).stdout.count("complete") == 2
    assert run("fork", f"{config.run_url}@2", "--name", "other").exit_code == 0


def test_checkpoint_of_the_same_step_that_is_trained_anew_counts(config: RunConfig) -> None:
    from tests.solo import Solo

    folder = Storage.open(config.run_url)
    for path in folder.list(folder_of(4)):  # as who takes the run up does
        folder.delete(path)
    Solo(config).train(4)
    assert standing.step_of(folder) == standing.step_of(folder, 4) == 4
    assert Rewinds.load(folder).made


def test_nobody_else_chooses_among_checkpoints() -> None:
    choosers = {
        name
        for name, path in MODULES.items()
        if re.search(r"registry\.(found|newest_complete|look)\b", path.read_text())
    }
    assert {name for name in choosers if not name.startswith(tuple(CHOOSERS))} == set()
    assert "elastic_lm.experiment.standing" in choosers
