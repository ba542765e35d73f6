"""A job's claim on its run: made by the driver before it writes anything, and again by each of its coordinators.

All of them show the job's token, so that a successor need not wait until its predecessor's claim expires. The token says
which job of which Ray cluster it is: when that cluster says that the job has ended, nobody need wait either. Trade-off:
Ray has no public call for its own id and for the jobs that have ended; the two private ones that this takes stand here alone.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable

import ray

from elastic_lm.config import RunConfig
from elastic_lm.errors import AlreadyExistsError, NotFoundError
from elastic_lm.events.log import last
from elastic_lm.ownership import FOLDER, Owner, Ownership
from elastic_lm.storage import Storage

BIRTH = "birth"


def new_token() -> str:
    """A job's own: CLUSTER/JOB/SECRET."""
    secret = secrets.token_hex(8)
    return f"{_cluster_id()}/{ray.get_runtime_context().get_job_id()}/{secret}" if ray.is_initialized() else secret


def claim(
    config: RunConfig,
    token: str,
    *,
    succeeds: Ownership | None = None,
    on_waiting: Callable[[str], None] = lambda sentence: None,
) -> Ownership:
    """The run, for the job of this token. `succeeds`: a claim of this process, which is to be outranked by this one alone.

    Raises: OwnershipError when another job trains it; SupersededError when another has outranked that claim; StorageError.
    """
    folder = Storage.open(config.run_url)
    return Ownership.acquire(
        folder,
        config.name,
        job_token=token,
        what=_place(),
        after=max((event.owner_epoch for event in last(folder.child("events"), 1)), default=0),
        succeeds=None if succeeds is None else succeeds.epoch,
        is_gone=_has_ended,
        on_waiting=on_waiting,
    )


def birth_of(run_storage: Storage) -> str:
    """What tells this run from one that had its folder before: drawn when the folder is new.    Raises: StorageError."""
    folder = run_storage.child(FOLDER)
    with contextlib.suppress(NotFoundError):
        return folder.read(BIRTH).decode()
    with contextlib.suppress(AlreadyExistsError):
        folder.create(BIRTH, secrets.token_hex(8).encode())
    return folder.read(BIRTH).decode()


def _place() -> str:
    """Where the job is, in people's words."""
    if not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"job {context.get_job_id()} of the Ray cluster at {context.gcs_address}"


def _has_ended(owner: Owner) -> bool:
    """Whether the owner's job was one of this cluster, and has ended: its coordinator ended with it."""
    cluster_id, _, rest = owner.job_token.partition("/")
    if not rest or not ray.is_initialized() or cluster_id != _cluster_id():
        return False
    job_id = rest.partition("/")[0]
    return any(job["JobID"] == job_id and job["IsDead"] for job in ray._private.state.jobs())


def _cluster_id() -> str:
    """Drawn anew whenever a cluster is started, whatever its address."""
    return str(ray._private.worker.global_worker.gcs_client.cluster_id.hex())
