"""Commands about a run's configuration: look at it whole, check it, describe it to an editor.

Nothing here starts anything: `show` of a run reads its storage, the others read a file at most.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastic_lm import cli_run
from elastic_lm.terminal import say, told_errors

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig

app = typer.Typer(no_args_is_help=True, help="Show, check and describe configs.")


@app.command()
def show(
    run: cli_run.Run,
    set_: cli_run.Overrides = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what differs from the defaults.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Print a config with every field, and what follows from it.

    Of a YAML file, or of a run as it was last trained. The output is itself a config that means the same.
    """
    with told_errors():
        from elastic_lm import config_text

        config = _load(run, set_ or ())
        values = config.model_dump(mode="json", exclude_defaults=changed)
        derived = _derived(config)
    if as_json:
        say(json.dumps({"config": values, "derived": derived}, indent=1))
    else:
        say("\n".join([config_text.dump(values), "# What follows from it:", *_rows(derived)]))


@app.command()
def validate(
    file: Annotated[str, typer.Argument(help="A run's YAML file.", metavar="RUN.YAML")],
    set_: cli_run.Overrides = None,
) -> None:
    """Check a config and tell all of its mistakes."""
    with told_errors():
        from elastic_lm.config import RunConfig

        config = RunConfig.load(file, set_ or ())
    say(f"{file} is valid.\n{config.describe()}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of configs, for editors.

    Store it (`elastic-lm config schema > run.schema.json`) and begin a config with the line

    # yaml-language-server: $schema=run.schema.json

    Editors with the YAML language server then complete names, show meanings and mark mistakes.
    """
    from elastic_lm.config_schema import schema as of_configs

    say(json.dumps(of_configs(), indent=1))


def _load(run: str, overrides: list[str] | tuple[()]) -> RunConfig:
    """What a file says, or what a run was last trained with."""
    if run.endswith((".yaml", ".yml")):
        from elastic_lm.config import RunConfig

        return RunConfig.load(run, overrides)
    return cli_run.find(run).config(overrides)


def _derived(config: RunConfig) -> dict[str, Any]:
    """What nobody wrote and everybody asks for."""
    from elastic_lm.model.spec import ModelSpec

    batch = config.batch
    model = config.model_spec(config.model.vocab_size or 0)
    derived = {
        "run_folder": config.run_url,
        "device": config.device,
        "samples_per_step": batch.samples,
        "tokens_per_step": batch.tokens,
        "tokens_in_all": batch.tokens * config.training.steps,
        "schedule_steps": config.schedule_steps,
        "context_tokens": model.max_tokens,
        "fingerprint": config.identity_fingerprint(),
    }
    if isinstance(model, ModelSpec):
        shape = asdict(model) | {"hidden": model.hidden_width}
        derived["model"] = {name: shape[name] for name in shape if name not in ("vocab_size", "max_tokens")}
    return derived


def _rows(derived: dict[str, Any]) -> Iterator[str]:
    """The derived values as YAML comments."""
    from elastic_lm.config_text import flatten

    for name, value in flatten(derived).items():
        match value:
            case bool():
                told = str(value).lower()
            case int():
                told = f"{value:,}"
            case _:
                told = str(value)
        yield f"#   {name.replace('_', ' '):18} {told[:12] if name == 'fingerprint' else told}"
