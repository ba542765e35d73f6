"""What attempts at a checkpoint have stored that were given up, and the thread that deletes it.

Invariant: nothing is deleted at a step of which a checkpoint is being written, for an attempt writes the same parts under the
same names. A delete that is on its way when one begins could still take such a part: so a manifest is written only when all
of its parts are seen to be there. Trade-off: what is stored after a look stays until a newer checkpoint is complete.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from elastic_lm.checkpoint import retention
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)


class Leftovers:
    """By step. `step_under_way` tells the step that is being written now, if any; `check` raises unless this is still the run's
    owner, for another one may be writing.
    """

    def __init__(self, storage: Storage, step_under_way: Callable[[], int | None], check: Callable[[], None]) -> None:
        self._storage, self._step_under_way, self._check = storage, step_under_way, check
        self._steps: set[int] = set()
        self._collecting = threading.Lock()

    def add(self, step: int) -> None:
        """An attempt at this step was given up."""
        self._steps.add(step)

    def begin_to_collect(self) -> None:
        """In the background."""
        if self._steps and not self._collecting.locked():
            threading.Thread(target=self.collect, name="leftovers", daemon=True).start()

    def collect(self) -> None:
        """Delete what can be deleted, unless somebody is at it. What storage refuses is tried again the next time."""
        if not self._collecting.acquire(blocking=False):
            return
        try:
            for step in sorted(self._steps):
                if step != self._step_under_way():
                    self._check()
                    retention.collect(self._storage, step)
                    self._steps.discard(step)
        except Exception as error:  # noqa: BLE001 - told; nothing depends on it
            logger.warning("Leftovers of a checkpoint that was given up could not be deleted: %s", error)
        finally:
            self._collecting.release()
