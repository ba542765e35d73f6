"""An evaluation on a Ray cluster: its pieces are answered by workers, each with a copy of the model.

Invariant: figures have the bits of one process in the same environment (PyTorch, device, threads), whatever happens to workers.
A worker holds what one of the run's holds in training, and no more than that; it is never revived, but replaced. Trade-off: it
keeps that until the evaluation ends, also when a run on the cluster comes to want more workers meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from elastic_lm.config import RunConfig
from elastic_lm.errors import ClusterError, ElasticLMError
from elastic_lm.evaluate.assignments import Assignments
from elastic_lm.evaluate.pieces import Answer, Piece, Subject
from elastic_lm.runtime import cluster
from elastic_lm.runtime.placement import worker_options
from elastic_lm.runtime.roster import reap
from elastic_lm.trained_model import TrainedModel

PATIENCE_S = 300.0  # for a first worker: an autoscaler's node takes minutes
POLL_S = 1.0
MAX_LOSSES = 5  # in a row, of workers that took the same place, with nothing answered in between
MOST_CHARACTERS = 200  # of what Ray says of a death
HUNG_S = 30.0  # with a piece that others have answered meanwhile
NICENESS = 4  # above what Ray starts workers with: those of a run on the same machine go first


class Evaluator:
    """The actor. Args: `pieces`: all of them, in one list, so that they share what they have read."""

    def __init__(self, subject: Subject, pieces: Sequence[Piece]) -> None:
        self._subject, self._pieces = subject, pieces
        self._model: TrainedModel | None = None

    def locate(self) -> tuple[str, int]:
        """Node id and process id: it has been placed."""
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    def load(self) -> None:
        """Read the model's weights, verified.    Raises: as `TrainedModel.load`."""
        from elastic_lm.engine.determinism import make_deterministic

        config = self._subject.config
        os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, 19))
        make_deterministic(config.device, exact=True, threads=config.workers.threads)
        self._model = self._subject.load(config.device)

    def answer(self, number: int) -> Answer:
        """What the piece of this number comes to.    Raises: as `Piece.answer`."""
        assert self._model is not None
        return Answer.to(self._pieces[number], self._model)


@dataclass(frozen=True)
class OnCluster:
    """Answers pieces on up to `num_workers` workers of the Ray cluster at RAY_ADDRESS, or of a local one that is started for it.

    `tell` gets sentences for people; `patience_s`: how long nobody may come.
    """

    num_workers: int
    tell: Callable[[str], None] = lambda sentence: None
    patience_s: float = PATIENCE_S

    def __call__(self, subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        """Raises: what a piece or the loading of the model raises, told as in one process; ClusterError."""
        num_workers, config = min(self.num_workers, len(pieces)), subject.config
        with cluster.connected(num_workers * config.workers.num_cpus) as sentence:
            self.tell(sentence)
            self.tell(
                f"Evaluating with {num_workers} worker{'s' if num_workers > 1 else ''} of {_amounts(_wanted(config))} each, as "
                f"the run's have; free now: {_amounts(ray.available_resources())}."
            )
            with contextlib.closing(_Crew(subject, pieces, num_workers, self)) as crew:
                yield from crew.answers()


class _Stage(Enum):
    """What a place's worker was called for last."""

    PLACING = "placing"
    LOADING = "loading"
    ANSWERING = "answering"


@dataclass
class _Place:
    """Where one worker is at a time. `losses`: of workers in a row, since one has answered."""

    number: int
    handle: Any = None
    process: tuple[str, int] | None = None  # node id and process id
    asked_at: float = 0.0
    stage: _Stage = _Stage.PLACING
    is_idle: bool = False
    losses: int = 0


class _Crew:
    """The workers of one evaluation."""

    def __init__(self, subject: Subject, pieces: Sequence[Piece], num_workers: int, choices: OnCluster) -> None:
        self._config, self._choices = subject.config, choices
        options = {**worker_options(subject.config), "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(Evaluator).options(**options)
        shared = ray.put(list(pieces))
        self._new = lambda: actor.remote(subject, shared)
        self._assignments = Assignments(len(pieces))
        self._places = [_Place(number) for number in range(num_workers)]
        self._calls: dict[ray.ObjectRef, _Place] = {}
        self._alone_since = time.monotonic()
        self._last_words = ""  # of a place that was given up

    def answers(self) -> Generator[Answer, None, None]:
        for place in self._places:
            self._start(place)
        while not self._assignments.done:
            if not self._calls:
                raise ClusterError(
                    f"workers of the evaluation died {self._last_words}; look into the logs of the cluster, or evaluate in this "
                    "process: leave --workers out"
                )
            heard, _ = ray.wait(list(self._calls), timeout=POLL_S)
            for reference in heard:
                self._hear(self._calls.pop(reference), reference)
            yield from self._assignments.coming()
            self._check_patience()

    def close(self) -> None:
        """End all workers, also one that is frozen and hears nothing."""
        for place in self._places:
            self._end(place)
        for place in self._calls.values():
            if place.stage is _Stage.ANSWERING and time.monotonic() - place.asked_at > HUNG_S and place.process:
                reap(*place.process, title=f"ray::{Evaluator.__name__}")

    def _start(self, place: _Place) -> None:
        place.handle, place.stage, place.is_idle = self._new(), _Stage.PLACING, False
        self._calls[place.handle.locate.remote()] = place

    def _hear(self, place: _Place, reference: ray.ObjectRef) -> None:
        """What has become of a call."""
        try:
            found = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, ElasticLMError) else error  # a bug keeps its traceback
            if place.stage is not _Stage.ANSWERING:
                self._unable(place, cause)
                return
            self._assignments.failed(place.number, cause)
        except RayError as error:
            self._lost(place, type(error).__name__, str(error))
            return
        else:
            if place.stage is _Stage.PLACING:
                place.stage, place.process = _Stage.LOADING, found
                self._calls[place.handle.load.remote()] = place
                return
            if place.stage is _Stage.ANSWERING:
                place.losses = 0
                self._assignments.answered(place.number, found)
        place.stage = _Stage.ANSWERING
        self._ask(place)

    def _ask(self, place: _Place) -> None:
        number = self._assignments.give(place.number)
        place.is_idle = number is None
        if number is not None:
            place.asked_at = time.monotonic()
            self._calls[place.handle.answer.remote(number)] = place

    def _unable(self, place: _Place, cause: BaseException) -> None:
        """It has no model. Where others have, as when a run has deleted the checkpoint meanwhile, they go on without it."""
        if not any(other.stage is _Stage.ANSWERING for other in self._places if other.handle is not None):
            raise cause from None
        self._end(place)
        self._choices.tell(f"A worker of the evaluation has no model ({cause}); the others go on.")

    def _lost(self, place: _Place, kind: str, why: str) -> None:
        """Replace a worker that died, or cannot be reached."""
        self._end(place)
        why = f"{kind} ({why.strip().splitlines()[-1].strip()[:MOST_CHARACTERS]})" if why.strip() else kind
        self._assignments.lost(place.number, why)
        place.losses += 1
        if place.losses <= MAX_LOSSES:
            self._choices.tell(f"A worker of the evaluation is lost: {kind}. Another takes its place.")
            self._start(place)
        else:
            self._last_words = f"{place.losses} times in a row, at last because of {why}"
        for idle in [other for other in self._places if other.is_idle]:
            self._ask(idle)

    def _end(self, place: _Place) -> None:
        if place.handle is not None:
            with contextlib.suppress(RayError):
                ray.kill(place.handle, no_restart=True)
        place.handle, place.is_idle = None, False

    def _check_patience(self) -> None:
        """Raises: ClusterError when no worker has come for too long."""
        now = time.monotonic()
        if any(place.stage is not _Stage.PLACING for place in self._places if place.handle is not None):
            self._alone_since = now
        elif now - self._alone_since > self._choices.patience_s:
            raise ClusterError(
                f"no worker of the evaluation came within {self._choices.patience_s:.0f} s: each asks for "
                f"{_amounts(_wanted(self._config))}, as the run's workers do; the cluster has "
                f"{_amounts(ray.cluster_resources())}, of which {_amounts(ray.available_resources())} are free; wait until "
                "what holds them has ended, add a node, or evaluate in this process: leave --workers out"
            )


def _wanted(config: RunConfig) -> dict[str, float]:
    workers = config.workers
    return {"CPU": workers.num_cpus, "GPU": workers.num_gpus, **workers.resources}


def _amounts(resources: Mapping[str, float]) -> str:
    """In words, without what Ray counts for itself."""
    told = [
        f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}"
        for name, amount in resources.items()
        if amount and ":" not in name and not name.endswith("memory")
    ]
    return ", ".join(told) or "nothing"
