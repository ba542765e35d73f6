"""A worker gets the same tokens from whichever reader can give them, and is told what no reader can help against."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from elastic_lm.data.windows import LocalTokens
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.errors import DataError, StorageError, UnavailableError
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.runtime.window_client import WindowClient, reader_for
from elastic_lm.storage import Storage
from tests.faults import proxy as p
from tests.faults.harness import processes_titled
from tests.faults.proxy import FaultyProxy
from tests.runtime.readers import WAIT_S, Corpus, reader_actors, windowed_corpus

pytestmark = pytest.mark.ray

SILENT_S = 0.5


class Scripted:
    """Answers like a reader that has what the script says in store; afterwards it is silent."""

    def __init__(self, script: list[Exception]) -> None:
        self._script = script

    async def window(self, epoch: int, window: int, stride: int = 1) -> Any:
        import asyncio

        if self._script:
            raise self._script.pop(0)
        await asyncio.Event().wait()


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return windowed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def well(shared_cluster: LocalCluster, windowed: Corpus) -> Iterator[Any]:
    """A reader to which nothing happens."""
    with reader_actors(windowed, 1) as readers:
        yield readers[0]


@pytest.fixture
def scripted(cluster: LocalCluster) -> Iterator[Callable[..., Any]]:
    actors = []

    def start(*script: Exception) -> Any:
        actors.append(ray.remote(Scripted).options(num_cpus=0).remote(list(script)))
        return actors[-1]

    yield start
    for actor in actors:
        ray.kill(actor)


def check(client: WindowClient, corpus: Corpus, steps: range) -> None:
    here = LocalTokens(*corpus)
    for step in steps:
        for slot in range(corpus.order.micro_batches):
            assert client.tokens(step, slot, lambda: False).tolist() == here.tokens(step, slot).tolist()


def test_tokens_are_those_of_storage(well: Any, windowed: Corpus) -> None:
    check(
        WindowClient(windowed.order, "s3://bucket/tokens", [well], reader_timeout_s=WAIT_S, storage_timeout_s=WAIT_S),
        windowed,
        range(20),
    )


def test_dead_reader_is_passed_over(well: Any, windowed: Corpus) -> None:
    with reader_actors(windowed, 1) as (victim,):
        client = WindowClient(
            windowed.order, "s3://bucket/tokens", [victim, well], reader_timeout_s=WAIT_S, storage_timeout_s=WAIT_S
        )
        check(client, windowed, range(3))
        ray.kill(victim)
        check(client, windowed, range(3, 20))


def test_frozen_reader_is_passed_over_after_its_time(cluster: LocalCluster, well: Any, windowed: Corpus) -> None:
    before = set(processes_titled(cluster, "ray::Reader"))
    with reader_actors(windowed, 1) as (victim,):
        (pid,) = set(processes_titled(cluster, "ray::Reader")) - before
        client = WindowClient(
            windowed.order, "s3://bucket/tokens", [victim, well], reader_timeout_s=SILENT_S, storage_timeout_s=WAIT_S
        )
        os.kill(pid, signal.SIGSTOP)
        try:
            check(client, windowed, range(4))
        finally:
            os.kill(pid, signal.SIGCONT)


def test_reader_whose_storage_gave_no_answer_is_passed_over(
    scripted: Callable[..., Any], well: Any, windowed: Corpus
) -> None:
    troubled = scripted(*[StorageError("read_range: gave up after 9 attempts")] * 100)
    check(
        WindowClient(
            windowed.order, "s3://bucket/tokens", [troubled, well], reader_timeout_s=WAIT_S, storage_timeout_s=WAIT_S
        ),
        windowed,
        range(6),
    )


def test_storage_that_is_away_is_waited_for_until_it_is_back(
    cluster: LocalCluster, proxy: FaultyProxy, s3_url: str, windowed: Corpus
) -> None:
    there, impatient = (Storage.open(f"{s3_url}/tokens", deadline_s=seconds) for seconds in (60.0, 1.0))
    for path in windowed.storage.list():
        there.write(path, windowed.storage.read(path))
    with reader_actors(windowed._replace(storage=impatient), 1) as readers:
        client = WindowClient(
            windowed.order, "s3://bucket/tokens", readers, reader_timeout_s=WAIT_S, storage_timeout_s=WAIT_S
        )
        check(client, windowed, range(3))
        storm = proxy.inject(p.status(503), on="^GET .*/shards/", times=30)  # more than three windows' attempts
        check(client, windowed, range(3, 20))
    assert len(storm.hits) == 30


def test_storage_that_stays_away_ends_the_wait_by_name(scripted: Callable[..., Any], windowed: Corpus) -> None:
    troubled = scripted(*[StorageError("read_range s3://bucket/x: gave up")] * 1000)
    client = WindowClient(
        windowed.order, "s3://bucket/tokens", [troubled], reader_timeout_s=WAIT_S, storage_timeout_s=1.0
    )
    told = r"^no tokens of s3://bucket/tokens for \d.*=1\): StorageError: read_range s3://bucket/x: gave up$"
    with pytest.raises(UnavailableError, match=told):
        client.tokens(0, 0, lambda: False)


def test_readers_that_were_replaced_are_asked_from_then_on(
    scripted: Callable[..., Any], well: Any, windowed: Corpus
) -> None:
    client = WindowClient(
        windowed.order, "s3://bucket/tokens", [scripted()], reader_timeout_s=SILENT_S, storage_timeout_s=WAIT_S
    )
    asked = []

    def replace() -> bool:
        """Called while the client waits."""
        if not asked:
            client.set_readers([well])
        asked.append(True)
        return False

    expected = LocalTokens(*windowed).tokens(0, 0)
    assert client.tokens(0, 0, replace).tolist() == expected.tolist()
    assert asked


def test_bad_data_is_no_other_readers_business(scripted: Callable[..., Any], windowed: Corpus) -> None:
    bad = scripted(DataError("shards/x.arrow, offset 64: checksum"))
    with pytest.raises(DataError, match="shards/x.arrow, offset 64: checksum"):
        WindowClient(
            windowed.order, "s3://bucket/tokens", [bad], reader_timeout_s=WAIT_S, storage_timeout_s=WAIT_S
        ).tokens(0, 0, lambda: False)


def test_waiting_for_a_silent_reader_can_be_cancelled(scripted: Callable[..., Any], windowed: Corpus) -> None:
    client = WindowClient(
        windowed.order, "s3://bucket/tokens", [scripted()], reader_timeout_s=WAIT_S, storage_timeout_s=WAIT_S
    )
    with pytest.raises(Cancelled):
        client.tokens(0, 0, lambda: True)


def test_waiting_without_any_reader_alive_can_be_cancelled(scripted: Callable[..., Any], windowed: Corpus) -> None:
    dead = scripted()
    ray.kill(dead)
    looks = iter([False] * 20)  # the reader is asked, found dead, and asked again
    with pytest.raises(Cancelled):
        WindowClient(
            windowed.order, "s3://bucket/tokens", [dead], reader_timeout_s=WAIT_S, storage_timeout_s=WAIT_S
        ).tokens(0, 0, lambda: next(looks, True))


def test_window_names_its_reader_and_each_attempt_another(windowed: Corpus) -> None:
    order, readers = windowed.order, ["a", "b", "c"]
    place, named = (0, order.num_windows - 3), []
    for _ in range(6):  # across the end of an epoch
        named.append(reader_for(place, order, readers))
        assert {reader_for(place, order, readers, attempt) for attempt in range(3)} == set(readers)
        place = order.window_after(place)
    start = readers.index(named[0])
    assert named == [readers[(start + number) % 3] for number in range(6)]
