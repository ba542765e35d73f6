"""Which run a person means: by the YAML file that it is trained from, by its address, or by its name alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError, NotFoundError, StorageError
from elastic_lm.storage import Storage

EVENTS = "events"


@dataclass(frozen=True)
class RunAddress:
    """A run's name and, when it is known, the folder that holds its log and checkpoints."""

    name: str
    storage: Storage | None = None

    @classmethod
    def find(cls, text: str) -> RunAddress:
        """From `RUN.yaml`, `s3://bucket/prefix/runs/NAME` or a folder, or a bare name.    Raises: ConfigError."""
        if text.endswith((".yaml", ".yml")):
            config = RunConfig.load(text)
            return cls(config.name, Storage.open(config.run_url))
        if "://" in text or "/" in text or Path(text).is_dir():
            try:
                storage = Storage.open(text)
            except StorageError as error:
                raise ConfigError(str(error)) from error
            return cls(storage.url.rstrip("/").rpartition("/")[2], storage)
        return cls(text)

    def log(self) -> Storage:
        """The folder of its event log.    Raises: ConfigError, NotFoundError."""
        if self.storage is None:
            raise ConfigError(
                f"{self.name!r} alone does not say where the run is stored; give its YAML file, or its address "
                f"(STORAGE/runs/{self.name})"
            )
        log = self.storage.child(EVENTS)
        if not log.list():
            raise NotFoundError(f"there is no run at {self.storage.url}: no event log in it")
        return log
