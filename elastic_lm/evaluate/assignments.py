"""Which worker answers which piece. Decisions only: whoever starts the workers and hears of them asks here.

Invariant: a piece that is lost with its worker is given out again, and answers come out once each, in the order of the pieces. A
piece may be computed twice; both come to the same, and the first answer counts. A piece that fails ends the evaluation where
one process would have ended: those before it are answered first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from elastic_lm.errors import ClusterError
from elastic_lm.evaluate.pieces import Answer

MAX_LOSSES = 5  # workers that a piece may take with it


class Assignments:
    """Of the pieces [0, `num_pieces`) to workers, which are called by numbers."""

    def __init__(self, num_pieces: int) -> None:
        self._num_pieces = num_pieces
        self._waiting = list(range(num_pieces))
        self._held: dict[int, int] = {}  # worker -> piece
        self._found: dict[int, Answer | BaseException] = {}  # that have not come out yet
        self._next = 0  # to come out
        self._losses: Counter[int] = Counter()

    @property
    def done(self) -> bool:
        """Whether all answers have come out."""
        return self._next == self._num_pieces

    @property
    def has_waiting(self) -> bool:
        """Whether there are pieces that no worker has."""
        return bool(self._waiting)

    def give(self, worker: int) -> int | None:
        """What an idle worker is to answer next, if anything.

        When nothing waits, the first of those that one other worker has: that may be slow, or hang.
        """
        if self._waiting:
            piece = heappop(self._waiting)
        else:
            holders = Counter(self._held.values())
            alone = [piece for piece, number in holders.items() if number == 1 and not self._is_found(piece)]
            if not alone:
                return None
            piece = min(alone)
        self._held[worker] = piece
        return piece

    def answered(self, worker: int, answer: Answer) -> None:
        """The worker has answered what it was given."""
        piece = self._held.pop(worker)
        if not self._is_found(piece):
            self._found[piece] = answer

    def failed(self, worker: int, error: BaseException) -> None:
        """What it was given raises. Nothing behind that is worth an answer."""
        piece = self._held.pop(worker)
        if not self._is_found(piece):
            self._found[piece] = error
            self._waiting = [other for other in self._waiting if other < piece]
            heapify(self._waiting)

    def lost(self, worker: int, why: str) -> None:
        """The worker is gone.    Raises: ClusterError when its piece has taken too many workers with it."""
        piece = self._held.pop(worker, None)
        if piece is None or self._is_found(piece):
            return
        self._losses[piece] += 1
        if self._losses[piece] > MAX_LOSSES:
            raise ClusterError(
                f"{self._losses[piece]} workers of the evaluation died over the same part of it, at last because of {why}; look "
                "into the logs of the cluster, or evaluate in this process: leave --workers out"
            )
        if piece not in self._held.values():
            heappush(self._waiting, piece)

    def coming(self) -> Iterator[Answer]:
        """Answers that are next in order.    Raises: what a piece raised, when that is next."""
        while self._next in self._found:
            found = self._found.pop(self._next)
            if isinstance(found, BaseException):
                raise found
            self._next += 1
            yield found

    def _is_found(self, piece: int) -> bool:
        return piece < self._next or piece in self._found
