"""Which run a person means: by the YAML file that it is trained from, by its address, or by its name alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.config_text import is_yaml
from elastic_lm.errors import ConfigError, NotFoundError, StorageError
from elastic_lm.events.log import read
from elastic_lm.events.types import EventKind
from elastic_lm.storage import Storage

EVENTS = "events"
LOCAL_RUNS = "runs"  # in the current directory


def split_step(text: str) -> tuple[str, int | None]:
    """`RUN@STEP` as (run, step); without a step as (run, None).    Raises: ConfigError when that is no step.

    An @ within an address is no step's: only what follows the last /.
    """
    run, at, step = text.rpartition("@")
    if not at or "/" in step or is_yaml(step):
        return text, None
    number = step.replace(",", "").replace("_", "")
    if not (run and number.isascii() and number.isdecimal()):
        raise ConfigError(f"{text!r} is no run at a step; write RUN@STEP, e.g. {run or 'my-run'}@1000, or RUN alone")
    return run, int(number)


@dataclass(frozen=True)
class RunAddress:
    """A run's name and, when it is known, the folder that holds its log and checkpoints."""

    name: str
    storage: Storage | None = None

    @classmethod
    def find(cls, text: str) -> RunAddress:
        """From `RUN.yaml`, `s3://bucket/prefix/runs/NAME` or a folder, or a bare name.    Raises: ConfigError.

        A bare name is that of a folder in `./runs`, if there is one; else nothing says where the run is stored.
        """
        if is_yaml(text):
            config = RunConfig.load(text)
            return cls(config.name, Storage.open(config.run_url))
        if "://" in text or "/" in text or Path(text).is_dir():
            return cls.at(text)
        local = Path(LOCAL_RUNS, text)
        return cls.at(str(local)) if text and local.is_dir() else cls(text)

    @classmethod
    def at(cls, url: str) -> RunAddress:
        """The run in this folder.    Raises: ConfigError when it cannot be one."""
        try:
            storage = Storage.open(url)
        except StorageError as error:
            raise ConfigError(str(error)) from error
        return cls(storage.url.rstrip("/").rpartition("/")[2], storage)

    def folder(self) -> Storage:
        """Where the run is stored.    Raises: ConfigError when its name alone is known."""
        if self.storage is None:
            raise ConfigError(
                f"{self.name!r} alone does not say where the run is stored; give its YAML file or its address "
                f"(STORAGE/runs/{self.name}), or set RAY_ADDRESS to the cluster that trains it"
            )
        return self.storage

    def log(self) -> Storage:
        """The folder of its event log.    Raises: ConfigError, NotFoundError."""
        folder = self.folder()
        log = folder.child(EVENTS)
        if not log.list():
            if folder.exists(CONFIG_FILE):
                raise NotFoundError(
                    f"{folder.url} holds a run that has not begun; begin it with: elastic-lm resume {folder.url}"
                )
            run, at, step = self.name.rpartition("@")
            hint = (
                f"; this command is about the whole run: leave @{step} out" if run and at and step.isdecimal() else ""
            )
            raise NotFoundError(f"there is no run at {folder.url}: no event log in it{hint}")
        return log

    def config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """What the run is to go on with: what it was last trained with, with `a.b=value` overrides on top.

        Raises: ConfigError when it is damaged, or belongs to a run that is stored elsewhere; NotFoundError.
        """
        folder, config = self.folder(), self.stored_config(overrides)
        if Storage.open(config.run_url).url != folder.url:
            raise ConfigError(
                f"the config in {folder.url} is of the run at {config.run_url}; if it was moved, say where it is now: "
                f"--set storage=... --set name=..."
            )
        return config

    def stored_config(self, overrides: Sequence[str] = ()) -> RunConfig:
        """The same wherever the run is stored now.    Raises: ConfigError when it is damaged; NotFoundError."""
        folder = self.folder()
        try:
            text, source = folder.read(CONFIG_FILE).decode(errors="replace"), f"{folder.url}/{CONFIG_FILE}"
            return RunConfig.from_yaml(text, source, overrides)
        except NotFoundError:
            return self._logged_config().replace(*overrides)

    def _logged_config(self) -> RunConfig:
        """Of a run whose config file is gone."""
        found = None
        for event in read(self.log()):
            if event.kind is EventKind.RUN_STARTED:
                found = event.fields.get("config")
        if not isinstance(found, dict):
            raise NotFoundError(f"neither {CONFIG_FILE} nor the event log in {self.folder().url} holds a config")
        return RunConfig(**found)
