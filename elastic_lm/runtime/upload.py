"""A member's share of a checkpoint on its way to storage: a copy of some tensors, and the thread that uploads it.

Invariant: the copy is made while nothing writes to the state, and is whole before the constructor returns; whatever happens
to the upload, training knows nothing of it. It runs at low priority, because the training beside it is what everybody
waits for.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from elastic_lm.checkpoint.layout import Part, shares

if TYPE_CHECKING:
    from elastic_lm.engine.state import ReplicaState
    from elastic_lm.storage import Storage

NICENESS = 10  # on top of the process's own


class Upload:
    """Share `share` of `num_shares` of a state that is at `step`.    Raises: RuntimeError when it is not, or is torn."""

    def __init__(self, storage: Storage, step: int, state: ReplicaState, *, share: int, num_shares: int) -> None:
        if state.torn or state.next_step != step:
            raise RuntimeError(f"cannot save step {step}: this state is at {state.next_step}, torn={state.torn}")
        self._storage, self._step, self._share = storage, step, share
        tensors = state.tensors()
        mine = shares({name: tensor.numel() for name, tensor in tensors.items()}, num_shares)[share]
        self._tensors: dict[str, Any] = {name: tensors[name].detach().clone() for name in mine}
        self._outcome: tuple[Part, ...] | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"save-{step}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        from elastic_lm.checkpoint import store

        try:
            niceness = os.getpriority(os.PRIO_PROCESS, 0) + NICENESS
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(niceness, 19))
            self._outcome = store.save_share(self._storage, self._step, self._tensors, share=self._share)
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread by `result`
            self._outcome = error.with_traceback(None)  # whose frames hold the copy
        self._tensors = {}

    def result(self) -> tuple[Part, ...]:
        """The parts, once they are stored.    Raises: StorageError and the like."""
        self._thread.join()
        if isinstance(self._outcome, tuple):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome
