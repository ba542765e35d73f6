"""`data show RUN`: the text that a run trained on, whoever names it, and what it was before the run went back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.windows import LocalTokens
from elastic_lm.experiment import rewinds
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.experiment.gone_back import decided
from tests.solo import Solo, solo_config, solo_corpus
from tests.test_cli import run


def shown(*arguments: str) -> list[dict[str, Any]]:
    told = run("data", "show", *arguments, "--json")
    assert (told.exit_code, told.stderr) == (0, "")
    return [json.loads(line) for line in told.stdout.splitlines()]


def refused(*arguments: str) -> str:
    told = run("data", "show", *arguments)
    assert (told.exit_code, told.stdout) == (2, ""), told.output
    return str(told.stderr)


def written(config: RunConfig, folder: Path, *changes: str) -> str:
    """A YAML file of the run."""
    file = folder / "run.yaml"
    file.write_text(config.replace(*changes).to_yaml())
    return str(file)


def ids(sample: dict[str, Any]) -> list[int]:
    return [token for passage in sample["passages"] for token in passage["ids"]]


def trained_on(config: RunConfig, step: int) -> list[list[int]]:
    """As a worker reads it."""
    tokens = Storage.open(config.data.tokens)
    manifest = Manifest.load(tokens)
    source = LocalTokens(tokens, manifest, manifest.order(**config.order_fields()))
    return [row.tolist() for j in range(config.batch.micro_batches) for row in source.tokens(step, j)]


# -- named by its YAML file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["training.seed=9", "batch.sequence_length=16", "training.skip=[[0, 2]]"])
def test_yaml_of_a_run_that_is_there_shows_what_it_trained_on(change: str, small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=4)
    file = written(config, tmp_path, change)
    planned = shown(file, "--step", "1", "--ids")
    assert Solo(config).train().ok
    samples = shown(file, "--step", "1", "--ids")
    assert samples == shown(config.run_url, "--step", "1", "--ids") != planned
    assert [ids(sample) for sample in samples] == trained_on(Run.open(config).config, 1)
    assert shown(file, "--step", "1", "--loss") == shown(config.run_url, "--step", "1", "--loss")


def test_yaml_with_more_steps_shows_those_that_the_run_will_come_to(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=4)
    assert Solo(config).train().ok
    longer, shorter = config.replace("training.steps=9"), config.replace("training.steps=2")
    samples = shown(written(longer, tmp_path, "training.seed=9"), "--step", "8", "--ids")
    assert [ids(sample) for sample in samples] == trained_on(Run.open(config).config, 8)
    assert "the run ends at step 9 (" in refused(written(longer, tmp_path), "--step", "9")
    assert shown(written(shorter, tmp_path), "--step", "3") == shown(config.run_url, "--step", "3")
    assert "the run ends at step 4 (" in refused(written(shorter, tmp_path), "--step", "4")


def test_text_of_another_corpus_in_the_same_place_is_not_shown(tmp_path: Path) -> None:
    tokens = solo_corpus(tmp_path)
    config = solo_config(tokens, f"file://{tmp_path}", steps=4)
    assert Solo(config).train().ok
    source = write_lines(tmp_path / "other.jsonl", texts(300, seed=1))
    prepare([source], Storage.open(tokens), PrepareOptions(vocab_size=300, block_tokens=257))
    for name in (config.run_url, written(config, tmp_path)):
        for more in ([], ["--loss"]):
            assert "is not the corpus at data.tokens" in refused(name, "--step", "3", *more)


# -- a run that went back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_resumed", [False, True])
def test_step_before_the_run_went_back_is_shown_with_its_text(
    is_resumed: bool, small_corpus: str, tmp_path: Path
) -> None:
    config = decided(small_corpus, f"file://{tmp_path}")
    folder = Storage.open(config.run_url)
    before = Run.open(config).config
    if is_resumed:
        rewinds.clear(folder, Rewinds.load(folder), lambda: None)
        Solo(config).train(5)
    now = Rewinds.load(folder).applied(before)
    for name in (config.run_url, written(config, tmp_path)):
        was = shown(name, "--step", "3", "--before-rewind", "1", "--ids", "--loss")
        assert [ids(sample) for sample in was] == trained_on(before, 3)
        assert {(sample["batch"], sample["weights_step"]) for sample in was} == {(3, 2)}
        samples = shown(name, "--step", "3", "--ids", "--loss")
        assert [ids(sample) for sample in samples] == trained_on(now, 3)
        assert {(sample["batch"], sample["weights_step"]) for sample in samples} == {(7, 2)}
        assert {sample["weights_step"] for sample in shown(name, "--step", "5", "--loss")} == {5 if is_resumed else 2}


def test_rewind_that_never_was_is_refused(small_corpus: str, tmp_path: Path) -> None:
    config = decided(small_corpus, f"file://{tmp_path}")
    assert "--before-rewind 2: times that the run went back: 1;" in refused(
        config.run_url, "--step", "3", "--before-rewind", "2"
    )
    assert "only a run goes back" in refused(small_corpus, "--step", "3", "--before-rewind", "1")


# -- options that say nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        ["--micro-batch", "0"], ["--sample", "0"], ["--before-rewind", "1"], ["--seed", "3"], ["--sequence-length", "-4"],
        ["--micro-batches", "2"], ["--micro-batch-size", "1"], ["--window-blocks", "1"],
        ["--micro-batch", "7", "--sample", "9", "--seed", "3"],
    ],
)  # fmt: skip
def test_options_about_a_step_are_refused_beside_tokens(options: list[str], small_corpus: str) -> None:
    told = refused(small_corpus, "--tokens", "0..20", *options)
    assert f"leave out {', '.join(options[::2])}, or choose --step N in place of --tokens" in told
