"""A config to start from: every field there is, with its meaning; those that one usually chooses are set.

Invariant: made of the fields and docstrings of config.py, so it cannot go out of date, and loaded before it is given out, so
it is valid. `# prose` is for reading; `#name: value` is a field with its default, put to work by taking the # away.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from elastic_lm import config_text
from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.model.presets import PRESETS

COLUMNS = 80
SOURCES = "TEXT"  # stands for the files of whoever reads it

# 6,144 tokens a step, minutes for the whole run on two cores. Twelve micro-batches divide among 1, 2, 3, 4 or 6 workers.
LAPTOP: dict[str, Any] = {
    "batch.micro_batches": 12,
    "batch.micro_batch_size": 4,
    "batch.sequence_length": 128,
    "training.steps": 500,
    "optimizer.learning_rate": 2e-3,
    "schedule.warmup_steps": 20,
    "workers.min": 1,
    "workers.max": 2,
    "checkpoint.every_steps": 100,
}
# Half a million tokens a step, 10 billion in all. Batch, peak and warm-up by Brown et al. 2020 (GPT-3), table 2.1.
GPU: dict[str, Any] = {
    "batch.micro_batches": 64,
    "batch.micro_batch_size": 8,
    "batch.sequence_length": 1024,
    "training.steps": 20_000,
    "training.precision": "bf16",
    "optimizer.learning_rate": 6e-4,
    "schedule.warmup_steps": 700,
    "workers.min": 1,
    "workers.max": 8,
    "workers.num_gpus": 1.0,
    "checkpoint.every_steps": 500,
}
BERT: dict[str, Any] = {
    **GPU,
    "batch.micro_batches": 32,
    "batch.sequence_length": 256,
    "training.steps": 1_000_000,
    "optimizer.learning_rate": 1e-4,
    "schedule.warmup_steps": 10_000,
}
MASKED: dict[str, Any] = {"objective.name": "masked"}
SETTINGS: dict[str, dict[str, Any]] = {
    "tiny": LAPTOP,
    "mini": LAPTOP,
    "10m": {**LAPTOP, "optimizer.learning_rate": 1e-3},
    "gpt2": GPU,
    "gpt2-medium": {**GPU, "optimizer.learning_rate": 3e-4},
    "bert-tiny": {**LAPTOP, **MASKED},
    "bert-mini": {**LAPTOP, **MASKED},
    "bert-small": {**LAPTOP, **MASKED, "optimizer.learning_rate": 1e-3},
    # Batch, peak and warm-up by Devlin et al. 2019, appendix A.2, with sequences half as long.
    "bert-base": {**BERT, **MASKED},
    "bert-large": {**BERT, **MASKED},
    "1.3b": {**GPU, "batch.micro_batches": 128, "training.steps": 26_000, "optimizer.learning_rate": 2e-4},
}
# An embedding of the usual 16,384 rows would be most of a small model.
VOCAB_SIZES = {"tiny": 2048, "mini": 2048, "10m": 4096, "bert-tiny": 2048, "bert-mini": 2048, "bert-small": 4096}


def template(*, name: str, file: str, preset: str, storage: str, tokens: str) -> str:
    """The text of a config, to be stored as `file`.    Raises: ConfigError when a value is refused."""
    chosen = {
        "name": name,
        "storage": storage,
        "data.tokens": tokens,
        "model.preset": preset,
        **SETTINGS.get(preset, LAPTOP),
    }
    for field, value in {"the file's name": file, **chosen}.items():
        if isinstance(value, str) and not value.isprintable():
            raise ConfigError(f"{field} holds a line break or another character that cannot be printed; leave it out")
    config = RunConfig(**config_text.nested(chosen))
    defaults = config_text.flatten(config.model_dump(mode="json"))
    return "\n".join([*_header(file, preset, tokens), *_fields(RunConfig, defaults, chosen), ""])


def prepare_command(preset: str, tokens: str) -> str:
    """What makes a corpus for it."""
    vocab_size = ["--vocab-size", str(VOCAB_SIZES[preset])] if preset in VOCAB_SIZES else []
    return shlex.join(["elastic-lm", "prepare", SOURCES, "--out", tokens, *vocab_size])


def _header(file: str, preset: str, tokens: str) -> Iterator[str]:
    yield f"# A run of elastic-lm. With your files or folders of text in place of {SOURCES}:"
    yield "#"
    yield f"#   {prepare_command(preset, tokens)}"
    yield f"#   {shlex.join(['elastic-lm', 'train', file])}"
    yield "#"
    yield from _prose(
        "A field behind a # (#name: value) has its default; take the # away to change it, and that of its section. "
        "Relative folders count from where a command is started. After a change:"
    )
    yield "#"
    yield f"#   {shlex.join(['elastic-lm', 'config', 'validate', file])}"
    yield f"#   {shlex.join(['elastic-lm', 'estimate', file])}"


def _fields(
    section: type[BaseModel], defaults: Mapping[str, Any], chosen: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """The lines of a section, at its own indentation."""
    indent = "  " * prefix.count(".")
    for name, field in section.model_fields.items():
        path = prefix + name
        if not indent:
            yield ""
        yield from _prose(_meaning(path, field), indent)
        if config_text.is_section(field):
            is_set = any(other.startswith(f"{path}.") for other in chosen)
            yield f"{indent}{'' if is_set else '#'}{name}:"
            yield from _fields(field.annotation, defaults, chosen, f"{path}.")  # type: ignore[arg-type]
        else:
            mark, value = ("", chosen[path]) if path in chosen else ("#", defaults.get(path, {}))
            yield f"{indent}{mark}{name}: {config_text.inline(value)}"


def _prose(text: str, indent: str = "") -> list[str]:
    begin = f"{indent}# "
    return textwrap.wrap(text, COLUMNS, initial_indent=begin, subsequent_indent=begin, break_on_hyphens=False)


def _meaning(path: str, field: FieldInfo) -> str:
    """The docstring, and the values that can be chosen where it does not name them."""
    of_section = field.annotation.__doc__ if config_text.is_section(field) else None
    meaning = config_text.as_yaml_says(of_section or field.description or "")
    if path == "model.preset":
        return f"{meaning} {', '.join(f'{name} ({preset.needs})' for name, preset in PRESETS.items())}."
    choices = [str(choice) for choice in _choices(field.annotation)]
    if len(choices) > 1 and not all(choice in meaning for choice in choices):
        return f"{meaning} One of {', '.join(choices)}."
    return meaning


def _choices(annotation: Any) -> tuple[Any, ...]:
    """Of a Literal, or of one that may be null."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))
