"""Whether a storage does what runs need of it: tried with one small object under a name of its own.

Invariant: the object is removed in every case, and so are folders that came with it. Each operation is tried on its own, so
that the answer is not merely that something is wrong.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from elastic_lm.errors import AlreadyExistsError, NotFoundError, StorageError
from elastic_lm.storage import Storage

DEADLINE_S, RETRIES = 10.0, 2  # a person waits; a run has more patience
NAME = "probe"
SIZE_BYTES = 4096


@dataclass
class Probe:
    """What was found: seconds of each operation that worked, what is wrong with the others, and storage's clock.

    `ahead_s`: how far storage's clock is ahead of ours, None when it does not say; `uncertain_s`: by how much that may err.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    ahead_s: float | None = None
    uncertain_s: float = 0.0


def probe(url: str) -> Probe:
    """Write, read and so on, in a folder of its own inside `url`.    Raises: StorageError when the address is none."""
    folder = Storage.open(url, deadline_s=DEADLINE_S, retries=RETRIES).child(
        f"elastic-lm-doctor-{secrets.token_hex(8)}"
    )
    found = Probe()
    with _no_new_folders(folder.url):
        began_s = time.time()
        try:
            _try(found, "write", lambda: folder.write(NAME, _CONTENT))
            if not found.failures:
                _try(found, "clock", lambda: _compare_clocks(found, folder, began_s, time.time()))
                for name, attempt in _ATTEMPTS.items():
                    _try(found, name, lambda attempt=attempt: attempt(folder))  # type: ignore[misc]
        finally:
            # What failed half way may be there all the same; that it cannot be deleted either is then no news.
            _try(Probe() if "write" in found.failures else found, "delete", lambda: _delete(folder))
    found.seconds.pop("clock", None)
    return found


def _try(found: Probe, name: str, attempt: Callable[[], None]) -> None:
    began = time.monotonic()
    try:
        attempt()
    except StorageError as error:
        found.failures[name] = str(error)
    else:
        found.seconds[name] = time.monotonic() - began


# -- operations: each raises StorageError when storage does something else than it should ------------------------------

_CONTENT = secrets.token_bytes(SIZE_BYTES)


def _read(folder: Storage) -> None:
    if folder.read(NAME) != _CONTENT:
        raise StorageError(f"read {folder.url}/{NAME}: other bytes than were written a moment ago")


def _read_range(folder: Storage) -> None:
    if folder.read_range(NAME, 1000, 96) != _CONTENT[1000:1096]:
        raise StorageError(f"read_range {folder.url}/{NAME}: other bytes than were written there")


def _create(folder: Storage) -> None:
    with contextlib.suppress(AlreadyExistsError):
        folder.create(NAME, b"a second object of that name")
        raise StorageError(f"create {folder.url}/{NAME}: an object that was there was replaced")


def _list(folder: Storage) -> None:
    if (names := folder.list()) != [NAME]:
        raise StorageError(f"list {folder.url}: {names} in place of the one object that is there")


def _delete(folder: Storage) -> None:
    folder.delete(NAME)
    with contextlib.suppress(NotFoundError):
        folder.size(NAME)
        raise StorageError(f"delete {folder.url}/{NAME}: it is still there")


_ATTEMPTS = {"read": _read, "ranged read": _read_range, "create-only": _create, "list": _list}


# -- clock and folders -------------------------------------------------------------------------------------------------


def _compare_clocks(found: Probe, folder: Storage, began_s: float, ended_s: float) -> None:
    """Storage stamped the object between `began_s` and `ended_s` of our clock; S3 cuts its stamp to whole seconds."""
    stamp_s = folder.modified_s(NAME)
    if stamp_s is not None:
        cut_s = 0.5 if folder.url.startswith("s3://") else 0.0
        found.ahead_s = stamp_s + cut_s - (began_s + ended_s) / 2
        found.uncertain_s = (ended_s - began_s) / 2 + cut_s


@contextlib.contextmanager
def _no_new_folders(url: str) -> Iterator[None]:
    """Files need folders, which storage makes and never removes: take away those that were not there before."""
    new = []
    if url.startswith("file://"):
        path = Path(url.removeprefix("file://"))
        new = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # somebody else has begun to use one
            for folder in new:
                os.rmdir(folder)
