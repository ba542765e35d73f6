"""The tasks that a user names: `held_out`, or the address of a YAML file that says a task's kind and where its items are.

Invariant: what is wrong with a task is found here, all of its items read and checked, before any model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from elastic_lm.config import RunConfig
from elastic_lm.config_text import beside, hint, is_yaml, parse
from elastic_lm.errors import ConfigError, NotFoundError, StorageError
from elastic_lm.evaluate import held_out
from elastic_lm.evaluate.bleu import Bleu
from elastic_lm.evaluate.choices import Choices
from elastic_lm.evaluate.fields import Fields
from elastic_lm.evaluate.held_out import HeldOutText
from elastic_lm.evaluate.pairs import Pairs
from elastic_lm.evaluate.pieces import Plan
from elastic_lm.evaluate.safety import Safety
from elastic_lm.storage import Storage
from elastic_lm.trained_model import ModelInterface

KINDS: dict[str, Any] = {kind.kind: kind for kind in (Choices, Pairs, Bleu, Safety)}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Question(Protocol):
    """What a task asks of a model. `figures`: names of the metrics that it tells."""

    @property
    def figures(self) -> tuple[str, ...]: ...

    def plan(self, model: ModelInterface) -> Plan:
        """Raises: ConfigError when an item does not fit this model; DataError."""


@dataclass(frozen=True)
class Task:
    """`hash`: of all that decides the outcome beside the model."""

    name: str
    kind: str
    hash: str
    question: Question


def find(names: Sequence[str], config: RunConfig, max_samples: int | None = None) -> list[Task]:
    """Tasks for the model of this run, in the order of their names.

    Raises: ConfigError when one is unknown, broken, named twice, or not for the run's objective; DataError, StorageError.
    """
    if not names:
        raise ConfigError(f"no task is named; write {held_out.NAME}, or the address of a task's YAML file")
    tasks = [_find(name, config, max_samples) for name in names]
    if max_samples is not None and held_out.NAME not in names:
        raise ConfigError(
            f"samples={max_samples} are of {held_out.NAME}, which is not asked for, and other tasks are asked whole; leave "
            "it out, or shorten the file of items"
        )
    seen: set[str] = set()
    for task in tasks:
        if task.name in seen:
            raise ConfigError(
                f"two tasks are called {task.name}, and each has a file of that name; rename one, or leave it out"
            )
        seen.add(task.name)
    return tasks


def _find(name: str, config: RunConfig, max_samples: int | None) -> Task:
    if name == held_out.NAME:
        question = HeldOutText(config, max_samples)
        return Task(name, question.kind, question.hash, question)
    if not is_yaml(name):
        raise ConfigError(
            f"{name!r} is no task{hint(name, [held_out.NAME])}; write {held_out.NAME}, or the address of a YAML file, "
            f"e.g. tasks/{name.rpartition('/')[2].partition('.')[0] or 'mine'}.yaml"
        )
    return load(name, config.objective.name)


def load(address: str, objective: str) -> Task:
    """The task of a YAML file, with its items.    Raises: ConfigError, StorageError."""
    stem = address.rpartition("/")[2].rpartition(".")[0]
    if stem == held_out.NAME or not NAME.fullmatch(stem):
        raise ConfigError(
            f"{address}: a task is called as its file, and its result, too: use letters, digits, . _ and -, and not "
            f"{held_out.NAME}"
        )
    options = Fields(parse(_text(address, address), address), address)
    kind = options.text("kind")
    if kind not in KINDS:
        raise ConfigError(f"{address}: kind={kind!r} is unknown{hint(kind, KINDS)}; choose {', '.join(KINDS)}")
    found = KINDS[kind]
    if objective not in found.objectives:
        raise ConfigError(
            f"{address}: a task of the kind {kind} takes a model with objective.name {' or '.join(found.objectives)}, and the "
            f"run's is {objective}; leave the task out"
        )
    data = options.text("data")
    text = _text(beside(address, data), f"{address}: data={data}")
    question = found(_items(text, beside(address, data)), options)
    options.end()
    asked = {**options.taken, **options.rules, "data": hashlib.sha256(text.encode()).hexdigest()}
    return Task(stem, kind, hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest(), question)


def _items(text: str, source: str) -> list[Fields]:
    """A JSON object a line; empty lines are passed over."""
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            items.append(Fields(json.loads(line, object_pairs_hook=_named_once), where))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where} is no JSON object ({error}); write one object a line") from error
    if not items:
        raise ConfigError(f"{source} holds no items; write one JSON object a line")
    return items


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises: ValueError, as for all else that is no object."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"{name!r} is written twice; remove one")
    return found


def _text(address: str, source: str) -> str:
    """Raises: ConfigError when it is not there, or no text."""
    folder, slash, name = address.rpartition("/")
    try:
        return Storage.open(folder or slash or ".").read(name).decode()
    except NotFoundError as error:
        raise ConfigError(f"{source} is not there; correct the address") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is no UTF-8 text; write it as UTF-8") from error
    except StorageError as error:
        if "://" in address:
            raise
        raise ConfigError(f"{source} cannot be read: {error}") from error
