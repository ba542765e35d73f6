"""Readers and a corpus of many small windows for tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ray

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.order import Order
from elastic_lm.runtime.reader import start_reader
from elastic_lm.storage import Storage
from tests.data.corpora import small_corpus

WAIT_S = 30.0
PREFETCH = 2


class Corpus(NamedTuple):
    """What a reader is given."""

    storage: Storage
    manifest: Manifest
    order: Order


def windowed_corpus(folder: Path) -> Corpus:
    """About thirty windows per epoch; a step's batch lies in one or two of them."""
    storage, manifest = small_corpus(folder, num_documents=250)
    order = manifest.order(sequence_length=15, micro_batches=2, micro_batch_size=3, seed=7, window_blocks=2)
    return Corpus(storage, manifest, order)


@contextlib.contextmanager
def reader_actors(corpus: Corpus, num_readers: int) -> Iterator[list[Any]]:
    """Readers that answer."""
    readers = [starter(corpus)() for _ in range(num_readers)]
    ray.get([reader.ping.remote() for reader in readers], timeout=WAIT_S)
    yield readers
    for reader in readers:
        ray.kill(reader)


def starter(corpus: Corpus) -> functools.partial[Any]:
    return functools.partial(start_reader, *corpus, prefetch_windows=PREFETCH, num_cpus=0)
