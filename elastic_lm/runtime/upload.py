"""A member's share of a checkpoint on its way to storage: a copy of some tensors, and the thread that uploads it.

Invariant: the copy is made while nothing writes to the state, and is whole before the constructor returns; whatever happens
to the upload, training knows nothing of it. It runs at low priority, because the training beside it is what everybody
waits for. One that is cancelled lets go of its copy and of whoever waits for it at once, and writes no further part.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from elastic_lm.checkpoint.layout import PART_BYTES, Part, shares
from elastic_lm.errors import CheckpointError, without_frames

if TYPE_CHECKING:
    from elastic_lm.engine.state import ReplicaState
    from elastic_lm.storage import Storage

NICENESS = 10  # on top of the process's own

Attempt = tuple[int, int]  # at a checkpoint: epoch of the owner that makes it, its number; later ones are greater


class Uploads:
    """A member's uploads, of which only that of the newest attempt counts: the one before is cancelled by it."""

    def __init__(self, storage: Storage, *, part_bytes: int = PART_BYTES) -> None:
        self._storage, self._part_bytes = storage, part_bytes
        self._newest: tuple[Attempt, Upload] | None = None
        self._given_up: Attempt = (-1, 0)  # the last one that was

    def begin(self, attempt: Attempt, step: int, state: ReplicaState, *, share: int, num_shares: int) -> None:
        """Copy, and begin to upload.    Raises: as `Upload`; CheckpointError when it was given up, or a later one has begun."""
        if attempt <= self._given_up:
            raise CheckpointError(f"attempt {attempt} at a checkpoint was given up before it began")
        if self._newest is not None:
            if attempt < self._newest[0]:
                raise CheckpointError(f"attempt {attempt} at a checkpoint is over: {self._newest[0]} has begun")
            self._newest[1].cancel()
            self._newest = None  # its copy goes before another is made
        upload = Upload(self._storage, step, state, share=share, num_shares=num_shares, part_bytes=self._part_bytes)
        self._newest = attempt, upload

    def result(self, attempt: Attempt) -> tuple[Part, ...]:
        """Wait for the upload of this attempt.    Raises: as `Upload.result`."""
        newest = self._newest
        if newest is None or newest[0] != attempt:
            raise CheckpointError(f"attempt {attempt} at a checkpoint is not under way here")
        return newest[1].result()

    def cancel(self, attempt: Attempt) -> None:
        """This attempt was given up, and whatever was before it."""
        self._given_up = max(self._given_up, attempt)
        newest = self._newest
        if newest is not None and newest[0] <= attempt:
            newest[1].cancel()


class Upload:
    """Share `share` of `num_shares` of a state that is at `step`.    Raises: RuntimeError when it is not, or is torn."""

    def __init__(
        self,
        storage: Storage,
        step: int,
        state: ReplicaState,
        *,
        share: int,
        num_shares: int,
        part_bytes: int = PART_BYTES,
    ) -> None:
        if state.torn or state.next_step != step:
            raise RuntimeError(f"cannot save step {step}: this state is at {state.next_step}, torn={state.torn}")
        self._storage, self._step, self._share, self._part_bytes = storage, step, share, part_bytes
        tensors = state.tensors()
        mine = shares({name: tensor.numel() for name, tensor in tensors.items()}, num_shares)[share]
        self._tensors: dict[str, Any] = {name: tensors[name].detach().clone() for name in mine}
        self._outcome: tuple[Part, ...] | BaseException | None = None
        self._cancelled, self._over = threading.Event(), threading.Event()
        threading.Thread(target=self._run, name=f"save-{step}", daemon=True).start()

    def _run(self) -> None:
        from elastic_lm.checkpoint import store

        try:
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(niceness, 19))
            self._outcome = store.save_share(
                self._storage,
                self._step,
                self._tensors,
                share=self._share,
                part_bytes=self._part_bytes,
                cancelled=self._cancelled.is_set,
            )
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread by `result`
            self._outcome = without_frames(error)  # which hold the copy
        self._tensors.clear()
        self._over.set()

    def cancel(self) -> None:
        """Write no further part. Returns at once; parts that are on their way are stored yet, or not."""
        self._cancelled.set()
        self._tensors.clear()  # the thread looks at the flag before it takes one
        self._over.set()

    def result(self) -> tuple[Part, ...]:
        """The parts, once they are stored.    Raises: StorageError and the like; CheckpointError when it was cancelled."""
        self._over.wait()
        outcome = self._outcome
        if isinstance(outcome, tuple):
            return outcome
        if self._cancelled.is_set() or outcome is None:
            raise CheckpointError(f"the upload of step {self._step} was given up")
        raise outcome
