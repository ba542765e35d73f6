"""`fork`: a new run made of another, and what is changed in it told before anything is written."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_lm import cli_run
from elastic_lm.errors import ConfigError
from elastic_lm.terminal import bytes_told, say, told_errors, visible

if TYPE_CHECKING:
    from elastic_lm.experiment.fork import Draft

app = typer.Typer()


@app.command()
def fork(
    run: cli_run.RunAtStep,
    name: Annotated[str, typer.Option(help="Name of the new run.")],
    storage: Annotated[str | None, typer.Option(help="Where it goes; else where its parent is.", metavar="URL")] = None,
    set_: cli_run.Overrides = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Batches to leave out, from the fork on.", metavar="START:STOP")
    ] = None,
) -> None:
    """Make a new run that goes on from a checkpoint of another.

    With its exact state: weights, moments and place in the order of samples. --set changes its config, also what would change a
    run's bits. With another shape of the model its weights are kept, and how new ones begin is told; what the state cannot take
    is refused. The parent may be training. Trains nothing.
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


def _tell_draft(draft: Draft) -> None:
    parts = draft.origin.manifest.parts
    size = bytes_told(sum(part.size_bytes for part in parts))
    number = f"{len(parts)} part{'s' if len(parts) != 1 else ''}"
    say(f"Forking {draft.origin.name} at step {draft.origin.step:,} into {draft.config.run_url}: {number}, {size}.")
    for change in draft.lineage.changes:
        say(visible(f"  {change}"))
    for rewind in draft.lineage.parent.rewinds:
        say(visible(f"  {draft.origin.name} had {rewind}."))
    if not any(change.identity for change in draft.lineage.changes):
        say("  Nothing that changes bits is changed.")
    if (account := draft.lineage.surgery) is not None:
        for line in (*account.table(), account.effect):
            say(visible(f"  {line}"))
    if draft.note is not None:
        say(f"  {draft.note}")


def _batches(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found is None:
        raise ConfigError(
            f"--skip {text!r} is no range of batches; write START:STOP, e.g. 500:520, of which STOP is not left out"
        )
    return int(found[1]), int(found[2])
