"""A checkpoint on its way from one run's folder into another's, which may be in another store.

Invariant: every tensor is verified as it passes, and nothing counts there until a manifest is published; so whatever interrupts
the way leaves an unfinished checkpoint, which the same call finishes. The source is only read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import Manifest, Part, folder_of
from elastic_lm.storage import Storage

T = TypeVar("T")
AT_ONCE = 2  # parts: one is read while another is written


def copy_parts(source: Storage, manifest: Manifest, target: Storage) -> None:
    """Store the parts of one run's checkpoint in the folder of another run.

    Raises: NotFoundError when one is gone, because its owner has deleted the checkpoint meanwhile; CheckpointError when one is
    damaged; StorageError.
    """
    path = folder_of(manifest.step)
    copy = functools.partial(copy_part, source.child(path), target.child(path))
    all_of([functools.partial(copy, part) for part in manifest.parts], f"copy-{manifest.step}")


def copy_part(source: Storage, target: Storage, part: Part) -> None:
    """From one checkpoint's folder into another's.    Raises: as `copy_parts`."""
    registry.write_part(target, part, registry.part_data(source, part))


def all_of(jobs: Sequence[Callable[[], T]], name: str) -> list[T]:
    """What they return, in their order; `AT_ONCE` of them run at a time. When one raises, the others are not begun any more."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix=name) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
