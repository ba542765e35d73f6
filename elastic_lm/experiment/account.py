"""What a run has come to and what it has taken, by its log: nothing that is not written there counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic_lm.events.log import read
from elastic_lm.events.types import EventKind
from elastic_lm.result import RunResult
from elastic_lm.run_address import EVENTS
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class Account:
    """`verdict`: None while there is none. `num_steps`: steps that this run has committed, also those that it gave up by going
    back; `step`: how many its state has applied.

    `seconds`: for which it was trained: from the start of each of its coordinators to the last that it has logged. Waiting for
    workers counts, and time in which nothing ran does not.
    """

    verdict: str | None = None
    message: str = ""
    step: int | None = None
    num_steps: int = 0
    seconds: float = 0.0

    def concluded(self, result: RunResult) -> Account:
        """With what its training has returned, which the log may lack where storage took no more."""
        step = self.step if result.last_step is None else result.last_step
        return replace(self, verdict=result.verdict, message=result.message, step=step)

    @classmethod
    def of(cls, run_storage: Storage) -> Account:
        """Of the run in this folder, also one that has not begun.    Raises: StorageError."""
        verdict, message = None, ""
        first: int | None = None
        last: int | None = None
        step: int | None = None
        given_up = 0
        lived: dict[int, float] = {}
        for event in read(run_storage.child(EVENTS)):
            lived[event.attempt] = max(lived.get(event.attempt, 0.0), event.elapsed_s)
            if event.kind is EventKind.RUN_STARTED:
                verdict, message = None, ""
            elif event.kind is EventKind.STEP_COMMITTED and event.step is not None:
                first = event.step if first is None else min(first, event.step)
                last = event.step if last is None else max(last, event.step)
                step = last + 1
            elif event.kind is EventKind.REWOUND and event.step is not None:
                given_up += event.fields["num_steps"]
                first, last, step = (
                    (None, None, event.step) if first == event.step else (first, event.step - 1, event.step)
                )
            elif event.kind is EventKind.RUN_FINISHED:
                verdict, message = event.fields.get("verdict"), event.fields.get("reason", event.message)
                step = step if event.step is None else event.step
        num_steps = 0 if first is None or last is None else last + 1 - first
        return cls(verdict, message, step, num_steps + given_up, sum(lived.values()))
