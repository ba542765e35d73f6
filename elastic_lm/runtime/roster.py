"""Who serves a run: its workers by name, whichever coordinator or job started them; and how to end an actor for certain.

Workers outlive their coordinator, so that a later one goes on with what they hold in memory. Their names say which run they
belong to, and the fingerprint of what it trains: a worker that holds the state of other settings is not taken over.
Trade-off: whether an actor has been placed, where, and as which process is known to Ray, but it has no public call for it;
the one private call that this takes stands here alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from elastic_lm.runtime.cluster import NAMESPACE

logger = logging.getLogger(__name__)

FINGERPRINT_DIGITS = 12
REASSURE_S = 5.0
_NAME = re.compile(r"worker/(?P<run>.+)/(?P<fingerprint>[0-9a-f]+)/(?P<owner_epoch>\d+)/(?P<member_id>w\d+)")


@dataclass(frozen=True)
class Found:
    """A worker that is registered with Ray. `place`: its node's id and its process's, None while it waits for one.

    `fits`: what it trains is what this run trains.
    """

    member_id: str
    handle: Any
    place: tuple[str, int] | None
    fits: bool

    @property
    def is_ours(self) -> bool:
        """It has a process, and what that holds is of use."""
        return self.fits and self.place is not None


class Roster:
    """The workers of one run. `fingerprints`: of the run's identity, that of now first; none: whatever they train."""

    def __init__(self, run: str, *fingerprints: str) -> None:
        self._run, self._fingerprints = run, [each[:FINGERPRINT_DIGITS] for each in fingerprints]

    def name(self, member_id: str, owner_epoch: int) -> str:
        """Of a worker, in Ray. The epoch makes it one of its own: a frozen one may hold on to its name for long."""
        return f"worker/{self._run}/{self._fingerprints[0]}/{owner_epoch}/{member_id}"

    def found(self) -> list[Found]:
        """Everybody who is registered, the newest coordinator's first."""
        if not ray.is_initialized():
            return []  # Ray would start a cluster to look
        named = [_NAME.fullmatch(actor["name"]) for actor in ray.util.list_named_actors(all_namespaces=True)]
        ours = [match for match in named if match and match["run"] == self._run]
        looked = [self._look(match) for match in sorted(ours, key=lambda match: -int(match["owner_epoch"]))]
        return [found for found in looked if found is not None]

    def end_all(self) -> None:
        """End everybody, for certain: nobody is to serve the run any more."""
        for found in self.found():
            ray.kill(found.handle, no_restart=True)
            if found.place is not None:
                reap(*found.place)

    def _look(self, match: re.Match[str]) -> Found | None:
        try:
            handle = ray.get_actor(match.string, namespace=NAMESPACE)
        except ValueError:  # it is gone by now
            return None
        known = ray._private.state.actors(handle._actor_id.hex())
        place = (known["Address"]["NodeID"], known["Pid"]) if known.get("Pid") else None
        return Found(match["member_id"], handle, place, fits=match["fingerprint"] in self._fingerprints)


class Reassurance:
    """As long as it is entered, the run's workers are told now and then that there will be a coordinator.

    By the driver: a successor may take longer than workers wait, because it is slow to start, because storage is away, or
    because there is much to read. Trade-off: while a coordinator is there this says nothing new, for a call per worker.
    """

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reassurance", daemon=True)

    def __enter__(self) -> Reassurance:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join(timeout=REASSURE_S)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                for found in self._roster.found():
                    found.handle.reassure.remote()
            except Exception as error:  # noqa: BLE001 - told, and tried again: they wait for a word
                logger.warning("The workers cannot be told that there will be a coordinator: %s.", error)
            self._over.wait(REASSURE_S)


def reap(node_id: str, pid: int, title: str = "ray::Worker", grace_s: float = 0.0) -> ray.ObjectRef | None:
    """SIGKILL an actor's process from its own node: Ray's kill is a request, and a frozen process answers none.

    Args: `title`: what its title begins with, for the id may belong to somebody else by now. `grace_s`: how long it is waited for
    before.    Returns: what is ready when it is done, where that is on another node; else it is done.
    """
    if node_id == ray.get_runtime_context().get_node_id():
        _kill(pid, title, grace_s)
        return None
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node_id, soft=False)
    try:
        killing = ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
        reference: ray.ObjectRef = killing.remote(pid, title, grace_s)
    except RayError as error:
        logger.warning("Process %d on node %s may be left behind: %s.", pid, node_id, error)
        return None
    return reference


def _kill(pid: int, title: str, grace_s: float) -> bool:
    """Runs on the actor's node."""
    deadline = time.monotonic() + grace_s
    while _is_there(pid, title):
        if time.monotonic() >= deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            return True
        time.sleep(0.05)
    return False


def _is_there(pid: int, title: str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read().startswith(title.encode())
    return False
