"""One log whoever else writes: an owner that thaws at any moment adds nothing behind its successor's opening.

Storage's operations are put into every order that matters: a frozen owner is one whose next operation comes late.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from elastic_lm.errors import StorageError, SupersededError
from elastic_lm.events import log
from elastic_lm.events.types import Event, EventKind
from elastic_lm.storage import Storage

WAIT_S = 30


def event(who: str, number: int) -> Event:
    return Event(EventKind.NOTE, f"{who}{number}", step=number)


def opening(who: str) -> Callable[[Event | None], Event]:
    """The first event of an attempt, which counts them."""
    return lambda newest: replace(event(who, 0), attempt=newest.attempt + 1 if newest else 1)


def told_by(who: str, events: list[Event]) -> list[str]:
    return [each.message for each in events if each.message[0] == who]


# -- the order of things -----------------------------------------------------------------------------------------------


class Stage:
    """Lets operations happen one at a time, in the order of a script: a letter for each, its actor's name.

    An actor that is done is passed over. When the script is through, whoever comes is let in.
    """

    def __init__(self, script: str) -> None:
        self._script = deque(script)
        self._changed = threading.Condition()

    @contextmanager
    def turn(self, who: str) -> Iterator[None]:
        with self._changed:
            assert self._changed.wait_for(lambda: not self._script or self._script[0] == who, WAIT_S)
            try:
                yield
            finally:
                if self._script:
                    self._script.popleft()
                self._changed.notify_all()

    def leave(self, who: str) -> None:
        with self._changed:
            self._script = deque(letter for letter in self._script if letter != who)
            self._changed.notify_all()


class Staged(Storage):
    """Storage as one actor reaches it."""

    def __init__(self, url: str, stage: Stage, who: str) -> None:
        super().__init__(url)
        self.stage, self._who = stage, who

    def create(self, path: str, data: bytes) -> None:
        with self.stage.turn(self._who):
            super().create(path, data)

    def read(self, path: str) -> bytes:
        with self.stage.turn(self._who):
            return super().read(path)

    def list(self, prefix: str = "") -> list[str]:
        with self.stage.turn(self._who):
            return super().list(prefix)


class Actor(threading.Thread):
    """An owner that opens the log unless it has done so before, and tells two segments. `name` is one letter."""

    def __init__(self, url: str, name: str, epoch: int, stage: Stage) -> None:
        super().__init__(name=name, daemon=True)
        self.epoch, self.stage = epoch, stage
        self.told: list[Event] = []
        self.found: list[Event] = []  # in the log, by who looks right after the opening
        self.refused = False
        self.all_stored = False
        self._url = url
        self._log: log.EventLog | None = None

    def open(self, storage: Storage) -> None:
        self._log = log.EventLog(
            storage, owner_epoch=self.epoch, opening=opening(self.name), on_stored=self.told.extend, flush_s=60
        )
        self.found = list(log.read(Storage.open(self._url)))

    def run(self) -> None:
        try:
            if self._log is None:
                self.open(Staged(self._url, self.stage, self.name))
            assert self._log is not None
            for number in (1, 2):
                self._log.append(event(self.name, number))
                self._log.flush(WAIT_S)
            self.all_stored = self._log.close()
        except SupersededError:
            self.refused = True
        finally:
            self.stage.leave(self.name)


class Opened(Actor):
    """One that opened the log before the scene begins."""

    def __init__(self, url: str, name: str, epoch: int, stage: Stage) -> None:
        super().__init__(url, name, epoch, Stage(""))
        self.staged = Staged(url, Stage(""), name)
        self.open(self.staged)
        self.staged.stage = self.stage = stage


def play(url: str, script: str, cast: dict[str, tuple[type[Actor], int]]) -> list[Actor]:
    """All actors, by epoch, when everybody is done; what must hold in every order is checked."""
    stage = Stage(script)
    actors = [kind(url, name, epoch, stage) for name, (kind, epoch) in cast.items()]
    for actor in actors:
        actor.start()
    for actor in actors:
        actor.join(WAIT_S)
        assert not actor.is_alive(), script
    problems: list[str] = []
    events = list(log.read(Storage.open(url), on_problem=problems.append))
    assert problems == [], script
    epochs = [each.owner_epoch for each in events]
    assert epochs == sorted(epochs), script
    for actor in actors:
        mine = [] if actor.refused else [f"{actor.name}0", *(each.message for each in actor.told)]
        assert told_by(actor.name, events) == mine, script  # all that it was told is there, and nothing else of it
        if not actor.refused:  # nobody who came before it tells anything that it did not find
            earlier = [each for each in events if each.owner_epoch < actor.epoch]
            assert [each for each in actor.found if each.owner_epoch < actor.epoch] == earlier, script
    last = actors[-1]
    assert last.all_stored, script
    assert told_by(last.name, events) == [f"{last.name}{number}" for number in range(3)], script
    return actors


def scripts(first: str, num_first: int, second: str, num_second: int) -> list[str]:
    """All orders of so many operations of the first and of the second."""
    length = num_first + num_second
    chosen = itertools.combinations(range(length), num_first)
    return ["".join(first if i in places else second for i in range(length)) for places in chosen]


def test_owner_that_thaws_at_any_moment_adds_what_its_successor_finds_or_nothing(folder_url: str) -> None:
    """Z has opened the log, and freezes and thaws between any two operations of its own and of its successor O."""
    outcomes = set()
    for number, script in enumerate(scripts("Z", 3, "O", 6)):
        zombie, owner = play(f"{folder_url}/{number}", script, {"Z": (Opened, 1), "O": (Actor, 2)})
        outcomes.add((len(zombie.told), len(owner.found)))
    assert {told for told, _ in outcomes} == {0, 1, 2}  # all of its segments were before the opening, or some, or none


def test_owner_that_freezes_before_its_opening_never_opens_behind_its_successor(folder_url: str) -> None:
    outcomes = set()
    for number, script in enumerate(scripts("L", 4, "O", 5)):
        late, owner = play(f"{folder_url}/{number}", script, {"L": (Actor, 1), "O": (Actor, 2)})
        outcomes.add((late.refused, len(late.told)))
    assert {(True, 0), (False, 0), (False, 1)} <= outcomes


@pytest.mark.parametrize("seed", range(60))
def test_many_owners_in_any_order_make_one_log(folder_url: str, seed: int) -> None:
    letters = list("Z" * 4 + "L" * 7 + "M" * 7 + "O" * 9)
    random.Random(seed).shuffle(letters)
    play(folder_url, "".join(letters), {"Z": (Opened, 1), "L": (Actor, 2), "M": (Actor, 3), "O": (Actor, 4)})


# -- one by one --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(folder_url: str) -> Storage:
    return Storage.open(folder_url)


def opened(storage: Storage, who: str, epoch: int) -> log.EventLog:
    return log.EventLog(storage, owner_epoch=epoch, opening=opening(who))


def messages(storage: Storage) -> list[str]:
    return [each.message for each in log.read(storage)]


def test_opening_is_stored_at_once_and_knows_what_came_before(folder: Storage) -> None:
    first = opened(folder, "a", 1)
    assert [(e.message, e.owner_epoch, e.attempt) for e in log.read(folder)] == [("a0", 1, 1)]
    first.append(event("a", 1))
    assert first.close()
    second = opened(folder, "b", 5)
    assert [(e.message, e.owner_epoch, e.attempt) for e in log.read(folder)][1:] == [("a1", 1, 0), ("b0", 5, 1)]
    assert second.close()


def test_owner_below_the_logs_is_refused(folder: Storage) -> None:
    assert opened(folder, "a", 7).close()
    with pytest.raises(SupersededError, match="is being written by owner 7 of the run; owner 6 has to end"):
        opened(folder, "b", 6)
    with pytest.raises(SupersededError):
        log.EventLog(folder, owner_epoch=6)
    assert messages(folder) == ["a0"]


def test_log_of_a_time_without_owners_goes_on(folder: Storage) -> None:
    """Its events have no epoch, and its segments the same names."""
    old = [event("old", number).to_json().replace(',"owner_epoch":0', "") + "\n" for number in range(3)]
    assert "epoch" not in "".join(old)
    folder.create("000000000000.jsonl", "".join(old[:2]).encode())
    folder.create("000000000002.jsonl", old[2].encode())
    assert opened(folder, "a", 1).close()
    assert messages(folder) == ["old0", "old1", "old2", "a0"]
    assert folder.list()[-1] == "000000000003.jsonl"
    assert [each.message for each in log.last(folder, 2)] == ["old2", "a0"]


@pytest.mark.parametrize("data", [b"", b"\xff\n", b"{\n"], ids=["empty", "not text", "cut"])
def test_log_whose_last_segment_is_damaged_is_opened_behind_it(folder: Storage, data: bytes) -> None:
    assert opened(folder, "a", 1).close()
    folder.write("000000000001.jsonl", data)
    with pytest.raises(SupersededError):
        opened(folder, "b", 0)
    assert opened(folder, "b", 2).close()
    assert messages(folder) == ["a0", "b0"]
    assert folder.list()[-1] == "000000000002.jsonl"


def test_name_that_is_taken_and_not_listed_is_an_error_and_no_endless_search(folder: Storage) -> None:
    folder.write("000000000000.jsonl/x", b"a folder in a segment's place")
    with pytest.raises(StorageError, match=r"000000000000\.jsonl is neither in the folder's list nor free"):
        opened(folder, "a", 1)


def test_storage_that_fails_at_the_opening_is_told(folder_url: str) -> None:
    class Failing(Storage):
        def create(self, path: str, data: bytes) -> None:
            raise StorageError("503 for ever")

    with pytest.raises(StorageError, match="503"):
        opened(Failing(folder_url), "a", 1)


def test_follower_sees_one_log_over_a_change_of_owners(folder: Storage) -> None:
    first = opened(folder, "a", 1)
    followed = log.read(folder, poll_s=0.01)
    assert next(followed).message == "a0"
    second = opened(folder, "b", 2)
    first.append(event("a", 1))
    assert not first.flush()
    assert next(followed).message == "b0"
    second.append(replace(event("b", 1), kind=EventKind.RUN_FINISHED))
    assert second.close()
    assert [each.message for each in followed] == ["b1"]
    assert not first.close()


def test_superseded_log_takes_events_without_a_word_and_keeps_none(folder: Storage) -> None:
    told: list[str] = []
    first = log.EventLog(folder, owner_epoch=1, opening=opening("a"), on_superseded=told.append)
    second = opened(folder, "b", 2)
    for number in range(3):
        first.append(event("a", number + 1))
        assert not first.flush()
    assert len(told) == 1
    assert second.close()
    assert not first.close()
    assert messages(folder) == ["a0", "b0"]


@pytest.mark.s3
def test_owner_that_thaws_finds_its_name_taken_on_s3(s3_url: str) -> None:
    storage = Storage.open(f"{s3_url}/runs/r/events")
    told: list[Event] = []
    first = log.EventLog(storage, owner_epoch=1, opening=opening("a"), on_stored=told.extend)
    first.append(event("a", 1))
    assert first.flush(WAIT_S)
    second = opened(storage, "b", 2)
    first.append(event("a", 2))
    assert not first.close()
    second.append(event("b", 1))
    assert second.close()
    assert messages(storage) == ["a0", "a1", "b0", "b1"]
    assert [each.message for each in told] == ["a1"]
