"""The documents name nothing that is not there: links, files, commands with their options, fields, metrics and events."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import BaseModel

from elastic_lm.cli import app
from elastic_lm.config import RunConfig
from elastic_lm.events.catalogue import CATALOGUE as KINDS
from elastic_lm.events.types import EventKind
from elastic_lm.monitor.metrics import CATALOGUE
from elastic_lm.monitor.table import COLUMNS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path
    for path in [ROOT / "README.md", ROOT / "bench/README.md", ROOT / "cluster/README.md", *ROOT.glob("docs/*.md")]
}
SECTIONS = {name for name, field in RunConfig.model_fields.items() if isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)}  # fmt: skip
FILE = re.compile(r"^((?:elastic_lm|tests|bench|docs|examples|cluster)/[\w./-]+|[a-z_]+/[a-z_]+\.py)$")


def prose(page: str) -> str:
    """The page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(page: str) -> list[str]:
    """What stands between backticks, outside code blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: str) -> Iterator[str]:
    """Lines of code blocks, and spans, that call `elastic-lm`; a line that ends in a backslash goes on in the next."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    for text in [*lines, *spans(page)]:
        if found := re.search(r"(?:^|[\s/])elastic-lm ((?:-|[a-z]).*)", text.partition("#")[0]):
            yield found[1]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            found = (PAGES[page].parent / path).resolve() if path else PAGES[page]
            assert found.exists(), f"{page} links to {target}"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", found.read_text(), flags=re.MULTILINE)
                assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page: str) -> None:
    for span in spans(page):
        if FILE.match(span) and "*" not in span:
            places = (ROOT, ROOT / "elastic_lm", PAGES[page].parent)
            assert any((place / span).exists() for place in places), f"{page} names {span}"


@pytest.mark.parametrize("page", PAGES)
def test_named_commands_exist_with_their_options(page: str) -> None:
    root = typer.main.get_command(app)
    for text in commands(page):
        words = text.replace("[", " ").replace("]", " ").split()
        command: Any = root
        while hasattr(command, "commands") and words and not words[0].startswith("-"):
            name = words.pop(0)
            assert name in command.commands, f"{page}: elastic-lm {text}"
            command = command.commands[name]
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        for word in words:
            if word.startswith("-"):
                assert word.partition("=")[0] in known, f"{page}: elastic-lm {text}: no option {word}"


@pytest.mark.parametrize("page", PAGES)
def test_named_fields_exist(page: str) -> None:
    """Both `batch.micro_batches` and `workers.min: 4`."""
    for span in spans(page):
        if found := re.match(r"^([a-z_]+)\.([a-z_]+)(?:$|[:=] )", span):
            section, name = found.groups()
            if section in SECTIONS and name not in ("py", "md", "json"):
                fields = RunConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
                assert name in fields, f"{page} names the field {span}"


@pytest.mark.parametrize("page", PAGES)
def test_named_metrics_and_events_exist(page: str) -> None:
    metrics = {f"elastic_lm_{metric.name}" for metric in CATALOGUE}
    for name in re.findall(r"elastic_lm_\w+", prose(page)):
        assert name in metrics, f"{page} names the metric {name}"
    known = {str(kind) for kind in EventKind} | {name for entry in KINDS.values() for name in entry.fields}
    known |= {column.name for column in COLUMNS} | set(RunConfig.model_fields)
    for name in re.findall(r"`((?:step|member|node|checkpoint|reader|run)_[a-z]+)`", prose(page)):
        assert name in known, f"{page} names the event {name}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_page_is_linked_from_the_readme(page: str) -> None:
    assert f"({page})" in (ROOT / "README.md").read_text()


def test_what_is_checked_is_there_to_be_checked() -> None:
    assert sum(len(list(commands(page))) for page in PAGES) > 20
    assert sum(bool(FILE.match(span)) for page in PAGES for span in spans(page)) > 20
