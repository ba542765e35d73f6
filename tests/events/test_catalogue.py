"""The catalogue of events: every kind, with just the fields that the code writes, and a document that is up to date."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_lm.events.catalogue import CATALOGUE, OPTIONAL, markdown
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import Evaluation, StepRecord

ROOT = Path(__file__).parents[2]
WRITERS = (
    "control/actions.py", "control/admission.py", "control/balance.py", "control/controller.py", "control/elastic_set.py",
    "control/evaluating.py", "control/interruption.py", "control/saving.py", "events/log.py", "runtime/coordinator.py",
    "runtime/recorder.py",
)  # fmt: skip


def test_document_is_what_the_module_prints() -> None:
    command = [sys.executable, "-m", "elastic_lm.events.catalogue"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True, timeout=50).stdout
    assert printed == markdown()
    assert (ROOT / "docs/events.md").read_text(encoding="utf-8") == printed, "docs/events.md is out of date: make docs"


def test_every_kind_is_there_in_the_order_of_the_types() -> None:
    assert list(CATALOGUE) == list(EventKind)
    assert all(f"| `{kind}` | " in markdown() for kind in EventKind)


def test_entries_fit_a_row_of_a_table() -> None:
    for kind, entry in CATALOGUE.items():
        assert entry.meaning.endswith(".") and "|" not in entry.meaning + "".join(entry.fields.values()), kind


def kind_in(call: ast.Call) -> EventKind | None:
    """Which kind of event the call makes, if it makes one."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    if name not in ("_emit", "Event") or not isinstance(first, ast.Attribute):
        return None
    return EventKind[first.attr]


def is_fields_of(node: ast.AST) -> bool:
    """What evaluating.py makes of an `Evaluation`."""
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fields_of"


def field_names(call: ast.Call, function: ast.AST) -> set[str]:
    """Of `_emit(kind, message, step=..., name=...)`, or of the dict that an `Event` is given as its fields."""
    of_an_evaluation = {f.name for f in dataclasses.fields(Evaluation)} - {"step"}
    if isinstance(call.func, ast.Attribute):
        many = any(keyword.arg is None and is_fields_of(keyword.value) for keyword in call.keywords)
        named = {keyword.arg for keyword in call.keywords if keyword.arg not in ("step", None)}
        return named | (of_an_evaluation if many else set())
    told = next((k.value for k in call.keywords if k.arg == "fields"), call.args[-1] if len(call.args) > 4 else None)
    if isinstance(told, ast.Name):
        assigned = [node.value for node in ast.walk(function) if isinstance(node, ast.Assign)]
        told = next(value for value in assigned if isinstance(value, ast.Dict))
    if told is None:
        return set()
    if is_fields_of(told):
        return of_an_evaluation
    assert isinstance(told, ast.Dict)
    of_the_record = {f.name for f in dataclasses.fields(StepRecord)} if None in told.keys else set()
    return {key.value for key in told.keys if isinstance(key, ast.Constant)} | of_the_record


def written() -> Iterator[tuple[EventKind, set[str]]]:
    """Every place in the code that makes an event: its kind and the names of its fields."""
    for writer in WRITERS:
        tree = ast.parse((ROOT / "elastic_lm" / writer).read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
                if (kind := kind_in(call)) is not None:
                    yield kind, field_names(call, function)


def test_events_are_written_with_the_fields_that_are_told() -> None:
    places: dict[EventKind, list[set[str]]] = defaultdict(list)
    for kind, names in written():
        places[kind].append(names)
    assert set(places) == set(EventKind)
    for kind, found in places.items():
        assert set().union(*found) == set(CATALOGUE[kind].fields), kind
        always = {name for name in CATALOGUE[kind].fields if (kind, name) not in OPTIONAL}
        assert all(always <= names for names in found), kind


@pytest.mark.parametrize("writer", sorted((ROOT / "elastic_lm").rglob("*.py")), ids=lambda path: path.stem)
def test_nobody_else_writes_events(writer: Path) -> None:
    """Else the test above would not see them."""
    tree = ast.parse(writer.read_text())
    makes = any(kind_in(node) is not None for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert makes == any(str(writer).endswith(f"elastic_lm/{name}") for name in WRITERS)
