"""One owner per run: whoever raced, froze, thawed, or lost storage for a while; told by no clock but the watcher's own."""

from __future__ import annotations

import os
import pickle
import platform
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import typer

from elastic_lm.errors import OwnershipError, StorageError, SupersededError
from elastic_lm.ownership import Owner, Ownership
from elastic_lm.storage import Storage
from elastic_lm.terminal import Exit, told_errors

pytestmark = pytest.mark.slow

WAIT_S = 30
RENEW_S, EXPIRY_S = 0.05, 0.5


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def run(request: pytest.FixtureRequest, folder_url: str) -> Storage:
    return Storage.open(folder_url if request.param == "file" else f"{request.getfixturevalue('s3_url')}/runs/r")


@pytest.fixture
def files(folder_url: str) -> Storage:
    return Storage.open(folder_url)


class Timer:
    """A clock and a sleep that are somebody's own. `on_sleep` is what happens in the world meanwhile."""

    def __init__(self, on_sleep: Callable[[], None] = lambda: None) -> None:
        self.now_s = 1000.0
        self._on_sleep = on_sleep

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self._on_sleep()


def acquire(storage: Storage, job: str, timer: Timer | None = None, **more: Any) -> Ownership:
    """As this process, on its own clock, or on the timer's."""
    times = {} if timer is None else {"clock": timer.clock, "sleep": timer.sleep}
    return Ownership.acquire(storage, "r", job_token=job, **{"renew_s": RENEW_S, "expiry_s": EXPIRY_S, **times, **more})


def let_go(ownership: Ownership, storage: Storage) -> None:
    """The owner dies without a word: its thread has ended and nothing says that it did."""
    ownership.release()
    assert storage.exists(f"owner/{ownership.epoch:08d}.released")
    storage.delete(f"owner/{ownership.epoch:08d}.released")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        threading.Event().wait(0.005)


def await_renewal(storage: Storage, epoch: int) -> None:
    path = f"owner/{epoch:08d}.renewed"
    seen = storage.read(path) if storage.exists(path) else b""
    until(lambda: storage.exists(path) and storage.read(path) != seen)


# -- who may own -------------------------------------------------------------------------------------------------------


def test_first_owner_has_epoch_one_and_every_next_one_more(files: Storage) -> None:
    for epoch in (1, 2, 3):
        owner = acquire(files, f"job-{epoch}")
        assert owner.epoch == epoch
        owner.check()
        owner.release()


def test_owner_is_told_in_words() -> None:
    owner = Owner(3, "token", "trainer-0", 4711, 1_772_366_400.0, "Ray at 10.0.0.1:6379")
    assert str(owner) == (
        "owner 3, process 4711 on host trainer-0 (Ray at 10.0.0.1:6379), since 2026-03-01 12:00:00 UTC"
    )
    assert "token" not in str(owner)


def test_second_job_is_refused_and_told_whose_the_run_is(run: Storage) -> None:
    told: list[str] = []
    owner = acquire(run, "a", what="Ray job 02")
    with pytest.raises(OwnershipError) as caught:
        acquire(run, "b", expiry_s=WAIT_S, on_waiting=told.append)
    assert f"run r is being trained by another job: owner 1, process {os.getpid()} on host {platform.node()}" in str(
        caught.value
    )
    assert "(Ray job 02), since" in str(caught.value)
    assert "elastic-lm stop r), or choose another name" in str(caught.value)
    assert len(told) == 1
    assert "Run r belongs to owner 1, process" in told[0]
    assert "no sign of life for 30 s" in told[0]
    owner.check()  # untroubled by who asked
    owner.release()


def test_released_run_is_nobodys_at_once(files: Storage) -> None:
    acquire(files, "a").release()
    told: list[str] = []
    owner = acquire(files, "b", on_waiting=told.append)
    assert (owner.epoch, told) == (2, [])
    owner.release()


def test_successor_of_the_same_job_takes_over_at_once(run: Storage) -> None:
    told: list[str] = []
    first = acquire(run, "a")
    second = acquire(run, "a", on_waiting=told.append)
    assert (second.epoch, told) == (2, [])
    with pytest.raises(
        SupersededError, match=r"run r was taken over by owner 2, process \d+ on host .*; owner 1, process"
    ):
        first.check()
    second.check()
    until(lambda: first.superseded is not None)  # it finds out by itself, too
    first.release()  # which says nothing about the second
    with pytest.raises(OwnershipError):
        acquire(run, "b")
    second.release()


@pytest.mark.parametrize("released", [True, False])
def test_whoever_goes_on_with_a_claim_of_its_own_takes_the_run_back_from_nobody(files: Storage, released: bool) -> None:
    """Frozen between two claims, it thaws when another job has had the run."""
    first = acquire(files, "a")
    second = acquire(files, "a", succeeds=first.epoch)
    assert second.epoch == first.epoch + 1
    second.release()
    other = acquire(files, "b")
    if released:
        other.release()
    with pytest.raises(SupersededError, match=f"was taken over by owner {other.epoch}"):
        acquire(files, "a", succeeds=second.epoch)
    for owner in (first, other):
        owner.release()


def test_claim_of_whose_success_nobody_heard_is_succeeded(files: Storage) -> None:
    first = acquire(files, "a")
    unheard = acquire(files, "a", succeeds=first.epoch)
    third = acquire(files, "a", succeeds=first.epoch)
    assert third.epoch == unheard.epoch + 1
    for owner in (first, unheard, third):
        owner.release()


def test_whoever_started_the_job_gives_the_run_back_for_coordinators_that_were_killed(files: Storage) -> None:
    driver = acquire(files, "a")
    let_go(acquire(files, "a"), files)
    driver.release()
    assert not files.exists("owner/00000002.released")
    driver.release_job()
    told: list[str] = []
    after = acquire(files, "b", on_waiting=told.append)
    assert (after.epoch, told) == (3, [])
    driver.release_job()  # it is no longer the job's to give back
    with pytest.raises(OwnershipError, match="owner 3"):
        acquire(files, "c", expiry_s=WAIT_S)
    after.release()


def test_job_without_a_token_is_refused(files: Storage) -> None:
    with pytest.raises(ValueError, match="secrets.token_hex"):
        acquire(files, "")


def test_expiry_shorter_than_a_few_renewals_is_refused(files: Storage) -> None:
    with pytest.raises(ValueError, match=r"expiry_s=3 is too short for a renewal every 1 s; use 4 or more"):
        acquire(files, "a", renew_s=1, expiry_s=3)


def test_errors_cross_processes() -> None:
    for error in (OwnershipError("whose"), SupersededError("by whom")):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_refusal_ends_a_command_with_the_code_for_what_is_not_available() -> None:
    with pytest.raises(typer.Exit) as caught, told_errors():
        raise OwnershipError("run r is being trained by another job")
    assert caught.value.exit_code == Exit.UNAVAILABLE


# -- silence -----------------------------------------------------------------------------------------------------------


def test_silent_owner_is_waited_for_by_the_watchers_clock_alone(run: Storage) -> None:
    let_go(acquire(run, "a"), run)
    timer = Timer()
    owner = acquire(run, "b", timer, expiry_s=30)
    assert owner.epoch == 2
    assert 30 <= timer.now_s - 1000 < 32
    owner.release()


def test_owner_that_died_before_its_first_renewal_is_waited_for_as_long(files: Storage) -> None:
    let_go(acquire(files, "a"), files)
    files.delete("owner/00000001.renewed")
    timer = Timer()
    acquire(files, "b", timer, expiry_s=30).release()
    assert timer.now_s - 1000 >= 30


def test_wall_clocks_have_no_say(files: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner from the future, a watcher in the past, and a clock that jumps to and fro: the same wait for all."""
    jumps = iter([4e9, 0.0, 1.5e9, -1e6] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    let_go(acquire(files, "a"), files)
    timer = Timer()
    second = acquire(files, "b", timer, expiry_s=30)
    assert 30 <= timer.now_s - 1000 < 32
    with pytest.raises(OwnershipError):
        acquire(files, "c", expiry_s=WAIT_S)
    second.check()
    second.release()


def test_living_owner_is_never_waited_out(files: Storage) -> None:
    """However fast the watcher's clock runs: what counts are the renewals in between."""
    owner = acquire(files, "a")
    with pytest.raises(OwnershipError):
        acquire(files, "b", Timer(lambda: await_renewal(files, 1)), expiry_s=30)
    owner.release()


def test_one_renewal_may_have_been_the_last(files: Storage) -> None:
    let_go(acquire(files, "a"), files)
    timer = Timer(lambda: files.write("owner/00000001.renewed", b"on its way when the owner died"))
    owner = acquire(files, "b", timer, expiry_s=30)
    assert owner.epoch == 2
    assert 31 <= timer.now_s - 1000 < 33  # counted anew from that renewal
    owner.release()


def test_sleep_of_the_watcher_counts_for_nothing(files: Storage) -> None:
    """It was frozen for an hour, and so may have been the owner, on the same machine."""
    let_go(acquire(files, "a"), files)
    timer, num_sleeps = Timer(), 0

    def freeze_once() -> None:
        nonlocal num_sleeps
        num_sleeps += 1
        timer.now_s += 3600 if num_sleeps == 3 else 0

    timer = Timer(freeze_once)
    acquire(files, "b", timer, expiry_s=30).release()
    assert num_sleeps >= 29


def test_release_while_somebody_watches_ends_the_wait(files: Storage) -> None:
    first = acquire(files, "a", renew_s=3600, expiry_s=4 * 3600)
    timer = Timer(first.release)
    second = acquire(files, "b", timer, expiry_s=30)
    assert second.epoch == 2
    assert timer.now_s - 1000 < 2
    second.release()


def test_another_that_took_over_while_somebody_watched_is_watched_next(files: Storage) -> None:
    let_go(acquire(files, "a"), files)
    others: list[Ownership] = []

    def late_successor() -> None:
        if not others:
            others.append(acquire(files, "a"))
        await_renewal(files, 2)

    told: list[str] = []
    with pytest.raises(OwnershipError, match="owner 2, process"):
        acquire(files, "b", Timer(late_successor), on_waiting=told.append)
    assert ["owner 1" in told[0], "owner 2" in told[1], len(told)] == [True, True, 2]
    others[0].release()


# -- storage in between ------------------------------------------------------------------------------------------------


class Faulty(Storage):
    """Storage with a connection of its own, which can be cut."""

    def __init__(self, url: str, **limits: Any) -> None:
        super().__init__(url, **limits)
        self.cut = threading.Event()

    def child(self, path: str) -> Storage:
        child = Faulty(super().child(path).url)
        child.cut = self.cut
        return child

    def list(self, prefix: str = "") -> list[str]:
        self._look()
        return super().list(prefix)

    def write(self, path: str, data: bytes) -> None:
        self._look()
        super().write(path, data)

    def _look(self) -> None:
        if self.cut.is_set():
            raise StorageError("503 for ever")


def test_owner_goes_on_while_storage_is_away_and_when_it_is_back(folder_url: str) -> None:
    storage = Faulty(folder_url)
    owner = acquire(storage, "a")
    storage.cut.set()
    until(lambda: owner.problem is not None)
    assert owner.problem == "The claim on run r cannot be renewed: 503 for ever"
    with pytest.raises(StorageError, match="503"):  # no answer is no permission
        owner.check()
    storage.cut.clear()
    until(lambda: owner.problem is None)
    owner.check()
    await_renewal(Storage.open(folder_url), 1)
    assert owner.superseded is None
    owner.release()


def test_driver_knows_whether_the_run_is_its_jobs(folder_url: str) -> None:
    storage = Faulty(folder_url)
    driver = acquire(storage, "a")
    assert driver.is_of_job()
    coordinator = acquire(storage, "a")
    assert driver.is_of_job()
    let_go(coordinator, storage)
    driver.release_job()
    other = acquire(storage, "b")
    assert not driver.is_of_job()
    storage.cut.set()
    assert driver.is_of_job()  # nobody knows better
    storage.cut.clear()
    other.release()
    for name in storage.list("owner/"):
        storage.delete(name)
    assert driver.is_of_job()


def test_owner_that_was_cut_off_looks_before_it_renews(folder_url: str) -> None:
    cut_off, storage = Faulty(folder_url), Storage.open(folder_url)
    first = acquire(cut_off, "a")
    await_renewal(storage, 1)
    cut_off.cut.set()
    second = acquire(storage, "b")
    renewals = storage.read("owner/00000001.renewed")
    cut_off.cut.clear()
    until(lambda: first.superseded is not None)
    assert "taken over by owner 2" in str(first.superseded)
    assert storage.read("owner/00000001.renewed") == renewals
    cut_off.cut.set()
    with pytest.raises(SupersededError):  # it knows, without asking again
        first.check()
    second.release()


def test_watcher_that_storage_does_not_answer_judges_nobody(folder_url: str) -> None:
    storage = Faulty(folder_url)
    let_go(acquire(Storage.open(folder_url), "a"), Storage.open(folder_url))
    with pytest.raises(StorageError, match="503"):
        acquire(storage, "b", Timer(storage.cut.set))
    assert Storage.open(folder_url).list("owner/") == ["owner/00000001.json", "owner/00000001.renewed"]


def test_release_is_quick_and_silent_when_storage_hangs(folder_url: str) -> None:
    class Hanging(Faulty):
        def child(self, path: str) -> Storage:
            child = Hanging(Storage.child(self, path).url)
            child.cut = self.cut
            return child

        def _look(self) -> None:
            if self.cut.is_set():
                ended.wait(WAIT_S)

    ended = threading.Event()
    storage = Hanging(folder_url)
    owner = acquire(storage, "a")
    storage.cut.set()
    began = time.monotonic()
    owner.release(timeout_s=0.3)
    assert time.monotonic() - began < 5
    ended.set()


def test_release_without_storage_lets_the_claim_expire(folder_url: str) -> None:
    storage = Faulty(folder_url)
    owner = acquire(storage, "a")
    await_renewal(storage, 1)
    storage.cut.set()
    owner.release()
    assert owner.problem == "The claim on run r could not be given back, so it has to expire: 503 for ever"
    timer = Timer()
    acquire(Storage.open(folder_url), "b", timer, expiry_s=30).release()
    assert timer.now_s - 1000 >= 30


# -- what lies in storage ----------------------------------------------------------------------------------------------


def test_last_claims_are_kept_and_older_ones_go(files: Storage) -> None:
    for number in range(6):
        owner = acquire(files, f"job-{number}")
        await_renewal(files, owner.epoch)
        owner.release()
    assert [name for name in files.list("owner/") if name.endswith(".json")] == [
        f"owner/{epoch:08d}.json" for epoch in (4, 5, 6)
    ]
    assert files.list("owner/0000000") == files.list("owner/")  # nothing else


def test_emptied_folder_does_not_make_an_owner_younger(files: Storage) -> None:
    assert acquire(files, "a", after=7).epoch == 8
    for path in files.list("owner/"):
        files.delete(path)
    owner = acquire(files, "b", after=8)
    assert owner.epoch == 9
    assert acquire(files, "b", after=3).epoch == 10


@pytest.mark.parametrize(
    "claim",
    [b"", b"{", b"[]", b'{"host": 7, "since_s": "noon"}', b'{"since_s": 1e300}', b'{"of": "a later version"}', b"\xff"],
    ids=["empty", "cut", "list", "types", "no time", "unknown", "not text"],
)
def test_claim_that_cannot_be_read_is_waited_for_like_any_other(files: Storage, claim: bytes) -> None:
    files.write("owner/00000004.json", claim)
    files.write("owner/notes.txt", b"not ours")
    timer, told = Timer(), []  # type: ignore[var-annotated]
    owner = acquire(files, "b", timer, expiry_s=30, on_waiting=told.append)
    assert owner.epoch == 5
    assert timer.now_s - 1000 >= 30
    assert "owner 4, process 0 on host unknown" in told[0]
    owner.release()


class Slow(Storage):
    """What is created in it is created late: first something else happens."""

    before: Callable[[], None]

    def child(self, path: str) -> Storage:
        child = Slow(super().child(path).url)
        child.before = self.before
        return child

    def create(self, path: str, data: bytes) -> None:
        before, self.before = self.before, lambda: None
        before()
        super().create(path, data)


def test_claim_that_was_outranked_before_it_was_made_is_none(folder_url: str) -> None:
    """Its maker slept before the write, so long that even the claims which outrank its epoch are deleted."""
    storage, slow = Storage.open(folder_url), Slow(folder_url)
    owners: list[Ownership] = []

    def meanwhile() -> None:
        for number in range(6):
            owners.append(acquire(storage, "a"))
            await_renewal(storage, number + 1)
        assert not storage.exists("owner/00000001.json")

    slow.before = meanwhile
    with pytest.raises(OwnershipError, match="owner 6"):
        acquire(slow, "b", expiry_s=WAIT_S)
    owners[-1].check()
    for owner in owners:
        owner.release()


# -- several threads and processes -------------------------------------------------------------------------------------


def test_of_many_that_find_a_silent_owner_one_takes_over(files: Storage) -> None:
    let_go(acquire(files, "a"), files)

    def attempt(number: int) -> Ownership | OwnershipError:
        try:
            return acquire(files, f"job-{number}", renew_s=0.1, expiry_s=2)
        except OwnershipError as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(attempt, range(4)))
    (winner,) = [outcome for outcome in outcomes if isinstance(outcome, Ownership)]
    assert winner.epoch == 2
    assert all("owner 2, process" in str(outcome) for outcome in outcomes if outcome is not winner)
    winner.release()


SCRIPT = textwrap.dedent("""
    import sys
    from elastic_lm.errors import OwnershipError, SupersededError
    from elastic_lm.ownership import Ownership
    from elastic_lm.storage import Storage

    url, job = sys.argv[1:]
    print("ready", flush=True)
    for command in sys.stdin:
        try:
            verb, *numbers = command.split()
            if verb == "acquire":
                expiry_s = float(numbers[0])
                owner = Ownership.acquire(Storage.open(url), "r", job_token=job, renew_s=0.1, expiry_s=expiry_s)
                print("owns", owner.epoch, flush=True)
            else:
                owner.check()
                print("still owns", owner.epoch, flush=True)
        except SupersededError as error:
            print("superseded:", error, flush=True)
        except OwnershipError as error:
            print("refused:", error, flush=True)
""")


class Process:
    """A process that does as it is told: `acquire EXPIRY_S` or `check`."""

    def __init__(self, url: str, job: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, url, job], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.answer() == "ready"

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def processes(url: str, *jobs: str) -> Iterator[list[Process]]:
    started = [Process(url, job) for job in jobs]
    try:
        yield started
    finally:
        for process in started:
            process.end()


def test_of_two_processes_that_race_one_owns_the_run(run: Storage) -> None:
    with processes(run.url, "a", "b") as pair:
        for process in pair:
            process.tell(f"acquire {WAIT_S}")
        answers = sorted(process.answer() for process in pair)
    assert answers[0] == "owns 1"
    assert answers[1].startswith("refused: run r is being trained by another job: owner 1, process")


def test_process_that_thaws_after_another_took_over_is_told(run: Storage) -> None:
    with processes(run.url, "a", "b", "c") as (frozen, taker, late):
        frozen.tell(f"acquire {WAIT_S}")
        assert frozen.answer() == "owns 1"
        frozen.signal(signal.SIGSTOP)
        taker.tell("acquire 2")
        assert taker.answer() == "owns 2"
        frozen.signal(signal.SIGCONT)
        frozen.tell("check")
        assert frozen.answer().startswith("superseded: run r was taken over by owner 2, process")
        taker.tell("check")
        assert taker.answer() == "still owns 2"
        late.tell(f"acquire {WAIT_S}")
        assert late.answer().startswith("refused: run r is being trained by another job: owner 2")


def test_process_that_was_frozen_for_less_than_the_expiry_goes_on(files: Storage) -> None:
    with processes(files.url, "a") as (owner,):
        owner.tell(f"acquire {WAIT_S}")
        assert owner.answer() == "owns 1"
        owner.signal(signal.SIGSTOP)
        timer, thawed = Timer(), threading.Event()

        def thaw_in_time() -> None:
            if timer.now_s >= 1020 and not thawed.is_set():
                owner.signal(signal.SIGCONT)
                thawed.set()
            if thawed.is_set():
                await_renewal(files, 1)

        timer = Timer(thaw_in_time)
        with pytest.raises(OwnershipError, match="owner 1"):
            acquire(files, "b", timer, expiry_s=30)
        owner.tell("check")
        assert owner.answer() == "still owns 1"


def test_owner_that_is_known_to_be_gone_is_not_waited_for(folder_url: str) -> None:
    storage = Storage.open(folder_url)
    first = Ownership.acquire(storage, "a-run", job_token="one")
    waited: list[str] = []
    second = Ownership.acquire(
        storage, "a-run", job_token="two", is_gone=lambda owner: owner.job_token == "one", on_waiting=waited.append
    )
    assert (second.epoch, waited) == (first.epoch + 1, [])
    second.release()
    first.release()


def test_owner_whose_process_of_this_machine_was_killed_is_not_waited_for(folder_url: str) -> None:
    script = f"""
        from elastic_lm.ownership import Ownership
        from elastic_lm.storage import Storage
        Ownership.acquire(Storage.open({folder_url!r}), "a-run", job_token="one")
        print("mine", flush=True)
        input()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == b"mine\n"
        other.kill()
    waited: list[str] = []
    second = Ownership.acquire(Storage.open(folder_url), "a-run", job_token="two", on_waiting=waited.append)
    assert (second.epoch, waited) == (2, [])
    second.release()
