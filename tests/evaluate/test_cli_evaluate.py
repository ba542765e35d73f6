"""`evaluate`: what is told, what is kept, and what is refused before any model is loaded."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer

from elastic_lm import cli_evaluate
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.errors import CheckpointError, ClusterError, ConfigError
from elastic_lm.evaluate.intervals import Metric
from elastic_lm.evaluate.pieces import Answer, Piece, Subject, here
from elastic_lm.evaluate.result import Outcome, Result
from elastic_lm.experiment import evaluations, rewinds
from elastic_lm.experiment.lineage import Lineage
from elastic_lm.experiment.skip import Skip
from elastic_lm.run import Run
from elastic_lm.runtime import evaluator
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.data.corpora import texts, write_lines
from tests.experiment.parents import forked, trained
from tests.solo import Solo, solo_config
from tests.test_cli import run


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, held_out_corpus: str) -> str:
    """Of a run with checkpoints of the steps 4 and 6."""
    config = solo_config(held_out_corpus, f"file://{tmp_path_factory.mktemp('evaluated')}")
    Solo(config).train(until=4)
    assert Solo(config).train().verdict == "done"
    return config.run_url


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    (tmp_path / "items.jsonl").write_text('{"more": "a cat runs", "less": "a dog runs"}\n')
    (tmp_path / "animals.yaml").write_text("kind: pairs\ndata: items.jsonl\n")
    return str(tmp_path / "animals.yaml")


def test_text_that_an_ancestor_may_have_trained_on_is_told(tmp_path: Path) -> None:
    """The same file, of which nothing was held out before."""
    source = write_lines(tmp_path / "text.jsonl", texts(200))
    whole, part = (Storage.open(f"file://{tmp_path}/{name}") for name in ("whole", "part"))
    prepare([source], whole, PrepareOptions(vocab_size=300, block_tokens=257, held_out=0))
    options = PrepareOptions(tokenizer=f"{whole.url}/tokenizer.json", block_tokens=257, held_out=0.2)
    prepare([source], part, options)
    parent = solo_config(whole.url, f"file://{tmp_path}", "parent", steps=4)
    trained(parent, 2)
    made = forked(parent, "child", step=2, overrides=[f"data.tokens={part.url}"])
    note = "another corpus, which may hold this text, was trained on by parent to step 2"
    told = run("evaluate", made.url, "--samples", "2")
    assert told.stdout.splitlines()[-1].strip() == note, told.output
    kept = json.loads(Storage.open(made.url).read("evaluations/step-00000002/held_out.json"))
    assert kept["method"]["corpus"] == note
    trained(made.config)
    again = forked(made.config, "again", overrides=["training.steps=6"])  # on the same corpus as its parent
    (line,) = run("evaluate", again.url, "--samples", "2", "--json").stdout.splitlines()
    assert json.loads(line)["method"]["corpus"] == note
    back = forked(again.config, "back", overrides=["training.steps=6", f"data.tokens={whole.url}"])
    lineage = Lineage.load(Storage.open(back.url))
    assert lineage is not None
    assert [parent.name for parent in lineage.trained_elsewhere(Manifest.load(whole).hash)] == ["child"]
    plain = forked(parent, "plain", step=2)
    assert plain.lineage.trained_elsewhere(Manifest.load(whole).hash) == []
    Storage.open(made.url).write("lineage.json", b"{}")
    assert "trained on this text is unknown" in run("evaluate", made.url, "--samples", "2").stdout


def test_figures_are_told_and_kept(address: str, pairs: str) -> None:
    told = run("evaluate", address, "--tasks", f"held_out, {pairs}", "--samples", "5")
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert lines[0].startswith("held_out at step 6: 5 samples, 5 batches, 160 targets, ")
    assert [" ".join(line.split()[:-4]) for line in lines[1:5]] == ["loss", "perplexity", "accuracy", "bits per byte"]
    assert lines[5].strip() == "the intervals may be too narrow: 5 documents are few"
    assert lines[6] == "animals at step 6: 1 pairs, 0 ties"
    folder = Storage.open(address)
    assert folder.list("evaluations/step-00000006/") == [
        "evaluations/step-00000006/animals.json", "evaluations/step-00000006/held_out.json",
    ]  # fmt: skip
    kept = json.loads(folder.read("evaluations/step-00000006/held_out.json"))
    assert (kept["format"], kept["version"], kept["run"], kept["step"]) == ("elastic-lm evaluation", 1, "solo", 6)
    result = Run.open(address).result
    assert result is not None and kept["weights"] == result.digest["weights"]
    assert f"{kept['metrics']['loss']['value']:.4f}" in lines[1]
    assert kept["counts"]["samples"] == 5 and len(kept["task_hash"]) == 64


def test_earlier_step_is_another_model(address: str) -> None:
    early, late = (
        json.loads(run("evaluate", f"{address}{at}", "--json").stdout.splitlines()[0]) for at in ("@4", "@6")
    )
    assert (early["step"], late["step"]) == (4, 6)
    assert early["task_hash"] == late["task_hash"] and early["weights"] != late["weights"]
    assert early["metrics"]["loss"]["value"] > late["metrics"]["loss"]["value"]
    assert Storage.open(address).exists("evaluations/step-00000004/held_out.json")
    [found] = Run.open(address).evaluate(step=4)
    assert found.as_dict() == early


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("@5", "has no complete checkpoint of step 5; the nearest are 4 and 6"),
        ("@1_000", "has no complete checkpoint of step 1000; the nearest are 4 and 6"),
        ("@last", "is no run at a step; write RUN@STEP, e.g."),
    ],
)
def test_step_that_is_not_there_is_told(step: str, message: str, address: str) -> None:
    told = run("evaluate", f"{address}{step}")
    assert told.exit_code == 2 and message in " ".join(told.output.split())


@pytest.mark.parametrize("tasks", ["heldout", "nowhere/mine.yaml", "held_out,,", "held_out,held_out"])
def test_wrong_task_is_refused_before_a_model_is_loaded(
    tasks: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedModel, "load", None)
    told = run("evaluate", address, "--tasks", tasks)
    assert told.exit_code == 2 and told.stderr.startswith("elastic-lm: "), told.output


def test_figures_are_told_where_they_cannot_be_kept(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from elastic_lm.errors import AccessDeniedError

    def refuse(storage: Storage, path: str, data: bytes) -> None:
        raise AccessDeniedError(f"{path} may not be written")

    monkeypatch.setattr(Storage, "write", refuse)
    told = run("evaluate", address, "--samples", "2")
    assert told.exit_code == 4 and told.stdout.startswith("held_out at step 6: 2 samples")
    assert re.search(r"held_out(-[0-9a-f]{8})?\.json may not be written", told.stderr)


def test_figures_are_kept_also_where_nobody_reads_on(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Storage.open(address)
    folder.delete("evaluations/step-00000006/held_out.json")

    def is_closed(text: str) -> None:
        raise typer.Exit(0)

    monkeypatch.setattr(cli_evaluate, "deliver", is_closed)
    assert run("evaluate", address, "--samples", "2").exit_code == 0
    assert folder.exists("evaluations/step-00000006/held_out.json")


# -- while the run goes back ---------------------------------------------------------------------------------------------


def back_to(to_step: int, number: int = 1) -> rewinds.Rewind:
    before: Skip = () if number == 1 else ((7, 8),)
    return rewinds.Rewind(number, "loss", "it jumped", 8, 9, to_step, before, ((7, 8), (9 + number, 20)), "f")


def result_of(step: int, num_rewinds: int = 0) -> Result:
    outcome = Outcome({"loss": Metric(9.0)}, {})
    return Result("mine", step, "0" * 64, "held_out", "held_out", "1" * 64, outcome, num_rewinds)


@pytest.mark.parametrize(("step", "stays"), [(9, False), (6, False), (5, True), (4, True)])
def test_result_of_weights_that_the_run_gave_up_meanwhile_is_refused(step: int, stays: bool, tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    rewinds.decide(folder, back_to(5))
    result = result_of(step)
    rewinds.clear(folder, rewinds.Rewinds.load(folder), lambda: None)
    if stays:
        result.store(folder)
    else:
        with pytest.raises(
            CheckpointError, match=f"went back to step 5 while its step {step} was evaluated in held_out"
        ):
            result.store(folder)
    assert [one.step for one in evaluations.found(folder)] == ([step] if stays else [])
    result_of(9, num_rewinds=1).store(folder)  # of the step when it was trained anew
    assert len(evaluations.found(folder)) == 1 + stays


def test_result_is_refused_in_words_where_nobody_can_tell_what_the_run_gave_up(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    folder.write("rewinds/0001.json", b"{")
    with pytest.raises(CheckpointError, match=r"rewinds/0001\.json cannot be read: .*; it says which batches"):
        result_of(4).store(folder)
    assert evaluations.found(folder) == []


def test_result_is_taken_back_where_the_run_goes_back_between_look_and_write(tmp_path: Path) -> None:
    class Between(Storage):
        def write(self, path: str, data: bytes) -> None:
            if path.startswith("evaluations/"):
                rewinds.decide(self, back_to(5))
                rewinds.clear(self, rewinds.Rewinds.load(self), lambda: None)
            super().write(path, data)

    folder = Between(str(tmp_path))
    with pytest.raises(CheckpointError, match="is not kept"):
        result_of(9).store(folder)
    assert evaluations.found(folder) == []


def test_command_tells_a_result_that_it_does_not_keep_and_why(
    address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    copied = tmp_path / "solo"
    shutil.copytree(address.removeprefix("file://"), copied)
    folder = Storage.open(str(copied))

    def meanwhile(subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        answers = here(subject, pieces)
        first = next(answers)
        rewinds.decide(folder, back_to(5))  # before it, and the answers were of step 4
        yield first
        yield from answers

    monkeypatch.setattr("elastic_lm.runtime.evaluators.OnCluster", lambda num_workers, tell: meanwhile)
    folder.delete("evaluations/step-00000006/held_out.json")
    told = run("evaluate", str(copied), "--samples", "2", "--workers", "1")
    assert told.exit_code == 2 and told.stdout.startswith("held_out at step 6: 2 samples")
    assert "went back to step 5 while its step 6 was evaluated" in " ".join(told.stderr.split())
    assert not folder.exists("evaluations/step-00000006/held_out.json")


def test_another_task_of_the_same_name_is_kept_beside(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))

    def store(task_hash: str, value: float) -> None:
        outcome = Outcome({"loss": Metric(value)}, {})
        Result("mine", 6, "0" * 64, "held_out", "held_out", task_hash, outcome).store(folder)

    first, other = "1" * 64, "2" * 64
    store(first, 1.0)
    store(other, 2.0)
    store(other, 3.0)
    store(first, 4.0)
    assert folder.list() == [f"evaluations/step-00000006/held_out{end}.json" for end in ("-22222222", "")]
    found = [(one.task, one.task_hash, one.value) for one in evaluations.found(folder)]
    assert found == [("held_out", first, 4.0), ("held_out", other, 3.0)]
    folder.write("evaluations/step-00000006/held_out.json", b"{")
    store(first, 5.0)
    assert evaluations.found(folder)[0].value == 5.0


def test_workers_answer_when_asked_and_what_is_said_of_them_is_no_result(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Crew:
        def __init__(self, num_workers: int, tell: Callable[[str], None]) -> None:
            self._tell = tell
            seen.append(num_workers)

        def __call__(self, subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
            self._tell("Evaluating with 3 workers.")
            yield from here(subject, pieces)

    monkeypatch.setattr("elastic_lm.runtime.evaluators.OnCluster", Crew)
    alone = run("evaluate", address, "--samples", "4", "--json")
    shared = run("evaluate", address, "--samples", "4", "--json", "--workers", "3")
    assert (shared.exit_code, shared.stdout, shared.stderr) == (0, alone.stdout, "Evaluating with 3 workers.\n")
    assert seen == [3]
    assert run("evaluate", address, "--workers", "0").exit_code == 2
    with pytest.raises(ConfigError, match="workers=0 is too few; use at least 1"):
        list(Run.open(address).evaluate(workers=0))


@pytest.mark.parametrize("samples", [0, -1, 2.5, True, "3"])
def test_number_of_samples_that_is_none_is_refused(samples: Any, address: str) -> None:
    """0 is not all of them."""
    with pytest.raises(ConfigError, match=f"samples={samples!r} is .*; use at least 1, or leave it out"):
        Run.open(address).evaluate(samples=samples)


def test_no_task_is_not_the_default(address: str) -> None:
    told = run("evaluate", address, "--tasks", "")
    assert told.exit_code == 2 and "'' is no task; write held_out" in told.stderr and not told.stdout


def test_command_takes_the_priority_of_workers_on_a_cluster_and_the_api_leaves_it_alone(
    address: str, monkeypatch: pytest.MonkeyPatch, priorities: list[tuple[int, int, int]]
) -> None:
    """So that a run on this machine goes first: Ray starts its workers with a niceness of 15."""
    list(Run.open(address).evaluate(samples=1))
    assert priorities == []
    assert run("evaluate", address, "--samples", "1").exit_code == 0
    assert priorities == [(os.PRIO_PROCESS, 0, 15 + evaluator.NICENESS)]
    monkeypatch.setattr("elastic_lm.runtime.evaluators.OnCluster", lambda num_workers, tell: here)
    assert run("evaluate", address, "--samples", "1", "--workers", "1").exit_code == 0
    assert len(priorities) == 1  # its workers have their own


def test_nothing_is_kept_of_a_task_whose_workers_are_lost(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        yield from itertools.islice(here(subject, pieces), len(pieces) - 1)
        raise ClusterError("workers of the evaluation died 6 times in a row")

    monkeypatch.setattr("elastic_lm.runtime.evaluators.OnCluster", lambda num_workers, tell: broken)
    monkeypatch.setattr("elastic_lm.evaluate.held_out.PIECE_TOKENS", 32)
    folder = Storage.open(address)
    folder.delete("evaluations/step-00000006/held_out.json")
    told = run("evaluate", address, "--workers", "2")
    assert told.exit_code == 4 and told.stderr == "elastic-lm: workers of the evaluation died 6 times in a row\n"
    assert told.stdout == "" and not folder.exists("evaluations/step-00000006/held_out.json")
