"""The `submit` command: a run as a Ray job. `logs`, `status` and `stop` with --address reach such a job (cli_run.py)."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from elastic_lm import __version__
from elastic_lm.cli_run import Overrides, RunFile
from elastic_lm.terminal import INTERRUPTED, deliver, say, told_errors, visible

app = typer.Typer()
NOT_FOUND = 127  # of the shell that was to begin `elastic-lm train`
ADDRESS_HELP = "Of the cluster's job server, e.g. http://HEAD:8265."


@app.command()
def submit(
    config: RunFile,
    address: Annotated[str, typer.Option(help=ADDRESS_HELP, envvar="RAY_API_SERVER_ADDRESS", metavar="URL")],
    set_: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print what it prints until it has ended.")] = False,
) -> None:
    """Train a run as a Ray job, which needs this terminal no longer.

    The job has the run's name and takes along the configuration and the modules of this folder that it names. The cluster must
    have this version of elastic-lm. With --follow, the exit code is the job's. A cluster with tokens takes the one in
    RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token.
    """
    with told_errors():
        from elastic_lm.config import RunConfig
        from elastic_lm.runtime.jobs import Jobs

        chosen = RunConfig.load(config, set_ or ())
        jobs = Jobs(address)
        say(chosen.describe())
        run = jobs.submit(chosen)
        say(f"Job {run} begins at {jobs.address}, the run is kept in {chosen.run_url}.")
        if chosen.run_url.startswith("file://"):
            say("That is a folder of the cluster's nodes: every one of them must see it, and this machine may not.")
        if not follow:
            say(f"elastic-lm logs -f {run} --address {jobs.address} tells how it goes on.")
            return
    end_with(address, run)


def end_with(address: str, run: str) -> NoReturn:
    """Print what a job prints, and end as it ends."""
    with told_errors():
        from elastic_lm.runtime.jobs import Jobs

        jobs = Jobs(address)
        try:
            for piece in jobs.follow(run, on_away=lambda sentence: say(sentence, sys.stderr)):
                deliver(visible(piece, line_breaks=True), end="")
        except KeyboardInterrupt:
            say(
                f"\nThe job goes on. elastic-lm logs -f {run} --address {address} looks again, stop in its place ends it."
            )
            raise typer.Exit(INTERRUPTED) from None
        code = jobs.exit_code(run)
    if code == NOT_FOUND:
        say(f"elastic-lm: {_not_found()}", sys.stderr)
    raise typer.Exit(code)


def log(address: str, run: str, *, follow: bool) -> None:
    """What `logs --address` does."""
    from elastic_lm.run_address import RunAddress
    from elastic_lm.runtime.jobs import Jobs

    name = RunAddress.find(run).name
    if follow:
        end_with(address, name)
    jobs = Jobs(address)
    deliver(visible(jobs.log(name), line_breaks=True), end="")
    if jobs.exit_code(name) == NOT_FOUND:
        say(f"elastic-lm: {_not_found()}", sys.stderr)


def status(address: str, run: str) -> dict[str, object]:
    """What `status --address` tells: the job's state beside the run's name."""
    from elastic_lm.run_address import RunAddress
    from elastic_lm.runtime.jobs import Jobs

    jobs = Jobs(address)
    details = jobs.details(RunAddress.find(run).name)
    code = jobs.exit_code(details.submission_id) if details.status.is_terminal() else None
    return {
        "run": details.submission_id,
        "job": details.status.value,
        "exit_code": code,
        "message": _not_found() if code == NOT_FOUND else details.message,
        "stored_in": (details.metadata or {}).get("run_url"),
    }


def stop(address: str, run: str) -> None:
    """What `stop --address` does."""
    from elastic_lm.run_address import RunAddress
    from elastic_lm.runtime.jobs import Jobs

    Jobs(address).stop(RunAddress.find(run).name)


def _not_found() -> str:
    return (
        f"exit code {NOT_FOUND}: the cluster's head has no elastic-lm on its PATH; install elastic-lm "
        f"{__version__} on all nodes where their `ray start` finds it, or begin them from an image that has it, and submit again"
    )
