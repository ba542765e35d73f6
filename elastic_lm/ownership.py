"""Who owns a run: of all jobs that are given its name, one trains it and writes where it is stored.

A claim is the object `owner/<epoch>.json` in the run's folder, created once and never changed; the highest epoch owns the
run. Its owner counts in `<epoch>.renewed` as long as it lives, and leaves `<epoch>.released` when it goes for good.
Invariant: storage lets one of all who create an epoch have it; whoever is outranked is told so before it makes anything
count or deletes anything (`check`), and by itself at its next renewal. An owner is taken for gone when its count stood
still for `EXPIRY_S` of the watcher's own monotonic clock, of which a time without looking counts for nothing: no two clocks
are ever compared, and nobody is judged while the judge slept or storage was away.
Trade-off: a job that died without a word is waited for, unless its process was one of this machine and has ended. One that
cannot reach storage trains on; if another takes over meanwhile, both compute, and one of them in vain: it finds out with
the first answer of storage. What it does between a `check` and the write that follows is left to the event log (which
contends for each segment's name) and to the manifests (which carry the epoch).
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from elastic_lm.errors import AlreadyExistsError, NotFoundError, OwnershipError, StorageError, SupersededError
from elastic_lm.process_identity import has_ended, this_process
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)


FOLDER = "owner"
RENEW_S = 5.0
EXPIRY_S = 30.0
ONE_RENEWAL_S = 15.0  # with its retries; no attempt takes more than a third of it, so one that hangs is no expiry
LOOK_S = 1.0
LIVES = 2  # renewals that show it: the first one seen may have been an owner's last
KEPT_EPOCHS = 3  # for people who look
_CLAIM, _RENEWED, _RELEASED = "json", "renewed", "released"
_NAME = re.compile(rf"(\d{{8,}})\.({_CLAIM}|{_RENEWED}|{_RELEASED})")


@dataclass(frozen=True)
class Owner:
    """Who made a claim. Coordinators of one job show the same `job_token`. `what` is in people's words: a Ray address or job.

    `since_s` is unix time, for people alone; `process` is its process's name (process_identity.py).
    """

    epoch: int
    job_token: str = ""
    host: str = "unknown"
    pid: int = 0
    since_s: float = 0.0
    what: str = ""
    process: str = ""

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        what = f" ({self.what})" if self.what else ""
        return f"owner {self.epoch}, process {self.pid} on host {self.host}{what}, since {since}"


class Ownership:
    """A claim of this process, renewed on a thread of its own until `release`. Safe to use from several threads."""

    def __init__(
        self,
        folder: Storage,
        run: str,
        owner: Owner,
        *,
        renew_s: float = RENEW_S,
        noun: str = "run",
    ) -> None:
        """For `acquire`, which made the claim."""
        self.owner = owner
        self._folder, self._run, self._renew_s, self._noun = folder, run, renew_s, noun
        self._superseded: str | None = None
        self._problem: str | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ownership", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls,
        run_storage: Storage,
        run: str,
        *,
        job_token: str,
        what: str = "",
        noun: str = "run",
        held: str = "trained by another job",
        remedy: str | None = None,
        after: int = 0,
        succeeds: int | None = None,
        expiry_s: float = EXPIRY_S,
        renew_s: float = RENEW_S,
        is_gone: Callable[[Owner], bool] = lambda owner: False,
        on_waiting: Callable[[str], None] = lambda sentence: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> Ownership:
        """Become the run's owner: at once if it has none, or one of the same job; else when its owner is gone.

        Args: `noun`: what is owned, in a word; `held`: what becomes of it while its owner lives; `remedy`: what to do about that,
        None: what helps with a run. `after`: the highest epoch that the run's log or checkpoints hold, should `owner/` have been
        emptied since. `succeeds`: the epoch of this process's claim so far, which only the new one may outrank.
        `is_gone` knows of some owners for certain that they have ended: they are not waited for, nor is a process of this
        machine. `on_waiting` gets a sentence before somebody is waited for. `renew_s` is the same for all who may meet;
        `expiry_s` is at least four times as long.
        Raises: OwnershipError naming the owner when it lives; SupersededError when another has outranked the claim that this one
        succeeds; StorageError.
        """
        if not job_token:
            raise ValueError("a job without a token cannot be told from others; use secrets.token_hex(16)")
        if expiry_s < 4 * renew_s:
            raise ValueError(
                f"expiry_s={expiry_s} is too short for a renewal every {renew_s} s; use {4 * renew_s} or more"
            )
        if remedy is None:
            remedy = (
                f"Wait for its end, stop it where it runs (elastic-lm stop {run}), or choose another name for a run of its "
                "own"
            )
        folder = run_storage.child(FOLDER)
        watch = _Watch(folder, run, noun, held, remedy, expiry_s, is_gone, on_waiting, clock, sleep)
        while True:
            newest = _Newest.of(folder)
            if succeeds is not None and newest.epoch > succeeds:
                there = _owner(folder, newest.epoch)
                is_ours = (there.job_token, there.process) == (job_token, this_process())
                if not is_ours:  # as one is of whose success we never heard
                    raise SupersededError(_superseded(noun, run, there, succeeds))
            if newest.epoch and not newest.released:
                there = _owner(folder, newest.epoch)
                if there.job_token != job_token and not watch.sees_it_go(there):
                    continue
            epoch = max(newest.epoch, after) + 1
            owner = Owner(epoch, job_token, platform.node(), os.getpid(), time.time(), what, this_process())
            with contextlib.suppress(AlreadyExistsError):
                folder.create(_name(owner.epoch, _CLAIM), json.dumps(asdict(owner)).encode())
                # Whoever slept before this line may have made a claim that was outranked and deleted long ago.
                if _Newest.of(folder).epoch == owner.epoch:
                    return cls(folder, run, owner, renew_s=renew_s, noun=noun)

    @property
    def epoch(self) -> int:
        """Goes into generations, events and manifests; a higher one outranks."""
        return self.owner.epoch

    @property
    def problem(self) -> str | None:
        """Why the claim could not be renewed lately, in a sentence; None when all is well."""
        return self._problem

    @property
    def superseded(self) -> str | None:
        """Who owns the run instead, in a sentence, as soon as that is known here."""
        return self._superseded

    def check(self) -> None:
        """Look into storage whether the run still belongs to this owner. Before anything counts or goes that all see.

        Raises: SupersededError naming the new owner; StorageError when there is no answer, which is no permission.
        """
        self._check(_impatient(self._folder))

    def is_of_job(self) -> bool:
        """Whether the run's owner is this one, or another of its job: nobody else, as far as storage tells."""
        folder = _impatient(self._folder)
        try:
            return _owner(folder, _Newest.of(folder).epoch).job_token in ("", self.owner.job_token)
        except StorageError:
            return True

    def release(self, timeout_s: float = 10.0) -> None:
        """Say that this owner is gone for good, so that nobody waits for it. Takes `timeout_s` at most; never raises."""
        self._ending.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("The claim on %s %s could not be given back in %.0f s.", self._noun, self._run, timeout_s)

    def release_job(self, timeout_s: float = 10.0) -> None:
        """The same in the name of the job's newest owner, by whoever started the job and outlived its coordinators."""
        self.release(timeout_s)
        releasing = threading.Thread(target=self._give_back_newest, name="release", daemon=True)
        releasing.start()
        releasing.join(timeout_s)

    def _check(self, folder: Storage) -> None:
        if self._superseded is None and (newest := _Newest.of(folder).epoch) > self.epoch:
            self._superseded = _superseded(self._noun, self._run, _owner(folder, newest), self.epoch)
        if self._superseded is not None:
            raise SupersededError(self._superseded)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        """Look, then count; never the other way round, so that no count speaks for an owner that did not look."""
        folder = _impatient(self._folder)
        count = 0
        while True:
            try:
                self._check(folder)
                count += 1
                folder.write(_name(self.epoch, _RENEWED), f"{count}\n".encode())
                if count == 1:
                    self._forget_old(folder)
                self._problem = None
            except SupersededError:
                return  # whoever holds the claim looks at `superseded`
            except StorageError as error:
                self._say(f"The claim on {self._noun} {self._run} cannot be renewed: {error}")
            if self._ending.wait(self._renew_s):
                self._give_back(folder, self.epoch)
                return

    def _forget_old(self, folder: Storage) -> None:
        """What is deleted was outranked several times: an owner that was just outranked itself does no harm here."""
        for name in folder.list():
            if (match := _NAME.fullmatch(name)) and int(match[1]) <= self.epoch - KEPT_EPOCHS:
                folder.delete(name)

    def _give_back_newest(self) -> None:
        folder = _impatient(self._folder)
        try:
            newest = _Newest.of(folder)
            if not newest.released and _owner(folder, newest.epoch).job_token == self.owner.job_token:
                self._give_back(folder, newest.epoch)
        except StorageError as error:
            self._say(f"The claim on {self._noun} {self._run} could not be given back, so it has to expire: {error}")

    def _give_back(self, folder: Storage, epoch: int) -> None:
        try:
            folder.write(_name(epoch, _RELEASED), b"")
        except StorageError as error:
            self._say(f"The claim on {self._noun} {self._run} could not be given back, so it has to expire: {error}")

    def _say(self, problem: str) -> None:
        if self._problem is None:  # once, and again after it was well
            logger.warning("%s", problem)
        self._problem = problem


class _Watch:
    """Looks at owners from outside. `clock` and `sleep` are this process's own."""

    def __init__(
        self,
        folder: Storage,
        run: str,
        noun: str,
        held: str,
        remedy: str,
        expiry_s: float,
        is_gone: Callable[[Owner], bool],
        on_waiting: Callable[[str], None],
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self._folder, self._run, self._noun, self._expiry_s = folder, run, noun, expiry_s
        self._held, self._remedy = held, remedy
        self._is_gone, self._on_waiting = is_gone, on_waiting
        self._clock, self._sleep = clock, sleep
        self._look_s = min(LOOK_S, expiry_s / 20)

    def sees_it_go(self, owner: Owner) -> bool:
        """Whether the owner is gone; False: there is another by now.    Raises: OwnershipError when it lives."""
        if self._is_known_to_be_gone(owner):
            return True
        self._on_waiting(
            f"{self._noun.capitalize()} {self._run} belongs to {owner}; watching whether it lives. It is taken over when it has "
            f"given no sign of life for {self._expiry_s:.0f} s."
        )
        seen, num_renewals, silent_s, looked_at = self._renewals(owner), 0, 0.0, self._clock()
        while silent_s < self._expiry_s:
            self._sleep(self._look_s)
            newest, renewals, now = _Newest.of(self._folder), self._renewals(owner), self._clock()
            if newest.epoch != owner.epoch:
                return False
            if newest.released or self._is_known_to_be_gone(owner):
                return True
            silent_s += min(now - looked_at, 2 * self._look_s)  # more than that was our sleep, or storage's
            looked_at = now
            if renewals != seen:
                seen, num_renewals, silent_s = renewals, num_renewals + 1, 0.0
            if num_renewals == LIVES:
                raise OwnershipError(
                    f"{self._noun} {self._run} is being {self._held}: {owner}; its claim was renewed while this one watched. "
                    f"{self._remedy}"
                )
        return True

    def _is_known_to_be_gone(self, owner: Owner) -> bool:
        return has_ended(owner.process) or self._is_gone(owner)

    def _renewals(self, owner: Owner) -> bytes | None:
        try:
            return self._folder.read(_name(owner.epoch, _RENEWED))
        except NotFoundError:
            return None


@dataclass(frozen=True)
class _Newest:
    """The highest claim in storage, 0 if there is none, and whether its owner has gone for good."""

    epoch: int
    released: bool

    @classmethod
    def of(cls, folder: Storage) -> _Newest:
        found = {(int(match[1]), match[2]) for name in folder.list() if (match := _NAME.fullmatch(name))}
        epoch = max((epoch for epoch, kind in found if kind == _CLAIM), default=0)
        return cls(epoch, (epoch, _RELEASED) in found)


def _owner(folder: Storage, epoch: int) -> Owner:
    """Who made this claim, as far as that can be read: of one that is damaged or gone the epoch alone."""
    try:
        body = json.loads(folder.read(_name(epoch, _CLAIM)))
        owner = Owner(**{**body, "epoch": epoch})
        str(owner)
    except (NotFoundError, ValueError, TypeError, OverflowError, OSError):
        return Owner(epoch)
    return owner


def _superseded(noun: str, run: str, by: Owner, epoch: int) -> str:
    """Of an owner of this process."""
    return (
        f"{noun} {run} was taken over by {by}; owner {epoch}, process {os.getpid()} on host {platform.node()}, has to end: "
        f"nothing of it counts from now on, and the {noun} goes on there"
    )


def _name(epoch: int, kind: str) -> str:
    return f"{epoch:08d}.{kind}"


def _impatient(storage: Storage) -> Storage:
    """The same folder with the deadline of a renewal."""
    folder = copy.copy(storage)
    folder.deadline_s, folder.retries = ONE_RENEWAL_S, 2
    return folder
