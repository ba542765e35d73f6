"""A job's claim on its run: made by the driver before it writes anything, and again by each of its coordinators.

All of them show the same token, so that a successor need not wait until its predecessor's claim expires.
"""

from __future__ import annotations

from collections.abc import Callable

import ray

from elastic_lm.config import RunConfig
from elastic_lm.events.log import last
from elastic_lm.ownership import Ownership
from elastic_lm.storage import Storage


def claim(
    config: RunConfig,
    token: str,
    *,
    on_waiting: Callable[[str], None] = lambda sentence: None,
) -> Ownership:
    """The run, for the job of this token.    Raises: OwnershipError when another job trains it; StorageError."""
    folder = Storage.open(config.run_url)
    return Ownership.acquire(
        folder,
        config.name,
        job_token=token,
        what=_place(),
        after=max((event.owner_epoch for event in last(folder.child("events"), 1)), default=0),
        on_waiting=on_waiting,
        on_superseded=lambda error: (
            None
        ),  # whoever holds the claim looks at it: a driver is outranked by its coordinator
    )


def _place() -> str:
    """Where the job is, in people's words."""
    if not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"job {context.get_job_id()} of the Ray cluster at {context.gcs_address}"
