"""Whoever waits for storage pauses longer and longer, goes on as soon as it is back, and gives up after the limit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise

import pytest

from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.errors import AccessDeniedError, NotFoundError, StorageError, UnavailableError
from elastic_lm.runtime import patience
from elastic_lm.runtime.patience import FIRST_PAUSE_S, POLL_S, Patience

WAIT_S = 20.0


class Clock:
    """Time passes while somebody sleeps, and only then."""

    def __init__(self) -> None:
        self._now = 1000.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(patience, "time", clock)
    return clock


def never() -> bool:
    return False


class Failing:
    """An attempt that raises these errors in turn and then succeeds; `asked_at` are its times."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.asked_at: list[float] = []

    def __call__(self, number: int) -> str:
        assert number == len(self.asked_at)
        self.asked_at.append(patience.time.monotonic())
        if self._errors:
            raise self._errors.pop(0)
        return "tokens"

    @property
    def gaps_s(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.asked_at)]


def away(number: int = 1) -> list[Exception]:
    return [StorageError("read s3://bucket/x: gave up")] * number


def test_success_comes_without_a_pause() -> None:
    assert Patience(WAIT_S).outlast("tokens", Failing(), never) == "tokens"


def test_pauses_double_and_differ() -> None:
    attempt = Failing(*away(4))
    assert Patience(WAIT_S).outlast("tokens", attempt, never) == "tokens"
    longest = [FIRST_PAUSE_S * 2**number for number in range(4)]
    assert all(most / 2 <= gap < most + 2 * POLL_S for gap, most in zip(attempt.gaps_s, longest, strict=True))
    assert len({round(gap / most, 2) for gap, most in zip(attempt.gaps_s, longest, strict=True)}) > 1


def test_first_attempts_may_come_at_once() -> None:
    attempt = Failing(*away(3))
    Patience(WAIT_S).outlast("tokens", attempt, never, at_once=3)
    assert attempt.gaps_s[:2] == [0, 0] and attempt.gaps_s[2] >= FIRST_PAUSE_S / 2


def test_limit_ends_the_wait_and_names_storage_and_the_field(clock: Clock) -> None:
    """The last word was a reader's silence; storage's own is what helps."""
    silence: list[Exception] = [TimeoutError("no answer within 5.0 s")] * 1000
    attempt = Failing(TimeoutError("first"), *away(), *silence)
    began = clock.monotonic()
    told = r"no tokens for 0\.5 s \(data.storage_timeout_s=0.5\): StorageError: read s3://bucket/x: gave up"
    with pytest.raises(UnavailableError, match=told):
        Patience(0.5).outlast("tokens", attempt, never, passing=(StorageError, TimeoutError))
    assert 0.5 <= clock.monotonic() - began < 0.5 + 2 * POLL_S


@pytest.mark.parametrize("error", [NotFoundError("gone"), AccessDeniedError("refused"), ValueError("a bug")])
def test_what_no_waiting_helps_against_is_not_waited_for(error: Exception) -> None:
    attempt = Failing(error)
    with pytest.raises(type(error)):
        Patience(WAIT_S).outlast("tokens", attempt, never)
    assert len(attempt.asked_at) == 1


def test_fence_ends_a_pause_and_the_time_waited_is_kept(clock: Clock) -> None:
    """Re-forming again and again must not make the wait endless; but a success begins it anew."""
    patient = Patience(0.6)

    def wait(seconds: float, attempt: Callable[[int], str]) -> None:
        until = clock.monotonic() + seconds
        with pytest.raises(Cancelled):
            patient.outlast("tokens", attempt, lambda: clock.monotonic() > until)

    wait(0.4, Failing(*away(100)))
    assert patient.outlast("tokens", Failing(), never) == "tokens"
    wait(0.4, Failing(*away(100)))
    with pytest.raises(UnavailableError, match="for 0.6 s"):
        patient.outlast("tokens", Failing(*away(100)), never)


def test_waiting_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Patience(WAIT_S).outlast("tokens", Failing(*away()), never)
    assert [record.message for record in caplog.records] == [
        "no tokens for 0.0 s (data.storage_timeout_s=20): StorageError: read s3://bucket/x: gave up; trying again"
    ]
