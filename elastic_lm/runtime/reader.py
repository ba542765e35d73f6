"""A reader: the actor that turns window ids into verified tokens in Ray's object store.

Stateless but for a bounded cache, so any reader can serve any window and a lost one costs a re-read. A window is put into
the object store once; every worker of every node maps the same copy. No torch is imported here.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.order import Order
from elastic_lm.data.windows import read_window
from elastic_lm.storage import Storage

Window = tuple[int, int]  # (epoch, window in the epoch)

CONCURRENCY = 64  # calls that may wait for windows at a time: workers, not threads that work


class Reader:
    """Serves windows of one corpus in one order. Holds, or has under way, `prefetch_windows` + 2 and those being waited for."""

    def __init__(self, storage: Storage, manifest: Manifest, order: Order, prefetch_windows: int) -> None:
        self._storage, self._manifest, self._order = storage, manifest, order
        self._prefetch_windows = prefetch_windows
        self._lock = threading.Lock()
        self._windows: OrderedDict[Window, Future[Any]] = OrderedDict()
        self._num_waiting: Counter[Window] = Counter()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="window")
        self._num_read = 0

    def window(self, epoch: int, window: int, stride: int = 1) -> list[Any]:
        """[reference to the window's tokens]: in a list, so that Ray hands on the reference and not the tokens.

        Args: `stride`: this reader is asked for each `stride`-th window, so it reads those ahead and leaves the others.
        Raises: DataError when the data must not be trained on; StorageError when storage gave no answer in time.
        """
        wanted = (epoch, window)
        with self._lock:
            self._num_waiting[wanted] += 1
        future = self._begin(wanted)
        ordinal = epoch * self._order.num_windows + window
        for ahead in range(1, self._prefetch_windows + 1):
            self._begin(divmod(ordinal + ahead * stride, self._order.num_windows))
        try:
            return [future.result()]
        except BaseException:
            with self._lock:  # the next call tries again
                if self._windows.get(wanted) is future:
                    del self._windows[wanted]
            raise
        finally:
            with self._lock:
                self._num_waiting -= Counter([wanted])  # drops what is zero
                self._make_room()

    @ray.method(concurrency_group="control")
    def ping(self) -> None:
        """Answered as long as the process is well."""

    @ray.method(concurrency_group="control")
    def stats(self) -> dict[str, int]:
        """Windows read from storage since the start, those held now, and those of them that are still being read."""
        with self._lock:
            under_way = sum(not future.done() for future in self._windows.values())
            return {"windows_read": self._num_read, "windows_held": len(self._windows), "windows_under_way": under_way}

    def _begin(self, window: Window) -> Future[Any]:
        """The window, being read if it is not there."""
        with self._lock:
            future = self._windows.get(window)
            if future is None:
                future = self._windows[window] = self._pool.submit(self._read, window)
            self._windows.move_to_end(window)
            self._make_room()
            return future

    def _make_room(self) -> None:
        """Let go of the windows asked for longest ago, but of none that somebody waits for."""
        excess = len(self._windows) - self._prefetch_windows - 2
        idle = [window for window in self._windows if not self._num_waiting[window]]
        for window in idle[: max(0, excess)]:
            self._windows.pop(window).cancel()

    def _read(self, window: Window) -> Any:
        tokens = read_window(self._storage, self._manifest, self._order, *window)
        self._num_read += 1
        return ray.put(tokens)


def start_reader(storage: Storage, manifest: Manifest, order: Order, *, prefetch_windows: int, num_cpus: float) -> Any:
    """Ask Ray for one reader; returns its handle at once."""
    actor = ray.remote(concurrency_groups={"control": 1})(Reader).options(
        num_cpus=num_cpus,
        max_restarts=0,
        max_concurrency=CONCURRENCY,
        scheduling_strategy="SPREAD",
    )
    return actor.remote(storage, manifest, order, prefetch_windows)
