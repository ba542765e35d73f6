"""The coordinator's part in a checkpoint: gather what the members have stored, write the manifest, delete old ones.

Invariant: a manifest is written only when every share of one attempt is there, and what became of it is told exactly once.
Storage is waited for on a thread of each attempt's own, which nobody waits for without a limit: a store that hangs keeps
neither later checkpoints back nor the end of the run. A manifest that was given up and is stored after all deletes nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from elastic_lm.checkpoint import registry, retention
from elastic_lm.checkpoint.layout import Manifest, Part
from elastic_lm.checkpoint.registry import Found
from elastic_lm.checkpoint.retention import Retention
from elastic_lm.control.events import Published
from elastic_lm.engine.digest import checkpoint_digests
from elastic_lm.errors import ElasticLMError
from elastic_lm.runtime.leftovers import Leftovers
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

CLOSE_S = 30.0


@dataclass
class _Attempt:
    number: int
    step: int
    loss: float | None = None
    parts: list[Part] = field(default_factory=list)
    thread: threading.Thread | None = None  # that writes the manifest
    given_up: bool = False
    told: bool = False


class Publisher:
    """`meta` goes into every manifest. `deliver` gets `Published`, on a thread of the publisher's.

    `check` raises unless the owner of this epoch still owns the run. It is asked for the step of the checkpoint whose manifest is
    to be written, or in whose place others go; for None before anything else goes. What is not `wanted` is in nobody's way.
    """

    def __init__(
        self,
        storage: Storage,
        retention: Retention,
        meta: dict[str, Any],
        deliver: Callable[[Published], None],
        *,
        owner_epoch: int = 0,
        check: Callable[[int | None], None] = lambda step: None,
        wanted: registry.Wanted = registry.any_of_them,
    ) -> None:
        self._owner_epoch, self._check, self._wanted = owner_epoch, check, wanted
        self._storage, self._retention, self._meta, self._deliver = storage, retention, meta, deliver
        self._attempt: _Attempt | None = None  # the one that is not given up
        self._leftovers = Leftovers(storage, self._step_under_way, partial(check, None))
        self._telling = threading.Lock()
        self._seen: dict[int, Found] = {}  # complete checkpoints
        self.newest_step = -1
        self.newest: dict[str, str] = {}  # `url` and digests of the newest that was published

    def begin(self, number: int, step: int, loss: float | None = None) -> None:
        """An attempt begins. `loss`: of the training before this step, if it is known."""
        self._attempt = _Attempt(number, step, loss)
        self._leftovers.begin_to_collect()

    def add(self, number: int, parts: tuple[Part, ...]) -> None:
        """A member's share is stored. May be called on any thread."""
        attempt = self._attempt
        if attempt is not None and attempt.number == number:
            attempt.parts.extend(parts)

    def publish(self, number: int) -> None:
        """All shares of this attempt are stored."""
        attempt = self._attempt
        assert attempt is not None and attempt.number == number
        attempt.thread = threading.Thread(
            target=self._publish, args=(attempt,), name=f"publish-{attempt.step}", daemon=True
        )
        attempt.thread.start()

    def abandon(self, number: int) -> None:
        """This attempt is given up."""
        attempt = self._attempt
        if attempt is not None and attempt.number == number:
            self._attempt, attempt.given_up = None, True
            if attempt.thread is None or attempt.told:  # otherwise its manifest may come, and name its parts
                self._leftovers.add(attempt.step)

    def _step_under_way(self) -> int | None:
        attempt = self._attempt
        return None if attempt is None or attempt.told else attempt.step

    def go_back(self, step: int | None) -> None:
        """The checkpoint of this step is the newest that can be restored, and nothing else that is known here is said to be."""
        self._seen = {seen: found for seen, found in self._seen.items() if step is not None and seen <= step}
        if self.newest_step != step:
            self.newest_step, self.newest = -1, {}

    def close(self, limit_s: float = CLOSE_S) -> None:
        """Wait for the manifest that is being written, and for old checkpoints to go; but not for ever."""
        attempt = self._attempt
        if attempt is not None and attempt.thread is not None:
            attempt.thread.join(limit_s)
            self._tell(
                attempt, f"its manifest was not stored within {limit_s:g} s of the run's end, and may be stored yet"
            )

    def _publish(self, attempt: _Attempt) -> None:
        parts = tuple(sorted(attempt.parts, key=lambda part: part.name))
        tensors = {name: entry for part in parts for name, entry in part.tensors.items()}
        digests = checkpoint_digests(attempt.step, tensors)
        meta = {**self._meta, "digest": digests} | ({} if attempt.loss is None else {"loss": attempt.loss})
        try:
            manifest = Manifest(attempt.step, parts, meta, self._owner_epoch)
            check = partial(self._check, attempt.step)
            info = registry.publish(self._storage, manifest, check=check, wanted=self._wanted)
        except Exception as error:
            if not isinstance(error, ElasticLMError):
                logger.exception("The manifest of step %d could not be written.", attempt.step)
            self._tell(attempt, f"{type(error).__name__}: {error}")
            if attempt.given_up:
                self._leftovers.add(attempt.step)
            return
        self._tell(attempt, None, {"url": info.url, **digests})  # before anything goes that is asked for until then
        self._prune(attempt)

    def _tell(self, attempt: _Attempt, error: str | None, newest: dict[str, str] | None = None) -> None:
        with self._telling:
            if attempt.told:
                return
            attempt.told = True
            if newest is not None and attempt.step > self.newest_step:
                self.newest_step, self.newest = attempt.step, newest
        self._deliver(Published(attempt.number, error is None, error))

    def _prune(self, attempt: _Attempt) -> None:
        if attempt.given_up:  # the run may be restoring one before it
            return
        self._leftovers.collect()
        under_way = self._attempt
        spared = {attempt.step} if under_way is None else {attempt.step, under_way.step}
        try:
            retention.prune(
                self._storage,
                self._retention,
                spared=spared,
                seen=self._seen,
                check=partial(self._check, attempt.step),
                wanted=self._wanted,
            )
        except Exception as error:  # noqa: BLE001 - told; they are deleted after the next checkpoint
            logger.warning("Old checkpoints could not be deleted: %s", error)
