"""Commands about a run's configuration: begin one, look at it whole, check it, describe it to an editor.

Nothing here starts anything: `show` of a run reads its storage, the others read or write a file at most.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elastic_lm import cli_run
from elastic_lm.cli_estimate import with_shape
from elastic_lm.errors import ConfigError
from elastic_lm.terminal import deliver, say, told_errors

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig

app = typer.Typer(no_args_is_help=True, help="Show, check and describe configs.")


@app.command()
def show(
    run: cli_run.RunName,
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
        deliver(json.dumps({"config": values, "derived": derived}, indent=1))
    else:
        deliver("\n".join([config_text.dump(values), "# What follows from it:", *_rows(derived)]))


@app.command()
def validate(
    file: cli_run.RunFile,
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

    Store it with `elastic-lm config schema > run.schema.json`, and begin a config with the line
    `# yaml-language-server: $schema=run.schema.json`. Editors with the YAML language server then complete names, show
    meanings and mark mistakes.
    """
    from elastic_lm.config_schema import schema as of_configs

    deliver(json.dumps(of_configs(), indent=1))


def init(
    path: Annotated[str, typer.Argument(help="The file to write.", metavar="RUN.YAML")] = "my-run.yaml",
    name: Annotated[str | None, typer.Option(help="Name of the run; else that of the file.")] = None,
    preset: Annotated[str, typer.Option(help="A known shape of the model.")] = "mini",
    storage: Annotated[str, typer.Option(help="Where runs are kept.")] = ".",
    tokens: Annotated[str, typer.Option(help="Where the prepared corpus is, or will be.")] = "runs/tokens",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a config to start from, with every field explained.

    As it is, it trains a small model on a laptop; its first lines say how to prepare a corpus for it.
    """
    with told_errors():
        from elastic_lm import config_template
        from elastic_lm.config_text import is_yaml

        if not is_yaml(path):
            raise ConfigError(f"{path} does not end with .yaml, by which commands know a config; write to {path}.yaml")
        text = config_template.template(
            name=name or Path(path).stem, file=path, preset=preset, storage=storage, tokens=tokens
        )
        try:
            with open(path, "w" if force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise ConfigError(f"{path} is there already; choose another name, or replace it with --force") from error
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        say(
            f"Wrote {path}. Next, with your text in place of {config_template.SOURCES}:\n"
            f"  {config_template.prepare_command(preset, tokens)}\n"
            f"  {shlex.join(['elastic-lm', 'train', path])}"
        )


def _load(run: str, overrides: list[str] | tuple[()]) -> RunConfig:
    """What a file says, or what a run was last trained with."""
    from elastic_lm.config_text import is_yaml

    if is_yaml(run):
        from elastic_lm.config import RunConfig

        return RunConfig.load(run, overrides)
    from elastic_lm.run import Run

    return Run.open(run).address.config(overrides)


def _derived(config: RunConfig) -> dict[str, Any]:
    """What nobody wrote and everybody asks for."""
    from elastic_lm.model.spec import ModelSpec

    batch = config.batch
    config = with_shape(config, 0)
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
        shape = asdict(model) | {"hidden": model.hidden_width, "num_kv_heads": model.num_kv_heads or model.num_heads}
        derived["model"] = {name: shape[name] for name in shape if name not in ("vocab_size", "max_tokens")}
    return derived


def _rows(derived: dict[str, Any]) -> Iterator[str]:
    """The derived values as YAML comments."""
    from elastic_lm.config_text import flatten

    values = flatten(derived)
    width = max(map(len, values))
    for name, value in values.items():
        match value:
            case bool():
                told = str(value).lower()
            case int():
                told = f"{value:,}"
            case _:
                told = str(value)
        yield f"#   {name.replace('_', ' '):{width}}  {told[:12] if name == 'fingerprint' else told}"
