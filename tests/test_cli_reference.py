"""Every command's help: whole in a line of the list, the same in docs/commands.md, forgiving to who mistypes, and quick."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperGroup

from elastic_lm.cli import PROGRAM
from elastic_lm.cli_reference import commands, markdown
from elastic_lm.terminal import Exit
from tests.test_cli import run

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "commands.md"
ALL = {path: command for path, command, _ in commands()}
GROUPS = [path for path, command in ALL.items() if isinstance(command, TyperGroup)]


def words_of(path: str) -> list[str]:
    return path.split()[1:]


# -- the document ----------------------------------------------------------------------------------------------------


def test_document_is_what_the_commands_say() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == markdown(), "docs/commands.md is out of date: make docs"


def test_module_prints_the_document() -> None:
    command = [sys.executable, "-m", "elastic_lm.cli_reference"]
    assert subprocess.run(command, capture_output=True, check=True, text=True, timeout=50).stdout == markdown()


def test_document_has_every_command_option_and_exit_code() -> None:
    text = markdown()
    for code in Exit:
        assert f"| {code.value} | {code.meaning} |" in text
    for path, command, ctx in commands():
        if isinstance(command, TyperGroup):
            continue
        section = text.partition(f"\n## {path}\n")[2].partition("\n## ")[0]
        assert section, path
        for param in command.get_params(ctx):
            names = [name for name in param.opts if name.startswith("--") and name != "--help"]
            assert all(name in section for name in names), (path, names)


# -- the help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GROUPS)
def test_list_of_commands_cuts_no_line(path: str) -> None:
    listed = (
        run(*words_of(path), "--help").stdout.partition("Commands:\n")[2].rstrip("\n").partition("\n\n")[0].splitlines()
    )
    assert len(listed) == sum(other.rpartition(" ")[0] == path for other in ALL), "each is one line"
    assert not [line for line in listed if "..." in line or len(line) > 80]
    assert all(line.endswith(".") for line in listed)


@pytest.mark.parametrize("path", ALL)
def test_help_fits_a_terminal_and_explains_every_option(path: str) -> None:
    told = run(*words_of(path), "--help")
    assert told.exit_code == 0
    assert max(map(len, told.stdout.splitlines())) <= 80
    assert "completion  " not in told.stdout  # in the list of options
    for param in ALL[path].params:
        assert getattr(param, "help", None), param.name


def test_help_says_how_to_get_completion() -> None:
    assert run("--help").stdout.rstrip().endswith(f"{PROGRAM} --install-completion")


# -- what is mistyped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("trian run.yaml", "train"),
        ("estimat run.yaml", "estimate"),
        ("docter", "doctor"),
        ("confg show x", "config"),
        ("config shwo x", "show"),
        ("train run.yaml --dryrun", "--dry-run"),
        ("train run.yaml --sett a=b", "--set"),
        ("estimate run.yaml --vocabsize 3", "--vocab-size"),
        ("status x --jsn", "--json"),
        ("--hlep", "--help"),
    ],
)
def test_mistyped_command_or_option_is_answered_with_the_nearest(words: str, near: str) -> None:
    told = run(*words.split())
    assert told.exit_code == Exit.USAGE
    asked = told.stderr.lower().partition("did you mean")[2] or told.stderr.partition("Possible options")[2]
    assert near in asked
    assert told.stderr.count("Error: ") == 1


def test_what_resembles_nothing_is_refused_without_a_guess() -> None:
    told = run("zzzz")
    assert told.exit_code == Exit.USAGE
    assert told.stderr.endswith("No such command 'zzzz'.\n")


# -- its time --------------------------------------------------------------------------------------------------------


def cpu_s(*command: str) -> float:
    """CPU time of a new interpreter, the shortest of three: what else runs can only make it longer."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(found)


@pytest.mark.parametrize(
    ("command", "most_s"),
    [
        (["-m", "elastic_lm", "--help"], 0.5),
        (["-m", "elastic_lm", "config", "show", "--help"], 0.5),
        (["-c", "import elastic_lm"], 0.3),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_answer_comes_at_once(command: list[str], most_s: float) -> None:
    assert cpu_s(*command) <= most_s
