"""Commands about runs beside each other: all of a store, one with all that is known of it, two compared.

From any machine that sees their storage. Nothing is changed there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastic_lm import cli_run
from elastic_lm.errors import ConfigError, StorageError
from elastic_lm.terminal import deliver, say, told_errors, visible

if TYPE_CHECKING:
    from elastic_lm.experiment.catalogue import Listed
    from elastic_lm.experiment.comparison import Comparison
    from elastic_lm.experiment.lineage import Lineage
    from elastic_lm.experiment.portrait import Portrait

app = typer.Typer(no_args_is_help=True, help="List runs, show one, compare two.")
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
Rows = Sequence[Sequence[str]]


@app.command("list")
def list_(
    storage: Annotated[str, typer.Argument(help="Where runs are kept.", metavar="STORAGE")], as_json: AsJson = False
) -> None:
    """All runs of a store, the last active one first."""
    with told_errors():
        from elastic_lm.experiment import catalogue
        from elastic_lm.storage import Storage

        try:
            folder = Storage.open(storage)
        except StorageError as error:
            raise ConfigError(str(error)) from error
        found = catalogue.listed(folder)
    if as_json:
        deliver(json.dumps([asdict(run) for run in found], indent=1))
    elif not found:
        say(f"{folder.url} has no run: there is none in {folder.url}/runs.")
    else:
        now = time.time()
        head = ("name", "state", "step", "loss", "checkpoint", "from", "last active")
        deliver("\n".join(_columns([head, *(_row(run, now) for run in found)], right={2, 3, 4})))


@app.command()
def show(run: cli_run.RunName, as_json: AsJson = False) -> None:
    """One run: how it is, where it is from, what it has.

    Its lineage, checkpoints, evaluations and report, and the choices that make its identity.
    """
    with told_errors():
        from elastic_lm.experiment.portrait import Portrait
        from elastic_lm.run import Run

        portrait = Portrait.of(Run.open(run).address)
    deliver(json.dumps(portrait.as_json(), indent=1) if as_json else "\n".join(_portrait(portrait)))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A run, as the other commands take it.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Another.", metavar="B")],
    out: Annotated[str | None, typer.Option(help="Write a page with their curves, too.", metavar="FILE.html")] = None,
    as_json: AsJson = False,
) -> None:
    """Two runs: what was chosen differently, what came of it.

    Their configs field by field, their figures and evaluations; with --out their curves in one HTML file that needs nothing else.
    """
    with told_errors():
        from elastic_lm.experiment import comparison_page
        from elastic_lm.experiment.comparison import Comparison
        from elastic_lm.run import Run

        found = Comparison.of(Run.open(a).address, Run.open(b).address)
        if out is not None:
            _write(out, comparison_page.render(found))
    if as_json:
        deliver(json.dumps(found.as_json(), indent=1))
    else:
        deliver("\n".join(_comparison(found)))
        if out is not None:
            say(f"Wrote {out}.")


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


# -- words -----------------------------------------------------------------------------------------------------------


def _columns(rows: Rows, right: set[int] | None = None) -> Iterator[str]:
    """Aligned; those in `right` at their right ends."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.rjust(w) if right and c in right else cell.ljust(w)
            for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        yield visible("  ".join(cells).rstrip())


def _row(run: Listed, now: float) -> tuple[str, ...]:
    return (
        run.name,
        run.state if run.problem is None else f"{run.state}: {run.problem[:60]}",
        "" if run.step is None and run.of is None else f"{run.step or 0:,}/{'?' if run.of is None else f'{run.of:,}'}",
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.checkpoint is None else f"{run.checkpoint:,}",
        "" if run.parent is None else f"{run.parent}@{'?' if run.parent_step is None else run.parent_step}",
        "" if run.last_s is None else _ago(now - run.last_s),
    )


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _date(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(unix_s))


def _portrait(portrait: Portrait) -> Iterator[str]:
    run = portrait.listed
    facts = [
        ("run", run.url),
        ("state", run.state if portrait.message is None else f"{run.state}: {portrait.message}"),
        ("step", f"{run.step or 0:,} of {portrait.config.training.steps:,}"),
        ("loss", "" if run.loss is None else f"{run.loss:.6f}"),
        ("last active", "" if run.last_s is None else _date(run.last_s)),
        ("report", portrait.report or ""),
        ("fingerprint", portrait.config.identity_fingerprint()),
    ]
    yield from (visible(f"{name:>11}  {value}") for name, value in facts if value)
    if portrait.lineage is not None:
        yield from ("", "from", *(visible(line) for link in portrait.lineage.chain() for line in _link(link)))
        yield from ("", "curve", *(_curve(portrait) or ["  none yet"]))
    if portrait.rewinds:
        yield from ("", "rewinds", *(visible(f"  {_date(rewind.time_s)}  {rewind}") for rewind in portrait.rewinds))
    yield from ("", "checkpoints", *(_checkpoints(portrait) or ["  none"]))
    if portrait.measured:
        names = portrait.task_names
        rows = [(f"  step {m.step:,}", names[m.task, m.task_hash], m.metric, str(m)) for m in portrait.measured]
        yield from ("", "evaluations", *_columns(rows))
    yield from ("", "identity", *_columns([(f"  {name}", str(value)) for name, value in portrait.identity.items()]))


def _curve(portrait: Portrait) -> list[str]:
    """Who has trained which steps."""
    rows = [
        (
            f"  steps {each.start:,} to {each.stop - 1:,}",
            each.name,
            f"loss {each.losses[0]:.4f} to {each.losses[-1]:.4f}" if each.losses else "",
            f"{each.num_tokens:,} tokens",
        )
        for each in portrait.curve
    ]
    lacks = portrait.ancestors.lacks
    return [*([visible(f"  {lacks}")] if lacks else []), *(_columns(rows) if rows else ())]


def _link(link: Lineage) -> Iterator[str]:
    parent = link.parent
    yield f"  {parent.name}@{parent.step}  {_date(link.time_s)}  {parent.url}  state {parent.digest.get('state', '')[:16]}"
    yield from (f"    {rewind}" for rewind in parent.rewinds)
    yield from (f"    {change}" for change in link.changes)
    if link.surgery is not None:
        yield from (f"    {line}" for line in (*link.surgery.table(), link.surgery.effect))


def _checkpoints(portrait: Portrait) -> list[str]:
    rows = [
        (
            f"  step {found.step:,}",
            found.state,
            "" if found.size_bytes is None else f"{found.size_bytes / 1e6:,.1f} MB",
            "" if found.loss is None else f"loss {found.loss:.4f}",
        )
        for found in portrait.checkpoints
    ]
    return list(_columns(rows)) if rows else []


def _comparison(found: Comparison) -> Iterator[str]:
    for sentence in (found.relation, *found.lacks):
        yield from (visible(sentence), "") if sentence else ()
    head = ("", *found.names)
    yield from _columns([head, *found.figures])
    if found.measured:
        rows = [
            (f"{task} {metric}, step {step:,}", _or_none(a), _or_none(b)) for step, task, metric, a, b in found.measured
        ]
        yield from ("", *_columns([("evaluations", "", ""), *rows]))
    differences = [
        (change.name, _or_none(change.before), _or_none(change.after))
        for change in found.differences
        if change.identity
    ]
    rest = [
        (change.name, _or_none(change.before), _or_none(change.after))
        for change in found.differences
        if not change.identity
    ]
    for title, rows in (("changes bits", differences), ("does not", rest)):
        yield from ("", *_columns([(title, "", ""), *rows])) if rows else ()
    if not found.differences:
        yield from ("", "Both were configured alike.")


def _or_none(value: Any) -> str:
    return "–" if value is None else str(value)
