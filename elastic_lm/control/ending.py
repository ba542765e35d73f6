"""Why a run ends before its last step, and the verdict when everything that can be saved is saved.

Invariant: of a person's stops the first is told. A failure that only stops the run (nothing is wrong with what was trained, so
that is saved first) outranks them, and is the verdict even when its checkpoint cannot be written.
"""

from __future__ import annotations

from elastic_lm.control.actions import Verdict
from elastic_lm.control.events import SPOILED

STOPPED = "stopped"


class Ending:
    """What the run was told about its end."""

    def __init__(self, total_steps: int) -> None:
        self.reason: str | None = None  # why it is to end early
        self._kind = STOPPED
        self._total_steps = total_steps

    @property
    def is_wanted(self) -> bool:
        """Whether the run is to end early."""
        return self.reason is not None

    def stop(self, reason: str) -> None:
        """Somebody wants it to."""
        self.reason = self.reason or reason

    def fail(self, kind: str, reason: str) -> None:
        """It has to, and that will be the verdict."""
        self._kind, self.reason = kind, reason

    def verdict(self, head: int | None, newest_step: int | None, *, lacks_evaluation: bool = False) -> Verdict:
        """With nothing left to save.

        Args: the steps of the newest state in memory and of the newest checkpoint; `lacks_evaluation`: one is due of what is in
        memory, for which a run that goes on will be there.
        """
        step = head if head is not None else (newest_step or 0)
        is_all = head == self._total_steps and not lacks_evaluation
        if self.reason is not None and (not is_all or self._kind in SPOILED):
            return Verdict(self._kind, self.reason, step)
        return Verdict("done", f"trained {step} steps", step)

    def verdict_unsaved(self, head: int, tries: str) -> Verdict:
        """Where the last checkpoint cannot be written. `tries`: how many there were, and what came of the last."""
        unsaved = f"the checkpoint of step {head} could not be written in {tries}"
        if self.reason is not None and self._kind != STOPPED:
            return Verdict(self._kind, f"{self.reason}; and {unsaved}", head)
        return Verdict("failed", unsaved, head)
