"""Commands about a run that is there: look at it from its log, reach into it through its cluster.

`status`, `logs`, `report` and `export` need its storage only, from any machine; `scale`, `stop` and `drain` need the cluster that
trains it.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastic_lm.errors import ConfigError
from elastic_lm.terminal import say, told_errors

if TYPE_CHECKING:
    from elastic_lm.monitor.history import History
    from elastic_lm.run_address import RunAddress

FOLLOW_S = 1.0
LOOK_EVENTS = 5_000  # of the newest, for a quick look

app = typer.Typer()
Run = Annotated[
    str, typer.Argument(help="RUN.YAML, the run's address (STORAGE/runs/NAME), or its name.", metavar="RUN")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a field: a.b=value.", metavar="A.B=V")]


@app.command()
def status(run: Run, as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """How a run is doing, by its log: from any machine that sees its storage."""
    with told_errors():
        from elastic_lm.events.log import last
        from elastic_lm.monitor.history import History

        address = find(run)
        facts = _facts(address.name, History.of(last(address.log(), LOOK_EVENTS)))
    if as_json:
        say(json.dumps(facts))
    else:
        say(
            "\n".join(
                f"{name.replace('_', ' '):>14}  {_told(value)}" for name, value in facts.items() if value is not None
            )
        )


@app.command()
def logs(
    run: Run, follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run has finished.")] = False
) -> None:
    """What happened in a run, a line each."""
    with told_errors():
        from elastic_lm.events.log import read
        from elastic_lm.events.types import EventKind
        from elastic_lm.monitor.progress import news_of

        log = find(run).log()
        told = 0
        while True:
            finished = False
            for number, event in enumerate(read(log)):
                finished = event.kind is EventKind.RUN_FINISHED
                if number >= told and (news := news_of(event)) is not None:
                    say(news.text)
                told = max(told, number + 1)
            if finished or not follow:
                return
            time.sleep(FOLLOW_S)


@app.command()
def report(
    run: Run,
    out: Annotated[str | None, typer.Option(help="A file to write; else report.html in the run's folder.")] = None,
) -> None:
    """Write the run's report: one HTML file that needs nothing else."""
    with told_errors():
        from pathlib import Path

        from elastic_lm.events.log import read
        from elastic_lm.monitor import report as page

        address = find(run)
        log = address.log()
        if out is None:
            say(page.write(address.name, address.folder()))
            return
        try:
            Path(out).write_text(page.render(address.name, read(log)))
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}") from error
        say(out)


@app.command()
def export(
    run: Run,
    out: Annotated[
        str | None, typer.Option(help="FILE.parquet or FILE.csv; else metrics/steps.parquet in the run's folder.")
    ] = None,
) -> None:
    """Write the run's table of steps: a row for each, with its loss, time, tokens, workers and so on."""
    with told_errors():
        from elastic_lm.events.log import read
        from elastic_lm.monitor import table

        address = find(run)
        log = address.log()
        if out is None:
            out = table.write(address.name, address.folder())
        else:
            table.write_file(read(log), out)
    say(out)


@app.command()
def scale(
    run: Run, workers: Annotated[str, typer.Option(help="How many: MIN..MAX, or one number.", metavar="MIN..MAX")]
) -> None:
    """Change how many workers a run wants. They come and leave between two steps."""
    with told_errors():
        low, high = _range(workers)
        _command(run, "scale", {"min_workers": low, "max_workers": high})
    say(f"Asked for {low} to {high} workers.")


@app.command()
def stop(run: Run) -> None:
    """Stop a run after its running step, with a checkpoint. The command that trained it goes on."""
    with told_errors():
        _command(run, "stop", {"reason": "asked by a person"})
    say("Asked to stop.")


@app.command()
def drain(
    run: Run, node: Annotated[str, typer.Argument(help="The node's id, or its beginning.", metavar="NODE")]
) -> None:
    """Move a run's workers off a node between two steps, as a preemption notice does. A fault drill."""
    with told_errors():
        node_id = _command(run, "drain", {}, node=node)
    say(f"Asked the workers on node {node_id[:12]} to leave.")


def find(run: str) -> RunAddress:
    """The run and where it is stored; a bare name is asked of RAY_ADDRESS.    Raises: ConfigError, ClusterError."""
    from elastic_lm.run_address import RunAddress

    address = RunAddress.find(run)
    if address.storage is None and "RAY_ADDRESS" in os.environ:
        from elastic_lm.runtime import remote

        return RunAddress.at(remote.run_url(run))
    return address


# -- parts -----------------------------------------------------------------------------------------------------------


def _facts(name: str, history: History) -> dict[str, Any]:
    """What there is to say, for people and programs."""
    point = history.points[-1] if history.points else None
    _, rates = history.tokens_per_s(most_parts=10)
    return {
        "run": name,
        "verdict": history.verdict or "running",
        "message": history.message or None,
        "step": point.step + 1 if point else 0,
        "of": history.config.get("training", {}).get("steps"),
        "loss": point.fields["loss"] if point else None,
        "workers": history.world_sizes[-1][1] if history.world_sizes else 0,
        "tokens_per_s": rates[-1] if rates else None,
        "last_event": history.news[-1].message if history.news else None,
        "seconds_ago": time.time() - history.ended_s,
    }


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    try:
        found = int(low), int(high if dots else low)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(f"--workers {text!r} is no range of workers; write MIN..MAX with 1 <= MIN <= MAX, e.g. 2..6")
    return found


def _command(run: str, kind: str, arguments: dict[str, Any], *, node: str | None = None) -> str:
    """Leave a word for the run's coordinator.    Returns: the id of the node that `node` means."""
    from elastic_lm.run_address import RunAddress
    from elastic_lm.runtime import remote

    return remote.command(RunAddress.find(run).name, kind, arguments, node=node)
