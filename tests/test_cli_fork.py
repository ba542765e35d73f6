"""`fork`: what is told before and after, and each end with its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lm.experiment.rewinds import Rewind, decide
from elastic_lm.experiment.spikes import Spike
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from tests.experiment.parents import trained
from tests.solo import solo_config
from tests.test_cli import run


@pytest.fixture
def url(small_corpus: str, tmp_path: Path) -> str:
    """A run with checkpoints of the steps 2 and 4."""
    config = solo_config(small_corpus, f"file://{tmp_path}", "parent", steps=4)
    trained(config, 2)
    return config.run_url


def test_fork_tells_what_is_changed_and_how_to_go_on(url: str) -> None:
    told = run("fork", f"{url}@2", "--name", "new", "--set", "training.seed=3", "--set", "checkpoint.keep=5", "--skip", "2:3",
               "--skip", "4:6")  # fmt: skip
    assert told.exit_code == 0, told.stderr
    new = url.replace("parent", "new")
    first, *changes, note, last = told.stdout.splitlines()
    assert first.startswith(f"Forking parent at step 2 into {new}: 1 part, ")
    assert changes == [
        "  training.seed: 0 -> 3", "  training.skip: [] -> [[2, 3], [4, 6]]", "  checkpoint.keep: 2 -> 5",
    ]  # fmt: skip
    assert "another order (training.seed)" in note
    assert last == f"Every byte was verified. Go on with: elastic-lm resume {new}"
    assert Run.open(new).config.training.skip == ((2, 3), (4, 6))


def test_fork_tells_what_was_gone_back_from_before(url: str) -> None:
    folder = Storage.open(url)
    chosen = Run.open(url).config.replace("checkpoint.every_steps=2", "spikes={policy: skip}")
    decide(folder, Rewind.of(Spike(2, 3, "loss", "the loss stands out"), chosen, number=1))
    rewind = "rewind 1: back to step 2, leaving out batches 2:4 (loss)"
    assert f"  parent had {rewind}.\n" in run("fork", f"{url}@2", "--name", "new").stdout
    assert f"    {rewind}\n" in run("runs", "show", url.replace("parent", "new")).stdout


def test_address_may_hold_an_at(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}/user@corp.com", "base", steps=4)
    trained(config, 2)
    told = run("fork", config.run_url, "--name", "longer", "--set", "training.steps=8")
    assert told.exit_code == 0, told.stderr
    assert "Forking base at step 4" in told.stdout
    told = run("fork", f"{tmp_path}/user@corp.com/runs/base@0,002", "--name", "new")
    assert told.exit_code == 0, told.stderr
    assert "Forking base at step 2" in told.stdout


def test_fork_that_has_not_begun_is_known_to_the_other_commands(url: str) -> None:
    new = url.replace("parent", "new")
    assert "Nothing that changes bits is changed." in run("fork", f"{url}@2", "--name", "new").stdout
    told = run("status", new)
    assert told.exit_code == 2
    assert f"has not begun; begin it with: elastic-lm resume {new}" in told.stderr
    assert run("checkpoints", "list", new).stdout.split()[:2] == ["2", "complete"]
    assert run("checkpoints", "verify", new).exit_code == 0


@pytest.mark.parametrize(
    ("words", "reason", "code"),
    [
        (["@two", "--name", "new"], "is no run at a step; write RUN@STEP", 2),
        (["@3", "--name", "new"], "no checkpoint of step 3; the nearest are 2 and 4", 2),
        (["@2", "--name", "parent"], "holds a run already", 2),
        (["@2", "--name", "new", "--skip", "5"], "--skip '5' is no range", 2),
        (["@2", "--name", "new", "--skip", "1:9"], "--skip 1:9 begins before batch 2", 2),
        (["@2", "--name", "new", "--set", "model.width=32"], "cannot take", 2),
        (["", "--name", "new"], "nothing would be trained", 2),
        (["@2", "--name", "new", "--storage", "/proc/nope"], "its folder cannot be made there; correct the address", 4),
        (["@2"], "--name", 2),
    ],
)
def test_what_cannot_be_forked_ends_in_one_message(words: list[str], reason: str, code: int, url: str) -> None:
    told = run("fork", f"{url}{words[0]}", *words[1:])
    assert told.exit_code == code
    assert reason in " ".join(told.stderr.split())
    assert not Storage.open(url.replace("parent", "new")).list()
