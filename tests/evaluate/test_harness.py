"""Tasks of lm-evaluation-harness: its figures are those of hand-worked cases, of our own tasks, and of the harness's own way to
run the exported model; what is wrong is told before any work; nothing of it is left behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from elastic_lm.config import RunConfig
from elastic_lm.data.tokenizer import SMALLEST_VOCABULARY
from elastic_lm.errors import CheckpointError, ConfigError
from elastic_lm.evaluate import tasks
from elastic_lm.evaluate.harness import child
from elastic_lm.evaluate.harness.answers import Answers
from elastic_lm.evaluate.harness.child import Child
from elastic_lm.evaluate.harness.environment import OFFLINE, environment
from elastic_lm.evaluate.harness.evaluation import VARIABLE, Harness
from elastic_lm.evaluate.intervals import Metric, Z
from elastic_lm.evaluate.progress import Progress
from elastic_lm.evaluate.result import Result
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.evaluate import fake_harness
from tests.evaluate.models import REST, bigrams, outcome_of, token
from tests.test_cli import run

GONE_S = 20.0
CHANCES = {("a", "b"): 0.3, ("a", "c"): 0.25, ("b", "c"): 0.5, ("c", "\n"): 0.9}


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One with the small harness."""
    return fake_harness.install(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run's model is one whose probabilities are known."""
    monkeypatch.setattr(TrainedModel, "load", lambda *_, **__: bigrams(CHANCES))


def asked(config: RunConfig, *names: str, step: int | None = None, **choices: Any) -> list[Result]:
    return list(Harness(names, **choices).evaluate(Storage.open(config.run_url), config, step))


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


# -- figures -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_hand")
def test_figures_by_hand(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    """ln P behind a of b, c and c?; the likeliest is b alone. Of "ababababab" every second token is known."""
    [found] = asked(causal_run, "good", python=python, include=str(tmp_path))
    others = SMALLEST_VOCABULARY - 1
    likelihoods = [math.log(0.3), math.log(0.25), math.log(0.25) + math.log(0.1 / others)]
    mean = sum(likelihoods) / 3
    metrics = dict(found.outcome.metrics)
    told = metrics.pop("log_p")
    assert (told.value, told.low, told.high) == pytest.approx((mean, mean - Z / 2, mean + Z / 2))
    rolling = metrics.pop("rolling").value
    huge = metrics.pop("huge")
    assert huge.value == 1e308 and huge.high is None  # no JSON has it
    assert rolling == pytest.approx(REST + 5 * math.log(0.3) + 4 * math.log(0.5 / others))
    assert metrics == {"greedy,strict": Metric(1.0), "written": Metric(2.0), "parts": Metric(None)}  # written is bc
    assert found.outcome.counts == {"items": 3, "cut_contexts": 0}
    assert found.outcome.method == {
        "harness": fake_harness.VERSION,
        "version": "1.5",
        "shots": "0",
        "intervals": "1.96 standard errors of the harness to each side",
    }
    assert (found.task, found.kind, found.run, found.step) == ("harness-good", "harness", causal_run.name, 1)


@pytest.mark.usefixtures("by_hand")
def test_interval_claims_no_certainty_and_a_share_stays_within_its_bounds(
    causal_run: RunConfig, python: str, tmp_path: Path
) -> None:
    """All items right is no sign of being sure; what one item has more than 1 of is no share."""
    [found] = asked(causal_run, "sure", python=python, include=str(tmp_path))
    assert found.outcome.metrics == {
        "right": Metric(1.0),
        "share": Metric(0.98, 0.98 - Z * 0.02, 1.0),
        "gain": Metric(0.98, 0.98 - Z * 0.02, 0.98 + Z * 0.02),
    }


@pytest.mark.usefixtures("by_hand")
def test_groups_come_behind_their_tasks(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    good, better, both = asked(causal_run, "both", python=python, include=str(tmp_path))
    assert [one.task for one in (good, better, both)] == ["harness-good", "harness-better", "harness-both"]
    assert both.outcome.metrics == {"log_p": Metric(good.outcome.metrics["log_p"].value)}
    assert both.outcome.counts == {"items": 6, "tasks": 2, "cut_contexts": 0}
    assert len({one.task_hash for one in (good, better, both)}) == 3


@pytest.mark.usefixtures("by_hand")
def test_long_name_of_a_task_makes_a_name_that_can_be_stored(causal_run: RunConfig, tmp_path: Path) -> None:
    """Two that begin alike have two."""
    long = "m" * 250
    python = fake_harness.install(tmp_path, at_import=f"LONG = {long!r}")
    source = tmp_path / "lm_eval" / "__init__.py"
    source.write_text(source.read_text().replace('"good", "better"', 'LONG, LONG + "s"', 1))
    found = asked(causal_run, long, f"{long}s", python=python, include=str(tmp_path))
    assert len({one.task for one in found}) == 2
    for one in found:
        one.store(Storage.open(causal_run.run_url))
        name_in_harness = one.task.removeprefix("harness-")[:150]
        assert name_in_harness == long[:150]
        assert len(f"{one.task}-12345678.json") < 255


@pytest.mark.usefixtures("by_hand")
def test_hash_tells_what_is_asked_and_not_where_it_lies(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    def task_hash(folder: str, **choices: int) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        [found] = asked(causal_run, "good", python=python, include=str(tmp_path / folder), **choices)
        assert (found.outcome.counts["items"], found.outcome.method["shots"]) == (
            choices.get("samples", 3),
            str(choices.get("shots", 0)),
        )
        return found.task_hash

    whole = task_hash("here")
    assert task_hash("there") == whole
    assert len({whole, task_hash("here", samples=2), task_hash("here", shots=5)}) == 3


def test_where_a_score_is_not_finite_neither_are_the_figures(
    causal_run: RunConfig, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedModel, "load", lambda *_, **__: bigrams({("a", "b"): math.nan}))
    found = asked(causal_run, "both", python=python, include=str(tmp_path))
    assert {metric for one in found for metric in one.outcome.metrics.values()} == {Metric(None)}
    assert found[2].outcome.counts["not_finite"] == found[0].outcome.counts["not_finite"] * 2 > 0


class Seen:
    """A view."""

    def __init__(self) -> None:
        self.told: list[Progress] = []

    def show(self, progress: Progress) -> None:
        self.told.append(progress)


def lines_of(told: Sequence[Progress]) -> list[str]:
    return [f"{each.doing} {each.stage} {each.done}/{each.total} {each.unit}, {each.tokens} tokens" for each in told]


@pytest.mark.usefixtures("by_hand")
def test_progress_tells_the_start_and_of_each_task_its_requests(
    causal_run: RunConfig, python: str, tmp_path: Path
) -> None:
    """Behind "a": b, c and c?; ten windows of one token; one text of three tokens."""
    seen = Seen()
    results = Harness(["both"], python, str(tmp_path)).evaluate(Storage.open(causal_run.run_url), causal_run, view=seen)
    next(results)
    assert lines_of(seen.told) == [
        "starting lm-evaluation-harness 0/None requests, 0 tokens",
        "loading both 0/None requests, 0 tokens",
        "loading the model 0/None requests, 0 tokens",
        "preparing good (1 of 2) 0/None requests, 0 tokens",
        "evaluating good (1 of 2) 0/3 requests, 0 tokens",
        "evaluating good (1 of 2) 2/3 requests, 4 tokens",
        "evaluating good (1 of 2) 3/3 requests, 7 tokens",
        "evaluating good (1 of 2) 0/10 requests, 0 tokens",
        "evaluating good (1 of 2) 10/10 requests, 10 tokens",
        "evaluating good (1 of 2) 0/1 requests, 0 tokens",
        "evaluating good (1 of 2) 1/1 requests, 3 tokens",
    ]
    seen.told.clear()
    assert len(list(results)) == 2
    assert lines_of(seen.told)[0].startswith("preparing better (2 of 2)")


def test_progress_names_one_task_alone_and_counts_several(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    for names, expected in ((["good"], "loading good"), (["good", "unloadable"], "loading 2 tasks")):
        seen = Seen()
        results = Harness(names, python, str(tmp_path)).evaluate(
            Storage.open(causal_run.run_url), causal_run, view=seen
        )
        with contextlib.suppress(ConfigError):
            next(results)
        assert lines_of(seen.told)[1].startswith(expected)


# -- what the model answers ----------------------------------------------------------------------------------------------


def test_contexts_lose_their_beginning_and_are_counted() -> None:
    answers = Answers(bigrams({("a", "b"): 0.5}, max_tokens=4))
    a, b = token("a"), token("b")
    expected = [(pytest.approx(math.log(0.5)), True)] * 2
    assert answers.to("score", [([b, b, b, a], [b]), ([b] * 9 + [a], [b])]) == expected
    assert answers.num_cut == 1


@pytest.mark.parametrize("continuation", [[], [5] * 5])
def test_continuation_that_is_none_or_does_not_fit_is_refused(continuation: list[int]) -> None:
    with pytest.raises(ConfigError, match=rf"has {len(continuation)} tokens of its own, and must have 1 to 4"):
        Answers(bigrams({}, max_tokens=4)).to("score", [([token("a")], continuation)])


def test_continuations_stop_at_the_first_of_their_stops_and_repeat_their_draws() -> None:
    model = bigrams({("a", "b"): 0.9, ("b", "c"): 0.9, ("c", "a"): 0.9})
    greedy = {
        "prompt": "a",
        "stops": ["ca", "c"],
        "max_new_tokens": 9,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
    }
    assert Answers(model).to("generate", [greedy, {**greedy, "stops": []}]) == ["b", "bcabcabca"]
    drawn = {**greedy, "stops": [], "temperature": 5.0}
    texts = Answers(model).to("generate", [drawn, drawn])
    assert texts[0] != texts[1] and Answers(model).to("generate", [drawn, drawn]) == texts
    answers = Answers(bigrams({}, max_tokens=4))
    answers.to("generate", [{**greedy, "prompt": "aaa"}, {**greedy, "prompt": "aaaa"}])
    assert answers.num_cut == 1  # with the token that begins a document


def test_continuations_that_are_not_finite_are_counted() -> None:
    answers = Answers(bigrams({("a", "b"): 1.0, ("b", "c"): math.nan, ("d", "e"): 1.0}))
    asked = {"stops": [], "max_new_tokens": 1, "temperature": 0.0, "top_k": None, "top_p": None}
    assert answers.to("generate", [{**asked, "prompt": "b"}, {**asked, "prompt": "d"}]) == ["", "e"]
    assert answers.num_not_finite == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"top_k": -1}, "generation_kwargs of a task .*: top_k=-1 is no number of tokens to draw from"),
        ({"top_k": 10.0}, r"top_k=10\.0 is no number of tokens to draw from; use at least 1, or leave it out"),
        ({"top_p": 1.5}, r"top_p=1\.5 is not in \(0, 1\]"),
        ({"top_p": 0.0}, r"top_p=0\.0 is not in \(0, 1\]"),  # it is not all tokens
        ({"max_new_tokens": 0}, "max_new_tokens=0 is no length"),
    ],
)
def test_draw_that_cannot_be_made_is_refused_before_any_other(
    option: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_lm.evaluate.harness.answers.Generator", None)
    asked = {"prompt": "a", "stops": [], "max_new_tokens": 1, "temperature": 1.0, "top_k": None, "top_p": None}
    with pytest.raises(ConfigError, match=message):
        Answers(bigrams({})).to("generate", [asked, {**asked, **option}])


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["goood"], f"'goood' is no task of lm-evaluation-harness {fake_harness.VERSION} \\(did you mean good\\?\\)"),
        (["good", "nothing_like_it"], "'nothing_like_it' is no task of .* lists them, and --harness-include adds"),
        (
            ["unloadable"],
            "cannot load unloadable: ConnectionError: no such data\nis anywhere; leave the task out, correct it, or see",
        ),
        (["unsafe"], "unsafe runs code that the model writes"),
        (["both", "good"], "the task good is in both both and good; leave one out"),
        (["good", "good"], "good is named twice"),
        (["good", ""], "has no name"),
    ],
)
def test_task_is_refused_before_the_model_is_loaded(
    names: list[str], message: str, causal_run: RunConfig, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedModel, "load", None)
    with pytest.raises(ConfigError, match=message):
        asked(causal_run, *names, python=python, include=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_beams": 10},
            "generation_kwargs has num_beams=10, which is not done here; leave the task out, correct it",
        ),
        ({"repetition_penalty": 1.2}, r"has repetition_penalty=1\.2, which is not done here"),
        ({"temperature": 0.5, "min_p": 0.1}, r"has min_p=0\.1, which is not done here"),
        ({"what_nobody_knows": False}, "has what_nobody_knows=False, which is not done here"),
        ({"do_sample": True}, "has do_sample without a temperature; write which"),
    ],
)
def test_text_that_cannot_be_written_as_asked_is_refused_before_the_model_is_loaded(
    options: dict[str, Any],
    message: str,
    causal_run: RunConfig,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TrainedModel, "load", None)
    (tmp_path / "options.json").write_text(json.dumps(options))
    with pytest.raises(ConfigError, match=f"writes: .*{message}"):
        asked(causal_run, "writes", python=python, include=str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "repetition_penalty": 1.0, "min_length": 0, "use_cache": False, "what_nobody_knows": None},
        {"temperature": 0.0, "top_p": 0.0, "min_p": 0.1},  # of draws, and nothing is drawn
        {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0},
    ],
)
@pytest.mark.usefixtures("by_hand")
def test_options_of_a_text_that_change_nothing_pass(
    options: dict[str, Any], causal_run: RunConfig, python: str, tmp_path: Path
) -> None:
    (tmp_path / "options.json").write_text(json.dumps(options))
    [found] = asked(causal_run, "writes", python=python, include=str(tmp_path))
    assert found.outcome.metrics["written"].value is not None


def test_folder_that_cannot_be_read_is_told(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").touch()
    with pytest.raises(ConfigError, match=r"cannot list its tasks: ValueError: broken\.yaml is no task; correct that"):
        asked(causal_run, "good", python=python, include=str(tmp_path))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"include": "/nowhere"}, "/nowhere is no folder"),
        ({"samples": 0}, "samples=0 is too few; use at least 1"),
        ({"samples": 2.5}, r"samples=2\.5 is no whole number; use at least 1, or leave it out"),
        ({"shots": -1}, "shots=-1 is too few; use at least 0"),
    ],
)
def test_choice_is_refused_before_anything_starts(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Harness(["good"], **choices)


def test_masked_objective_is_refused(masked_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"takes objective\.name=causal, and the run's is masked"):
        asked(masked_run, "good", python="/nowhere")


def test_step_without_checkpoint_is_told_before_the_harness_starts(causal_run: RunConfig) -> None:
    with pytest.raises(CheckpointError, match="has no complete checkpoint of step 5; the nearest are 4 and 6"):
        asked(causal_run, "good", python="/nowhere", step=5)


def test_another_corpus_is_told_before_the_harness_starts(causal_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"is not the corpus at data\.tokens="):
        asked(causal_run.replace(f"data.manifest={'f' * 64}"), "good", python="/nowhere")


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


# -- what is left behind -------------------------------------------------------------------------------------------------


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


# -- the command ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("by_hand")
def test_command_tells_and_keeps(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    options = ["--harness-python", python, "--harness-include", str(tmp_path), "--samples", "2", "--harness-shots", "4"]
    told = run("evaluate", causal_run.run_url, "--harness", "good, better", *options)
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert lines[0] == "harness-good at step 1: 2 items, 0 cut contexts" and lines[1].split()[:2] == ["log", "p"]
    folder = Storage.open(causal_run.run_url)
    kept = json.loads(folder.read("evaluations/step-00000001/harness-better.json"))
    assert (kept["kind"], kept["counts"]["items"], kept["method"]["shots"]) == ("harness", 2, "4")


@pytest.mark.usefixtures("by_hand")
def test_lines_of_json_are_alike_for_all_tasks_and_what_is_kept(
    causal_run: RunConfig, python: str, tmp_path: Path
) -> None:
    folder = Storage.open(causal_run.run_url)
    for path in folder.list("evaluations/"):
        folder.delete(path)
    (tmp_path / "one.jsonl").write_text('{"prompt": "a"}\n')
    task = tmp_path / "loud.yaml"
    task.write_text(f"kind: safety\ndata: one.jsonl\nscorer: {__name__}:loud\nmax_new_tokens: 1\n")
    options = ["--harness", "both", "--harness-python", python, "--harness-include", str(tmp_path)]
    told = [run("evaluate", causal_run.run_url, "--json", *each) for each in (["--tasks", str(task)], options)]
    assert [each.exit_code for each in told] == [0, 0], told
    bodies = [json.loads(line, parse_constant=pytest.fail) for each in told for line in each.stdout.splitlines()]
    assert [body["task"] for body in bodies] == ["loud", "harness-good", "harness-better", "harness-both"]
    assert len({tuple(body) for body in bodies}) == 1
    for body in bodies:
        assert body == json.loads(folder.read(f"evaluations/step-00000001/{body['task']}.json"))
        assert all(set(metric) == {"value", "low", "high"} for metric in body["metrics"].values())
    assert "it is judged" in told[0].stderr


def loud(text: str) -> float:
    """A scorer that says what it does."""
    print("it is judged")
    return 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "held_out", "--harness", "good"], "--tasks and --harness are two evaluations"),
        (["--harness-shots", "3"], "are for tasks of the harness; name them with --harness"),
        (["--harness-python", "/nowhere"], "are for tasks of the harness; name them with --harness"),
        (["--harness-include", "."], "are for tasks of the harness; name them with --harness"),
        (["--harness", "good,", "--harness-python", "/nowhere"], "has no name"),
    ],
)
def test_command_refuses(options: list[str], message: str, causal_run: RunConfig) -> None:
    told = run("evaluate", causal_run.run_url, *options)
    assert told.exit_code == 2 and message in " ".join(told.stderr.split())


# -- the real one --------------------------------------------------------------------------------------------------------

ANIMALS = ("cow", "dog", "cat", "ant", "river", "then", "over", "lazy", "quick", "a", "slowly", "under")
CHOICES = [" dog", " cat", " the river", " slowly"]
ITEMS = [{"context": f"the {name} and", "choices": CHOICES, "answer": n % 4} for n, name in enumerate(ANIMALS)]
PAIRS = [
    {"more": f"the {one} runs over the {other}", "less": f"the {other} runs over the {one}"}
    for one, other in zip(ANIMALS, ANIMALS[1:], strict=False)
]
TEXTS = [{"text": "the quick dog runs over a lazy river and then " * n} for n in (1, 4, 9)]

HARNESS_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
target_delimiter: ""
metadata: {{version: 1.0}}
"""
KINDS = {
    "animals": """
output_type: multiple_choice
doc_to_text: context
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "sentences": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{[more, less]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
""",
    "next_words": """
output_type: loglikelihood
doc_to_text: "{{text[:20]}}"
doc_to_target: "{{text[20:40]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "whole_texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{text[:20]}}"
doc_to_target: "{{text[20:40]}}"
generation_kwargs: {until: ["xyz"], max_gen_toks: 8}
metric_list: [{metric: chrf}]
""",
}
GROUP = "group: zoo\ntask: [animals]\naggregate_metric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of the harness, and the same items as a task of ours."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("items", ITEMS), ("pairs", PAIRS), ("texts", TEXTS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind in KINDS.items():
        data = folder / {"animals": "items.jsonl", "sentences": "pairs.jsonl"}.get(name, "texts.jsonl")
        (folder / f"{name}.yaml").write_text(HARNESS_TASK.format(name=name, data=data) + kind)
    (folder / "zoo.yaml").write_text(GROUP)
    (folder / "ours").mkdir()
    (folder / "ours" / "choices.yml").write_text("kind: choices\ndata: ../items.jsonl\n")
    (folder / "ours" / "pairs.yml").write_text("kind: pairs\ndata: ../pairs.jsonl\n")
    return folder


@pytest.fixture(scope="module")
def real(causal_run: RunConfig, harness_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What the real harness finds out, without a network."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in _offline(tmp_path_factory.mktemp("cache")).items():
            patch.setenv(name, value)
        found = Run.open(causal_run).evaluate_harness(
            "zoo",
            "sentences",
            "next_words",
            "whole_texts",
            "written",
            include=str(harness_tasks),
        )
        return {result.task.removeprefix("harness-"): result for result in found}


def _offline(cache: Path) -> dict[str, str]:
    return {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_harness_counts_as_our_own_tasks(real: dict[str, Result], causal_run: RunConfig, harness_tasks: Path) -> None:
    model = TrainedModel.load(Storage.open(causal_run.run_url), causal_run)
    choices, pairs = (
        outcome_of(tasks.load(str(harness_tasks / "ours" / f"{kind}.yml"), "causal").question, model).metrics
        for kind in ("choices", "pairs")
    )
    animals = real["animals"].outcome
    p, n = choices["accuracy"].value, len(ITEMS)
    assert p is not None and 0 < p < 1
    assert animals.metrics["acc"].value == p
    assert animals.metrics["acc"].high == pytest.approx(p + Z * math.sqrt(p * (1 - p) / (n - 1)))
    assert animals.metrics["acc_norm"].value == choices["accuracy_per_byte"].value
    assert animals.counts == {"items": n, "cut_contexts": 0}
    assert real["zoo"].outcome.metrics["acc"] == animals.metrics["acc"]
    assert 0 < (pairs["share_more"].value or 0) < 1
    assert real["sentences"].outcome.metrics["acc"].value == pairs["share_more"].value
    assert real["animals"].weights == model.digest


# The harness's own class for models of transformers, in the harness's Python; PyTorch and transformers are those of ours.
REFERENCE = """
import json, sys
sys.path.append(sys.argv[1])
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path=sys.argv[3], include_defaults=False)
found = {}
# It puts a first token before whole texts itself, so that one more there would be another text.
for first, names in ((True, ["animals", "sentences", "next_words", "written"]), (False, ["whole_texts"])):
    model = HFLM(pretrained=sys.argv[2], device="cpu", dtype="float32", add_bos_token=first)
    found |= simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
def figures(each):
    return {key.removesuffix(",none"): float(value) for key, value in each.items() if key.endswith(",none") and value != "N/A"}
print(json.dumps({name: figures(each) for name, each in found.items()}))
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_harness_finds_the_same_of_the_exported_model(
    real: dict[str, Result], causal_run: RunConfig, harness_tasks: Path, tmp_path: Path
) -> None:
    """To 1e-5 of the figure: fp32 sums in another order differ by about 1e-7 of it."""
    Run.open(causal_run).export_model(tmp_path / "model")
    packages = Path(torch.__file__).parents[1]
    python = sys.executable
    done = subprocess.run(
        [python, "-I", "-c", REFERENCE, str(packages), str(tmp_path / "model"), str(harness_tasks)],
        env=_offline(tmp_path / "cache"),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    reference = json.loads(done.stdout.splitlines()[-1])
    compared = {
        (name, metric): value
        for name, each in reference.items()
        for metric, value in each.items()
        if "stderr" not in metric
    }
    assert len(compared) == 8
    for (name, metric), value in compared.items():
        assert real[name].outcome.metrics[metric].value == pytest.approx(value, rel=1e-5), (name, metric)
