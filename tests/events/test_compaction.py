"""Compaction: nobody who reads the log, whenever, sees a difference, and no owner finds a name free that was taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from elastic_lm.errors import NotFoundError, StorageError
from elastic_lm.events import log, segments
from elastic_lm.events.compaction import BATCH, STAYING, compact
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage

DUE = BATCH + STAYING


def event(number: int, owner_epoch: int = 1) -> Event:
    return Event(EventKind.NOTE, f"note {number}", step=number, owner_epoch=owner_epoch, fields={"number": number})


def fill(storage: Storage, count: int, *, first: int = 0, owner_epoch: int = 1, sizes: tuple[int, ...] = (1, 2)) -> int:
    """Segments of one owner, of so many events in turn.    Returns: the number of the next event."""
    number = first
    for index in range(count):
        size = sizes[index % len(sizes)]
        events = [event(each, owner_epoch) for each in range(number, number + size)]
        storage.write(segments.named(number).name, segments.data(each.to_json() for each in events))
        number += size
    return number


def numbers(storage: Storage) -> list[int]:
    """As they are read; damage would be an error."""

    def fail(sentence: str) -> None:
        raise AssertionError(sentence)

    return [event.fields["number"] for event in log.read(storage, on_problem=fail)]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    return Storage.open(str(tmp_path_factory.mktemp("log") / "events"))


def test_few_segments_are_left_alone(folder: Storage) -> None:
    fill(folder, DUE - 1)
    before = folder.list()
    assert not compact(folder)
    assert folder.list() == before


def test_many_small_segments_become_one_of_the_same_bytes(folder: Storage) -> None:
    end = fill(folder, DUE)
    small = segments.listed(folder)[:BATCH]
    data = b"".join(folder.read(segment.name) for segment in small)
    assert compact(folder)
    (joined,) = [segment for segment in segments.listed(folder) if segment.end is not None]
    assert folder.read(joined.name) == data
    assert (joined.first, joined.end) == (0, segments.listed(folder)[1].first)
    assert len(folder.list()) == 1 + 1 + STAYING  # nobody knows what was before the first small one: that one stays
    assert numbers(folder) == list(range(end))
    assert not compact(folder)


def test_log_of_a_month_is_a_few_objects(folder: Storage) -> None:
    end = fill(folder, 5 * BATCH + STAYING, sizes=(1,))
    while compact(folder):
        pass
    assert len(segments.listed(folder)) == 5 + STAYING
    assert numbers(folder) == list(range(end))
    assert [event.fields["number"] for event in log.last(folder, STAYING + 10)][-1] == end - 1


def test_where_owners_changed_the_names_stay_taken(folder: Storage) -> None:
    """Whoever thaws tries the name of its last segment, or that of its successor's opening."""
    first = fill(folder, 100, owner_epoch=1)
    second = fill(folder, 1, first=first, owner_epoch=2)
    fill(folder, DUE, first=second, owner_epoch=2)
    listed = segments.listed(folder)
    last_of_one, opening_of_two, behind = listed[99], listed[100], listed[101]
    while compact(folder):
        pass
    assert {last_of_one.name, opening_of_two.name} < set(folder.list())
    assert behind.name not in folder.list()


def test_owner_that_thaws_finds_that_it_is_superseded_in_a_compacted_log(folder: Storage) -> None:
    told: list[str] = []
    first = log.EventLog(folder, owner_epoch=1, opening=lambda newest: event(0), on_superseded=told.append)
    second = log.EventLog(folder, owner_epoch=2, opening=lambda newest: event(1))
    assert second.close()
    end = fill(folder, DUE + BATCH, first=2, owner_epoch=2, sizes=(1,))
    while compact(folder):
        pass
    first.append(event(99))
    assert not first.close()
    assert len(told) == 1
    assert numbers(folder) == list(range(end))


def test_log_compacts_itself_as_it_grows(folder: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_lm.events.compaction.BATCH", 8)
    monkeypatch.setattr("elastic_lm.events.compaction.STAYING", 4)
    written = log.EventLog(folder, owner_epoch=1, opening=lambda newest: event(0), flush_s=60)
    for number in range(1, 60):
        written.append(event(number))
        assert written.flush()
    assert written.close()
    deadline = time.monotonic() + 20
    while len(segments.listed(folder)) > 24 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(segments.listed(folder)) <= 24
    assert numbers(folder) == list(range(60))


class _Turning(Storage):
    """Calls `turn` before the read with that number."""

    turn: Callable[[], object] = staticmethod(lambda: None)
    at = 0

    def read(self, path: str) -> bytes:
        self.at -= 1
        if self.at == 0:
            self.turn()
        return super().read(path)


@pytest.mark.parametrize("at", [1, 2, 20, BATCH, BATCH + 2])
def test_reader_goes_on_when_the_log_is_compacted_under_it(folder: Storage, at: int) -> None:
    end = fill(folder, DUE)
    reading = _Turning(folder.url)
    reading.turn, reading.at = lambda: compact(folder), at
    assert numbers(reading) == list(range(end))
    assert any(segment.end for segment in segments.listed(folder))


def test_reader_that_follows_reads_each_event_once(folder: Storage) -> None:
    end = fill(folder, DUE)
    followed = log.read(folder, poll_s=0.01)
    read = [next(followed).fields["number"] for _ in range(end - 5)]
    while compact(folder):
        pass
    later = fill(folder, 3, first=end)
    read += [next(followed).fields["number"] for _ in range(5 + later - end)]
    assert read == list(range(later))


def test_segment_that_is_listed_and_never_there_is_an_error_and_no_loop(folder: Storage) -> None:
    fill(folder, 3)

    class Lost(Storage):
        def read(self, path: str) -> bytes:
            if path == segments.named(1).name:
                raise NotFoundError("gone")
            return super().read(path)

    with pytest.raises(NotFoundError, match="gone"):
        numbers(Lost(folder.url))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: folder.delete(segments.named(30).name),
        lambda folder: folder.write(segments.named(30).name, b""),
        lambda folder: folder.write(segments.named(30).name, b"not json\n"),
        lambda folder: folder.write(segments.named(30).name, folder.read(segments.named(30).name) * 3),
        lambda folder: folder.write(segments.named(0).name, b"not json\n"),
    ],
)
def test_damage_reads_as_before(folder: Storage, damage: Callable[[Storage], None]) -> None:
    fill(folder, DUE + BATCH, sizes=(1,))
    damage(folder)
    before: list[str] = []
    events = list(log.read(folder, on_problem=before.append))
    while compact(folder):
        pass
    after: list[str] = []
    assert list(log.read(folder, on_problem=after.append)) == events
    assert len(after) <= len(before)  # later copies are left out once and for all
    assert len(segments.listed(folder)) < STAYING + BATCH + 10


def test_compaction_that_was_cut_short_is_done_by_the_next(folder: Storage) -> None:
    end = fill(folder, DUE + BATCH)

    class Failing(Storage):
        left = 10

        def delete(self, path: str) -> None:
            self.left -= 1
            if self.left < 0:
                raise StorageError("503")
            super().delete(path)

    with pytest.raises(StorageError):
        compact(Failing(folder.url))
    assert numbers(folder) == list(range(end))
    assert compact(folder)
    assert numbers(folder) == list(range(end))
    assert len(segments.listed(folder)) == 2 + STAYING


def test_two_that_compact_at_once_lose_nothing(folder: Storage) -> None:
    end = fill(folder, DUE + 3 * BATCH)

    def run() -> None:
        try:
            while compact(folder):
                pass
        except NotFoundError:
            pass  # the other one was faster

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert numbers(folder) == list(range(end))
