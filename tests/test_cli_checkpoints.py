"""Commands about checkpoints: what there is, whether it is whole, what goes; each with its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_lm.checkpoint import layout, registry
from elastic_lm.storage import Storage
from tests.checkpoint.saved import change_version, flip, parts_of, save
from tests.solo import Solo, solo_config
from tests.test_cli import run
from tests.test_cli_run import STORY, write_log


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A run with checkpoints of the steps 10, 20 and 30, of which the last is unfinished."""
    url = write_log(tmp_path, *STORY)
    for step in (10, 20, 30):
        save(Storage.open(url), step)
    Storage.open(url).delete(f"{layout.folder_of(30)}/{layout.MANIFEST}")
    return url


def steps(url: str) -> list[int]:
    return [found.step for found in registry.found(Storage.open(url))]


def test_list_tells_people_and_programs_the_same(url: str) -> None:
    told = run("checkpoints", "list", url)
    assert told.exit_code == 0
    first, second, third = told.stdout.splitlines()
    assert first.split() == ["10", "complete", "0.0", "MB"]
    assert "unfinished" in third and "its writer did not finish" in third
    found = json.loads(run("checkpoints", "list", url, "--json").stdout)
    assert [(one["step"], one["state"]) for one in found] == [(10, "complete"), (20, "complete"), (30, "unfinished")]


def test_list_tells_the_loss_where_it_is_known(tmp_path: Path) -> None:
    url = write_log(tmp_path, *STORY)
    save(Storage.open(url), 1_000, loss=2.34567)
    save(Storage.open(url), 2_000)
    first, second = run("checkpoints", "list", url).stdout.splitlines()
    assert first.split() == ["1,000", "complete", "0.0", "MB", "loss", "2.3457"]
    assert second.split() == ["2,000", "complete", "0.0", "MB"]
    found = json.loads(run("checkpoints", "list", url, "--json").stdout)
    assert found[0]["meta"]["loss"] == 2.34567


def test_prune_keeps_the_best(tmp_path: Path) -> None:
    url = write_log(tmp_path, *STORY)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 4.0)):
        save(Storage.open(url), step, loss=loss)
    told = run("checkpoints", "prune", url, "--keep", "1", "--keep-best", "1")
    assert told.stdout == "Deleted the checkpoints of these steps: 10.\n"
    assert run("checkpoints", "prune", url, "--keep", "1", "--keep-best", "-1").exit_code == 2


def test_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    told = run("checkpoints", "list", write_log(tmp_path, *STORY))
    assert told.exit_code == 0
    assert "has no checkpoint" in told.stdout


@pytest.mark.parametrize("command", [("list",), ("verify",), ("prune", "--keep", "1")], ids=lambda words: words[0])
def test_unknown_run_is_refused(command: tuple[str, ...], tmp_path: Path) -> None:
    told = run("checkpoints", command[0], f"{tmp_path}/runs/none", *command[1:])
    assert told.exit_code == 2
    assert "no run at" in told.stderr


def test_verify_reads_every_byte_and_names_what_is_damaged(url: str) -> None:
    whole = run("checkpoints", "verify", url)
    assert whole.exit_code == 0  # an unfinished one is no damage
    assert whole.stdout.count("every byte is as it was written") == 2
    flip(Storage.open(url), part := parts_of(Storage.open(url), 10)[1])
    told = run("checkpoints", "verify", url)
    assert told.exit_code == 3
    assert Path(part).name in told.stdout
    assert "1 of 3 checkpoints are damaged" in told.stderr
    assert steps(url) == [10, 20, 30]  # nothing was changed
    assert run("checkpoints", "verify", url, "--step", "20").exit_code == 0
    assert run("checkpoints", "verify", url, "--step", "40").exit_code == 2


def test_prune_deletes_what_it_says(url: str) -> None:
    dry = run("checkpoints", "prune", url, "--keep", "1", "--dry-run")
    assert dry.stdout == "Would delete the checkpoints of these steps: 10.\n"
    assert steps(url) == [10, 20, 30]
    assert run("checkpoints", "prune", url, "--keep", "1", "--keep-every", "10").stdout.endswith(": nothing.\n")
    assert run("checkpoints", "prune", url, "--keep", "1").stdout == "Deleted the checkpoints of these steps: 10.\n"
    assert steps(url) == [20, 30]


def test_prune_keeps_at_least_one(url: str) -> None:
    assert run("checkpoints", "prune", url, "--keep", "0").exit_code == 2
    assert steps(url) == [10, 20, 30]


def test_checkpoint_of_another_version_is_listed_and_is_no_damage(url: str) -> None:
    change_version(Storage.open(url), 20, 3)
    rows = run("checkpoints", "list", url).stdout.splitlines()
    assert rows[1].split(maxsplit=1) == [
        "20", "other version  its manifest is of version 3 of the format, and this program reads version 2",
    ]  # fmt: skip
    told = run("checkpoints", "verify", url)
    assert told.exit_code == 2
    assert "1 of 3 checkpoints are of another version" in told.stderr
    assert "damaged" not in told.stderr
    assert run("checkpoints", "prune", url, "--keep", "1").stdout.endswith(": nothing.\n")


def test_prune_leaves_what_may_be_gone_back_to(small_corpus: str, tmp_path: Path) -> None:
    spikes = {"policy": "rewind", "rewind_steps": 2, "skip_batches": 9, "steps_in_a_row": 1}
    config = solo_config(small_corpus, f"file://{tmp_path}", spikes=spikes, checkpoint={"every_steps": 1})
    for step in (1, 3, 5, 6):
        Solo(config).train(step)
    assert run("checkpoints", "prune", config.run_url, "--keep", "1").stdout.endswith(" 1.\n")
    assert steps(config.run_url) == [3, 5, 6]  # and the next one
