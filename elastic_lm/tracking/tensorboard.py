"""Scalars for TensorBoard: event files in a folder.

Invariant: the folder holds one event file of ours, every step in it once and in order. Each attempt, and each export, writes it
anew from the log and then removes the one before: a file that was cut off by a kill leaves nothing behind, and a gap closes
by itself. A lock keeps two writers apart. Trade-off: 70 us a step when an attempt begins (CRC in Python), paced by the feed.
"""

from __future__ import annotations

import secrets
import socket
import time
from pathlib import Path
from typing import Any

from elastic_lm.events.types import Event
from elastic_lm.tracking.folder_lock import FolderLock
from elastic_lm.tracking.sink import Point, point_of

OURS = ".elastic-lm"  # the end of the names of our event files; others in the folder are left alone


class TensorBoard:
    """See `Sink`."""

    key = "tensorboard"
    title = "TensorBoard"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = FolderLock(folder)
        self._writer: Any = None
        self._file = folder / _new_name()
        self._part = folder / f"{secrets.token_hex(4)}{OURS}.part"  # not a name that TensorBoard looks at
        self._next_step = 0
        self._evaluation: tuple[Point, float] | None = None  # the last one, and its unix time

    def open(self) -> None:
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        for left in self._folder.glob(f"*{OURS}.part"):
            left.unlink()
        self._writer = RecordWriter(str(self._part))
        self._put(file_version="brain.Event:2", wall_time=time.time())
        self._begin_again(0)  # a TensorBoard that has seen the file before forgets it

    def write(self, event: Event) -> None:
        if (point := point_of(event)) is None:
            return
        if point.is_step and point.step < self._next_step:
            self._begin_again(point.step)
            if self._evaluation is not None and self._evaluation[0].step == point.step:
                self._show(*self._evaluation)  # it comes before that step, and stays
        if point.is_step:
            self._next_step = point.step + 1
        else:
            self._evaluation = point, event.time_s
        self._show(point, event.time_s)

    def _show(self, point: Point, time_s: float) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in point.scalars.items()]
        self._put(step=point.step, wall_time=time_s, summary=Summary(value=values))

    def caught_up(self) -> None:
        before = list(self._folder.glob(f"events.out.tfevents.*{OURS}"))
        self._writer.flush()
        self._part.rename(self._file)
        for file in before:
            file.unlink()

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.flush()
            self._writer.close()
            self._writer = None
        self._part.unlink(missing_ok=True)
        self._lock.release()

    def _begin_again(self, step: int) -> None:
        """What was shown from this step on is to be forgotten: it comes again."""
        from tensorboardX.proto.event_pb2 import SessionLog

        self._put(step=step, session_log=SessionLog(status=SessionLog.START))

    def _put(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event as Record

        self._writer.write(Record(**fields).SerializeToString())


def _new_name() -> str:
    """Sorted by time, as TensorBoard reads them, and never twice the same."""
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{secrets.token_hex(4)}{OURS}"
