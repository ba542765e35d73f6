"""Configuration: every rule refuses with field, value, rule and remedy; text goes in and out unchanged; identity is exact.

`FIELDS` has a row for every field there is (a test says so): a value that is refused and how, a value that is accepted
instead of the base's, and whether that changes the bits of a run.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from elastic_lm import config_text
from elastic_lm.config import BatchConfig, ControlConfig, DataConfig, ModelConfig, RunConfig, TrainingConfig
from elastic_lm.control.spec import ControlSpec
from elastic_lm.engine.spec import EngineSpec, FactorySpec, MaskingSpec, OptimizerSpec, ScheduleSpec
from elastic_lm.errors import ConfigError
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec

MANIFEST = "0123456789abcdef" * 4
SMALLEST: dict[str, Any] = {
    "name": "first",
    "storage": "/srv/runs",
    "data": {"tokens": "/srv/tokens"},
    "model": {"preset": "tiny"},
    "batch": {"micro_batches": 8, "micro_batch_size": 2, "sequence_length": 16},
    "training": {"steps": 100},
}
# With what would otherwise follow from another field spelled out, so that each field can be looked at alone.
SETTLED: dict[str, Any] = {
    **SMALLEST,
    "data": {"tokens": "/srv/tokens", "manifest": MANIFEST},
    "model": {"preset": "tiny", "max_tokens": 32},
    "schedule": {"total_steps": 50},
    "workers": {"max": 4},
}
FACTORY = "model={factory: 'pack.age:build', args: {depth: 2}}"


def config(*overrides: str, base: dict[str, Any] = SMALLEST) -> RunConfig:
    return RunConfig(**config_text.override(base, overrides))


def refusal(*overrides: str, base: dict[str, Any] = SMALLEST) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*overrides, base=base)
    return str(caught.value)


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Every field that holds a value, by its dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaves(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


LEAVES = leaves()


def kinds(annotation: Any) -> set[Any]:
    """`X | None` and `Annotated[X, ...]` as the X that they are about."""
    if get_origin(annotation) is Annotated:
        return kinds(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*(kinds(part) for part in get_args(annotation)))
    return {annotation}


def value_of(settings: Any, field: str) -> Any:
    for name in field.split("."):
        settings = getattr(settings, name)
    return settings


@dataclass(frozen=True)
class Row:
    """`bad` and `other` as they are written after `field=`; `shown` is `bad` as the message shows it."""

    field: str
    bad: str
    shown: str
    rule: str
    other: str | None  # None: there is no other value
    identity: bool
    under: tuple[str, ...] = ()  # what has to be set for `other` to be allowed


def number(field: str, bad: str, rule: str, other: str, *, identity: bool = False, **more: Any) -> Row:
    return Row(field, bad, bad, rule, other, identity, **more)


NOT_BELOW_0 = "should be greater than or equal to 0"
NOT_BELOW_1 = "should be greater than or equal to 1"
ABOVE_0 = "should be greater than 0"
NOT_ABOVE_1 = "should be less than or equal to 1"
NO_LIST = "is not a list"
MASKED, OWN = "objective.name=masked", "objective.name=a.b:c"
NO_PATH = "is not an import path; write package.module:function"

FIELDS = (
    Row("name", "-a", "'-a'", "should match pattern", "second", False),
    Row("storage", "gs://a/b", "'gs://a/b'", "has the unknown scheme gs://; write s3://bucket/prefix", "/other", False),
    Row("data.tokens", "s3://", "'s3://'", "names no bucket; write s3://bucket/prefix", "/other", False),
    Row("data.manifest", "ABC", "'ABC'", "should match pattern", "fedcba9876543210", True),
    number("data.window_blocks", "0", NOT_BELOW_1, "3", identity=True),
    number("data.readers", "1025", "should be less than or equal to 1024", "3"),
    number("data.reader_num_cpus", "-0.5", NOT_BELOW_0, "0.5"),
    number("data.prefetch_windows", "65", "should be less than or equal to 64", "3"),
    number("data.reader_timeout_s", "0", ABOVE_0, "7"),
    number("data.storage_timeout_s", "0", ABOVE_0, "7200"),
    Row("model.preset", "tinny", "'tinny'", "is unknown (did you mean tiny?); known: tiny, mini,", "mini", True),
    number("model.num_layers", "0", NOT_BELOW_1, "3", identity=True),
    number("model.num_heads", "0", NOT_BELOW_1, "2", identity=True),
    number("model.width", "0", NOT_BELOW_1, "128", identity=True),
    number("model.hidden", "0", NOT_BELOW_1, "96", identity=True),
    Row("model.position", "alibi", "'alibi'", "should be learned, sinusoidal or rotary", "learned", True),
    Row("model.norm", "batch", "'batch'", "should be rmsnorm or layernorm", "layernorm", True),
    Row("model.activation", "relu", "'relu'", "should be swiglu, gelu or gelu_erf", "gelu", True),
    Row("model.tied", "1", "1", "is neither true nor false", "false", True),
    Row("model.bias", "'no'", "'no'", "is neither true nor false", "true", True),
    number("model.dropout", "1", "should be less than 1", "0.1", identity=True),
    number("model.max_tokens", "0", NOT_BELOW_1, "64", identity=True),
    number("model.vocab_size", "0", NOT_BELOW_1, "512", identity=True),
    Row("model.factory", "pack.age", "'pack.age'", NO_PATH, "pack.age:other", True, (FACTORY,)),
    Row("model.args", "3", "3", "is not a section; write its fields indented below it", "{depth: 3}", True, (FACTORY,)),
    Row("batch.micro_batches", "0", "0", NOT_BELOW_1, "16", True),
    Row("batch.micro_batch_size", "2.0", "2.0", "is not a whole number", "4", True),
    Row("batch.sequence_length", "16777217", "16777217", "should be less than or equal to 16777216", "8", True),
    number("training.steps", "0", NOT_BELOW_1, "200"),
    number("training.seed", "9223372036854775808", "should be less than 9223372036854775808", "1", identity=True),
    Row("training.precision", "fp8", "'fp8'", "should be fp32, tf32, bf16 or fp16", "bf16", True),
    Row("training.recompute", "1", "1", "is neither true nor false", "true", False),
    Row("training.compile", "1", "1", "is neither true nor false", "true", True),
    Row("training.on_nonfinite", "wait", "'wait'", "should be stop, skip or rewind", "skip", False),
    Row("training.skip", "5", "5", NO_LIST, "[[3, 5]]", True),
    number("model.num_kv_heads", "0", NOT_BELOW_1, "2", identity=True),
    Row("model.qk_norm", "1", "1", "is neither true nor false", "true", True),
    Row("model.norm_placement", "both", "'both'", "should be pre, post or sandwich", "post", True),
    Row("model.embedding_norm", "1", "1", "is neither true nor false", "true", True),
    Row("model.head_transform", "1", "1", "is neither true nor false", "true", True),
    number("model.norm_eps", "0", ABOVE_0, "1e-6", identity=True),
    Row("model.init", "/folder", "'/folder'", "is no hf:FOLDER; write hf:/folder or hf:s3://bucket/prefix", "hf:/other", True),
    Row("model.init_hash", "abc", "'abc'", "should match pattern", "a" * 64, True, ("model.init=hf:/folder",)),
    Row("model.attention", "both", "'both'", "should be causal or bidirectional", "bidirectional", True, (OWN,)),
    number("model.rope_theta", "1", "should be greater than 1", "50000", identity=True),
    Row("model.rope_scaling", "ntk", "'ntk'", "should be linear, yarn or llama3", "yarn", True,
        ("model.rope_scaling=llama3", "model.rope_factor=8", "model.rope_original_tokens=512")),
    number("model.rope_factor", "0", NOT_BELOW_1, "16", identity=True,
           under=("model.rope_scaling=linear", "model.rope_factor=8")),
    number("model.rope_original_tokens", "0", NOT_BELOW_1, "1024", identity=True,
           under=("model.rope_scaling=llama3", "model.rope_factor=8", "model.rope_original_tokens=512")),
    Row("model.document_masking", "1", "1", "is neither true nor false", "true", True),
    number("objective.z_loss", "-1", NOT_BELOW_0, "1e-4", identity=True),
    Row("objective.name", "mask", "'mask'", f"is neither causal nor masked nor {NO_PATH[7:]}", "pack.age:loss", True),
    number("objective.mask_ratio", "0", ABOVE_0, "0.2", identity=True, under=(MASKED,)),
    Row("optimizer.kind", "sgd", "'sgd'", "should be adamw or muon", "muon", True),
    number("optimizer.momentum", "1", "should be less than 1", "0.8", identity=True, under=("optimizer.kind=muon",)),
    number("optimizer.learning_rate", "0", ABOVE_0, "1e-3", identity=True),
    Row("optimizer.betas", "0.9", "0.9", NO_LIST, "[0.9, 0.99]", True),
    number("optimizer.eps", "0", ABOVE_0, "1e-6", identity=True),
    number("optimizer.weight_decay", "-0.1", NOT_BELOW_0, "0.2", identity=True),
    number("optimizer.clip_norm", "0", ABOVE_0, "2", identity=True),
    Row("schedule.kind", "linear", "'linear'", "should be cosine, wsd or constant", "constant", True),
    number("schedule.warmup_steps", "-1", NOT_BELOW_0, "5", identity=True),
    number("schedule.decay_steps", "-1", NOT_BELOW_0, "6", identity=True,
           under=("schedule.kind=wsd", "schedule.decay_steps=5")),
    number("schedule.final_ratio", "1.5", NOT_ABOVE_1, "0.2", identity=True),
    number("schedule.total_steps", "0", NOT_BELOW_1, "60", identity=True),
    Row("reduction.kind", "slow", "'slow'", "should be exact or fast", "fast", True),
    number("workers.min", "0", NOT_BELOW_1, "2"),
    number("workers.max", "0", NOT_BELOW_1, "3"),
    number("workers.num_cpus", "-1", NOT_BELOW_0, "2"),
    number("workers.num_gpus", "-1", NOT_BELOW_0, "1"),
    Row("workers.resources", "gpu", "'gpu'", "is not a section; write its fields indented below it", "{rack: 1}", False),
    number("workers.threads", "1025", "should be less than or equal to 1024", "2"),
    Row("workers.device", "tpu", "'tpu'", "should be auto, cpu or cuda", "cpu", False),
    Row("workers.collectives", "mpi", "'mpi'", "should be auto, gloo or nccl", "gloo", False),
    number("checkpoint.every_steps", "0", NOT_BELOW_1, "10"),
    number("checkpoint.timeout_s", "0", ABOVE_0, "60"),
    number("evaluation.every", "0", NOT_BELOW_1, "10"),
    number("evaluation.samples", "0", NOT_BELOW_1, "100"),
    Row("spikes.policy", "wait", "'wait'", "should be ignore, stop, skip or rewind", "stop", False),
    number("spikes.window_steps", "19", "should be greater than or equal to 20", "50"),
    number("spikes.loss_z", "0", ABOVE_0, "5"),
    number("spikes.gradient_z", "0", ABOVE_0, "5"),
    number("spikes.steps_in_a_row", "0", NOT_BELOW_1, "2"),
    number("spikes.rewind_steps", "5001", "should be less than or equal to 5000", "50"),
    number("spikes.skip_batches", "0", NOT_BELOW_1, "200"),
    number("spikes.max_rewinds", "0", NOT_BELOW_1, "2"),
    number("spikes.accept_until", "0", NOT_BELOW_1, "103"),
    Row("checkpoint.fallback", "s3://a/b", "'s3://a/b'", "is no folder of a machine; write /folder", "/spare", False),
    number("checkpoint.keep", "0", NOT_BELOW_1, "3"),
    number("checkpoint.keep_best", "-1", NOT_BELOW_0, "2", under=("checkpoint.every_steps=10",)),
    number("checkpoint.keep_every", "0", NOT_BELOW_1, "20", under=("checkpoint.every_steps=10",)),
    number("control.heartbeat_interval_s", "0", ABOVE_0, "0.1"),
    number("control.heartbeat_timeout_s", "0", ABOVE_0, "2"),
    number("control.lost_connection_grace_s", "0", ABOVE_0, "0.2"),
    number("control.progress_timeout_s", "0", ABOVE_0, "61"),
    number("control.start_timeout_s", "0", ABOVE_0, "121"),
    number("control.form_timeout_s", "0", ABOVE_0, "11"),
    number("control.retire_timeout_s", "0", ABOVE_0, "6"),
    number("control.orphaned_after_s", "14.9", "should be greater than or equal to 15", "61"),
    number("control.join_batch_s", "0", ABOVE_0, "0.3"),
    number("control.lease_steps", "0", NOT_BELOW_1, "7"),
    number("control.backoff_base_s", "0", ABOVE_0, "1.5"),
    number("control.backoff_limit_s", "10000001.0", "should be less than or equal to 10000000", "62"),
    number("control.quarantine_failures", "0", NOT_BELOW_1, "5"),
    number("control.quarantine_window_s", "0", ABOVE_0, "63"),
    number("control.straggler_factor", "1", "should be greater than 1", "1.75"),
    number("control.rebalance_gain", "-0.1", NOT_BELOW_0, "0.3"),
    number("control.rebalance_every_s", "0", ABOVE_0, "31"),
    number("control.same_error_limit", "0", NOT_BELOW_1, "3"),
    number("metrics.port", "65536", "should be less than or equal to 65535", "9500"),
    Row("metrics.host", "0", "0", "is not text; put quotes around it", "0.0.0.0", False),
    Row("metrics.tls_certificate", "s3://b/tls.crt", "'s3://b/tls.crt'", "is no folder of a machine", "/tls.crt", False,
        ("metrics.tls_certificate=/1.crt", "metrics.tls_key=/1.key")),
    Row("metrics.tls_key", "s3://b/tls.key", "'s3://b/tls.key'", "is no folder of a machine", "/tls.key", False,
        ("metrics.tls_certificate=/1.crt", "metrics.tls_key=/1.key")),
    number("metrics.interval_s", "0", ABOVE_0, "6"),
    Row("tracking.tensorboard", "1", "1", "is neither true nor false", "true", False),
    Row("tracking.wandb_project", "a/b", "'a/b'", "should match pattern", "mine", False),
    Row("tracking.wandb_entity", "a b", "'a b'", "should match pattern", "team", False,
        ("tracking.wandb_project=mine",)),
    Row("tracking.wandb_mode", "disabled", "'disabled'", "should be online or offline", "offline", False),
    Row("tracking.folder", "s3://a/b", "'s3://a/b'", "is no folder of a machine; write /folder", "/tracking", False),
    Row("failpoints", "kill", "'kill'", NO_LIST, "['w1:save@3=kill']", False),
)  # fmt: skip
BY_NAME = {row.field: row for row in FIELDS}
OF_CONTROL = [row for row in FIELDS if row.field.startswith("control.")]


def changed(row: Row) -> tuple[RunConfig, RunConfig]:
    """Before and after `row.field` takes its other value."""
    before = config(*row.under, base=SETTLED)
    return before, before.replace(f"{row.field}={row.other}")


def test_there_is_a_row_for_every_field() -> None:
    assert sorted(row.field for row in FIELDS) == sorted(LEAVES)


# -- rules about one field -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", FIELDS, ids=lambda row: row.field)
def test_value_against_its_rule_is_refused_with_field_value_rule_and_meaning(row: Row) -> None:
    message = refusal(f"{row.field}={row.bad}")
    assert message.startswith(f"{row.field}={row.shown} {row.rule}")
    if row.field != "model.preset":  # it says what is known instead
        assert " ".join((LEAVES[row.field].description or "?").split()) in message
    assert "\n" not in message


@pytest.mark.parametrize("row", [row for row in FIELDS if row.other], ids=lambda row: row.field)
def test_other_value_is_accepted_and_kept(row: Row) -> None:
    before, after = changed(row)
    assert [name for name in LEAVES if value_of(after, name) != value_of(before, name)] == [row.field]


FLOATS = [name for name, field in LEAVES.items() if float in kinds(field.annotation)]
INTEGERS = [name for name, field in LEAVES.items() if int in kinds(field.annotation)]


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_number_that_is_not_finite_is_refused(field: str, value: str) -> None:
    assert refusal(f"{field}={value}").startswith(f"{field}={value.strip('.')} is not a finite number. ")


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", ["'1'", "true"])  # text that looks like a number, and Python's idea of true
def test_what_is_no_number_is_not_taken_for_one(field: str, value: str) -> None:
    assert f"{field}=" in (message := refusal(f"{field}={value}"))
    assert "is not a number. " in message


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", ["'1'", "true", "1.5"])
def test_what_is_no_whole_number_is_not_rounded_or_guessed(field: str, value: str) -> None:
    assert "is not a whole number. " in refusal(f"{field}={value}")


def test_the_kinds_of_number_are_found_by_their_annotations() -> None:
    assert len(FLOATS) > 20
    assert len(INTEGERS) > 20
    assert not set(FLOATS) & set(INTEGERS)


@pytest.mark.parametrize("field", ["training.steps", "batch.micro_batches", "workers.max"])
def test_whole_number_written_as_a_float_is_answered_with_the_integer(field: str) -> None:
    assert refusal(f"{field}=8.0").endswith(f"Write {field.rpartition('.')[2]}: 8")


def with_example() -> list[str]:
    placeholders = {"data.manifest"}  # the hash is not known here
    return [row.field for row in FIELDS if "For example" in refusal(f"{row.field}={row.bad}")
            and row.field not in placeholders]  # fmt: skip


@pytest.mark.parametrize("field", with_example())
def test_example_in_a_refusal_is_accepted_when_it_is_followed(field: str) -> None:
    example = config_text.parse(refusal(f"{field}={BY_NAME[field].bad}").partition("For example ")[2], "the example")
    [(name, value)] = example.items()
    assert name == field.rpartition(".")[2]
    under = BY_NAME[field].under
    assert config(*under, f"{field}={json.dumps(value)}", base={**SMALLEST, "workers": {"max": 8}})


@pytest.mark.parametrize("field", ["name", "storage", "data.tokens", "batch.micro_batches", "training.steps"])
def test_missing_field_is_named_with_meaning_and_example(field: str) -> None:
    values = config_text.override(SMALLEST, [])
    section, name = (values[field.partition(".")[0]], field.partition(".")[2]) if "." in field else (values, field)
    del section[name]
    with pytest.raises(ConfigError) as caught:
        RunConfig(**values)
    message = str(caught.value)
    assert message.startswith(f"{field} is missing; add it. {LEAVES[field].description}"[:60])
    assert f"For example {name}: " in message


def test_every_mistake_is_told_each_on_a_line() -> None:
    lines = refusal("training.steps=0", "batch.micro_batch_size=x", "nmae=b").splitlines()
    assert [line.split("=")[0].split(" ")[0] for line in lines] == ["batch.micro_batch_size", "training.steps", "nmae"]


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("optimizer.betas=[0.9, 2]", "optimizer.betas.1=2 should be less than or equal to 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing"),
        ("training.skip=[[1, x]]", "training.skip.0.1='x' is not a whole number"),
        ("workers.resources={rack: many}", "workers.resources.rack='many' is not a number"),
        ("data=3", "data=3 is not a section; write its fields indented below it. Where tokens come from."),
        ("workers=null", "workers=None is not a section; write its fields indented below it. The elastic set."),
    ],
)
def test_mistake_inside_a_value_is_named_with_its_place(override: str, start: str) -> None:
    assert refusal(override).startswith(start)


@pytest.mark.parametrize(
    "override", ["optimizer.betas=[0.9, 2]", "training.skip=[[1, x]]", "workers.resources={rack: many}"]
)
def test_mistake_inside_a_value_says_what_the_field_means(override: str) -> None:
    field = override.partition("=")[0]
    assert (LEAVES[field].description or "?").split(".")[0] in refusal(override)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gs://a/b", "has the unknown scheme gs://; write s3://bucket/prefix, file:///folder or a folder"),
        ("s3://", "names no bucket; write s3://bucket/prefix"),
        ("s3:///prefix", "names no bucket; write s3://bucket/prefix"),
        ("file://folder", "names no folder"),  # a host, not a folder
        ("/", "names no folder"),
        ('" "', "names no folder"),
        ('"a\\0b"', "names no folder"),
        ("s3://key:word@bucket/a", "may hold credentials (it has an @ or a ?)"),
        ("s3://bucket/a?X-Amz-Signature=word", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
    ],
)
@pytest.mark.parametrize("field", ["storage", "data.tokens"])
def test_address_that_leads_nowhere_or_holds_a_secret_is_refused(field: str, value: str, words: str) -> None:
    message = refusal(f"{field}={value}")
    assert message.startswith(f"{field}=")
    assert words in message
    assert "word@" not in message and "Signature" not in message


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        ("s3://bucket/prefix/", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket"),
        ("file:///srv/a/../b/", "file:///srv/b"),
        ("/srv/a", "file:///srv/a"),
    ],
)
def test_address_is_kept_bare_and_absolute(value: str, kept: str) -> None:
    assert config(f"storage={value}").storage == kept


def test_relative_and_home_folders_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert config("storage=runs", "data.tokens=~/tokens").storage == f"file://{tmp_path}/runs"
    assert config("storage=runs", "data.tokens=~/tokens").data.tokens == "file:///home/somebody/tokens"


# -- rules about several fields --------------------------------------------------------------------------------------

TOGETHER = [
    (
        ["batch.sequence_length=64", "model.max_tokens=32"],
        "batch.sequence_length=64 is longer than the model's context model.max_tokens=32; use at most 32, or raise "
        "model.max_tokens",
    ),
    (["model.width=63"], "model.width=63 is not a multiple of model.num_heads=4; use width 56 or 64"),
    (
        ["model.num_heads=64"],
        "rotary positions need an even head size, and model.width/model.num_heads=1; halve num_heads or use position: "
        "learned",
    ),
    (
        ["model.args={depth: 2}"],
        "model.args are for model.factory, which is not set; set it or remove model.args",
    ),
    (
        ["model.preset=bert-tiny"],
        "objective.name=causal predicts the next token, and with model.preset=bert-tiny (bidirectional) the model sees it; set "
        "objective.name: masked, or model.attention: causal",
    ),
    (
        ["model.attention=causal", MASKED],
        "objective.name=masked predicts tokens from both sides, and with model.attention (causal) the model sees one; set "
        "model.attention: bidirectional, or objective.name: causal",
    ),
    (
        ["model={num_layers: 2, width: 64}"],
        "model.num_heads is missing; set it, or choose model.preset (tiny, mini, 10m, gpt2, gpt2-medium, 1.3b, bert-tiny, "
        "bert-mini, bert-small, bert-base, bert-large), or give model.factory",
    ),
    (
        ["model.factory=pack.age:build"],
        "model.factory builds the whole model, so model.preset has no effect; remove one of the two",
    ),
    (
        [FACTORY, "model.dropout=0.1"],
        "model.factory builds the whole model, so model.dropout has no effect; remove one of the two",
    ),
    (
        ["schedule.warmup_steps=101"],
        "schedule.warmup_steps=101 is more than training.steps=100; use at most 100",
    ),
    (
        ["schedule.warmup_steps=51", "schedule.total_steps=50"],
        "schedule.warmup_steps=51 is more than schedule.total_steps=50; use at most 50",
    ),
    (
        ["schedule.kind=wsd", "schedule.warmup_steps=10"],
        "schedule.decay_steps=0 with kind wsd must be from 1 to training.steps - warmup_steps = 90; a tenth of the steps "
        "is usual",
    ),
    (
        ["schedule.kind=wsd", "schedule.warmup_steps=10", "schedule.decay_steps=91"],
        "schedule.decay_steps=91 with kind wsd must be from 1 to training.steps - warmup_steps = 90; a tenth of the steps "
        "is usual",
    ),
    (
        ["schedule.decay_steps=3"],
        "schedule.decay_steps=3 has no effect with kind cosine; remove it or use kind: wsd",
    ),
    (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas[1]=1.0 is not below 1; 0.9 and 0.95 are usual"),
    (["optimizer.betas=[1, 0.95]"], "optimizer.betas[0]=1.0 is not below 1; 0.9 and 0.95 are usual"),
    (
        ["training.skip=[[5, 5]]"],
        "training.skip[0]=[5, 5] is not a half-open range of batch indices that begins at or after 0; write ascending "
        "ranges [start, stop) with start < stop",
    ),
    (
        ["training.skip=[[2, 5], [4, 6]]"],
        "training.skip[1]=[4, 6] is not a half-open range of batch indices that begins at or after 5; write ascending "
        "ranges [start, stop) with start < stop",
    ),
    (
        ["training.skip=[[-1, 2]]"],
        "training.skip[0]=[-1, 2] is not a half-open range of batch indices that begins at or after 0; write ascending "
        "ranges [start, stop) with start < stop",
    ),
    (["workers.min=3", "workers.max=2"], "workers.min=3 is more than workers.max=2; raise max to 3 or lower min"),
    (
        ["workers.max=9"],
        "workers.max=9 is more than batch.micro_batches=8: a worker without a micro-batch has nothing to do; use at most 8 "
        "workers, or more and smaller micro-batches",
    ),
    (["training.precision=tf32"], "training.precision=tf32 is for GPUs and workers compute on cpu; use fp32 or bf16"),
    ([OWN, "objective.z_loss=1e-4"], "objective.z_loss=0.0001 has no effect with an objective of your own; remove it,"),
    ([FACTORY, "training.recompute=true"], "training.recompute=true has no effect on a model of your own; remove it,"),
    (["workers.device=cuda"], "workers.device=cuda needs workers.num_gpus above 0; set workers.num_gpus: 1"),
    (
        ["workers.resources={rack: -1}"],
        "workers.resources.rack=-1.0 is not a finite amount from 0; write e.g. rack: 1",
    ),
    (
        ["workers.resources={rack: .nan}"],
        "workers.resources.rack=nan is not a finite amount from 0; write e.g. rack: 1",
    ),
    (
        ["checkpoint.keep_every=25", "checkpoint.every_steps=10"],
        "checkpoint.keep_every=25 is not a multiple of checkpoint.every_steps=10, so that most of what it keeps is never saved; "
        "use a multiple of 10, e.g. 100",
    ),
    (
        ["spikes.policy=rewind"],
        "spikes.policy=rewind goes back to a checkpoint, and there is only one at the end; set checkpoint.every_steps",
    ),
    (
        ["spikes={policy: skip, skip_batches: 1}"],
        "spikes.policy=skip goes back to a checkpoint, and there is only one at the end; set checkpoint.every_steps",
    ),
    (
        ["training.on_nonfinite=rewind", "spikes.skip_batches=102", "checkpoint.every_steps=1000"],
        "spikes.skip_batches=102 ends before the spike does, 100 batches later (rewind_steps) and 3 long (steps_in_a_row); use "
        "at least 103",
    ),
    (
        ["checkpoint.keep_best=2"],
        "checkpoint.keep_best=2 has no effect without checkpoint.every_steps: only the last step is saved; set that, too",
    ),
    (
        ["checkpoint.keep_every=25"],
        "checkpoint.keep_every=25 is not a multiple of checkpoint.every_steps=None, so that most of what it keeps is never "
        "saved; set every_steps too",
    ),
    (
        ["control.heartbeat_timeout_s=0.5", "control.heartbeat_interval_s=0.2"],
        "control.heartbeat_timeout_s=0.5 is less than three beats of control.heartbeat_interval_s=0.2, so one lost beat "
        "would evict a healthy worker; use at least 0.6",
    ),
    (
        ["control.backoff_base_s=61"],
        "control.backoff_base_s=61.0 is more than control.backoff_limit_s=60.0; use at most 60",
    ),
    (
        ["failpoints=['w1:save@1=kill', 'w1:lunch@1=kill']"],
        "failpoints[1]: failpoint 'w1:lunch@1=kill': unknown name 'lunch'; known: warm_up, ",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "message"), TOGETHER, ids=lambda value: "" if isinstance(value, str) else value[-1]
)
def test_fields_that_do_not_go_together_are_refused_with_values_and_remedy(overrides: list[str], message: str) -> None:
    assert refusal(*overrides).startswith(message)


@pytest.mark.parametrize(
    "overrides",
    [
        ["batch.sequence_length=32", "model.max_tokens=32"],
        ["model.width=64"],
        ["model.num_heads=64", "model.position=learned"],
        ["model.num_heads=32"],
        ["schedule.warmup_steps=100"],
        ["schedule.kind=wsd", "schedule.warmup_steps=10", "schedule.decay_steps=90"],
        ["schedule.kind=wsd", "schedule.decay_steps=1"],
        ["training.skip=[[0, 2], [2, 3]]"],
        ["workers.min=3", "workers.max=3"],
        ["workers.max=8"],
        ["workers.device=cuda", "workers.num_gpus=1"],
        ["workers.resources={rack: 0}"],
        ["control.heartbeat_timeout_s=0.75", "control.heartbeat_interval_s=0.25"],
        ["control.backoff_base_s=60"],
        ["training.seed=9223372036854775807"],
        ["name=a" + 62 * "b"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_value_on_the_edge_of_a_rule_is_accepted(overrides: list[str]) -> None:
    assert config(*overrides)


def test_both_widths_that_are_proposed_are_accepted() -> None:
    for width in re.findall(r"\d+", refusal("model.width=63").partition("; use width")[2]):
        assert config(f"model.width={width}")


@pytest.mark.parametrize("name", ["api_key", "apikey", "my_secret", "PASSWORD", "aws_access_key_id", "credentials"])
def test_argument_that_looks_like_a_secret_is_refused_without_its_value(name: str) -> None:
    message = refusal(FACTORY, f"model.args.deep.{name}=hunter2")
    assert message.startswith(f"model.args.deep.{name} looks like a secret, and the config is stored with the run; ")
    assert "hunter2" not in message


@pytest.mark.parametrize("name", ["keys", "secretary", "num_keys", "monkey", "tokens"])
def test_argument_that_only_resembles_a_secret_is_accepted(name: str) -> None:
    assert config(FACTORY, f"model.args.{name}=1").model.args[name] == 1


# -- unknown fields --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("training.step", "steps"),
        ("optimizer.learn_rate", "learning_rate"),
        ("batches.micro_batches", "batch"),
        ("data.reader", "readers"),
        ("learning_rate", "optimizer.learning_rate"),  # right name, wrong section
        ("training.warmup_steps", "schedule.warmup_steps"),
        ("kind", "optimizer.kind or schedule.kind or reduction.kind"),
    ],
)
def test_unknown_field_names_the_nearest_known_one(name: str, near: str) -> None:
    unknown = name.partition(".")[0] if name.startswith("batches") else name
    assert refusal(f"{name}=1") == (
        f"{unknown} is not a field of the config (did you mean {near}?); remove it or correct its name"
    )


def test_unknown_field_that_resembles_nothing_is_refused_without_a_guess() -> None:
    assert refusal("zzzz=1") == "zzzz is not a field of the config; remove it or correct its name"


@pytest.mark.parametrize("name", ["optimizer.lr", "metrics.x"])
def test_unknown_field_is_not_answered_with_the_section_it_is_in(name: str) -> None:
    assert f"did you mean {name.partition('.')[0]}?" not in refusal(f"{name}=1")


# -- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("training.steps=7", 7),
        ("optimizer.learning_rate=3e-4", 3e-4),  # YAML 1.1 would read text
        ("optimizer.learning_rate=1E+2", 100.0),
        ("optimizer.learning_rate=1", 1.0),
        ("model.tied=false", False),
        ("name=run-7", "run-7"),
        ('name="7"', "7"),
        ("metrics.port=null", None),
        ("metrics.port=", None),
        ("model.factory=null", None),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("training.skip=[[1, 2], [5, 9]]", ((1, 2), (5, 9))),
        ("workers.resources={rack: 2}", {"rack": 2.0}),
        ("workers.resources.rack=2", {"rack": 2.0}),  # a path may go on inside a value
        (" metrics.host = 0.0.0.0", "0.0.0.0"),
        ("objective.name=a:b", "a:b"),
        ("failpoints=['w1:save@1=kill']", ("w1:save@1=kill",)),  # only the first = separates
    ],
)
def test_override_enters_a_value_of_its_type(override: str, value: Any) -> None:
    found = value_of(config(override), override.partition("=")[0].strip().removesuffix(".rack"))
    assert found == value
    assert type(found) is type(value)


def test_override_of_a_whole_section_replaces_it() -> None:
    assert config("model={preset: mini}", "model.dropout=0.5").model == ModelConfig(preset="mini", dropout=0.5)


def test_later_override_wins() -> None:
    assert config("training.steps=5", "training.steps=6").training.steps == 6


def test_overrides_leave_the_given_values_alone() -> None:
    given = {"training": {"steps": 1}}
    assert config_text.override(given, ["training.steps=2", "training.seed=3"]) == {"training": {"steps": 2, "seed": 3}}
    assert given == {"training": {"steps": 1}}


@pytest.mark.parametrize("text", ["training.steps", "=3", "training.=3", ".steps=3", "training..steps=3", ""])
def test_override_of_another_form_is_refused_with_an_example(text: str) -> None:
    assert refusal(text) == f"override {text!r} is not a.b=value; write e.g. optimizer.learning_rate=3e-4"


def test_override_below_a_value_is_refused() -> None:
    assert refusal("training.steps.x=1") == "override 'training.steps.x=1': steps holds a value, not a section"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps=[", "the value of override training.steps is not YAML: "),
        ("training.steps=2020-99-99", "the value of override training.steps holds a value that cannot be read: "),
        ("training.steps=" + 5_000 * "9", "the value of override training.steps holds a value that cannot be read: "),
        ("model.args={1: 2}", "the overrides: the name 1 is not text; put quotes around it"),
        ("model.args=" + 30 * "{a: " + "1" + 30 * "}", "the overrides is nested deeper than 20 levels"),
        ("model.args={a: 1, a: 2}", "'a' is written twice"),
    ],
    ids=lambda text: text[:25],
)
def test_override_whose_value_is_no_value_is_refused(override: str, words: str) -> None:
    assert words in refusal(override)


def test_message_shows_a_long_value_shortened() -> None:
    assert len(refusal("model.preset=" + 5_000 * "x").partition(" is unknown")[0]) < 5_100
    assert refusal("data.manifest=" + 500 * "x").startswith("data.manifest='" + 56 * "x" + "... should match")


@pytest.mark.parametrize("value", ["s3://k:hunter2@bucket/x", "gs://k:hunter2@bucket/x", "s3://b/x?sig=hunter2"])
def test_secret_in_a_mistaken_override_is_not_repeated(value: str) -> None:
    for override in (f"storage={value}", f"training.steps={value}", f"storage.x={value}", f"stroage={value}", value):
        assert "hunter2" not in refusal(override)


# -- files -----------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_file_and_overrides_make_a_config(tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump(SMALLEST))
    assert RunConfig.load(path) == config()
    assert RunConfig.load(path, ["training.steps=5"]) == config("training.steps=5")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty; a config is a mapping with name:, storage:, data: and so on"),
        ("# nothing\n", "is empty"),
        ("- a\n", "is a list; a config is a mapping"),
        ("hello", "is a str; a config is a mapping"),
        ("a: [", "is not YAML: "),
        ("a: b: c", "is not YAML: mapping values are not allowed here"),
        ("a: !!python/object:os.system {}", "is not YAML: could not determine a constructor"),
        ("a: 1\na: 2", "'a' is written twice in the section that begins on line 1; remove one"),
        ("a:\n  b: 1\n  b: 2", "'b' is written twice in the section that begins on line 2; remove one"),
        ("1: a", "the name 1 is not text; put quotes around it or correct it"),
        ("a: &a\n  b: *a", "is nested deeper than 20 levels"),  # it contains itself
        ("a: " + 5_000 * "[", "holds a value that cannot be read: "),
        ("a: 2024-02-30", "holds a value that cannot be read: "),
        (b"\xff\xfe\x00\x01", "it is not UTF-8 text; give the path of a YAML file"),
    ],
    ids=lambda text: repr(text)[:25],
)
def test_file_that_is_no_config_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(("name", "reason"), [("none.yaml", "No such file or directory"), (".", "Is a directory")])
def test_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.load(tmp_path / name)
    assert str(caught.value) == f"cannot read the config {tmp_path / name}: {reason}; give the path of a YAML file"


ROUND_TRIPS = {
    "smallest": [],
    "every other value": [
        f"{row.field}={row.other}"
        for row in FIELDS
        if row.other and not row.field.startswith(("model.", "schedule.", "objective.z_loss"))
    ],
    "wsd": ["schedule.kind=wsd", "schedule.decay_steps=5", "optimizer.clip_norm=null", "metrics.port=null"],
    "factory": [FACTORY, "model.args.text='3: x # y'", "model.args.list=[1, a, null, 0.1]"],
    "odd names": ["name='123'", "storage='/srv/with space/ünï'", "metrics.host='::1'"],
    "tiny and huge": ["optimizer.eps=1e-30", "optimizer.learning_rate=1e+20", "control.start_timeout_s=0.1"],
}


@pytest.mark.parametrize("overrides", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_config_comes_back_from_its_yaml(tmp_path: Path, overrides: list[str]) -> None:
    original = config(*overrides)
    again = RunConfig.load(written(tmp_path, original.to_yaml()))
    assert again == original
    assert again.to_yaml() == original.to_yaml()
    assert again.identity_fingerprint() == original.identity_fingerprint()


@pytest.mark.parametrize("override", ["name='3e-4'", "model={factory: 'a:b', args: {rate: '1e5'}}"])
def test_text_that_looks_like_a_number_comes_back_from_its_yaml(tmp_path: Path, override: str) -> None:
    original = config(override)
    assert RunConfig.load(written(tmp_path, original.to_yaml())) == original


def test_yaml_spells_out_every_field() -> None:
    flat = config_text.flatten(yaml.safe_load(config().to_yaml()))
    empty_sections = {"model.args", "workers.resources"}
    assert set(flat) | empty_sections == set(LEAVES)


def test_config_survives_pickling_and_cannot_be_changed() -> None:
    original = config()
    assert pickle.loads(pickle.dumps(original)) == original
    with pytest.raises(ValidationError):
        original.training.steps = 5


def test_config_can_be_built_from_parts() -> None:
    built = RunConfig(
        name="first",
        storage="/srv/runs",
        data=DataConfig(tokens="/srv/tokens"),
        model=ModelConfig(preset="tiny"),
        batch=BatchConfig(micro_batches=8, micro_batch_size=2, sequence_length=16),
        training=TrainingConfig(steps=100),
    )
    assert built == config()


def test_config_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ConfigError(refusal("workers.max=9"))))
    assert type(error) is ConfigError
    assert str(error) == refusal("workers.max=9")


# -- identity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in FIELDS if row.other and row.identity], ids=lambda row: row.field)
def test_field_that_changes_the_bits_changes_the_fingerprint(row: Row) -> None:
    before, after = changed(row)
    assert after.identity_fingerprint() != before.identity_fingerprint()
    assert after.identity_changes(before)


@pytest.mark.parametrize("row", [row for row in FIELDS if row.other and not row.identity], ids=lambda row: row.field)
def test_operational_field_leaves_the_fingerprint(row: Row) -> None:
    before, after = changed(row)
    assert after != before
    assert after.identity_fingerprint() == before.identity_fingerprint()
    assert after.identity_changes(before) == []


@pytest.mark.parametrize("field", [row.field for row in FIELDS if row.other and row.identity])
def test_change_of_identity_is_named_as_in_the_file(field: str) -> None:
    before, after = changed(BY_NAME[field])
    for change in after.identity_changes(before):
        name = change.partition(": ")[0]
        assert any(name == known or name.startswith(f"{known}.") for known in LEAVES)


def test_fingerprint_does_not_depend_on_the_order_of_writing() -> None:
    backwards = {
        name: dict(reversed(part.items())) if isinstance(part, dict) else part for name, part in SETTLED.items()
    }
    assert (
        RunConfig(**dict(reversed(backwards.items()))).identity_fingerprint()
        == config(base=SETTLED).identity_fingerprint()
    )
    one, other = (config(FACTORY, f"model.args={args}") for args in ("{x: 1, y: 2}", "{y: 2, x: 1}"))
    assert one.identity_fingerprint() == other.identity_fingerprint()
    assert re.fullmatch("[0-9a-f]{64}", one.identity_fingerprint())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["optimizer.learning_rate=1"], ["optimizer.learning_rate=1.0"]),
        (["model.max_tokens=16"], []),  # the default: batch.sequence_length
        (["schedule.total_steps=100"], []),  # the default: training.steps
        (["model={num_layers: 2, num_heads: 4, width: 64}"], []),  # what tiny stands for
        (["model={preset: tiny, position: rotary, dropout: 0}"], []),
        (["schedule.kind=constant", "training.steps=5"], ["schedule.kind=constant"]),  # nothing depends on the end
    ],
    ids=lambda overrides: overrides[0] if overrides else "",
)
def test_two_ways_to_write_one_run_have_one_fingerprint(one: list[str], other: list[str]) -> None:
    assert config(*one).identity_fingerprint() == config(*other).identity_fingerprint()


def test_steps_change_the_fingerprint_when_the_schedule_follows_them() -> None:
    assert config("training.steps=101").identity_changes(config()) == ["schedule.total_steps: 100 -> 101"]


def test_corpus_counts_by_its_manifest_and_by_its_place_only_without_one() -> None:
    assert config("data.tokens=/other").identity_changes(config()) == [
        "data.tokens: 'file:///srv/tokens' -> 'file:///other'"
    ]
    known = f"data.manifest={MANIFEST}"
    assert config(known, "data.tokens=/other").identity_changes(config(known)) == []


def test_identity_changes_name_fields_with_both_values() -> None:
    changes = config("optimizer.learning_rate=1e-3", "training.seed=4", "workers.max=2").identity_changes(config())
    assert changes == ["optimizer.learning_rate: 0.0003 -> 0.001", "training.seed: 0 -> 4"]


# -- what follows ----------------------------------------------------------------------------------------------------


def test_control_gets_every_field_it_asks_for() -> None:
    spec = config(
        "workers={min: 2, max: 4}", "checkpoint={every_steps: 9, timeout_s: 33}", "reduction.kind=fast",
            "evaluation.every=7",
        *(f"{row.field}={row.other}" for row in OF_CONTROL),
    ).control_spec()  # fmt: skip
    expected: dict[str, Any] = {row.field.removeprefix("control."): float(row.other or 0) for row in OF_CONTROL}
    expected |= {"min_workers": 2, "max_workers": 4, "num_micro_batches": 8, "total_steps": 100}
    expected |= {"checkpoint_every": 9, "checkpoint_timeout_s": 33.0, "exact": False}
    expected |= {"evaluate_every": 7, "num_held_out_batches": 0}  # how many there are, the corpus says
    assert {field.name: getattr(spec, field.name) for field in fields(ControlSpec)} == {
        field.name: expected[field.name] for field in fields(ControlSpec)
    }


def test_control_without_choices_has_the_defaults_of_control() -> None:
    assert config().control_spec() == ControlSpec(min_workers=1, max_workers=1, num_micro_batches=8, total_steps=100)


def test_every_limit_of_control_can_be_configured() -> None:
    elsewhere = {"min_workers", "max_workers", "num_micro_batches", "total_steps", "exact"}
    elsewhere |= {"checkpoint_every", "checkpoint_timeout_s", "evaluate_every", "num_held_out_batches"}
    assert {field.name for field in fields(ControlSpec)} - elsewhere <= set(ControlConfig.model_fields)


def test_engine_gets_every_field_it_asks_for() -> None:
    spec = config(
        "optimizer={learning_rate: 0.01, betas: [0.5, 0.6], eps: 0.001, weight_decay: 0.2, clip_norm: 3}",
        "schedule={kind: wsd, warmup_steps: 3, decay_steps: 4, final_ratio: 0.25, total_steps: 60}",
        "objective.name=pack.age:loss", "training={steps: 70, seed: 5, precision: bf16}", "reduction.kind=fast",
        "workers={num_gpus: 1, threads: 3}", "model.max_tokens=32",
    ).engine_spec(vocab_size=300)  # fmt: skip
    assert spec == EngineSpec(
        model=ModelSpec(vocab_size=300, num_layers=2, num_heads=4, width=64, max_tokens=32),
        micro_batches=8,
        micro_batch_size=2,
        sequence_length=16,
        optimizer=OptimizerSpec(0.01, (0.5, 0.6), 0.001, 0.2, 3.0),
        schedule=ScheduleSpec("wsd", 3, 60, 4, 0.25),
        objective="pack.age:loss",
        seed=5,
        precision="bf16",
        reduction="fast",
        on_nonfinite="stop",
        device="cuda",
        threads=3,
        collectives="nccl",
    )
    assert spec.targets_per_batch == 8 * 2 * 16


def test_engine_without_choices_has_the_defaults_of_the_engine() -> None:
    model = ModelSpec(vocab_size=300, num_layers=2, num_heads=4, width=64, max_tokens=16)
    assert config().engine_spec(300) == EngineSpec(model, 8, 2, 16, schedule=ScheduleSpec(total_steps=100))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_gives_its_shape_and_fields_beside_it_change_it(preset: str) -> None:
    objective = "masked" if preset.startswith("bert") else "causal"
    spec = config(f"model.preset={preset}", "model.num_layers=3", f"objective.name={objective}").model_spec(300)
    assert spec == ModelSpec(**{**PRESETS[preset].shape, "num_layers": 3}, vocab_size=300, max_tokens=16)


def test_masked_objective_gets_the_corpus_mask_and_a_model_that_sees_both_sides() -> None:
    special = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "end_of_text": 299}
    spec = config(MASKED, "objective.mask_ratio=0.4", "model.vocab_size=320").engine_spec(300, special)
    assert spec.masking == MaskingSpec(0.4, 3, (0, 1, 2, 3, 299), 300)
    assert isinstance(spec.model, ModelSpec) and spec.model.attention == "bidirectional"
    assert config().engine_spec(300, special).masking is None


def test_fingerprint_of_a_causal_run_is_what_it_was_before_there_were_masked_ones() -> None:
    """Runs go on from their checkpoints under a newer version."""
    assert "mask_ratio" not in config().identity()["objective"]
    assert "attention" not in config().identity()["model"]


def test_factory_gets_its_arguments_vocabulary_and_context() -> None:
    assert config(FACTORY).engine_spec(300).model == FactorySpec("pack.age:build", 300, 16, {"depth": 2})


def test_model_may_have_a_larger_vocabulary_than_the_corpus_but_no_smaller_one() -> None:
    wide = config("model.vocab_size=320")
    model = wide.engine_spec(300).model
    assert model.vocab_size == 320
    with pytest.raises(ConfigError) as caught:
        wide.engine_spec(321)
    assert str(caught.value) == (
        "model.vocab_size=320 is smaller than the corpus's vocabulary of 321 tokens; use at least 321, or remove it"
    )


@pytest.mark.parametrize(
    ("overrides", "device"),
    [
        ([], "cpu"),
        (["workers.num_gpus=0.5"], "cuda"),
        (["workers.num_gpus=1", "workers.device=cpu"], "cpu"),
        (["workers.num_gpus=1", "workers.device=cuda"], "cuda"),
    ],
    ids=str,
)
def test_device_follows_gpus_unless_it_is_chosen(overrides: list[str], device: str) -> None:
    assert config(*overrides).device == device


def test_settled_config_holds_what_the_corpus_says_and_keeps_what_was_chosen() -> None:
    open_config = config("training.skip=[[1, 2]]", "workers.resources={rack: 1}")
    settled = open_config.settled(manifest=MANIFEST, window_blocks=4)
    assert settled == open_config.replace(f"data.manifest={MANIFEST}", "data.window_blocks=4")
    assert config("data.window_blocks=2").settled(manifest=MANIFEST, window_blocks=4).data.window_blocks == 2
    assert settled.settled(manifest=MANIFEST, window_blocks=8) == settled


def test_corpus_with_another_manifest_is_refused_with_both() -> None:
    with pytest.raises(ConfigError) as caught:
        config(base=SETTLED).settled(manifest="f" * 64, window_blocks=4)
    message = str(caught.value)
    assert message.startswith(f"data.manifest={MANIFEST} is not the corpus at data.tokens=file:///srv/tokens, ")
    assert "f" * 64 in message and message.endswith("or remove data.manifest")


def test_replaced_config_is_checked_again() -> None:
    with pytest.raises(ConfigError, match=r"workers\.max=9 is more than"):
        config().replace("workers.max=9")


@pytest.mark.parametrize("given", ["tls_certificate=/tls.crt", "tls_key=/tls.key"])
def test_certificate_and_key_belong_together(given: str) -> None:
    assert "belong together; set both for an endpoint that speaks TLS, or neither" in refusal(f"metrics.{given}")


def test_run_lives_below_storage_under_its_name() -> None:
    assert config("storage=s3://bucket/prefix/", "name=big").run_url == "s3://bucket/prefix/runs/big"


def test_description_says_the_derived_figures() -> None:
    assert config("workers={min: 2, max: 4}").describe() == (
        "Run first: 100 steps of 8 x 2 samples x 16 tokens = 256 tokens per step, 25,600 in all; 2 to 4 workers on cpu; "
        "reduction exact."
    )


def test_all_rules_that_are_broken_are_told_at_once() -> None:
    """Rules of one part and of several, each with a line of its own."""
    broken = ["workers.min=9", "workers.max=8", "schedule.decay_steps=5", "model.num_heads=3", "batch.micro_batches=1"]
    lines = refusal(*broken).splitlines()
    fields = ["model.width", "schedule.decay_steps", "workers.min", "workers.max"]
    assert [line.partition("=")[0] for line in lines] == fields
