"""Commands that are killed between two writes to storage."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic_lm.storage import Storage


class Killed(BaseException):
    """The process is gone."""


class Mortal:
    """Lets so many writing operations on a folder happen, and then none any more: as if the process had been killed.

    `late`: after the operation, and not before it. Claims are not counted: a thread makes them.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, below: str = "") -> None:
        self.left, self.late, self.count = 10**9, False, 0
        for verb in ("create", "write", "delete"):
            monkeypatch.setattr(Storage, verb, self._mortal(getattr(Storage, verb), below))

    def _mortal(self, real: Callable[..., None], below: str) -> Callable[..., None]:
        def operation(storage: Storage, path: str, *data: bytes) -> None:
            if not storage.url.startswith(below) or storage.url.endswith("/owner"):
                return real(storage, path, *data)
            self.count += 1
            self.left -= 1
            if self.left < 0 and (self.left < -1 or not self.late):
                raise Killed
            real(storage, path, *data)
            if self.left < 0:
                raise Killed

        return operation
