"""One writer at a time in a folder, so that an export does not write where a run that trains does."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from elastic_lm.errors import ConfigError


class FolderLock:
    """The kernel's lock on a file in it: it ends with its process, however that ends."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / ".lock"
        self._descriptor: int | None = None

    def take(self) -> None:
        """Raises: ConfigError when somebody has it."""
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise ConfigError(
                f"{self._file.parent} is being written by the run itself, or by another export; wait for its end"
            ) from error
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
