"""The worker's side of the readers: tokens of a micro-batch, from whichever reader can give them.

Affinity: a window is asked of the reader that its number names, so all workers ask the same one and it is read from
storage once. A reader that is dead or silent is passed over; which reader answers does not show in the tokens. When none
can give a window, training waits for it, but not for ever: see patience.py.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from elastic_lm.data.order import Order
from elastic_lm.data.windows import Tokens, rows
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.errors import DataError, StorageError
from elastic_lm.runtime.patience import POLL_S, Patience

Window = tuple[int, int]

WINDOWS_KEPT = 3
PASSING = (RayActorError, ObjectLostError, TimeoutError, StorageError)


class WindowClient:
    """Implements the engine's TokenSource. One thread uses it; `set_readers` may be called from another.

    Args: `address` of the corpus, for people.
    """

    def __init__(
        self, order: Order, address: str, readers: list[Any], *, reader_timeout_s: float, storage_timeout_s: float
    ) -> None:
        self.order = order
        self._address = address
        self._readers = readers
        self._timeout_s = reader_timeout_s
        self._patience = Patience(storage_timeout_s)
        self._windows: OrderedDict[Window, Tokens] = OrderedDict()
        self._asked: dict[Window, tuple[Any, ray.ObjectRef]] = {}

    def set_readers(self, readers: list[Any]) -> None:
        """Ask these from now on."""
        self._readers = readers

    def tokens(self, step: int, micro_batch: int, cancelled: Callable[[], bool]) -> Tokens:
        """Rows of the micro-batch, [micro_batch_size, sequence_length + 1].

        Raises: Cancelled; DataError when a reader found data that must not be trained on; UnavailableError.
        """
        found = rows(self.order, step, micro_batch, lambda *window: self._window(window, cancelled))
        self._ask_ahead(step)
        return found

    def _ask_ahead(self, step: int) -> None:
        """Have the next step's windows, and the one after the newest, on their way before they are needed."""
        windows = self.order.windows_of(step + 1)
        for window in [*windows, self.order.window_after(windows[-1])]:
            if window not in self._windows and window not in self._asked and len(self._asked) < WINDOWS_KEPT:
                self._ask(window, attempt=0)

    def _window(self, window: Window, cancelled: Callable[[], bool]) -> Tokens:
        if window not in self._windows:
            self._windows[window] = self._fetch(window, cancelled)
            while len(self._windows) > WINDOWS_KEPT:
                self._windows.popitem(last=False)
        self._windows.move_to_end(window)
        return self._windows[window]

    def _fetch(self, window: Window, cancelled: Callable[[], bool]) -> Tokens:
        def attempt(number: int) -> Tokens:
            if window not in self._asked:
                self._ask(window, number)
            reference = self._asked[window][1]
            try:
                (tokens,) = self._await(reference, cancelled)
                return self._await(tokens, cancelled)
            except RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, StorageError) else DataError(str(cause))) from error
            finally:
                self._asked.pop(window, None)

        return self._patience.outlast(
            f"tokens of {self._address}", attempt, cancelled, passing=PASSING, at_once=len(self._readers)
        )

    def _ask(self, window: Window, attempt: int) -> None:
        reader = reader_for(window, self.order, self._readers, attempt)
        self._asked[window] = (reader, reader.window.remote(*window, stride=len(self._readers)))

    def _await(self, reference: ray.ObjectRef, cancelled: Callable[[], bool]) -> Any:
        """The value, polled.    Raises: Cancelled; TimeoutError after the reader's time-out; what the reader raised."""
        deadline = time.monotonic() + self._timeout_s
        while not ray.wait([reference], timeout=POLL_S)[0]:
            if cancelled():
                raise Cancelled
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer within {self._timeout_s:.1f} s")
        return ray.get(reference)


def reader_for(window: Window, order: Order, readers: Sequence[Any], attempt: int = 0) -> Any:
    """The reader to ask for a window; another one at each attempt."""
    epoch, index = window
    return readers[(epoch * order.num_windows + index + attempt) % len(readers)]
