"""The workers of one evaluation: started, given pieces, doubted, replaced, and ended for certain.

A worker is never revived, but replaced. It makes room for a worker of a run that waits for its place (demand.py), and comes back
when none does. Trade-off: that one waits for two looks, up to 6 s, since it may be starting already; and the piece that was under
way is begun again by another.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError, ClusterError, ConfigError, ElasticLMError
from elastic_lm.evaluate.assignments import Assignments
from elastic_lm.evaluate.pieces import Answer, Piece, Subject, other_weights
from elastic_lm.runtime import demand
from elastic_lm.runtime.evaluator import Evaluator
from elastic_lm.runtime.placement import worker_options
from elastic_lm.runtime.roster import reap

logger = logging.getLogger(__name__)

POLL_S = 1.0
LOOK_S = 3.0  # whether others wait for a place; longer than it takes to start the process of one that has got it
MAX_LOSSES_OF_A_PLACE = 5  # in a row, of workers that took it, with nothing answered in between
MOST_CHARACTERS = 200  # of what Ray says of a death
LOADING_S = 900.0  # to import PyTorch and read the weights: 50 GB at 60 MB/s
LATE_S = 60.0  # at least, with a piece, before that is given to others, too
LATE_TIMES = 5.0  # what the slowest piece took, at least
FIRST_LATE_S = 600.0  # where none has been answered
GONE_S = 3.0  # for a worker to end when it is told to
REAP_S = 15.0  # for those on other nodes to be looked after


class _Stage(Enum):
    """What a place's worker was called for last."""

    PLACING = "placing"
    LOADING = "loading"
    ANSWERING = "answering"


@dataclass
class _Place:
    """Where one worker is at a time. `asked_at`: when it was called. `losses`: of workers in a row, since one has answered."""

    number: int
    handle: Any = None
    process: tuple[str, int] | None = None  # node id and process id
    asked_at: float = 0.0
    stage: _Stage = _Stage.PLACING
    is_idle: bool = False
    is_late: bool = False  # its piece may be given to others
    losses: int = 0
    is_away: bool = False  # its worker has made room for another's, and is to come back


class Crew:
    """`tell` gets sentences for people; `patience_s`: how long nobody may come."""

    def __init__(
        self,
        subject: Subject,
        pieces: Sequence[Piece],
        num_workers: int,
        *,
        tell: Callable[[str], None],
        patience_s: float,
    ) -> None:
        self._subject, self._config = subject, subject.config
        self._tell, self._patience_s = tell, patience_s
        options = {**worker_options(subject.config), "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(Evaluator).options(**options)
        shared = ray.put(list(pieces))
        self._new = lambda: actor.remote(subject, shared)
        self._assignments = Assignments(len(pieces))
        self._num_workers = num_workers
        self._places = [_Place(number) for number in range(num_workers)]
        self._calls: dict[ray.ObjectRef, _Place] = {}
        self._processes: set[tuple[str, int]] = set()  # of workers that are not known to have died
        self._step = subject.step
        self._weights: str | None = None  # sha256
        self._slowest_s: float | None = None  # of the pieces that were answered
        self._alone_since = self._looked_at = time.monotonic()
        self._waited: frozenset[str] = frozenset()  # those who waited for a place at the last look
        self._is_blind = False  # nobody knows who waits
        self._last_words = ""  # of a place that was given up
        self._cause: BaseException | None = None  # why a worker has no model, the last one

    def answers(self) -> Generator[Answer, None, None]:
        """As they come.    Raises: what a piece or the loading of the model raises, told as in one process; ClusterError."""
        for place in self._places:
            self._start(place)
        while not self._assignments.done:
            self._listen()
            yield from self._assignments.coming()
            self._make_room()
            self._check_times()
            self._check_patience()

    def _listen(self) -> None:
        if not self._calls:
            if not any(place.is_away for place in self._places):
                raise self._end_of_all()
            time.sleep(POLL_S)
            return
        heard, _ = ray.wait(list(self._calls), timeout=POLL_S)
        for reference in heard:
            if reference in self._calls:  # its worker may have been ended meanwhile
                self._hear(self._calls.pop(reference), reference)

    def close(self) -> None:
        """End all workers, also one that is frozen and hears nothing."""
        for place in self._places:
            self._end(place)
        deadline = time.monotonic() + GONE_S
        reaping = [_reap(process, max(0.0, deadline - time.monotonic())) for process in self._processes]
        if remote := [reference for reference in reaping if reference is not None]:
            with contextlib.suppress(RayError):
                ray.wait(remote, num_returns=len(remote), timeout=REAP_S)

    def _start(self, place: _Place) -> None:
        place.handle, place.process, place.is_away = self._new(), None, False
        self._call(place, _Stage.PLACING, place.handle.locate.remote())

    def _call(self, place: _Place, stage: _Stage, reference: ray.ObjectRef) -> None:
        place.stage, place.asked_at = stage, time.monotonic()
        self._calls[reference] = place

    def _hear(self, place: _Place, reference: ray.ObjectRef) -> None:
        """What has become of a call."""
        try:
            found = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, ElasticLMError) else error  # a bug keeps its traceback
            if place.stage is not _Stage.ANSWERING:
                self._has_no_model(place, cause)
                return
            self._assignments.failed(place.number, cause)
        except RayError as error:
            if isinstance(error, ActorDiedError) and place.process is not None:
                self._processes.discard(place.process)
            self._lost(place, type(error).__name__, str(error))
            return
        else:
            if place.stage is _Stage.PLACING:
                self._load(place, found)
                return
            if place.stage is _Stage.LOADING and self._weights is not None and found != self._weights:
                assert self._step is not None, "it is known before anybody loads"
                self._unable(place, other_weights(self._step, self._weights, found))
                return
            if place.stage is _Stage.LOADING:
                self._weights = found
            else:
                self._answered(place, found)
        self._ask(place)

    def _load(self, place: _Place, process: tuple[str, int]) -> None:
        place.process = process
        self._processes.add(process)
        if self._step is None:
            self._step = self._subject.pinned().step
        self._call(place, _Stage.LOADING, place.handle.load.remote(self._step))

    def _answered(self, place: _Place, answer: Answer) -> None:
        place.losses, place.is_late = 0, False
        self._slowest_s = max(self._slowest_s or 0.0, time.monotonic() - place.asked_at)
        self._assignments.answered(place.number, answer)

    def _ask(self, place: _Place) -> None:
        """Give it a piece, if there is one. Where one more worker was called while this one was late, one of them goes."""
        place.stage, place.is_late = _Stage.ANSWERING, False
        present = [other for other in self._there() if not other.is_late]
        if len(present) > self._num_workers:
            going = next((other for other in present if other.stage is not _Stage.ANSWERING), place)
            self._end(going)
            if going is place:
                return
        number = self._assignments.give(place.number)
        place.is_idle = number is None
        if number is not None:
            self._call(place, _Stage.ANSWERING, place.handle.answer.remote(number))

    def _there(self) -> list[_Place]:
        return [place for place in self._places if place.handle is not None]

    def _has_no_model(self, place: _Place, cause: BaseException) -> None:
        """It could not read the weights. Another may, unless the checkpoint or the config is at fault."""
        if isinstance(cause, CheckpointError | ConfigError):
            self._unable(place, cause)
            return
        self._cause = cause
        kind = type(cause.cause if isinstance(cause, RayTaskError) else cause).__name__
        self._lost(place, kind, str(cause))

    def _unable(self, place: _Place, cause: BaseException) -> None:
        """It has no model. Where others have or may get it, as when a run has deleted the checkpoint, they go on without it."""
        self._end(place)
        if not self._there() and not any(other.is_away for other in self._places):
            raise cause from None
        self._cause = cause
        self._tell(f"A worker of the evaluation has no model ({cause}); the others go on.")

    def _lost(self, place: _Place, kind: str, why: str) -> None:
        """Replace a worker that died, hangs, or cannot be reached."""
        self._end(place)
        why = f"{kind} ({why.strip().splitlines()[-1].strip()[:MOST_CHARACTERS]})" if why.strip() else kind
        self._assignments.lost(place.number, why)
        place.losses += 1
        if place.losses <= MAX_LOSSES_OF_A_PLACE:
            self._tell(f"A worker of the evaluation is lost: {kind}. Another takes its place.")
            self._start(place)
        else:
            self._last_words = f"{place.losses} times in a row, at last because of {why}"
        self._ask_the_idle()

    def _ask_the_idle(self) -> None:
        for idle in [place for place in self._there() if place.is_idle]:
            self._ask(idle)

    def _end(self, place: _Place) -> None:
        """It is not heard of any more."""
        if place.handle is not None:
            with contextlib.suppress(RayError):
                ray.kill(place.handle, no_restart=True)
        self._calls = {reference: other for reference, other in self._calls.items() if other is not place}
        place.handle, place.is_idle, place.is_late = None, False, False

    def _end_of_all(self) -> BaseException:
        """Why nobody is left: what was wrong with the model, if none had it."""
        if self._weights is None and self._cause is not None:
            return self._cause
        return ClusterError(
            f"workers of the evaluation died {self._last_words}; look into the logs of the cluster, or evaluate in this "
            "process: leave --workers out"
        )

    def _make_room(self) -> None:
        """For those who have waited for a place since the last look, as many of ours leave as it takes, until nobody waits."""
        if time.monotonic() - self._looked_at < LOOK_S:
            return
        self._looked_at = time.monotonic()
        try:
            found = demand.Demand.now(besides=Evaluator.__name__)
        except (RuntimeError, RayError) as error:
            if not self._is_blind:  # once, and again after it was well
                logger.warning(
                    "Cannot ask Ray who waits for a place (%s): no worker of the evaluation makes room.", error
                )
            self._is_blind = True
            return
        self._is_blind = False
        before, self._waited = self._waited, frozenset(actor.actor_id for actor in found.waiting)
        patient = replace(found, waiting=tuple(actor for actor in found.waiting if actor.actor_id in before))
        there = {place.number: place.process[0] for place in sorted(self._there(), key=_dearness) if place.process}
        _, leaving = patient.room(there, wanted(self._config))
        if leaving:
            self._leave([place for place in self._there() if place.number in leaving])
        elif not found.room(there, wanted(self._config))[0]:
            self._come_back()

    def _leave(self, leaving: Sequence[_Place]) -> None:
        """With those who have no place yet: they would take what becomes free."""
        for place in [*leaving, *(other for other in self._there() if other.process is None)]:
            process = place.process
            self._end(place)
            self._assignments.returned(place.number)
            place.is_away = True
            if process is not None:
                _reap(process, 0.0)  # for what it holds
        number = len(leaving)
        self._tell(
            f"Workers of a run wait for a place: {number} worker{'s' if number > 1 else ''} of the evaluation "
            f"leave{'' if number > 1 else 's'}, until none waits. {len(self._there())} of {self._num_workers} go on."
        )
        self._ask_the_idle()

    def _come_back(self) -> None:
        coming = [place for place in self._places if place.is_away][: max(0, self._num_workers - len(self._there()))]
        for place in coming:
            self._start(place)
        if coming:
            self._tell("No worker of a run waits for a place any more: those of the evaluation come back.")

    def _check_times(self) -> None:
        """Nobody is waited for in silence. One that reads the weights for too long is replaced; a piece is given to others."""
        now = time.monotonic()
        for place in list(self._calls.values()):
            waited_s = now - place.asked_at
            if place.stage is _Stage.LOADING and waited_s > LOADING_S:
                process = place.process
                self._lost(place, f"it has read the weights for {waited_s:,.0f} s", "")
                if process is not None:
                    _reap(process, 0.0)  # for what it holds
            elif place.stage is _Stage.ANSWERING and not place.is_late and waited_s > self._late_s():
                self._doubt(place, waited_s)

    def _late_s(self) -> float:
        return FIRST_LATE_S if self._slowest_s is None else max(LATE_S, LATE_TIMES * self._slowest_s)

    def _doubt(self, place: _Place, waited_s: float) -> None:
        """It may be slow, or hang: others may take its piece. Where all are late, one more worker comes, up to twice as many."""
        node_id, pid = place.process or ("", 0)
        self._tell(
            f"A worker of the evaluation has been at its piece for {waited_s:,.0f} s: process {pid} on the node {node_id[:8]}. "
            "Another takes that over; if it hangs, end it."
        )
        place.is_late = True
        self._assignments.doubt(place.number)
        self._ask_the_idle()
        if all(other.is_late for other in self._there()) and len(self._places) < 2 * self._num_workers:
            self._places.append(_Place(len(self._places)))
            self._start(self._places[-1])

    def _check_patience(self) -> None:
        """Raises: ClusterError when no worker has come for too long; what was wrong with the model of those that had."""
        now = time.monotonic()
        if any(place.stage is not _Stage.PLACING for place in self._there()):
            self._alone_since = now
        elif now - self._alone_since > self._patience_s:
            if self._cause is not None:
                raise self._cause from None
            raise ClusterError(
                f"no worker of the evaluation came within {self._patience_s:.0f} s: each asks for "
                f"{amounts(wanted(self._config))}, as the run's workers do; the cluster has "
                f"{amounts(ray.cluster_resources())}, of which {amounts(ray.available_resources())} are free; wait until "
                "what holds them has ended, add a node, or evaluate in this process: leave --workers out"
            )


def _reap(process: tuple[str, int], grace_s: float) -> ray.ObjectRef | None:
    return reap(*process, title=f"ray::{Evaluator.__name__}", grace_s=grace_s)


def _dearness(place: _Place) -> tuple[bool, float]:
    """What is lost when it leaves: the longer it is at a piece, the more, unless that is given to others anyway."""
    is_at_it = place.stage is _Stage.ANSWERING and not place.is_idle and not place.is_late
    return is_at_it, -place.asked_at


def wanted(config: RunConfig) -> dict[str, float]:
    workers = config.workers
    return {"CPU": workers.num_cpus, "GPU": workers.num_gpus, **workers.resources}


def amounts(resources: Mapping[str, float]) -> str:
    """In words, without what Ray counts for itself."""
    told = [
        f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}"
        for name, amount in resources.items()
        if amount and ":" not in name and not name.endswith("memory")
    ]
    return ", ".join(told) or "nothing"
