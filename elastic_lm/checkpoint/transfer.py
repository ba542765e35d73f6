"""A checkpoint on its way from one run's folder into another's, which may be in another store.

Invariant: every tensor is verified as it passes, and nothing counts there until a manifest is published; so whatever interrupts
the way leaves an unfinished checkpoint, which the same call finishes. The source is only read.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import Manifest, Part, folder_of
from elastic_lm.storage import Storage

AT_ONCE = 2  # parts: one is read while another is written


def copy_parts(source: Storage, manifest: Manifest, target: Storage) -> None:
    """Store the parts of one run's checkpoint in the folder of another run.

    Raises: NotFoundError when one is gone, because its owner has deleted the checkpoint meanwhile; CheckpointError when one is
    damaged; StorageError.
    """
    path = folder_of(manifest.step)
    copy = functools.partial(_copy, source.child(path), target.child(path))
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix=f"copy-{manifest.step}") as pool:
        futures = [pool.submit(copy, part) for part in manifest.parts]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _copy(source: Storage, target: Storage, part: Part) -> None:
    registry.write_part(target, part, registry.part_data(source, part))
