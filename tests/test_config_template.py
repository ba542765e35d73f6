"""`elastic-lm init`: a config with every field in it, that is valid as it stands, means the same spelled out, and trains."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from elastic_lm import RunConfig, config_text
from elastic_lm.config_template import COLUMNS, SETTINGS, template
from elastic_lm.errors import ConfigError
from elastic_lm.model.presets import PRESETS
from tests.data.corpora import texts, write_lines
from tests.faults.oracle import undisturbed
from tests.test_cli import run
from tests.test_config import LEAVES

STEPS = 3
each_preset = pytest.mark.parametrize("preset", PRESETS)


def text_for(preset: str = "mini", *, name: str = "mine", storage: str = ".", tokens: str = "runs/tokens") -> str:
    return template(name=name, file="mine.yaml", preset=preset, storage=storage, tokens=tokens)


def with_all_fields(text: str) -> str:
    """Every `#name: value` put to work, and nothing else."""
    return re.sub(r"^( *)#(?=[a-z])", r"\1", text, flags=re.MULTILINE)


def commands_in(text: str) -> list[list[str]]:
    """What the first lines say to type."""
    return [shlex.split(line[1:]) for line in text.splitlines() if line.startswith("#   elastic-lm ")]


# -- the text --------------------------------------------------------------------------------------------------------


@each_preset
def test_every_field_is_there_with_its_default(preset: str) -> None:
    text = text_for(preset)
    config = RunConfig.from_yaml(text, "the template")
    values = yaml.safe_load(with_all_fields(text))
    assert RunConfig(**values) == config
    for name in LEAVES:
        value = values
        for part in name.split("."):
            assert part in value, name
            value = value[part]


def test_what_is_not_chosen_is_a_default() -> None:
    chosen = set(config_text.flatten(yaml.safe_load(text_for())))
    spelled_out = config_text.flatten(yaml.safe_load(with_all_fields(text_for())))
    smallest = {name: value for name, value in spelled_out.items() if LEAVES[name].is_required()}
    defaults = config_text.flatten(
        RunConfig(**config_text.nested({**smallest, "model.preset": "mini"})).model_dump(mode="json")
    )
    for name in set(spelled_out) - chosen:
        assert spelled_out[name] == defaults[name], name
    assert set(smallest) <= chosen


def test_every_meaning_is_there_in_yamls_words() -> None:
    prose = " ".join(line.strip()[2:] for line in text_for().splitlines() if line.strip().startswith("# "))
    for name, field in LEAVES.items():
        assert config_text.as_yaml_says(field.description or "?") in prose, name
    assert "None" not in prose


@each_preset
def test_lines_fit_a_terminal(preset: str) -> None:
    assert max(len(line) for line in text_for(preset).splitlines()) <= COLUMNS


@pytest.mark.parametrize(
    ("field", "choices"),
    [
        ("schedule.kind", "One of cosine, wsd, constant."),
        ("model.norm", "One of rmsnorm, layernorm."),  # it may be null, too
        ("model.preset", "mini (a laptop CPU; the demo)"),
        ("workers.device", "auto: cuda when num_gpus is above 0, else cpu."),  # its docstring names them all
    ],
)
def test_choices_are_named_once(field: str, choices: str) -> None:
    section, _, name = field.partition(".")
    above = re.search(rf"^#?{section}:\n.*?((?:  # [^\n]*\n)+)  #?{name}:", text_for(), flags=re.MULTILINE | re.DOTALL)
    assert above is not None
    prose = " ".join(line.strip()[2:] for line in above[1].splitlines())
    assert choices in prose
    assert prose.count("One of") <= 1


@each_preset
def test_values_that_are_chosen_go_together(preset: str) -> None:
    config = RunConfig.from_yaml(text_for(preset), "the template")
    assert config.batch.micro_batches % config.workers.max == 0, "no worker waits for an uneven share"
    assert config.schedule.warmup_steps <= config.training.steps / 10
    assert (config.device == "cuda") == ("GPU" in PRESETS[preset].needs)
    assert preset in SETTINGS


def test_names_and_addresses_are_entered_as_they_were_typed() -> None:
    text = text_for(name="123", storage="s3://bucket/it's", tokens="~/with space: #1")
    values = yaml.safe_load(text)
    assert (values["name"], values["storage"], values["data"]["tokens"]) == (
        "123",
        "s3://bucket/it's",
        "~/with space: #1",
    )
    assert commands_in(text)[0][:5] == ["elastic-lm", "prepare", "TEXT", "--out", "~/with space: #1"]
    assert RunConfig.from_yaml(text, "the template").name == "123"


@pytest.mark.parametrize("field", ["name", "storage", "tokens"])
def test_line_break_cannot_enter_the_text(field: str) -> None:
    with pytest.raises(ConfigError, match="cannot be printed"):
        text_for(**{field: "a\nname: b"})


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_command_writes_a_valid_config_named_as_its_file(here: Path) -> None:
    told = run("init", "small.yaml")
    assert told.exit_code == 0, told.stderr
    assert told.stdout.startswith("Wrote small.yaml.") and "elastic-lm train small.yaml" in told.stdout
    assert RunConfig.load("small.yaml").name == "small"
    assert RunConfig.load("small.yaml").run_url == f"file://{here}/runs/small"
    assert run("config", "validate", "small.yaml").exit_code == 0


def test_options_are_what_is_asked_for_most(here: Path) -> None:
    options = ["--name", "big", "--storage", "s3://bucket/a", "--tokens", "s3://bucket/tokens", "--preset", "gpt2"]
    assert run("init", "x.yml", *options).exit_code == 0
    config = RunConfig.load("x.yml")
    assert (config.run_url, config.data.tokens, config.model.preset) == (
        "s3://bucket/a/runs/big", "s3://bucket/tokens", "gpt2",
    )  # fmt: skip


def test_file_that_is_there_is_replaced_only_by_force(here: Path) -> None:
    Path("my-run.yaml").write_text("precious")
    told = run("init")
    assert told.exit_code == 2
    assert "my-run.yaml is there already" in told.stderr and "--force" in told.stderr
    assert Path("my-run.yaml").read_text() == "precious"
    assert run("init", "--force").exit_code == 0
    assert RunConfig.load("my-run.yaml").name == "my-run"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run.txt"], "does not end with .yaml"),
        (["no/run.yaml"], "no/run.yaml cannot be written: No such file or directory"),
        (["my run.yaml"], "name='my run' should match pattern"),
        (["a\nb.yaml", "--name", "a"], "the file's name holds a line break"),
        (["\udcff.yaml", "--name", "a"], "another character that cannot be printed"),  # a name that is no UTF-8
        (["--preset", "gpt"], "did you mean gpt2?"),
        (["--storage", "gs://bucket"], "unknown scheme gs://"),
        (["--tokens", "s3://key:hunter2@bucket"], "may hold credentials"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistake_writes_nothing(arguments: list[str], words: str, here: Path) -> None:
    told = run("init", *arguments)
    assert (told.exit_code, told.stdout) == (2, "")
    assert words in told.stderr and "hunter2" not in told.stderr
    assert list(here.iterdir()) == []


def test_written_config_trains_on_the_corpus_that_its_first_lines_prepare(here: Path) -> None:
    source = write_lines(here / "text.jsonl", texts(600))
    assert run("init", "--preset", "tiny").exit_code == 0
    prepare, train, validate, estimate = commands_in(Path("my-run.yaml").read_text())
    assert run(*[source if word == "TEXT" else word for word in prepare[1:]], "--local").exit_code == 0
    assert train == ["elastic-lm", "train", "my-run.yaml"]
    assert run(*validate[1:]).exit_code == run(*estimate[1:]).exit_code == 0
    config = RunConfig.load("my-run.yaml", [f"training.steps={STEPS}", "schedule.warmup_steps=0"])
    _, steps = undisturbed(config)
    losses = [loss for _, loss, *_ in steps]
    assert len(losses) == STEPS and losses[-1] < losses[0]
