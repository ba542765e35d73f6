"""The event log: a prefix of what was appended, whatever storage does, and never an exception into training."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_lm.errors import StorageError
from elastic_lm.events import log
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage


def event(number: int) -> Event:
    return Event(EventKind.NOTE, f"note {number}", step=number, fields={"number": number})


def numbers(storage: Storage, problems: list[str] | None = None) -> list[int]:
    told: list[str] = [] if problems is None else problems
    return [e.fields["number"] for e in log.read(storage, on_problem=told.append)]


@pytest.fixture
def folder(folder_url: str) -> Storage:
    return Storage.open(folder_url)


class _Failing(Storage):
    """Storage that fails while `down` is set."""

    down = False

    def create(self, path: str, data: bytes) -> None:
        if self.down:
            raise StorageError("503 for ever")
        super().create(path, data)


def test_events_come_back_in_order_and_equal(folder: Storage) -> None:
    written = log.EventLog(folder)
    for number in range(100):
        written.append(event(number))
    assert written.close()
    assert list(log.read(folder)) == [event(number) for number in range(100)]


def test_empty_log_reads_as_nothing(folder: Storage) -> None:
    assert log.EventLog(folder).close()
    assert list(log.read(folder)) == []


def test_log_of_a_later_attempt_continues_the_numbers(folder: Storage) -> None:
    for attempt in range(3):
        written = log.EventLog(folder)
        written.append(event(2 * attempt))
        written.append(event(2 * attempt + 1))
        written.close()
    problems: list[str] = []
    assert numbers(folder, problems) == list(range(6))
    assert problems == []
    assert folder.list() == ["000000000000.jsonl", "000000000002.jsonl", "000000000004.jsonl"]


def test_append_reaches_storage_without_a_flush(folder: Storage) -> None:
    stored = threading.Event()
    written = log.EventLog(folder, flush_s=0.01, on_stored=lambda events: stored.set())
    written.append(event(0))
    assert stored.wait(10)
    assert numbers(folder) == [0]
    written.close()


def test_on_stored_tells_every_event_once_in_order(folder: Storage) -> None:
    told: list[Event] = []
    written = log.EventLog(folder, flush_s=60, on_stored=told.extend)
    for number in range(10):
        written.append(event(number))
        if number % 4 == 3:
            written.flush()
    written.close()
    assert told == [event(number) for number in range(10)]


def test_watcher_that_raises_does_not_end_the_log(folder: Storage) -> None:
    def broken(events: list[Event]) -> None:
        raise RuntimeError("bug")

    written = log.EventLog(folder, on_stored=broken)
    for number in range(2):
        written.append(event(number))
        assert written.flush()
    written.close()
    assert numbers(folder) == [0, 1]


def test_events_wait_for_storage_to_come_back(folder_url: str) -> None:
    storage = _Failing(folder_url)
    written = log.EventLog(storage, flush_s=0.01)
    storage.down = True
    written.append(event(0))
    assert not written.flush(timeout_s=0.2)
    assert written.problem is not None
    assert "503" in written.problem
    written.append(event(1))
    storage.down = False
    assert written.flush()
    assert written.problem is None
    assert written.close()
    assert numbers(storage) == [0, 1]


def test_close_without_storage_ends_and_says_so(folder_url: str) -> None:
    storage = _Failing(folder_url)
    storage.down = True
    written = log.EventLog(storage)
    written.append(event(0))
    assert not written.close(timeout_s=0.2)


def test_in_the_place_of_events_beyond_the_buffer_a_note_says_how_many(folder_url: str) -> None:
    storage = _Failing(folder_url)
    storage.down = True
    written = log.EventLog(storage, max_buffered=3)
    for number in range(5):
        written.append(event(number))
    storage.down = False
    assert written.flush()
    written.append(event(5))
    assert written.close()
    problems: list[str] = []
    messages = [each.message for each in log.read(storage, on_problem=problems.append)]
    missing = "2 events are missing here: storage was away for longer than they could be kept."
    assert messages == ["note 0", "note 1", "note 2", missing, "note 5"]
    assert problems == []  # the numbers go on: a gap in them would be a second place for the log to grow


def test_segment_whose_answer_was_lost_is_known_as_ones_own(folder_url: str) -> None:
    class Unheard(Storage):
        deaf = False

        def create(self, path: str, data: bytes) -> None:
            super().create(path, data)
            if self.deaf:
                raise StorageError("the connection was reset")

    storage, told = Unheard(folder_url), []  # type: ignore[var-annotated]
    written = log.EventLog(storage, on_stored=told.extend)
    storage.deaf = True
    written.append(event(0))
    assert not written.flush(timeout_s=0.2)
    assert told == []
    written.append(event(1))
    storage.deaf = False
    assert written.close()
    assert numbers(storage) == [0, 1]
    assert told == [event(0), event(1)]


def test_second_writer_ends_at_once_and_says_so(folder: Storage) -> None:
    told: list[str] = []
    first, second = log.EventLog(folder), log.EventLog(folder, on_superseded=told.append)
    first.append(event(0))
    assert first.close()
    second.append(event(7))
    assert not second.flush(timeout_s=20)
    second.append(event(8))
    assert not second.close()
    (problem,) = told
    assert problem == second.problem
    assert "000000000000.jsonl was written by somebody else, who owns the run now" in problem
    assert numbers(folder) == [0]


def _cut(storage: Storage) -> None:
    storage.write("000000000001.jsonl", storage.read("000000000001.jsonl")[:-5])


def _garble(storage: Storage) -> None:
    storage.write("000000000001.jsonl", b'{"kind": "no_such_kind"}\n')


def _lose(storage: Storage) -> None:
    storage.delete("000000000001.jsonl")


def _misshape(storage: Storage) -> None:
    storage.write("000000000001.jsonl", event(1).to_json().replace('{"number":1}', "[]").encode())


def _mistype(storage: Storage) -> None:
    storage.write("000000000001.jsonl", event(1).to_json().replace('"step":1', '"step":"1"').encode())


def _misdate(storage: Storage) -> None:
    storage.write("000000000001.jsonl", event(1).to_json().replace('"time_s":0.0', '"time_s":null').encode())


def _nest(storage: Storage) -> None:
    storage.write("000000000001.jsonl", b"[" * 100_000)


@pytest.mark.parametrize(
    ("damage", "left", "told"),
    [
        (_misshape, [0, 2], "event 1 cannot be read: TypeError"),
        (_mistype, [0, 2], "event 1 cannot be read: TypeError"),
        (_misdate, [0, 2], "event 1 cannot be read: TypeError: time_s is None"),
        (_nest, [0, 2], "event 1 cannot be read: RecursionError"),
        (_cut, [0, 2], "event 1 cannot be read"),
        (_garble, [0, 2], "event 1 cannot be read"),
        (_lose, [0, 2], "events 1 to 1 are missing before 000000000002.jsonl"),
    ],
)
def test_damage_is_told_and_the_rest_is_read(
    folder: Storage, damage: Callable[[Storage], None], left: list[int], told: str
) -> None:
    written = log.EventLog(folder)
    for number in range(3):
        written.append(event(number))
        written.flush()
    written.close()
    damage(folder)
    problems: list[str] = []
    assert numbers(folder, problems) == left
    assert len(problems) == 1
    assert told in problems[0]


def test_overlapping_segments_are_read_once(folder: Storage) -> None:
    lines = [event(number).to_json() + "\n" for number in range(4)]
    folder.write("000000000000.jsonl", "".join(lines[:3]).encode())
    folder.write("000000000002.jsonl", "".join(lines[2:]).encode())
    folder.write("notes.txt", b"not ours")
    problems: list[str] = []
    assert numbers(folder, problems) == [0, 1, 2, 3]
    assert len(problems) == 1
    assert "begins before event 3" in problems[0]


class _Counting(Storage):
    """Notes what is read."""

    def read(self, path: str) -> bytes:
        self.reads = [*getattr(self, "reads", []), path]
        return super().read(path)


def test_followed_log_is_read_on_from_where_one_was_until_the_run_has_finished(folder_url: str) -> None:
    storage = _Counting(folder_url)
    written = log.EventLog(storage)

    def store(*events: Event) -> None:
        for each in events:
            written.append(each)
        assert written.flush()

    store(event(0), event(1))
    followed = log.read(storage, poll_s=0.01)
    assert [next(followed), next(followed)] == [event(0), event(1)]
    store(event(2))
    assert next(followed) == event(2)
    finished = Event(EventKind.RUN_FINISHED, "done")
    store(finished)
    assert list(followed) == [finished]
    assert sorted(storage.reads) == storage.list()  # each segment once
    store(event(3))  # it was resumed: the end that is not the last is none
    followed = log.read(storage, poll_s=0.01)
    assert [next(followed) for _ in range(5)] == [event(0), event(1), event(2), finished, event(3)]
    store(finished)
    assert list(followed) == [finished]
    assert written.close()


def test_appending_from_many_threads_loses_nothing(folder: Storage) -> None:
    written = log.EventLog(folder, flush_s=0.001)
    threads = [
        threading.Thread(target=lambda base=base: [written.append(event(base + i)) for i in range(200)])
        for base in (0, 200, 400)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert written.close()
    assert sorted(numbers(folder)) == list(range(600))


def test_events_that_storage_does_not_take_are_kept_elsewhere_under_their_names(
    folder: Storage, tmp_path: Path
) -> None:
    failing, spare = _Failing(folder.url), Storage.open(str(tmp_path / "spare"))
    written = log.EventLog(failing, flush_s=60)
    written.append(event(0))
    assert written.flush() and written.keep_unstored(spare) == 0
    assert spare.list() == []
    failing.down = True
    for number in range(1, 4):
        written.append(event(number))
    assert written.keep_unstored(spare) == 3
    written.close(timeout_s=0.1)
    for name in spare.list():
        folder.write(name, spare.read(name))
    assert numbers(folder) == [0, 1, 2, 3]
