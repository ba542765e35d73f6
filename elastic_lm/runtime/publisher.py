"""The coordinator's part in a checkpoint: gather what the members have stored, write the manifest, delete old ones.

Invariant: a manifest is written only when every share of one attempt is there. Storage is waited for on a thread of its own,
one checkpoint after the other, so a slow one delays checkpoints and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import Manifest, Part
from elastic_lm.checkpoint.registry import Retention
from elastic_lm.control.events import Published
from elastic_lm.engine.digest import state_digest
from elastic_lm.errors import ElasticLMError
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)


@dataclass
class _Attempt:
    number: int
    step: int
    parts: list[Part] = field(default_factory=list)


class Publisher:
    """`meta` goes into every manifest. `deliver` gets `Published`, on the publisher's thread.

    `check` raises unless the owner of this epoch still owns the run.
    """

    def __init__(
        self,
        storage: Storage,
        retention: Retention,
        meta: dict[str, Any],
        deliver: Callable[[Published], None],
        *,
        owner_epoch: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._owner_epoch, self._check = owner_epoch, check
        self._storage, self._retention, self._meta, self._deliver = storage, retention, meta, deliver
        self._attempt: _Attempt | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publisher")
        self.newest: dict[str, str] = {}  # `url` and digests of what was published last

    def begin(self, number: int, step: int) -> None:
        """An attempt begins; whatever else was under way is given up."""
        self._attempt = _Attempt(number, step)

    def add(self, number: int, parts: tuple[Part, ...]) -> None:
        """A member's share is stored. May be called on any thread."""
        attempt = self._attempt
        if attempt is not None and attempt.number == number:
            attempt.parts.extend(parts)

    def publish(self, number: int) -> None:
        """All shares of this attempt are stored."""
        attempt = self._attempt
        assert attempt is not None and attempt.number == number
        self._thread.submit(self._publish, attempt)

    def close(self) -> None:
        """Wait for the manifest that is being written."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _publish(self, attempt: _Attempt) -> None:
        parts = tuple(sorted(attempt.parts, key=lambda part: part.name))
        digests = {"state": _digest(attempt.step, parts, ""), "weights": _digest(attempt.step, parts, "parameters/")}
        try:
            manifest = Manifest(attempt.step, parts, {**self._meta, "digest": digests}, self._owner_epoch)
            info = registry.publish(self._storage, manifest, check=self._check)
        except ElasticLMError as error:
            self._deliver(Published(attempt.number, False, f"{type(error).__name__}: {error}"))
            return
        except Exception as error:
            logger.exception("The manifest of step %d could not be written.", attempt.step)
            self._deliver(Published(attempt.number, False, f"{type(error).__name__}: {error}"))
            return
        self.newest = {"url": info.url, **digests}
        self._deliver(Published(attempt.number, True))  # before anything goes that could be asked for until it is told
        try:
            under_way = self._attempt
            spared = {attempt.step} if under_way is None else {attempt.step, under_way.step}
            registry.prune(self._storage, self._retention, spared=spared, check=self._check)
        except Exception as error:  # noqa: BLE001 - told; they are deleted after the next checkpoint
            logger.warning("Old checkpoints could not be deleted: %s", error)


def _digest(step: int, parts: tuple[Part, ...], prefix: str) -> str:
    entries = ((name, entry) for part in parts for name, entry in part.tensors.items() if name.startswith(prefix))
    return state_digest(step, [(name, entry.shape, entry.sha256) for name, entry in entries])
