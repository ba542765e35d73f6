"""Notices of nodes that are about to go: preemption, `ray drain-node`, the autoscaler's idle nodes.

Ray has no public call for this, so the one private call it takes stands here alone. A poll costs about 1 ms.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import ray

logger = logging.getLogger(__name__)

POLL_S = 0.5


def draining_nodes() -> dict[str, float]:
    """Draining nodes: node id (hex) -> deadline in unix seconds, 0 when there is none.    Source: Ray 2.60's global state."""
    state = ray._private.state.state
    state._connect_and_get_accessor()
    return {node_id: deadline_ms / 1000 for node_id, deadline_ms in state.get_draining_nodes().items()}


class DrainWatcher:
    """Calls `on_draining(node_id, deadline)` once for each node that begins to drain."""

    def __init__(self, on_draining: Callable[[str, float], None]) -> None:
        self._on_draining = on_draining
        self._known: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drain-watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                nodes = draining_nodes()
            except (RuntimeError, ray.exceptions.RayError) as error:
                logger.warning("Cannot ask for draining nodes (%s); a preemption now counts as a plain failure.", error)
                continue
            for node_id, deadline in nodes.items():
                if node_id not in self._known:
                    self._known.add(node_id)
                    self._on_draining(node_id, deadline)
