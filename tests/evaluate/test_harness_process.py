"""The process of lm-evaluation-harness: which Python it is, what it has of our environment, and that nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.harness import child
from elastic_lm.evaluate.harness.child import Child
from elastic_lm.evaluate.harness.environment import OFFLINE, environment
from elastic_lm.evaluate.harness.evaluation import VARIABLE, Harness
from elastic_lm.storage import Storage
from tests.evaluate import fake_harness
from tests.evaluate.fake_harness import asked

GONE_S = 20.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + GONE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {GONE_S:.0f} s: {what}"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def pid_in(folder: Path, name: str = "pid") -> int:
    """Of the process that has begun to load its tasks; `child`: of one that it has forked."""
    file = folder / name
    wait_for(lambda: file.exists() and file.read_text().endswith("\n"), "the harness loads its tasks")
    return int(file.read_text())


# -- how it starts and fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f'exec {sys.executable} -S "$@"',
            "does not run lm-evaluation-harness: ModuleNotFoundError: No module named 'lm_eval'",
        ),
        ("exit 7", "does not run lm-evaluation-harness: it ended with code 7 and said nothing"),
    ],
)
def test_python_without_a_harness_is_told(line: str, message: str, causal_run: RunConfig, tmp_path: Path) -> None:
    python = fake_harness.program(tmp_path / "python", line)
    with pytest.raises(ConfigError, match=message) as raised:
        asked(causal_run, "good", python=python)
    assert f"{python} -m pip install 'lm-eval>=0.4.13'" in str(raised.value)


def test_python_that_is_not_there_is_told(causal_run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/python cannot be run: No such file or directory"):
        asked(causal_run, "good", python="/nowhere/python")
    monkeypatch.setenv(VARIABLE, "/elsewhere/python")
    with pytest.raises(ConfigError, match=r"/elsewhere/python cannot be run"):
        asked(causal_run, "good")


@pytest.mark.usefixtures("by_hand")
def test_without_a_choice_it_is_the_python_that_runs(
    causal_run: RunConfig, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(sys, "executable", python)
    assert len(asked(causal_run, "good", include=str(tmp_path))) == 1


def test_harness_that_does_not_start_is_given_up(
    causal_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "START_S", 0.1)
    python = fake_harness.install(tmp_path, at_import="import time; time.sleep(600)")
    with pytest.raises(ConfigError, match=r"has not started lm-evaluation-harness within 0 s"):
        asked(causal_run, "good", python=python)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "lm-evaluation-harness failed: ZeroDivisionError: no item is left"),
        ("dies", "ended in the middle of its work: out of patience; try it again"),
        ("dies_in_a_line", "ended in the middle of its work: .*; try it again"),
        ("forks_and_dies", "ended in the middle of its work: killed from without; try it again"),
    ],
)
@pytest.mark.usefixtures("by_hand")
def test_failure_is_told_behind_the_results_before_it(
    name: str, message: str, causal_run: RunConfig, python: str, tmp_path: Path
) -> None:
    harness = Harness(["good", name], python, str(tmp_path))
    results = harness.evaluate(Storage.open(causal_run.run_url), causal_run)
    assert next(results).task == "harness-good"
    with pytest.raises(ConfigError, match=message):
        next(results)


# -- what is left behind -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_hand")
def test_who_stops_listening_ends_the_harness(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    harness = Harness(["good", "hangs"], python, str(tmp_path))
    results = harness.evaluate(Storage.open(causal_run.run_url), causal_run)
    next(results)
    pid = pid_in(tmp_path)
    assert not is_gone(pid)
    results.close()
    assert is_gone(pid)


@pytest.mark.parametrize("name", ["hangs", "forks_and_hangs"])
def test_harness_ends_with_the_process_that_asked(name: str, python: str, tmp_path: Path) -> None:
    """So does what it has started."""
    script = f"""
from elastic_lm.evaluate.harness.child import Child
with Child({python!r}, 1) as child:
    child.tell({{"tasks": [{name!r}], "include": {str(tmp_path)!r}, "samples": None, "shots": None}})
    child.first(), child.next()
    child.tell({{"max_tokens": 16, "end_of_text": 0}})
    child.next(), child.next()  # that it begins, and what never comes
"""
    with subprocess.Popen([sys.executable, "-c", script]) as process:
        pids = [pid_in(tmp_path), *([pid_in(tmp_path, "child")] if name != "hangs" else [])]
        assert not any(map(is_gone, pids))
        process.kill()
    wait_for(lambda: all(map(is_gone, pids)), "the harness ended itself")


def test_end_of_the_harness_is_seen_also_where_a_process_of_it_holds_the_pipe(tmp_path: Path) -> None:
    """One that was not forked by Python, so that nothing could let go of it there."""
    python = fake_harness.program(tmp_path / "python", "sleep 600 & echo $! > " + f"{tmp_path}/child; exit 7")
    began = time.monotonic()
    with Child(python, 1) as asked_child, pytest.raises(ConfigError, match="it ended with code 7 and said nothing"):
        asked_child.first()
    assert time.monotonic() - began < GONE_S
    wait_for(lambda: is_gone(pid_in(tmp_path, "child")), "it is killed, too")


# -- its environment ---------------------------------------------------------------------------------------------------


def seen_by_harness(config: RunConfig, folder: Path) -> dict[str, str]:
    """The variables that a harness of this run would have."""
    python = fake_harness.program(folder / "python", f"env -0 > {folder}/environment")
    with pytest.raises(ConfigError):
        asked(config, "good", python=python)
    told = (folder / "environment").read_text().split("\0")[:-1]
    return {name: value for name, _, value in (each.partition("=") for each in told)}


def test_harness_has_what_it_needs_of_our_environment_and_nothing_else(
    causal_run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither packages of ours, nor secrets, nor what a task reads, as COUNTRY: that would be another task of the same name."""
    needed = {
        "HF_HOME": "/data",
        "HF_TOKEN": "hub's",
        "HTTPS_PROXY": "http://a:1",
        "no_proxy": "b",
        "LD_LIBRARY_PATH": "",
    }
    others = (
        "PYTHONPATH",
        "PYTHONOPTIMIZE",
        "AWS_SECRET_ACCESS_KEY",
        "WANDB_API_KEY",
        "COUNTRY",
        "WORLD_SIZE",
        VARIABLE,
    )
    for name, value in {**needed, **dict.fromkeys(others, "ours"), "OMP_NUM_THREADS": "64", "LANG": "de_DE"}.items():
        monkeypatch.setenv(name, value)
    seen = seen_by_harness(causal_run.replace("workers.threads=3"), tmp_path)
    assert needed.items() <= seen.items() and seen["HOME"] == os.environ["HOME"]
    assert not {*others, "LANG"} & seen.keys()
    fixed = {
        "OMP_NUM_THREADS": "3",
        "PYTHONHASHSEED": "0",
        "PYTHONSAFEPATH": "1",
        "PYTHONUTF8": "1",
        "LC_ALL": "C.UTF-8",
    }
    assert fixed.items() <= seen.items() and seen["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize(("value", "is_offline"), [("1", True), ("true", True), ("0", False)])
def test_harness_is_offline_where_we_are(name: str, value: str, is_offline: bool) -> None:
    """Each of Hugging Face's libraries has a variable of its own."""
    seen = environment({name: value}, 1)
    assert ({each: seen.get(each) for each in OFFLINE} == dict.fromkeys(OFFLINE, "1")) is is_offline
    assert is_offline or {each: seen[each] for each in OFFLINE if each in seen} == {name: value}
