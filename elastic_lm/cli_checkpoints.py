"""Commands about the checkpoints of a run, from any machine that sees its storage."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from elastic_lm import cli_run
from elastic_lm.errors import ConfigError, DataError, NotFoundError
from elastic_lm.terminal import deliver, say, told_errors

if TYPE_CHECKING:
    from elastic_lm.checkpoint.registry import Found
    from elastic_lm.storage import Storage

app = typer.Typer(no_args_is_help=True, help="List, verify and prune a run's checkpoints.")


@app.command("list")
def list_(run: cli_run.RunName, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """All checkpoints of a run, by their manifests."""
    with told_errors():
        from elastic_lm.experiment import standing
        from elastic_lm.experiment.rewinds import Rewinds

        folder = _folder(run)
        found = standing.found(folder, Rewinds.if_readable(folder))
    if as_json:
        deliver(json.dumps([asdict(checkpoint) for checkpoint in found], indent=1))
    elif not found:
        say(f"{folder.url} has no checkpoint.")
    else:
        deliver("\n".join(map(_row, found)))


@app.command()
def verify(
    run: cli_run.RunName,
    step: Annotated[int | None, typer.Option(help="Of this step only.", metavar="STEP")] = None,
) -> None:
    """Read checkpoints whole and check every byte. Changes nothing.

    Exit code 3 when one is damaged, 2 when one is of another version of the format.
    """
    with told_errors():
        from elastic_lm.checkpoint import registry
        from elastic_lm.errors import CheckpointError, NotFoundError

        folder = _folder(run)
        found = [checkpoint for checkpoint in registry.found(folder) if step in (None, checkpoint.step)]
        if not found:
            raise ConfigError(
                f"{folder.url} has no checkpoint{'' if step is None else f' of step {step}'}; see `checkpoints list`"
            )
        num_damaged = num_foreign = 0
        for checkpoint in found:
            reason = checkpoint.reason
            if checkpoint.state == "complete":
                try:
                    registry.verified(folder, checkpoint.step)
                except (CheckpointError, NotFoundError) as error:
                    reason = str(error)
            num_damaged += reason is not None and checkpoint.state in ("complete", "damaged")
            num_foreign += checkpoint.state == "other version"
            say(f"{checkpoint.step:>10,}  {reason or 'every byte is as it was written'}")
        if num_damaged:
            raise DataError(
                f"{num_damaged} of {len(found)} checkpoints are damaged; a resumed run passes them over and goes on from the "
                "newest that is whole"
            )
        if num_foreign:
            raise CheckpointError(
                f"{num_foreign} of {len(found)} checkpoints are of another version of the format; verify them with the version "
                "of elastic-lm that wrote them"
            )


@app.command()
def prune(
    run: cli_run.RunName,
    keep: Annotated[int, typer.Option(min=1, help="Newest complete checkpoints that stay.")],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Those of every multiple of this stay, too.", metavar="STEPS")
    ] = None,
    keep_best: Annotated[int, typer.Option(min=0, help="So many with the lowest training loss stay, too.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
) -> None:
    """Delete old checkpoints, and what unfinished ones have left.

    What damaged ones have left goes, too. Of a run that a loss spike stops or sends back, one from
    before it stays, and the next one.
    """
    with told_errors():
        from elastic_lm.checkpoint import retention
        from elastic_lm.experiment.rewinds import Rewinds

        folder, chosen = _folder(run), retention.Retention(keep, keep_every, keep_best, _reach_steps(run))
        deleted = retention.prune(folder, chosen, dry_run=dry_run, wanted=Rewinds.load(folder).keep)
    what = ", ".join(f"{step:,}" for step in deleted) or "nothing"
    say(f"{'Would delete' if dry_run else 'Deleted'} the checkpoints of these steps: {what}.")


def _reach_steps(run: str) -> int | None:
    """How far the run may go back; None: it does not, or nobody knows."""
    from elastic_lm.experiment.rewinds import retention_of
    from elastic_lm.run import Run

    try:
        return retention_of(Run.open(run).config).reach_steps
    except (ConfigError, NotFoundError):
        return None


def _folder(run: str) -> Storage:
    """Where the run is stored.    Raises: ConfigError, NotFoundError when there is none."""
    from elastic_lm.checkpoint import registry
    from elastic_lm.run import Run

    address = Run.open(run).address
    if not registry.listed(address.folder()):  # a fork has one before it has a log
        address.log()
    return address.folder()


def _row(checkpoint: Found) -> str:
    begin = f"{checkpoint.step:>10,}  {checkpoint.state:13}  "
    if checkpoint.size_bytes is None or checkpoint.reason is not None:
        return f"{begin}{checkpoint.reason}"
    loss = "" if checkpoint.loss is None else f"  loss {checkpoint.loss:.4f}"
    return f"{begin}{checkpoint.size_bytes / 1e6:>12,.1f} MB{loss}"
