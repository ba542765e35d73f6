"""What Ray knows of nodes: which are about to go (preemption, `ray drain-node`, the autoscaler's idle nodes), and which are dead.

Trade-off: the list of draining nodes is short and is looked at twice a second, at about 1 ms each; Ray has no public call
for it, so the one private call it takes stands here alone. The list of all nodes is long on a large cluster and is fetched
only for as long as somebody asks after one: where a worker was just lost, was it the node?
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import ray

logger = logging.getLogger(__name__)

POLL_S = 0.5
ASKED_S = 30.0  # with its default health checks Ray needs 13 s to give a node up


def draining_nodes() -> dict[str, float]:
    """Draining nodes: node id (hex) -> deadline in unix seconds, 0 when there is none.    Source: Ray 2.60's global state."""
    state = ray._private.state.state
    state._connect_and_get_accessor()
    return {node_id: deadline_ms / 1000 for node_id, deadline_ms in state.get_draining_nodes().items()}


class NodeWatcher:
    """Tells of nodes from a thread of its own: `on_draining(node_id, deadline)` once for each node that begins to drain, and
    `on_lost(node_id)` once for each that is dead and was asked after.
    """

    def __init__(self, on_draining: Callable[[str, float], None], on_lost: Callable[[str], None]) -> None:
        self._on_draining, self._on_lost = on_draining, on_lost
        self._draining: set[str] = set()
        self._asked: dict[str, float] = {}  # node id -> when nobody asks any more
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="node-watcher", daemon=True)
        self._thread.start()

    def ask_after(self, node_id: str) -> None:
        """Tell if this node turns out to be dead within the next half minute."""
        with self._lock:
            self._asked[node_id] = time.monotonic() + ASKED_S

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self._look()
            except (RuntimeError, ray.exceptions.RayError) as error:
                logger.warning("Cannot ask Ray for its nodes (%s); a preemption now counts as a plain failure.", error)

    def _look(self) -> None:
        for node_id, deadline in draining_nodes().items():
            if node_id not in self._draining:
                self._draining.add(node_id)
                self._on_draining(node_id, deadline)
        now = time.monotonic()
        with self._lock:
            self._asked = {node_id: until for node_id, until in self._asked.items() if now < until}
            asked = set(self._asked)
        if not asked:
            return
        for node_id in asked - {node["NodeID"] for node in ray.nodes() if node["Alive"]}:
            with self._lock:
                del self._asked[node_id]
            self._on_lost(node_id)
