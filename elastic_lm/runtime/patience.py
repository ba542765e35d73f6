"""How long a run waits for what storage does not give: pauses that grow, and an end after a limit.

Who owns which wait: an operation of `Storage` ends within about a minute, well or not; a reader passes that on and tries
again when it is asked again; whoever trains owns the patience, because only there is it known that training waits, and
since when. The limit is of the time waited without any success in between, in however many leases.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.errors import AccessDeniedError, NotFoundError, StorageError, UnavailableError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0  # storage pauses longer between its own attempts; this is what its return may go unnoticed for
POLL_S = 0.005
LARGEST_EXPONENT = 10  # the longest pause is reached by then


class Patience:
    """For one thread. `limit_s`: data.storage_timeout_s."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waited_s = 0.0  # in waits that were cancelled, since the last success

    def outlast(
        self,
        what: str,
        attempt: Callable[[int], Result],
        cancelled: Callable[[], bool] = lambda: False,
        *,
        passing: tuple[type[Exception], ...] = (StorageError,),
        at_once: int = 1,
    ) -> Result:
        """What `attempt(number)` returns, once it does not raise `passing` any more; `at_once` attempts come without a pause.

        Raises: UnavailableError when that takes longer than the limit; Cancelled; what is final at once.
        """
        began = time.monotonic() - self._waited_s
        cause: Exception | None = None
        try:
            for number in itertools.count():
                try:
                    result = attempt(number)
                    break
                except (NotFoundError, AccessDeniedError):
                    raise
                except passing as error:
                    # A reader that is silent because its storage is tells less than the storage's own words.
                    if isinstance(error, StorageError) or not isinstance(cause, StorageError):
                        cause = error
                self._judge(what, time.monotonic() - began, cause)
                if number + 1 >= at_once:
                    _pause(number + 1 - at_once, began + self._limit_s, cancelled)
        except Cancelled:
            self._waited_s = time.monotonic() - began
            raise
        self._waited_s = 0.0
        return result

    def _judge(self, what: str, waited_s: float, cause: Exception) -> None:
        told = f"no {what} for {waited_s:.1f} s (data.storage_timeout_s={self._limit_s:g}): {_in_short(cause)}"
        if waited_s >= self._limit_s:
            raise UnavailableError(told) from cause
        logger.warning("%s; trying again", told)


def _pause(number: int, end: float, cancelled: Callable[[], bool]) -> None:
    """The longer the larger `number` is, and never the same: those who failed together come back apart. Not beyond `end`."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(number, LARGEST_EXPONENT))
    deadline = min(end, time.monotonic() + longest * random.uniform(0.5, 1.0))
    while time.monotonic() < deadline:
        if cancelled():
            raise Cancelled
        time.sleep(POLL_S)


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]
