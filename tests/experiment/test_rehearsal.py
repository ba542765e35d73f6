"""Before an experiment begins: each bad input is refused with its remedy, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lm.config import RunConfig
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.errors import ConfigError, DataError, ElasticLMError
from elastic_lm.experiment.beginning import kept_steps
from elastic_lm.experiments import Experiment
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.experiment.trainers import FakeTrainer, carried_out, loop_of, plan_of
from tests.solo import solo_config

Write = Callable[..., Path]


@pytest.fixture
def base(held_out_corpus: str, tmp_path: Path) -> RunConfig:
    return solo_config(held_out_corpus, f"file://{tmp_path}/store", "base", steps=10)


@pytest.fixture
def write(base: RunConfig, tmp_path: Path) -> Write:
    """Writes plan.yaml with base.yaml beside it."""

    def written(*, set_: tuple[str, ...] = (), **changes: Any) -> Path:
        (tmp_path / "base.yaml").write_text(base.replace(*set_).to_yaml())
        plan = {"name": "plan", "base": "base.yaml", "target": "perplexity <= 30",
                "changes": [{"optimizer.learning_rate": 0.01}]}  # fmt: skip
        values = {name: value for name, value in {**plan, **changes}.items() if value is not None}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values))
        return tmp_path / "plan.yaml"

    return written


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One with a tokenizer of its own, that keeps nothing from training."""
    folder = tmp_path_factory.mktemp("other")
    source = write_lines(folder / "text.jsonl", texts(100))
    prepare(
        [source], Storage.open(str(folder / "tokens")), PrepareOptions(vocab_size=280, held_out=0.0, block_tokens=257)
    )
    return f"file://{folder}/tokens"


def refused(plan: Path, base: RunConfig) -> str:
    """What is told; nothing is written."""
    with pytest.raises(ElasticLMError) as told:
        Experiment.open(plan)
    assert isinstance(told.value, (ConfigError, DataError))
    assert Storage.open(base.storage).list() == []
    return str(told.value)


def test_plan_that_can_be_carried_out_is_told_and_writes_nothing(base: RunConfig, write: Write) -> None:
    found = Experiment.open(
        write(changes=[{"optimizer.learning_rate": 0.01}, {"training.steps": 20, "model.dropout": 0.1}])
    )
    assert [prospect.config.name for prospect in found.prospects] == ["plan-00", "plan-01", "plan-02"]
    assert [prospect.tokens for prospect in found.prospects] == [640, 640, 1280]
    assert [str(change) for change in found.prospects[2].changes] == [
        "model.dropout: 0.0 -> 0.1", "schedule.total_steps: 10 -> 20", "training.steps: 10 -> 20",
    ]  # fmt: skip
    assert [attempt.state for attempt in found.attempts] == ["not begun"] * 3
    assert Storage.open(base.storage).list() == []


FORK: dict[str, Any] = {"parent": "base", "steps": 5}


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        # changes that do not apply
        ({"changes": [{"optimizer.learnin_rate": 0.1}]},
         ["attempt 1 (optimizer.learnin_rate=0.1): optimizer.learnin_rate is not a field", "did you mean learning_rate?"]),
        ({"changes": [{}, {"optimizer.learning_rate": "fast"}], "parent": "base", "steps": 2},
         ["attempt 2 (optimizer.learning_rate=fast): optimizer.learning_rate='fast' is not a number"]),
        ({"changes": [{"workers.min": 2, "workers.max": 1}]}, ["attempt 1", "workers.min=2"]),
        ({"changes": None, "grid": {"model.dropout": [0.1], "model.num_heads": [1, 3]}},
         ["attempt 2 (model.dropout=0.1, model.num_heads=3): "]),
        ({"changes": [{"data.tokens": "/nowhere"}]}, ["attempt 1 (data.tokens=/nowhere): "]),
        # attempts that repeat
        ({"changes": [{"optimizer.learning_rate": 0.0003}]}, ["attempt 1", "would repeat attempt 0 (the base) bit for bit"]),
        ({"changes": [{"model.dropout": 0.1}, {"workers.num_cpus": 0.5, "model.dropout": 0.1}]}, ["would repeat attempt 1"]),
        # tasks and targets
        ({"tasks": ["hold_out"]}, ["'hold_out' is no task (did you mean held_out?)"]),
        ({"tasks": ["held_out", "no.yaml"]}, ["no.yaml is not there"]),
        ({"tasks": ["held_out", "held_out"]}, ["two tasks are called held_out"]),
        ({"target": "perplexty <= 30"}, ["held_out tells no perplexty (did you mean perplexity?)"]),
        ({"target": "capitals.accuracy >= 0.5"}, ["which is not among tasks: held_out"]),
        ({"changes": [{"objective.name": "masked"}], "target": "bits_per_byte <= 3", "set_": ("objective.name=masked",)},
         ["held_out tells no bits_per_byte; it tells loss, perplexity, accuracy"]),
        ({"changes": [{"objective.name": "masked"}], "target": "bits_per_byte <= 3"},
         ["attempt 1 (objective.name=masked): ", "held_out tells no bits_per_byte"]),
        ({"set_": ("batch.sequence_length=4000",)}, ["there is nothing to evaluate on"]),
        # the budget
        ({"budget": {"tokens": 600}}, ["budget.tokens=600 does not allow one attempt: the base alone trains on 640 tokens"]),
        # forks
        ({**FORK, "steps": None}, ["attempt 1", "as a fork of plan-00: it would begin at step 10", "steps: N"]),
        ({**FORK, "parent": "best", "steps": None, "changes": [{"training.steps": 15}, {"training.steps": 12}]},
         ["attempt 2 (training.steps=12), as a fork of plan-01: it would begin at step 15"]),
        ({**FORK, "parent_step": 6, "set_": ("checkpoint.every_steps=4", "checkpoint.keep=3")},
         ["parent_step=6: run plan-00 will have no checkpoint of that step", "of step 4 and step 8"]),
        ({**FORK, "parent_step": 4, "set_": ("checkpoint.every_steps=4",)}, ["the nearest will be of step 8 ("]),
        ({**FORK, "parent_step": 12}, ["the nearest will be of step 10 ("]),
        ({**FORK, "changes": [{"model.width": 32}]}, ["the state of step 10 cannot take model.width: 16 -> 32"]),
        ({**FORK, "changes": [{"model.num_heads": 2}]}, ["attempt 1", "would mean something else"]),
        ({**FORK, "changes": [{"optimizer.kind": "muon"}]}, ["cannot take", "optimizer.kind"]),
        ({**FORK, "changes": [{"skip": [[2, 5]]}]}, [": skip 2:5 begins before batch 10, the first that the fork trains"]),
        ({**FORK, "changes": [{"skip": [[90, 95]]}]}, [": skip 90:95 begins behind batch"]),
        ({"changes": [{"skip": [[90, 95]]}]}, ["attempt 1 (skip 90:95): skip 90:95 begins behind batch 9, the last"]),
        ({"changes": [{"training.skip": [[90, 95]]}]}, ["[90, 95], ...] begins behind batch 9"]),
        ({**FORK, "changes": [{"training.skip": [[2, 5]]}]}, ["does not agree with what the 10 steps before"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    changes: dict[str, Any], messages: list[str], base: RunConfig, write: Write
) -> None:
    told = refused(write(**changes), base)
    for message in messages:
        assert message in told


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ('{"prompt": "a", "references": []}', "line 1: references=[] is not a list of at least 1 text"),
        ('{"prompt": "a"}', "line 1: references is missing"),
        ("", "holds no items"),
    ],
)
def test_task_with_missing_references_or_items_is_refused(
    item: str, message: str, base: RunConfig, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("kind: bleu\ndata: mine.jsonl\n")
    (tmp_path / "mine.jsonl").write_text(item)
    assert message in refused(write(tasks=["mine.yaml"], target="mine.bleu >= 20"), base)


def test_item_that_does_not_fit_an_attempts_model_is_refused(base: RunConfig, write: Write, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("kind: choices\ndata: mine.jsonl\n")
    item = {"context": "a", "choices": ["b", "one two three four five six seven eight nine ten " * 2], "answer": 0}
    (tmp_path / "mine.jsonl").write_text(json.dumps(item))
    long = ("model.max_tokens=256",)
    Experiment.open(write(tasks=["mine.yaml"], target="mine.accuracy >= 0.5", set_=long))
    plan = write(tasks=["mine.yaml"], target="mine.accuracy >= 0.5", changes=[{"model.max_tokens": 32}], set_=long)
    told = refused(plan, base)
    assert told.startswith("attempt 1 (model.max_tokens=32): ") and "the model's context is 32" in told
    told = refused(write(tasks=["mine.yaml"], target="mine.accuracy >= 0.5"), base)
    assert told.startswith("attempt 0 (the base): ")


def test_task_that_an_attempts_objective_cannot_answer_is_refused(
    base: RunConfig, write: Write, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("kind: bleu\ndata: mine.jsonl\n")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "a", "references": ["b"]}')
    plan = write(tasks=["mine.yaml"], target="mine.bleu >= 20", changes=[{"objective.name": "masked"}])
    told = refused(plan, base)
    assert told.startswith("attempt 1 (objective.name=masked): ")
    assert "takes a model with objective.name causal" in told


def test_corpus_without_held_out_text_is_refused(base: RunConfig, write: Write, other_corpus: str) -> None:
    told = refused(write(set_=(f"data.tokens={other_corpus}", "data.manifest=null", "data.window_blocks=null")), base)
    assert "the corpus holds 0 tokens out" in told


def test_corpus_of_another_tokenizer_is_refused_unless_bytes_are_counted(
    base: RunConfig, tmp_path: Path, other_corpus: str
) -> None:
    changes = [{"data.tokens": other_corpus}]
    with pytest.raises(ConfigError, match="was made with another tokenizer .* so perplexity would not compare"):
        loop_of(base, plan_of(changes=changes), FakeTrainer())
    trainer = FakeTrainer()
    trainer.figures = ("bits_per_byte",)
    loop_of(base, plan_of(changes=changes, target="bits_per_byte < 1"), trainer)
    with pytest.raises(ConfigError, match="attempt 1 .*, as a fork of lower-00: .*another tokenizer"):
        loop_of(base, plan_of(changes=changes, target="bits_per_byte < 1", parent="base", steps=5), trainer)


def test_name_of_a_run_that_is_not_the_experiments_is_refused(base: RunConfig, write: Write) -> None:
    Storage.open(base.storage).child("runs/plan-01").write("config.yaml", b"")
    with pytest.raises(ConfigError, match=r"runs/plan-01 holds a run already, and it is not this experiment's"):
        Experiment.open(write())
    assert Storage.open(base.storage).list() == ["runs/plan-01/config.yaml"]


@pytest.mark.parametrize("change", ["training.on_nonfinite=skip", "spikes.policy=stop"])
def test_policies_make_other_attempts_and_other_experiments(change: str, base: RunConfig) -> None:
    field, _, value = change.partition("=")
    loop = loop_of(base, plan_of(grid={field: [value]}), FakeTrainer())
    assert [attempt.same_as for attempt in loop.attempts] == [None, None]
    carried_out(base, plan_of(), FakeTrainer())
    with pytest.raises(ConfigError, match=rf"base.{field}: \w+ -> {value}"):
        loop_of(base.replace(change), plan_of(), FakeTrainer())


def test_choices_about_spikes_that_nobody_looks_for_make_no_other_attempt(base: RunConfig) -> None:
    with pytest.raises(ConfigError, match="would repeat attempt 0"):
        loop_of(base, plan_of(changes=[{"spikes.loss_z": 9.0}]), FakeTrainer())


def test_corpus_that_was_replaced_is_refused(base: RunConfig, tmp_path: Path, other_corpus: str) -> None:
    shutil.copytree(base.data.tokens.removeprefix("file://"), tmp_path / "mine")
    mine = base.replace(f"data.tokens={tmp_path}/mine")
    trainer = FakeTrainer(verdicts={"lower-01": ["stopped"]})
    carried_out(mine, plan_of(), trainer)
    shutil.move(tmp_path / "mine", tmp_path / "moved")
    assert loop_of(
        mine.replace(f"data.tokens={tmp_path}/moved"), plan_of(), trainer
    ).attempts  # it may have another place
    shutil.copytree(other_corpus.removeprefix("file://"), tmp_path / "mine")
    with pytest.raises(ConfigError, match=r"base.data.manifest: \w+ -> \w+ \(the corpus at data.tokens is not the one"):
        loop_of(mine, plan_of(), trainer)


def test_corpus_that_is_replaced_while_attempts_are_made_ends_the_loop(
    base: RunConfig, tmp_path: Path, other_corpus: str
) -> None:
    shutil.copytree(base.data.tokens.removeprefix("file://"), tmp_path / "mine")

    def score(config: RunConfig) -> float:
        shutil.rmtree(tmp_path / "mine")
        shutil.copytree(other_corpus.removeprefix("file://"), tmp_path / "mine")
        return 50.0

    with pytest.raises(ConfigError, match=r"data.manifest=\w+ is not the corpus at data.tokens="):
        carried_out(base.replace(f"data.tokens={tmp_path}/mine"), plan_of(), FakeTrainer(score))


def test_combination_that_is_the_base_is_not_made_again(base: RunConfig) -> None:
    grid = {"optimizer.learning_rate": [3e-4, 1e-2], "model.dropout": [0.0, 0.1]}
    trainer = FakeTrainer()
    result = carried_out(base, plan_of(grid=grid, target="perplexity < 1"), trainer)
    assert [attempt.state for attempt in result.attempts] == ["done", "as attempt 0", "done", "done", "done"]
    assert trainer.begun == ["lower-00", "lower-02", "lower-03", "lower-04"]


def test_attempt_that_is_asked_another_thing_is_noted(base: RunConfig) -> None:
    loop = loop_of(base, plan_of(changes=[{"batch.sequence_length": 16}, {"model.dropout": 0.1}]), FakeTrainer())
    notes = [prospect.note for prospect in loop.rehearsal.prospects]
    assert notes[0] is None and notes[2] is None
    assert notes[1] is not None and "its held_out is not the base's" in notes[1]


@pytest.mark.parametrize(
    ("checkpoint", "begins_at", "kept"),
    [
        ({}, 0, [10]),
        ({"every_steps": 3}, 0, [9, 10]),
        ({"every_steps": 3, "keep": 3}, 0, [6, 9, 10]),
        ({"every_steps": 5, "keep": 9}, 0, [5, 10]),
        ({"every_steps": 3, "keep": 1, "keep_every": 3}, 0, [3, 6, 9, 10]),
        ({"every_steps": 3}, 8, [9, 10]),
        ({"every_steps": 5}, 8, [8, 10]),  # a fork has its parent's
        (  # that of step 4 is old enough to go back to, and that of step 6 is the next one
            {"every_steps": 2, "spikes.policy": "rewind", "spikes.rewind_steps": 4, "spikes.steps_in_a_row": 1},
            0,
            [4, 6, 8, 10],
        ),
        ({"every_steps": 2, "keep": 2, "keep_best": 3}, 0, [8, 10]),  # which are the best is not known
    ],
)
def test_checkpoints_that_a_run_will_have(
    checkpoint: dict[str, Any], begins_at: int, kept: list[int], base: RunConfig
) -> None:
    overrides = [f"{name if '.' in name else f'checkpoint.{name}'}={value}" for name, value in checkpoint.items()]
    assert kept_steps(base.replace(*overrides), begins_at) == kept
