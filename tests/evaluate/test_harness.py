"""Tasks of lm-evaluation-harness: hand-worked figures, intervals and answers, what is told meanwhile, and the command."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.data.tokenizer import SMALLEST_VOCABULARY
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.harness.answers import Answers
from elastic_lm.evaluate.harness.evaluation import Harness
from elastic_lm.evaluate.intervals import Metric, Z
from elastic_lm.evaluate.progress import Progress
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.evaluate import fake_harness
from tests.evaluate.fake_harness import asked
from tests.evaluate.models import REST, bigrams, token
from tests.test_cli import run

# -- figures -----------------------------------------------------------------------------------------------------------


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


# -- progress ----------------------------------------------------------------------------------------------------------


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


# -- what the model answers --------------------------------------------------------------------------------------------


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


# -- the command -------------------------------------------------------------------------------------------------------


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
