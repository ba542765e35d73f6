"""Commands about a run that is there: words around `Run` (run.py), which does what they say.

`status`, `logs`, `report` and `export` need its storage only, from any machine; `scale`, `stop` and `drain` need the
cluster that trains it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from elastic_lm import completion
from elastic_lm.errors import ConfigError
from elastic_lm.terminal import deliver, say, told_errors, visible

app = typer.Typer()
RunName = Annotated[
    str,
    typer.Argument(
        help="RUN.YAML, the run's address (STORAGE/runs/NAME), or its name.",
        metavar="RUN",
        autocompletion=completion.runs,
    ),
]
RunAtStep = Annotated[
    str,
    typer.Argument(
        help="RUN.YAML, the run's address or its name; @STEP for another checkpoint than the newest.",
        metavar="RUN[@STEP]",
        autocompletion=completion.runs,
    ),
]
RunFile = Annotated[
    str, typer.Argument(help="The run's YAML file.", metavar="RUN.YAML", autocompletion=completion.configs)
]
JobServer = Annotated[
    str | None, typer.Option("--address", help="Ask the job server there for the run's job.", metavar="URL")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="Override a field: a.b=value.", metavar="A.B=V")]


@app.command()
def status(
    run: RunName,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    address: JobServer = None,
) -> None:
    """Tell how a run is doing, by its log.

    From any machine that sees its storage. With --address, how the job that `submit` began is doing.
    """
    with told_errors():
        from elastic_lm import cli_jobs
        from elastic_lm.run import Run

        facts = asdict(Run.open(run).status()) if address is None else cli_jobs.status(address, run)
    if as_json:
        deliver(json.dumps(facts))
    else:
        deliver(
            "\n".join(
                f"{name.replace('_', ' '):>14}  {_told(value)}" for name, value in facts.items() if value is not None
            )
        )


@app.command()
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run has finished.")] = False,
    address: JobServer = None,
) -> None:
    """Tell what happened in a run, a line each.

    With --address, what the job that `submit` began has printed; followed, it gives its exit code too.
    """
    with told_errors():
        if address is not None:
            from elastic_lm import cli_jobs

            cli_jobs.log(address, run, follow=follow)
            return
        from elastic_lm.monitor.progress import news_of
        from elastic_lm.run import Run

        for event in Run.open(run).events(follow=follow):
            if (news := news_of(event)) is not None:
                deliver(visible(news.text, line_breaks=True))


@app.command()
def report(
    run: RunName,
    out: Annotated[str | None, typer.Option(help="A file to write; else report.html in the run's folder.")] = None,
) -> None:
    """Write the run's report, an HTML file that stands alone."""
    with told_errors():
        from elastic_lm.run import Run

        say(Run.open(run).report(out))


@app.command()
def export(
    run: RunName,
    out: Annotated[
        str | None,
        typer.Option(
            help="FILE.parquet or FILE.csv; else metrics/steps.parquet in the run's folder. With --format, a folder."
        ),
    ] = None,
    to: Annotated[
        str | None, typer.Option(help="Fill a tracker in its place: tensorboard or wandb.", metavar="TRACKER")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="Write the model in its place: hf.", metavar="FORMAT")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="With --to: override a field, e.g. tracking.wandb_project=P.", metavar="A.B=V"),
    ] = None,
) -> None:
    """Write the run's table of steps, or its model.

    A row for each step, with its loss, time, tokens, workers and so on. With --to, write all steps so far into TensorBoard or
    Weights & Biases as the run's config says; nothing comes to be there twice. With --format hf, write the newest checkpoint
    to the folder --out, which Hugging Face's transformers loads: as Llama, Qwen3, GPT-2 or BERT.
    """
    with told_errors():
        from elastic_lm.run import Run

        if format_ is not None:
            _export_model(run, format_, out, to)
        elif to is None:
            if set_:
                raise ConfigError("--set changes where --to TRACKER writes; give both, or neither")
            say(Run.open(run).export(out))
        else:
            if out is not None:
                raise ConfigError("--out names a file for the table, and --to a tracker; give one of the two")
            Run.open(run).refill(to, set_ or ())
            say(f"Filled {to}.")


@app.command()
def generate(
    run: RunAtStep,
    prompt: Annotated[str, typer.Argument(help="A text that is to be continued; may be empty.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="At most so many.", metavar="N")] = 128,
    temperature: Annotated[
        float, typer.Option(help="Below 1 more probable tokens, above 1 others; 0: the best.")
    ] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Of the K most probable tokens only.", metavar="K")] = None,
    top_p: Annotated[float, typer.Option(help="Of the most probable ones that sum to P only.", metavar="P")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed, the same text.")] = 0,
) -> None:
    """Continue a text with the run's newest checkpoint, or another.

    On this machine's CPU, also while the run trains. Of a run with the masked objective: fill in each <|mask|> of the text.
    """
    with told_errors():
        from elastic_lm.run import Run
        from elastic_lm.run_address import split_step

        name, step = split_step(run)
        pieces = Run.open(name).generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            step=step,
        )
        for piece in pieces:
            deliver(visible(piece, line_breaks=True), end="")
        deliver("")


@app.command()
def scale(
    run: RunName, workers: Annotated[str, typer.Option(help="How many: MIN..MAX, or one number.", metavar="MIN..MAX")]
) -> None:
    """Change how many workers a run wants.

    They come and leave between two steps.
    """
    with told_errors():
        from elastic_lm.run import Run

        low, high = _range(workers)
        Run.open(run).scale(low, high)
    say(f"Asked for {low} to {high} workers.")


@app.command()
def stop(run: RunName, address: JobServer = None) -> None:
    """Stop a run after its running step, with a checkpoint.

    The command that trained it goes on from there. With --address, through the job that `submit` began.
    """
    with told_errors():
        from elastic_lm import cli_jobs
        from elastic_lm.run import Run

        if address is None:
            Run.open(run).stop()
        else:
            cli_jobs.stop(address, run)
    say("Asked to stop.")


@app.command()
def drain(
    run: RunName, node: Annotated[str, typer.Argument(help="The node's id, or its beginning.", metavar="NODE")]
) -> None:
    """Move a run's workers off a node: a fault drill.

    They leave between two steps, as they do on a preemption notice.
    """
    with told_errors():
        from elastic_lm.run import Run

        node_id = Run.open(run).drain(node)
    say(f"Asked the workers on node {node_id[:12]} to leave.")


# -- parts -----------------------------------------------------------------------------------------------------------


def _told(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4f}" if value < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _export_model(run: str, format_: str, out: str | None, to: str | None) -> None:
    from elastic_lm.run import Run

    if format_ != "hf":
        raise ConfigError(f"--format {format_!r} is unknown; write --format hf, or leave it out for the table of steps")
    if out is None or to is not None:
        raise ConfigError("--format hf writes a model to a folder; name it with --out FOLDER, without --to")
    step = Run.open(run).export_model(out)
    say(f"Wrote the model of step {step} to {out}: transformers loads it by that name.")


def _range(text: str) -> tuple[int, int]:
    low, dots, high = text.partition("..")
    try:
        found = int(low), int(high if dots else low)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise ConfigError(f"--workers {text!r} is no range of workers; write MIN..MAX with 1 <= MIN <= MAX, e.g. 2..6")
    return found
