"""`doctor`: what is the matter here, in lines that can be pasted into a bug report."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_lm import completion
from elastic_lm.errors import ConfigError, StorageError
from elastic_lm.terminal import Exit, deliver, told_errors

if TYPE_CHECKING:
    from elastic_lm.doctor import Check

COLUMNS, INDENT = 80, 27

app = typer.Typer()


@app.command()
def doctor(
    target: Annotated[
        str | None,
        typer.Argument(
            help="A run's YAML file, or the address of a storage.",
            metavar="RUN.YAML|STORAGE",
            autocompletion=completion.configs,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Check machine, cluster and storage; for bug reports.

    Versions, devices, limits, ports, the cluster at RAY_ADDRESS, and the storage by writing, reading and deleting a small
    object. Holds no secrets and no user names. Exit code 4 when something keeps runs from training; warnings do not count.
    """
    with told_errors():
        from elastic_lm.config import RunConfig
        from elastic_lm.config_text import is_yaml
        from elastic_lm.doctor import examine, failed
        from elastic_lm.storage import Storage

        config, url = None, None
        if target is not None and is_yaml(target):
            config = RunConfig.load(target)
        elif target is not None:
            try:
                url = Storage.open(target).url
            except StorageError as error:
                raise ConfigError(str(error)) from error
        found = []
        for check in examine(config, url):
            found.append(check)
            if not as_json:
                deliver(describe(check))
    if as_json:
        deliver(json.dumps([asdict(check) for check in found], indent=1))
    if failed(found):
        raise typer.Exit(Exit.UNAVAILABLE)


def describe(check: Check) -> str:
    """A line for people, or a few."""
    lines = [f"{check.status:<9}{check.name:<{INDENT - 9}}{check.text}"]
    if check.remedy:
        lines.append(f"{'':<{INDENT}}-> {check.remedy}")
    return "\n".join(
        textwrap.fill(line, COLUMNS, subsequent_indent=" " * INDENT, break_long_words=False, break_on_hyphens=False)
        for line in lines
    )
