"""plan.yaml: what is read from it, in which order attempts follow, and what each mistake is told as."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lm.config_text import beside, override
from elastic_lm.errors import ConfigError
from elastic_lm.experiment.plan import Plan, Planned
from elastic_lm.storage import Storage
from tests.experiment.trainers import plan_of


def written(folder: Path, **changes: Any) -> Path:
    values = {
        "name": "lower",
        "base": "run.yaml",
        "target": "perplexity <= 30",
        "changes": [{"optimizer.learning_rate": 0.001}],
    }
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump({name: value for name, value in {**values, **changes}.items() if value is not None}))
    return file


def test_plan_is_read_whole(tmp_path: Path) -> None:
    plan = Plan.load(written(tmp_path, tasks=["held_out", "tasks/capitals.yaml"], budget={"tokens": 2e9, "hours": 12}))
    assert plan.base == f"{tmp_path}/run.yaml"
    assert plan.tasks == ("held_out", f"{tmp_path}/tasks/capitals.yaml")
    assert (plan.budget.tokens, plan.budget.hours, plan.budget.attempts) == (2e9, 12, None)
    assert str(plan.wanted) == "held_out.perplexity <= 30"
    assert not plan.forks


def test_numbers_of_a_plan_are_those_of_a_config(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(
        "name: a\nbase: b\ntarget: loss <= 3\nbudget: {tokens: 1e9, hours: 2}\nchanges: [{optimizer.learning_rate: 3e-4}]\n"
    )
    plan = Plan.load(tmp_path / "plan.yaml")
    assert plan.budget.tokens == 1e9
    assert plan.attempts()[1].changes == {"optimizer.learning_rate": 3e-4}


def test_changes_come_in_their_order_behind_the_base() -> None:
    plan = plan_of(
        parent="best",
        steps=50,
        changes=[
            {"optimizer": {"learning_rate": 0.1, "eps": 1e-6}},
            {"steps": 7, "skip": [[5, 9]]},
            {"training.steps": 90},
        ],
    )
    base, nested, special, absolute = plan.attempts()
    assert (base.number, base.changes, base.told) == (0, {}, "the base")
    assert nested.changes == {"optimizer.learning_rate": 0.1, "optimizer.eps": 1e-6}
    assert (nested.steps, special.steps, absolute.steps) == (50, 7, None)
    assert (special.changes, special.skip, special.told) == ({}, ((5, 9),), "skip 5:9")
    assert nested.overrides == ["optimizer.learning_rate=0.1", "optimizer.eps=1e-06"]


@pytest.mark.parametrize(
    "text",
    [
        "x\U0001f600",
        "\U0010ffff\U00010000",
        "caf\xe9 \u4e16",
        "a\x85b\u2028c\u2029d",  # what YAML takes for ends of lines
        "\x00\x07\x1b\x7f\x80\x9f\ufeff\ufffe\uffff",  # what it does not take
        "\\ud83d\\ude00 \\U0001f600",  # no escapes, but words
        'a: "b" # c\n\t',
    ],
)
def test_text_is_read_as_it_was_written(text: str) -> None:
    planned = Planned(1, {"tracking.wandb_project": text, "model.args": [text, 1e-6]})
    read = override({}, planned.overrides)
    assert read == {"tracking": {"wandb_project": text}, "model": {"args": [text, 1e-6]}}


def test_grid_is_all_combinations_the_last_field_fastest() -> None:
    grid = {"optimizer.learning_rate": [0.1, 0.2], "model.dropout": [0.0, 0.1, 0.2]}
    told = [tuple(each.changes.values()) for each in plan_of(grid=grid).attempts()[1:]]
    assert told == [(0.1, 0.0), (0.1, 0.1), (0.1, 0.2), (0.2, 0.0), (0.2, 0.1), (0.2, 0.2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name is missing; add it"),
        ({"name": "a/b"}, "name='a/b' should match pattern"),
        ({"targt": "x"}, r"targt is not a field of a plan \(did you mean target\?\)"),
        ({"target": "perplexity = 30"}, "is no target"),
        ({"parent": "beast"}, "parent='beast' should be scratch, best, last or base"),
        ({"budget": {"tokns": 3}}, r"budget.tokns is not a field of a plan \(did you mean tokens\?\)"),
        ({"budget": {"tokens": 0}}, "budget.tokens=0 should be greater than 0"),
        ({"budget": {"hours": float("nan")}}, "budget.hours=nan is not a finite number"),
        ({"budget": {"attempts": 0}}, "budget.attempts=0"),
        ({"changes": None}, "neither changes nor a grid is given"),
        ({"grid": {"model.dropout": [0.1]}}, "both changes and grid are given"),
        ({"changes": None, "grid": {"model.dropout": []}}, "model.dropout has no values"),
        (
            {"changes": None, "grid": {"model.dropout": [0.1] * 40, "training.seed": [*range(26)]}},
            "the plan has 1,040 attempts, and may have 1,000",
        ),
        ({"changes": [{"name": "mine"}]}, "attempt 1 changes name"),
        ({"changes": [{}, {"storage": "s3://b"}]}, "attempt 2 changes storage"),
        ({"changes": [{"steps": 5}]}, "steps of an attempt count for forks, and parent: scratch makes none"),
        ({"parent_step": 5, "steps": 3}, "parent_step and steps count for forks"),
        ({"parent": "best", "changes": [{"steps": 0}]}, "attempt 1: steps=0 is no number of steps"),
        ({"parent": "best", "changes": [{"steps": 5, "training.steps": 9}]}, "both steps and training.steps"),
        ({"changes": [{"skip": [[9, 5]]}]}, "is no list of ranges of batches"),
        ({"changes": [{"skip": 5}]}, "is no list of ranges of batches"),
        ({"tasks": []}, "tasks="),
        ({"changes": [5]}, "changes.0=5 is not a section"),
        (
            {"changes": [{"model.dropout": datetime.date(2024, 1, 1)}]},
            r"attempt 1: 'model.dropout'=datetime.date\(2024",
        ),
        ({"changes": [{}, {"model.preset": b"x"}]}, "attempt 2: 'model.preset'=b'x' is no value that is kept"),
        ({"changes": None, "grid": {"model.dropout": [{1, 2}]}}, "attempt 1: 'model.dropout'={1, 2} is no value"),
        ({"changes": [{"optimizer.clip_norm": math.inf}]}, "attempt 1: 'optimizer.clip_norm'=inf is no value"),
        ({"changes": [{"optimizer.clip_norm": [math.nan]}]}, r"'optimizer.clip_norm'=\[nan\] is no value"),
        ({"changes": [{"model.preset": "\ud800"}]}, r"'model.preset'='\\ud800' is no value"),
        (
            {"changes": [{"optimizer.eps": 1, "optimizer": {"eps": 2}}]},
            "attempt 1 gives optimizer.eps twice; leave one out",
        ),
        (
            {"changes": [{"optimizer.eps": 1, "optimizer.eps ": 2}]},
            "attempt 1: 'optimizer.eps ' is no field's name; write it without = and without spaces around it",
        ),
        ({"parent": "best", "changes": [{"steps": 5, " training.steps": 9}]}, "' training.steps' is no field's name"),
        ({"parent": "best", "changes": [{"steps": 5, "training.steps=9 #": 9}]}, "'training.steps=9 #' is no field's"),
        ({"changes": [{"training": {"steps\u2003": 9}}]}, r"'training.steps\\u2003' is no field's name"),
        ({"changes": [{" name": "mine"}]}, "' name' is no field's name"),
        ({"changes": None, "grid": {"optimizer.eps ": [1]}}, "attempt 1: 'optimizer.eps ' is no field's name"),
    ],
)
def test_mistake_in_a_plan_is_told_with_its_file(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = written(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as told:
        Plan.load(file)
    assert str(told.value).startswith(f"{file}: ")


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "1: 2"])
def test_file_that_is_no_plan_is_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is no plan; write name:, base:, target: and changes:"):
        Plan.load(tmp_path / "plan.yaml")


def test_plan_and_base_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the plan"):
        Plan.load(tmp_path / "plan.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the base config .*/run.yaml"):
        Plan.load(written(tmp_path)).base_config()
    with pytest.raises(ConfigError, match=r"the plan file://.*/no.yaml is not there"):
        Plan.load(f"file://{tmp_path}/no.yaml")


def test_plan_may_be_an_object_in_storage(tmp_path: Path) -> None:
    written(tmp_path)
    Storage.open(str(tmp_path)).write("run.yaml", b"name: x")
    plan = Plan.load(f"file://{tmp_path}/plan.yaml")
    assert plan.base == f"file://{tmp_path}/run.yaml"
    with pytest.raises(ConfigError, match="storage is missing"):
        plan.base_config()


@pytest.mark.parametrize(
    ("plan", "address", "meant"),
    [
        ("plan.yaml", "run.yaml", "run.yaml"),
        ("plans/a.yaml", "../run.yaml", "plans/../run.yaml"),
        ("plans/a.yaml", "/runs/b.yaml", "/runs/b.yaml"),
        ("s3://bucket/plans/a.yaml", "run.yaml", "s3://bucket/plans/run.yaml"),
        ("s3://bucket/plans/a.yaml", "../run.yaml", "s3://bucket/run.yaml"),
        ("file:///x/plans/a.yaml", "../run.yaml", "file:///x/plans/../run.yaml"),
        ("/plans/a.yaml", "s3://bucket/run.yaml", "s3://bucket/run.yaml"),
    ],
)
def test_relative_address_is_beside_the_plan(plan: str, address: str, meant: str) -> None:
    assert beside(plan, address) == meant
