"""`elastic-lm config`: what is printed is a config again, mistakes are all told, and an editor gets every field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from elastic_lm import RunConfig, config_text
from elastic_lm.config_schema import schema
from elastic_lm.model.presets import PRESETS
from tests.test_cli import run, write_config
from tests.test_cli_run import stored
from tests.test_config import FACTORY, FIELDS, LEAVES, SMALLEST, Row

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
CHANGES = {
    "none": [],
    "of every kind": [
        "optimizer.betas=[0.5, 0.6]",
        "workers.max=4",
        "workers.resources={rack: 1}",
        "metrics.port=null",
    ],
    "factory": [FACTORY],
}
# Not `jsonschema.validate`, which would check the schema, too, each time: for 80 ms.
VALIDATOR = jsonschema.Draft202012Validator(schema())


def overrides(changes: list[str]) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


# -- show ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--changed"]], ids=["all", "changed"])
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_shown_config_is_a_config_that_means_the_same(changes: list[str], options: list[str], tmp_path: Path) -> None:
    file = write_config(tmp_path)
    told = run("config", "show", file, *overrides(changes), *options)
    assert told.exit_code == 0, told.stderr
    (tmp_path / "shown.yaml").write_text(told.stdout)
    assert RunConfig.load(tmp_path / "shown.yaml") == RunConfig.load(file, changes)


def test_shown_config_has_every_field(tmp_path: Path) -> None:
    shown = yaml.safe_load(run("config", "show", write_config(tmp_path)).stdout)
    for name in LEAVES:
        value = shown
        for part in name.split("."):
            assert part in value, name
            value = value[part]


def test_changed_fields_are_those_that_are_required_or_differ_from_the_defaults(tmp_path: Path) -> None:
    changes = ["workers.max=4", "workers.min=1", "checkpoint.keep=2", "reduction.kind=fast"]  # two of them are defaults
    shown = yaml.safe_load(run("config", "show", write_config(tmp_path), "--changed", *overrides(changes)).stdout)
    assert shown == {
        "name": "first", "storage": f"file://{tmp_path}", "data": {"tokens": f"file://{tmp_path}/tokens"},
        "model": {"preset": "tiny"}, "batch": {"micro_batches": 8, "micro_batch_size": 2, "sequence_length": 16},
        "training": {"steps": 100}, "workers": {"max": 4}, "reduction": {"kind": "fast"},
    }  # fmt: skip


def test_derived_values_stand_at_the_end(tmp_path: Path) -> None:
    lines = run("config", "show", write_config(tmp_path, workers={"num_gpus": 1})).stdout.splitlines()
    derived = dict(line[1:].strip().split("  ", 1) for line in lines[lines.index("# What follows from it:") + 1 :])
    found = {name: value.strip() for name, value in derived.items()}
    assert found["run folder"] == f"file://{tmp_path}/runs/first"
    assert found["tokens per step"] == "256"
    assert found["tokens in all"] == "25,600"
    assert found["context tokens"] == "16"
    assert found["schedule steps"] == "100"
    assert found["device"] == "cuda"
    assert found["model.width"] == "64"
    assert found["model.hidden"] == "176"  # 8/3 x 64 rounded up to a multiple of 16
    assert found["model.tied"] == "true"


def test_programs_get_config_and_derived_values(tmp_path: Path) -> None:
    file = write_config(tmp_path)
    told = json.loads(run("config", "show", file, "--json").stdout)
    config = RunConfig.load(file)
    assert RunConfig(**told["config"]) == config
    assert told["derived"]["fingerprint"] == config.identity_fingerprint()
    assert told["derived"]["tokens_in_all"] == 25_600
    assert told["derived"]["model"]["num_layers"] == PRESETS["tiny"].shape["num_layers"]
    assert "workers" not in json.loads(run("config", "show", file, "--json", "--changed").stdout)["config"]


def test_run_is_shown_as_it_was_last_trained(tmp_path: Path) -> None:
    _, url = stored(tmp_path)  # with other steps than in its file
    assert yaml.safe_load(run("config", "show", url).stdout)["training"]["steps"] == 77
    assert yaml.safe_load(run("config", "show", f"{tmp_path}/run.yaml").stdout)["training"]["steps"] == 100


@pytest.mark.parametrize(("run_", "words"), [("nowhere/runs/x", "there is no run at"), ("no.yaml", "no.yaml: No such")])
def test_config_that_is_not_there_cannot_be_shown(run_: str, words: str, tmp_path: Path) -> None:
    told = run("config", "show", f"{tmp_path}/{run_}")
    assert (told.exit_code, told.stdout) == (2, "")
    assert words in told.stderr


# -- validate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_valid_config_is_called_so_and_described(path: Path) -> None:
    told = run("config", "validate", str(path))
    assert told.exit_code == 0
    assert told.stdout == f"{path} is valid.\n{RunConfig.load(path).describe()}\n"


@pytest.mark.parametrize(
    ("changes", "starts"),
    [
        (["training.steps=0", "nmae=x"], ["elastic-lm: training.steps=0 ", "nmae is not a field"]),
        (["workers.min=9", "workers.max=2"], ["elastic-lm: workers.min=9 is more than workers.max=2"]),
        (["schedule.decay_steps=1", "workers.max=99"], ["elastic-lm: schedule.decay_steps=1 ", "workers.max=99 "]),
    ],
)
def test_every_mistake_is_told_and_the_code_is_2(changes: list[str], starts: list[str], tmp_path: Path) -> None:
    told = run("config", "validate", write_config(tmp_path), *overrides(changes))
    assert (told.exit_code, told.stdout) == (2, "")
    lines = told.stderr.splitlines()
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True)), lines


@pytest.mark.parametrize("command", ["shwo", "vaildate", "shema"])
def test_mistyped_command_is_answered_with_the_nearest(command: str) -> None:
    told = run("config", command)
    assert told.exit_code == 2
    assert {"shwo": "show", "vaildate": "validate", "shema": "schema"}[command] in told.stderr.partition(
        "Did you mean"
    )[2]


# -- schema ----------------------------------------------------------------------------------------------------------


def properties(node: Any) -> list[tuple[str, dict[str, Any]]]:
    """Every property of every section in the schema."""
    if isinstance(node, list):
        return [found for item in node for found in properties(item)]
    if not isinstance(node, dict):
        return []
    mine = node["properties"].items() if isinstance(node.get("properties"), dict) else ()
    return [*mine, *(found for value in node.values() for found in properties(value))]


def test_printed_schema_names_its_dialect_and_is_valid_in_it() -> None:
    printed = json.loads(run("config", "schema").stdout)
    assert printed == schema()
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert printed["title"] == "elastic-lm run"
    jsonschema.Draft202012Validator.check_schema(printed)


def test_every_field_of_the_schema_has_its_meaning() -> None:
    whole = schema()
    found = properties(whole)
    assert {name.rpartition(".")[2] for name in LEAVES} <= {name for name, _ in found}
    assert not [name for name, field in found if not meaning(field, whole)]


def meaning(field: dict[str, Any], whole: dict[str, Any]) -> str:
    """Its own description, or that of the section it refers to, which is left out beside the reference when equal."""
    section = whole["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
    return str(field.get("description") or section.get("description", "")).strip()


def test_meanings_are_in_yamls_words_and_in_one_line() -> None:
    text = json.dumps(schema())
    assert "null: only at the end." in text
    assert "None" not in text and "\\n" not in text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_schema_accepts_what_is_a_config(path: Path) -> None:
    VALIDATOR.validate(yaml.safe_load(path.read_text()))


# These break rules that are code; and 2.0 is an integer to JSON Schema.
NOT_IN_THE_SCHEMA = {
    "storage",
    "data.tokens",
    "model.preset",
    "model.factory",
    "model.init",
    "objective.name",
    "tracking.folder",
    "checkpoint.fallback",
    "metrics.tls_certificate",
    "metrics.tls_key",
    "batch.micro_batch_size",
}


@pytest.mark.parametrize(
    "row", [row for row in FIELDS if row.field not in NOT_IN_THE_SCHEMA], ids=lambda row: row.field
)
def test_schema_refuses_what_a_rule_of_one_field_refuses(row: Row) -> None:
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(config_text.override(SMALLEST, [f"{row.field}={row.bad}"]))


@pytest.mark.parametrize("name", ["nmae", "training.step", "optimizer.lr"])
def test_schema_refuses_unknown_fields(name: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        VALIDATOR.validate(config_text.override(SMALLEST, [f"{name}=1"]))
