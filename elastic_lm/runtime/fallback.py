"""What a run ends with when its storage takes nothing any more: its last state and events, in folders of the nodes' own.

They are laid out as the run's folder in storage is, so that a copy of them there brings all of it back. Trade-off: one
member writes the whole state, because shares on several nodes would have to be gathered by hand.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError

from elastic_lm.config import RunConfig
from elastic_lm.errors import StorageError
from elastic_lm.storage import Storage

if TYPE_CHECKING:
    from elastic_lm.runtime.recorder import Recorder

logger = logging.getLogger(__name__)

ANSWER_S = 5.0  # members that are busy, or ill, are not asked


class Fallback:
    """`checkpoint.fallback` of a run. `meta` goes into the checkpoint's manifest."""

    def __init__(self, config: RunConfig, meta: dict[str, Any]) -> None:
        self._folder = f"{config.checkpoint.fallback}/runs/{config.name}"
        self._run_url = config.run_url
        self._timeout_s = config.checkpoint.timeout_s
        self._meta = meta

    def keep_state(self, workers: Sequence[Any], step: int) -> str:
        """Write the state of `step`.    Returns: what became of it, in a sentence."""
        problem = "no worker that answers has it"
        for worker in _holders(workers, step):
            try:
                host = ray.get(worker.keep.remote(f"file://{self._folder}", self._meta), timeout=self._timeout_s)
            except RayError as error:
                problem = str(error.cause if isinstance(error, RayTaskError) else error).splitlines()[0]
                logger.warning("The state of step %d could not be kept: %s", step, problem)
                continue
            return (
                f"the state of step {step} is on the node {host}, in {self._folder}: copy what is in there to "
                f"{self._run_url} before you give the same command again, which then goes on from it"
            )
        return f"the state of step {step} could not be kept in {self._folder} either: {problem}"

    def keep_events(self, recorder: Recorder) -> str:
        """Write the events that are not stored.    Returns: what became of them; nothing when all are."""
        try:
            num_events = recorder.keep_unstored(Storage.open(f"file://{self._folder}"))
        except StorageError as error:
            return f"the last events are lost: {error}"
        return (
            f"the last {num_events} events are on the head node, in {self._folder}, to be copied there as well"
            if num_events
            else ""
        )


def _holders(workers: Sequence[Any], step: int) -> list[Any]:
    """Those who say within a moment that they hold the state of this step."""
    asked = {worker.holds.remote(): worker for worker in workers}
    if not asked:
        return []
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    found = []
    for answer in answered:
        try:
            if ray.get(answer) == step:
                found.append(asked[answer])
        except RayError:
            continue  # it died; another may have it
    return found
