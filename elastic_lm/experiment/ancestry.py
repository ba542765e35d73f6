"""The part of a fork's curve that is in the logs of its ancestors.

Invariant: only what lies on the fork's line counts. Of a parent that is what it had trained when it was forked, up to the step of
the fork: whatever it went back from before that counts nowhere, and what it went back from later still does. Which of the two
it was is told by the identity that it was forked with, for each rewind makes another one, and each attempt in its log begins
with its own; but a rewind to the fork's step or behind it changed nothing of what was forked, and an attempt before it counts.
So a log in the parent's place that is another run's is found out, too.
Trade-off: each log is read whole. That is for commands and for the end of a run, not for whoever trains it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.data.order import merged
from elastic_lm.errors import CheckpointError, ConfigError, ElasticLMError, NotFoundError
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment.lineage import Lineage, Parent
from elastic_lm.experiment.rewinds import with_skip
from elastic_lm.monitor.ancestors import NONE, Ancestors, Fork, Stretch
from elastic_lm.monitor.history import History
from elastic_lm.run_address import EVENTS
from elastic_lm.storage import Storage

DEADLINE_S = 20.0  # for an answer from a parent's store: it may be long gone
SHOWN = ("loss", "learning_rate", "grad_norm")  # of a step
NEEDED = (EventKind.RUN_STARTED, EventKind.STEP_COMMITTED, EventKind.EVALUATED, EventKind.REWOUND)


def of_run(folder: Storage) -> Ancestors:
    """Of the run in this folder, whatever became of the others. Never raises on their account.    Raises: StorageError."""
    try:
        return of(Lineage.load(folder))
    except CheckpointError as error:
        return Ancestors(lacks=f"Where it is from is not known: {error}.")


def of(lineage: Lineage | None) -> Ancestors:
    """The same, given where it is from. What lies behind an ancestor that cannot be read is not shown either."""
    if lineage is None:
        return NONE
    chain = list(lineage.chain())
    stretches: list[Stretch] = []
    lacks = None
    for link in chain:
        try:
            stretches.append(_stretch(link.parent))
        except _Unknown as reason:
            parent = link.parent
            lacks = (
                f"The steps before {parent.step:,} are not shown: they are in the log of {parent.name}, and {reason}."
            )
            break
    forks = tuple(Fork(link.run, link.parent.name, link.parent.step) for link in reversed(chain))
    return Ancestors(forks, tuple(reversed([each for each in stretches if each.start < each.stop])), lacks)


class _Unknown(Exception):
    """Why, in words."""


def _stretch(parent: Parent) -> Stretch:
    """What the parent itself has trained of the fork's line."""
    start = parent.lineage.parent.step if parent.lineage else 0
    points, scores = [], []
    if start < parent.step:  # else it was forked as it began
        history = _history(parent)
        points = [point for point in history.points if point.step < parent.step]
        scores = [score for step, score in sorted(history.evaluations.items()) if step <= parent.step]
    return Stretch(parent.name, parent.url, start, parent.step, tuple(points), tuple(scores))


def _history(parent: Parent) -> History:
    """Of the parent when it was forked, and of what it has done since without going back.    Raises: _Unknown."""
    try:
        log = Storage.open(parent.url, deadline_s=DEADLINE_S).child(EVENTS)
        told = [event for event in read(log, on_problem=lambda problem: None) if event.kind in NEEDED]
        ours = _of_line(told, parent)
        if ours:
            history = History.of(ours)
            _check(history)
            return history
    except NotFoundError:
        told = []
    except ElasticLMError as error:
        raise _Unknown(f"that cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _Unknown(f"that cannot be understood: {type(error).__name__}: {error}") from error
    if told:
        raise _Unknown(
            f"no attempt in the one in {parent.url} has the config that was forked: it may be another run's by now"
        )
    raise _Unknown(f"there is none in {parent.url} any more; it was deleted or moved")


def _check(history: History) -> None:
    """Raises: KeyError, TypeError or ValueError when a step does not tell what curves show."""
    for point in history.points:
        for name in SHOWN:
            float(point.fields[name])


def _of_line(events: Iterable[Event], parent: Parent) -> list[Event]:
    """All up to the end of the last attempt that was on the fork's line; none where no attempt was."""
    taken: list[Event] = []
    waiting: list[Event] = []
    known: dict[str, Any] = {}
    is_ours = False
    for event in events:
        if event.kind is EventKind.RUN_STARTED and event.fields["config"] != known:
            known = event.fields["config"]
            is_ours = _is_on_line(known, parent)
        waiting.append(event)
        if is_ours:
            taken += waiting
            waiting.clear()
    return taken


def _is_on_line(config: dict[str, Any], parent: Parent) -> bool:
    """Whether what an attempt with this config trains, up to the step of the fork, is what was forked."""
    later = [left_out for rewind in parent.rewinds if rewind.to_step >= parent.step for left_out in rewind.left_out]
    try:
        known = RunConfig(**config)
        if later:
            known = with_skip(known, merged((*known.training.skip, *later)))
    except ConfigError:  # of a version with other fields
        return False
    return known.identity_fingerprint() == parent.fingerprint
