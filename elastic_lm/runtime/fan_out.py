"""Work spread over the cluster: `prepare` with one Ray task per part of the corpus.

Invariant: the bytes are those of `data.prepare.prepare` in one process; results come back in the order of the parts. A
task whose process or node dies is run again, and finds what it had finished.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import ray
from ray.exceptions import RayTaskError

from elastic_lm.data import prepare as local
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.mixture import Source
from elastic_lm.data.parts import Part, PartResult
from elastic_lm.data.prepare import PrepareOptions
from elastic_lm.data.progress import View
from elastic_lm.storage import Storage

MAX_RETRIES = 5  # of a task whose process or node died; its own exceptions are final
AHEAD = 2  # parts under way for each CPU of the cluster


def prepare(
    sources: Sequence[str | Source], out: Storage, options: PrepareOptions, *, view: View | None = None
) -> Manifest:
    """`data.prepare.prepare` over the Ray cluster that this process has joined.

    Raises: ConfigError, DataError, StorageError, wherever they arose.
    """
    return local.prepare(sources, out, options, map=_map, view=view)


def _map(encode: Callable[[Part], PartResult], parts: Iterable[Part]) -> Iterator[PartResult]:
    """`map` on the cluster, a bounded number of parts ahead of the one that is awaited."""
    task = ray.remote(encode_one).options(num_cpus=1, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD")
    shared = ray.put(encode)
    limit = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    under_way: deque[ray.ObjectRef] = deque()
    for part in parts:
        if len(under_way) >= limit:
            yield _result(under_way.popleft())
        under_way.append(task.remote(shared, part))
    while under_way:
        yield _result(under_way.popleft())


def encode_one(encode: Callable[[Part], PartResult], part: Part) -> PartResult:
    """The task."""
    return encode(part)


def _result(reference: ray.ObjectRef) -> PartResult:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
