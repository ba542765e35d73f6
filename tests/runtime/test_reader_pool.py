"""Readers that die or fall silent are replaced, and it is told; those that merely start slowly are not."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from elastic_lm.data.windows import read_window
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from elastic_lm.runtime.reader_pool import ReaderNews, ReaderPool
from tests.faults.harness import processes_titled
from tests.runtime.readers import WAIT_S, Corpus, starter, windowed_corpus

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return windowed_corpus(tmp_path_factory.mktemp("corpus"))


class Patient:
    """An actor that waits to be placed for as long as it takes."""

    def ping(self) -> None: ...


class Watched:
    """A pool of readers that start one after the other, what it told, and the readers' processes in that order."""

    def __init__(self, cluster: LocalCluster, corpus: Corpus, num_readers: int, unplaced: list[Any]) -> None:
        self.news: queue.Queue[ReaderNews] = queue.Queue()
        self.pids: list[int] = []
        self._cluster, self._corpus, self._unplaced = cluster, corpus, unplaced
        self.pool = ReaderPool(self._start, num_readers, timeout_s=5.0, on_news=self.news.put)

    def _start(self) -> Any:
        if self._unplaced:
            return self._unplaced.pop()
        before = set(processes_titled(self._cluster, "ray::Reader"))
        reader = starter(self._corpus)()
        assert well((reader,))
        self.pids += set(processes_titled(self._cluster, "ray::Reader")) - before
        return reader


@pytest.fixture
def watch(cluster: LocalCluster, windowed: Corpus) -> Iterator[Callable[..., Watched]]:
    begun: list[Watched] = []

    def begin(num_readers: int, *unplaced: Any) -> Watched:
        begun.append(Watched(cluster, windowed, num_readers, list(unplaced)))
        return begun[-1]

    yield begin
    for watched in begun:
        watched.pool.close()


def well(readers: tuple[Any, ...]) -> bool:
    ray.get([reader.ping.remote() for reader in readers], timeout=WAIT_S)
    return True


def test_dead_reader_is_replaced_and_then_a_frozen_one(watch: Callable[..., Watched], windowed: Corpus) -> None:
    watched = watch(2)
    before = watched.pool.readers
    os.kill(watched.pids[1], signal.SIGKILL)
    news = watched.news.get(timeout=WAIT_S)
    assert (news.lost, news.replacement, news.cause) == ("r1", "r2", "process died")
    assert news.readers == watched.pool.readers
    assert news.readers[0] == before[0] and news.readers[1] != before[1]

    os.kill(watched.pids[0], signal.SIGSTOP)  # the pool has heard of it in the round before
    news = watched.news.get(timeout=WAIT_S)
    assert (news.lost, news.replacement) == ("r0", "r3")
    assert news.cause.startswith("silent for ")
    wait_for(lambda: not psutil.pid_exists(watched.pids[0]), timeout_s=WAIT_S, what="the frozen process ended")

    expected = read_window(*windowed, 0, 0).tolist()
    for reader in watched.pool.readers:
        (reference,) = ray.get(reader.window.remote(0, 0), timeout=WAIT_S)
        assert ray.get(reference).tolist() == expected


def test_reader_that_is_not_placed_yet_is_left_to_start(watch: Callable[..., Watched]) -> None:
    unplaced = ray.remote(Patient).options(num_cpus=0, resources={"nobody-has-this": 1}).remote()
    watched = watch(2, unplaced)
    os.kill(watched.pids[0], signal.SIGKILL)
    news = watched.news.get(timeout=WAIT_S)  # it comes from a round in which the other one was silent
    assert news.lost == "r1" and watched.pool.readers[0] is unplaced


def test_closed_pool_leaves_no_reader_not_even_a_frozen_one(watch: Callable[..., Watched]) -> None:
    watched = watch(2)
    os.kill(watched.pids[0], signal.SIGSTOP)
    watched.pool.close()
    wait_for(lambda: not any(map(psutil.pid_exists, watched.pids)), timeout_s=WAIT_S, what="every process ended")
    assert watched.news.empty()
