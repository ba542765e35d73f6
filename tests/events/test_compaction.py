"""Compaction: nobody who reads the log, whenever, sees a difference, and no owner finds a name free that was taken."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from elastic_lm.errors import NotFoundError, StorageError, SupersededError
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
    # A look takes what is there when it begins; what comes meanwhile is left to the next one, and the last has none.
    most = 60 - 4 * (8 - 1)
    deadline = time.monotonic() + 20
    while len(segments.listed(folder)) > most and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(segments.listed(folder)) <= most
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


class _Paged(Storage):
    """Calls `turn` between the first page of a list and the rest of it."""

    turn: Callable[[], object] = staticmethod(lambda: None)
    page = 0

    def list(self, prefix: str = "") -> list[str]:
        first = super().list(prefix)[: self.page]
        turn, self.turn = self.turn, lambda: None
        turn()
        return first + [name for name in super().list(prefix) if not first or name > first[-1]]


@pytest.mark.parametrize("page", [1, 2, 100, BATCH - 1, BATCH, BATCH + 1])
@pytest.mark.parametrize("borders", [0, 100])
def test_list_of_several_pages_that_straddles_a_compaction_loses_nothing(
    folder: Storage, page: int, borders: int
) -> None:
    """The small segments of its first page are there still, and what the others became is not in it."""
    first = fill(folder, borders, sizes=(1,))
    end = fill(folder, DUE + BATCH, first=first, owner_epoch=2, sizes=(1,))
    reading = _Paged(folder.url)
    reading.turn, reading.page = lambda: compact(folder), page
    assert numbers(reading) == list(range(end))
    again = fill(folder, DUE, first=end, owner_epoch=2, sizes=(1,))
    reading.turn, reading.page = lambda: compact(folder), page
    assert [event.fields["number"] for event in log.last(reading, 10 * DUE)] == list(range(again))


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


def _overlapping(folder: Storage, number: int) -> None:
    folder.write(segments.named(number).name, folder.read(segments.named(number).name) * 3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder, number: folder.delete(segments.named(number).name),
        lambda folder, number: folder.write(segments.named(number).name, b""),
        lambda folder, number: folder.write(segments.named(number).name, b"not json\n"),
        _overlapping,
    ],
)
@pytest.mark.parametrize("number", [0, 1, 5, 6, 7, 8, 40])
def test_damage_reads_as_before_and_stops_nothing(
    folder: Storage, damage: Callable[[Storage, int], None], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the log grows behind it."""
    monkeypatch.setattr("elastic_lm.events.compaction.BATCH", 8)
    monkeypatch.setattr("elastic_lm.events.compaction.STAYING", 4)
    end = fill(folder, 60, sizes=(1,))
    damage(folder, number)
    before: list[str] = []
    told = [event.fields["number"] for event in log.read(folder, on_problem=before.append)]
    assert len(before) == (2 if damage is _overlapping else 1)
    for _ in range(20):
        compact(folder)
        end = fill(folder, 8, first=end, sizes=(1,))
    after: list[str] = []
    found = [event.fields["number"] for event in log.read(folder, on_problem=after.append)]
    assert found == told + list(range(60, end))
    # Of later copies, some are left out for good: in a compacted segment nobody has to be told of them.
    assert len(after) == len(before) or (damage is _overlapping and len(after) < len(before))
    assert len([segment for segment in segments.listed(folder) if segment.end is None]) < 4 + 2 * 8 + 4


def test_owner_that_froze_before_its_opening_was_stored_finds_that_it_is_superseded(folder: Storage) -> None:
    """It writes where a segment was that is compacted by now, and storage lets it."""
    end = fill(folder, 300, owner_epoch=4, sizes=(1,))

    class Frozen(Storage):
        def create(self, path: str, data: bytes) -> None:
            later = fill(folder, 3, first=end, owner_epoch=4, sizes=(1,))
            fill(folder, 2 * DUE, first=later, owner_epoch=6, sizes=(1,))
            while compact(folder):
                pass
            assert path not in folder.list()
            super().create(path, data)

    with pytest.raises(SupersededError, match="is being written by owner 6 of the run; owner 5 has to end"):
        log.EventLog(Frozen(folder.url), owner_epoch=5, opening=lambda newest: event(-1))
    assert numbers(folder) == list(range(end + 3 + 2 * DUE))


def test_closed_log_waits_for_no_compaction(folder: Storage) -> None:
    """Nor does the process's end."""
    fill(folder, DUE, sizes=(1,))
    joining, going_on = threading.Event(), threading.Event()

    class Hanging(Storage):
        def delete(self, path: str) -> None:
            joining.set()
            going_on.wait(20)
            super().delete(path)

    written = log.EventLog(Hanging(folder.url), owner_epoch=1, opening=lambda newest: event(DUE))
    written.append(event(DUE + 1))
    assert written.flush() and joining.wait(20)
    assert written.close(timeout_s=5)
    before = len(folder.list())
    going_on.set()
    compactor = [thread for thread in threading.enumerate() if thread.name == "compactor"]
    for thread in compactor:
        assert thread.daemon
        thread.join(20)
    assert len(folder.list()) >= before - 1  # the one that was under way
    assert numbers(folder) == list(range(DUE + 2))


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
        with contextlib.suppress(NotFoundError):  # the other one was faster
            compact(folder)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run) for _ in range(4)]:
            done.result()
    assert numbers(folder) == list(range(end))
