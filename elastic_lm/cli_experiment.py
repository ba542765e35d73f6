"""`experiment`: a plan of attempts carried out, told as it goes, and ended with the tree of all attempts."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_lm import completion
from elastic_lm.terminal import OF_VERDICT, Exit, deliver, say, told_errors, visible

if TYPE_CHECKING:
    from elastic_lm.experiment.rehearsal import Prospect
    from elastic_lm.experiment.result import ExperimentResult
    from elastic_lm.experiments import Experiment

app = typer.Typer()
STYLES = {"good": "green", "best": "bold", "bad": "red", "plain": "", "faint": "dim"}  # of lines in a terminal
BEGINNINGS = {
    "scratch": "at step 0",
    "best": "as a fork of the best one before",
    "last": "as a fork of the last one before that has a score",
    "base": "as a fork of the base",
}


@app.command()
def experiment(
    plan: Annotated[
        str,
        typer.Argument(help="The plan's YAML file.", metavar="PLAN.YAML", autocompletion=completion.configs),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and tell the attempts; start nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs: what came of it; all else on stderr.")] = False,
) -> None:
    """Make attempts, one after another, until one reaches a target.

    The plan names a base config, the target, what may be spent, and what each attempt changes: docs/experiments.md. An attempt is
    a run from scratch, or a fork of one before. Given again, the command goes on wherever it was cut short. Ends with the tree of
    attempts and their scores, which is also a page in the experiment's folder.
    """
    told = functools.partial(say, file=sys.stderr) if as_json else say
    with told_errors():
        from elastic_lm.experiments import Experiment

        found = Experiment.open(plan, tell=lambda text: told(visible(text)), on_line=told if as_json else None)
        if dry_run:
            deliver(json.dumps(_prospects_json(found), indent=1) if as_json else "\n".join(_prospects(found)))
            return
        told(_headline(found))
        result = found.run()
    if as_json:
        deliver(json.dumps(result.as_json(), indent=1))
    else:
        _tell_result(result)
    raise typer.Exit(OF_VERDICT.get(result.verdict, Exit.FAILED))


# -- words -----------------------------------------------------------------------------------------------------------


def _tell_result(result: ExperimentResult) -> None:
    """The tree, then what it comes to."""
    from rich.console import Console
    from rich.text import Text

    from elastic_lm.experiment import tree
    from elastic_lm.monitor.progress import clock

    console = Console(highlight=False)
    plain = not console.encoding.startswith("utf")
    say("")
    for line, tone in tree.lines(result.attempts, result.target, plain=plain):
        if console.is_terminal:
            with contextlib.suppress(OSError, ValueError):  # as `say`: the result is in storage
                console.print(Text(visible(line), STYLES[tone]), soft_wrap=True)
        else:
            say(visible(line))
    say("")
    rows = [
        ("verdict", f"{result.verdict}: {result.message}"),
        ("spent", f"{result.tokens:,} tokens, trained for {clock(result.hours * 3600)}"),
        ("page", result.page or ""),
    ]
    say("\n".join(f"{name:>10}  {visible(value)}" for name, value in rows if value))


def _prospects(found: Experiment) -> Iterator[str]:
    """What would be made, a line each."""
    plan = found.plan
    yield _headline(found)
    yield f"Attempts after the base begin {BEGINNINGS[plan.parent]}."
    yield ""
    states = [attempt.state for attempt in found.attempts]
    rows = [("run", "tokens", "state", "changes"), *(_row(*each) for each in zip(found.prospects, states, strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for run, tokens, state, changed in rows:
        yield visible(f"{run:<{widths[0]}}  {tokens:>{widths[1]}}  {state:<{widths[2]}}  {changed}".rstrip())
    for prospect in found.prospects:
        if prospect.note is not None:
            yield f"{prospect.config.name}: {prospect.note}."
    yield ""
    yield f"{_total(found):,} tokens in all, if none reaches it before. Nothing was started."


def _row(prospect: Prospect, state: str) -> tuple[str, str, str, str]:
    tokens = "" if prospect.same_as is not None else f"{prospect.tokens:,}"
    changed = [f"{change.name}: {change.before} -> {change.after}" for change in prospect.changes]
    skip = [f"skip {start}:{stop}" for start, stop in prospect.planned.skip]
    return prospect.config.name, tokens, state, ", ".join([*changed, *skip]) or prospect.planned.told


def _total(found: Experiment) -> int:
    return sum(prospect.tokens for prospect in found.prospects if prospect.same_as is None)


def _headline(found: Experiment) -> str:
    return (
        f"Experiment {found.name}: {len(found.attempts)} attempts, {found.plan.wanted} wanted, {_budget_told(found)}."
    )


def _budget_told(found: Experiment) -> str:
    limits = [f"{limit:,.12g} {name}" for name, limit in found.plan.budget if limit is not None]
    return f"the budget {', '.join(limits)}" if limits else "no budget given"


def _prospects_json(found: Experiment) -> dict[str, object]:
    attempts = [
        {
            "number": prospect.planned.number,
            "run": prospect.config.name,
            "state": attempt.state,
            "tokens": prospect.tokens,
            "same_as": prospect.same_as,
            "note": prospect.note,
            "changes": {change.name: [change.before, change.after] for change in prospect.changes},
        }
        for prospect, attempt in zip(found.prospects, found.attempts, strict=True)
    ]
    return {"name": found.name, "target": str(found.plan.wanted), "tokens": _total(found), "attempts": attempts}
