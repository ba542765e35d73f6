"""Completion in a shell: runs and configs that are there, answered by the real command as a shell asks it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lm import completion
from elastic_lm.cli import PROGRAM

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for run, part in (("mine", "config.yaml"), ("minor", "events"), ("other", "config.yaml"), ("tokens", "shards")):
        (tmp_path / "runs" / run / part).mkdir(parents=True)
    for name in ("my-run.yaml", "more.yml", "text.txt", "[odd].yaml"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "deep.yaml").touch()
    (tmp_path / "folder.yaml").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("incomplete", "found"),
    [
        ("", ["[odd].yaml", "more.yml", "my-run.yaml"]),
        ("m", ["more.yml", "my-run.yaml"]),
        ("my-run.yaml", []),
        ("[", ["[odd].yaml"]),  # no pattern
        ("folder/", ["folder/deep.yaml"]),
        ("fold", []),  # the shell proposes the folder
        ("none/x", []),
    ],
)
def test_configs_are_yaml_files(incomplete: str, found: list[str]) -> None:
    assert completion.configs(incomplete) == found


def test_runs_are_folders_that_hold_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert completion.runs("") == ["mine", "minor", "other", "[odd].yaml", "more.yml", "my-run.yaml"]
    assert completion.runs("mi") == ["mine", "minor"]
    monkeypatch.chdir(here / "folder")
    assert completion.runs("") == ["deep.yaml"]


def asked(words: str) -> list[str]:
    """What bash is told."""
    environment = {
        "_ELASTIC_LM_COMPLETE": "complete_bash",
        "COMP_WORDS": f"{PROGRAM} {words}",
        "COMP_CWORD": str(len(words.split(" "))),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "elastic_lm"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("stat", ["status"]),
        ("re", ["report", "resume"]),
        ("config va", ["validate"]),
        ("status mi", ["mine", "minor"]),
        ("resume o", ["other"]),
        ("train m", ["more.yml", "my-run.yaml"]),
        ("config show mi", ["mine", "minor"]),
        ("estimate --tok", ["--tokens-per-second"]),
        ("train --d", ["--dry-run"]),
    ],
)
def test_shell_is_told_what_fits(words: str, found: list[str]) -> None:
    assert sorted(asked(words)) == found


def test_script_for_a_shell_calls_this_command() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "elastic_lm", "--show-completion", "bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "_ELASTIC_LM_COMPLETE=complete_bash" in done.stdout
    assert f"complete -o default -F _elastic_lm_completion {PROGRAM}" in done.stdout
