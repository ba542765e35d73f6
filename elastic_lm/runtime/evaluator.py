"""A worker of an evaluation on a Ray cluster: holds a copy of the model, and answers pieces of the whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import ray

from elastic_lm.evaluate.pieces import Answer, Piece, Subject
from elastic_lm.trained_model import TrainedModel

NICENESS = 4  # above what Ray starts workers with: those of a run on the same machine go first


class Evaluator:
    """The actor. Args: `pieces`: all of them, in one list, so that they share what they have read."""

    def __init__(self, subject: Subject, pieces: Sequence[Piece]) -> None:
        self._subject, self._pieces = subject, pieces
        self._model: TrainedModel | None = None

    def locate(self) -> tuple[str, int]:
        """Node id and process id: it has been placed."""
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    def load(self, step: int) -> str:
        """Read the model's weights of this step, verified.    Returns: their sha256.    Raises: as `TrainedModel.load`."""
        from elastic_lm.engine.determinism import make_deterministic

        config = self._subject.config
        os.setpriority(os.PRIO_PROCESS, 0, min(os.getpriority(os.PRIO_PROCESS, 0) + NICENESS, 19))
        make_deterministic(config.device, exact=True, threads=config.workers.threads)
        self._model = replace(self._subject, step=step).load(config.device)
        return self._model.digest

    def answer(self, number: int) -> Answer:
        """What the piece of this number comes to.    Raises: as `Piece.answer`."""
        assert self._model is not None
        return Answer.to(self._pieces[number], self._model)
