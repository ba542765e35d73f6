"""`runs`: all of a store, one, two; for people and for programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.experiment.parents import forked, trained
from tests.solo import Solo, solo_config
from tests.test_cli import run


@pytest.fixture(scope="module")
def storage(small_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run, its fork that has trained, and one that has not."""
    folder = tmp_path_factory.mktemp("store")
    config = solo_config(small_corpus, f"file://{folder}", "parent", steps=6)
    trained(config, 4)
    Solo(forked(config, "child", step=4, overrides=["optimizer.learning_rate=1e-3"]).config).train()
    forked(config, "waiting", step=4)
    return str(folder)


def test_list_has_a_row_for_each_run(storage: str) -> None:
    told = run("runs", "list", storage)
    assert told.exit_code == 0
    head, *rows = told.stdout.splitlines()
    assert head.split("  ")[0] == "name" and "last active" in head
    found = {row.split()[0]: row for row in rows}
    assert found.keys() == {"parent", "child", "waiting"}
    assert found["parent"].split()[1:3] == ["done", "6/6"]
    assert found["waiting"].split()[1:] == ["not", "begun", "4/6", "4", "parent@4", *found["waiting"].split()[-3:]]
    assert "parent@4" in found["child"] and found["child"].endswith("s ago")
    facts = {one["name"]: one for one in json.loads(run("runs", "list", storage, "--json").stdout)}
    assert (facts["child"]["state"], facts["child"]["parent"], facts["child"]["step"]) == ("done", "parent", 6)


def test_store_without_runs_says_so(tmp_path: Path) -> None:
    told = run("runs", "list", str(tmp_path))
    assert told.exit_code == 0
    assert f"has no run: there is none in file://{tmp_path}/runs" in told.stdout
    assert run("runs", "list", "gs://bucket").exit_code == 2


def test_show_tells_where_a_run_is_from_and_what_it_has(storage: str) -> None:
    told = run("runs", "show", f"{storage}/runs/child")
    assert told.exit_code == 0
    text = " ".join(told.stdout.split())
    for part in ("state done: run_finished happened.", "step 6 of 6", "parent@4", "optimizer.learning_rate: 0.0003 -> 0.001",
                 "step 4 complete", "training.seed 0", "curve steps 0 to 3 parent loss", "steps 4 to 5 child loss"):  # fmt: skip
        assert part in text
    assert "\ncurve\n" not in run("runs", "show", f"{storage}/runs/parent").stdout
    facts = json.loads(run("runs", "show", f"{storage}/runs/child", "--json").stdout)
    assert facts["lineage"]["parent"]["step"] == 4
    assert [checkpoint["step"] for checkpoint in facts["checkpoints"]] == [4, 6]


def test_parent_that_is_gone_is_told(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", "parent", steps=6)
    trained(config, 4)
    Solo(forked(config, "child", step=4).config).train()
    shutil.move(tmp_path / "runs/parent", tmp_path / "elsewhere")
    child, told = (
        f"{tmp_path}/runs/child",
        f"there is none in file://{tmp_path}/runs/parent any more; it was deleted or moved",
    )
    for words in (("show", child), ("compare", child, child)):
        done = run("runs", *words)
        assert done.exit_code == 0 and told in done.stdout
    assert run("report", child).exit_code == 0
    assert told in (tmp_path / "runs/child/report.html").read_text()


def test_report_of_a_fork_has_its_parents_part(storage: str, tmp_path: Path) -> None:
    for words in ((), ("--out", f"{tmp_path}/report.html")):
        assert run("report", f"{storage}/runs/child", *words).exit_code == 0
    for file in (Path(storage, "runs/child/report.html"), tmp_path / "report.html"):
        assert "loss, before" in file.read_text()


def test_show_of_a_run_that_has_not_begun(storage: str) -> None:
    told = run("runs", "show", f"{storage}/runs/waiting")
    assert told.exit_code == 0
    assert "not begun" in told.stdout and "step 4" in told.stdout


def test_compare_tells_what_differs_and_writes_the_page(storage: str, tmp_path: Path) -> None:
    words = ("runs", "compare", f"{storage}/runs/parent", f"{storage}/runs/child")
    told = run(*words, "--out", f"{tmp_path}/page.html")
    assert told.exit_code == 0
    lines = [line.split() for line in told.stdout.splitlines()]
    assert ["optimizer.learning_rate", "0.0003", "0.001"] in lines
    assert ["steps", "6", "of", "6", "6", "of", "6"] in lines
    assert told.stdout.startswith("child is a fork of parent at step 4.")
    assert told.stdout.endswith(f"Wrote {tmp_path}/page.html.\n")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads(run(*words, "--json").stdout)["first_difference"] == 4
    assert run(*words, "--out", f"{tmp_path}/absent/page.html").exit_code == 2


@pytest.mark.parametrize("words", [("show", "{}/runs/none"), ("compare", "{}/runs/parent", "{}/runs/none")])
def test_run_that_is_not_there_is_told(words: tuple[str, ...], storage: str) -> None:
    told = run("runs", *(word.format(storage) for word in words))
    assert told.exit_code == 2
    assert "there is no run at" in told.stderr
