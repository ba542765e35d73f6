"""The work of an evaluation in pieces: what each comes to is a pure function of the model's weights, whoever computes it.

Invariant: the pieces, and the batches within them, follow from task and corpus alone, never from who answers them or how many
do. What they come to is put together in their order, so figures have the same bits for any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError
from elastic_lm.evaluate.result import Outcome
from elastic_lm.experiment import standing
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel

PIECE_TOKENS = (
    16_384  # read in one, about: a message for each costs a few ms, and 100,000 tokens make pieces for six workers
)


class Piece(Protocol):
    """A share of a task. Picklable; pieces of a task may share what they read from, and are answered by one thread."""

    def answer(self, model: TrainedModel) -> Any:
        """What it comes to: plain data.    Raises: ConfigError for what the user is to correct; DataError, StorageError."""

    def num_tokens(self, answer: Any) -> int:
        """Tokens that were read for this answer, or written."""


@dataclass(frozen=True)
class Plan:
    """All that a task asks of a model. `outcome` makes figures of what the pieces came to, given in their order."""

    pieces: Sequence[Piece]
    outcome: Callable[[Sequence[Any]], Outcome]


@dataclass(frozen=True)
class Subject:
    """The model that is asked. `step` None: of the newest complete checkpoint."""

    run_storage: Storage
    config: RunConfig
    step: int | None = None

    def pinned(self) -> Subject:
        """The same of one step for good: a run that trains has a newer checkpoint soon. No weights are read.

        Raises: CheckpointError when there is no such checkpoint; StorageError.
        """
        return replace(self, step=standing.step_of(self.run_storage, self.step))

    def load(self, device: str = "cpu") -> TrainedModel:
        """Raises: as `TrainedModel.load`."""
        return TrainedModel.load(self.run_storage, self.config, self.step, device=device)


@dataclass(frozen=True)
class Answer:
    """What a piece came to. `step` and `weights` (their sha256) say of which model."""

    value: Any
    step: int
    weights: str

    @classmethod
    def to(cls, piece: Piece, model: TrainedModel) -> Answer:
        """Raises: as `Piece.answer`."""
        return cls(piece.answer(model), model.step, model.digest)


def other_weights(step: int, before: str, now: str) -> CheckpointError:
    """Of answers that are not of the same weights, whose sha256 are these."""
    return CheckpointError(
        f"the checkpoint of step {step} changed while it was evaluated: its weights were {before[:8]} and are {now[:8]}; "
        "evaluate it again"
    )


# Answers all pieces about a subject, in their order.
Answerer = Callable[[Subject, Sequence[Piece]], Generator[Answer, None, None]]


def here(subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
    """In this process, one after the other.    Raises: as `TrainedModel.load` and `Piece.answer`."""
    model = subject.load()
    for piece in pieces:
        yield Answer.to(piece, model)
