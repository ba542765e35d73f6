"""Commands about runs as experiments: a new one made of another, and a plan of attempts carried out."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_lm import cli_run, completion
from elastic_lm.errors import ConfigError
from elastic_lm.terminal import OF_VERDICT, Exit, bytes_told, deliver, say, told_errors, visible

if TYPE_CHECKING:
    from elastic_lm.experiment.fork import Draft
    from elastic_lm.experiment.loop import ExperimentResult
    from elastic_lm.experiment.rehearsal import Prospect
    from elastic_lm.experiments import Experiment

app = typer.Typer()
RunAtStep = Annotated[
    str,
    typer.Argument(
        help="RUN.YAML, the run's address or its name, and which checkpoint: else the newest.",
        metavar="RUN[@STEP]",
        autocompletion=completion.runs,
    ),
]


@app.command()
def fork(
    run: RunAtStep,
    name: Annotated[str, typer.Option(help="Name of the new run.")],
    storage: Annotated[str | None, typer.Option(help="Where it goes; else where its parent is.", metavar="URL")] = None,
    set_: cli_run.Overrides = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Batches to leave out, from the fork on.", metavar="START:STOP")
    ] = None,
) -> None:
    """Make a new run that goes on from a checkpoint of another.

    With its exact state: weights, moments and place in the order of samples. --set changes its config, also what would change a
    run's bits; what the state cannot take is refused. The parent may be training. Trains nothing.
    """
    with told_errors():
        from elastic_lm.experiment import fork as experiment
        from elastic_lm.run import Run
        from elastic_lm.run_address import split_step

        address, step = split_step(run)
        ranges = tuple(_batches(text) for text in skip or ())
        request = experiment.Request(Run.open(address).address, name, step, storage, set_ or (), ranges)
        made = experiment.fork(request, _tell_draft)
        say(f"Every byte was verified. Go on with: elastic-lm resume {made.url}")


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

    The plan names a base config, the target, what may be spent, and what each attempt changes: docs/experiments.md. An attempt is a
    run from scratch, or a fork of one before. Given again, the command goes on wherever it was cut short. Ends with the tree of
    attempts and their scores, which is also a page in the experiment's folder.
    """
    told = functools.partial(say, file=sys.stderr) if as_json else say
    with told_errors():
        from elastic_lm.experiments import Experiment

        found = Experiment.open(plan, tell=lambda text: told(visible(text)), on_line=told if as_json else None)
        if dry_run:
            deliver(json.dumps(_prospects_json(found), indent=1) if as_json else "\n".join(_prospects(found)))
            return
        told(
            f"Experiment {found.name}: {len(found.attempts)} attempts, wanted is {found.plan.wanted}, {_budget_told(found)}."
        )
        result = found.run()
    if as_json:
        deliver(json.dumps(result.as_json(), indent=1))
    else:
        _tell_result(result)
    raise typer.Exit(OF_VERDICT.get(result.verdict, Exit.FAILED))


# -- words -----------------------------------------------------------------------------------------------------------

STYLES = {"good": "green", "best": "bold", "bad": "red", "plain": "", "faint": "dim"}


def _tell_result(result: ExperimentResult) -> None:
    """The tree, then what it comes to."""
    from rich.console import Console
    from rich.text import Text

    from elastic_lm.experiment import tree

    console = Console(highlight=False)
    plain = not console.encoding.startswith("utf")
    say("")
    for line, tone in tree.lines(result.attempts, result.target, plain=plain):
        if console.is_terminal:
            console.print(Text(visible(line), STYLES[tone]), soft_wrap=True)
        else:
            say(visible(line))
    say("")
    rows = [
        ("verdict", f"{result.verdict}: {result.message}"),
        ("spent", f"{result.tokens:,} tokens, {result.hours:.2f} hours"),
        ("page", result.page or ""),
    ]
    say("\n".join(f"{name:>10}  {visible(value)}" for name, value in rows if value))


def _prospects(found: Experiment) -> Iterator[str]:
    """What would be made, a line each."""
    plan = found.plan
    begin = {"scratch": "from scratch", "best": "as a fork of the best one so far", "last": "as a fork of the one before",
             "base": "as a fork of the base"}  # fmt: skip
    yield f"Experiment {plan.name}: wanted is {plan.wanted}, {_budget_told(found)}."
    yield f"Attempts after the base begin {begin[plan.parent]}."
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


def _budget_told(found: Experiment) -> str:
    budget = found.plan.budget
    limits = [(budget.tokens, "tokens"), (budget.hours, "hours"), (budget.attempts, "attempts")]
    told = [f"{limit:,.12g} {what}" for limit, what in limits if limit is not None]
    return f"with at most {', '.join(told)}" if told else "without a limit to what it takes"


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


def _tell_draft(draft: Draft) -> None:
    parts = draft.origin.manifest.parts
    size = bytes_told(sum(part.size_bytes for part in parts))
    number = f"{len(parts)} part{'s' if len(parts) != 1 else ''}"
    say(f"Forking {draft.origin.name} at step {draft.origin.step:,} into {draft.config.run_url}: {number}, {size}.")
    for change in draft.lineage.changes:
        say(visible(f"  {change}"))
    if not any(change.identity for change in draft.lineage.changes):
        say("  Nothing that changes bits is changed.")
    if draft.note is not None:
        say(f"  {draft.note}")


def _batches(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise ConfigError(
            f"--skip {text!r} is no range of batches; write START:STOP, e.g. 500:520, of which STOP is not left out"
        )
    return int(found[1]), int(found[2])
