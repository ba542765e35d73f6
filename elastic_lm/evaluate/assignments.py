"""Which worker answers which piece. Decisions only: whoever starts the workers and hears of them asks here.

Invariant: a piece that is lost with its worker is given out again, and answers come out once each, in the order of the pieces. A
piece may be computed several times; all come to the same, and the first answer counts. A piece that fails ends the evaluation
where one process would have ended: those before it are answered first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from elastic_lm.errors import ClusterError
from elastic_lm.evaluate.pieces import Answer

MAX_LOSSES_OF_A_PIECE = 5  # workers that it may take with it


class Assignments:
    """Of the pieces [0, `num_pieces`) to workers, which are called by numbers."""

    def __init__(self, num_pieces: int) -> None:
        self._num_pieces = num_pieces
        self._waiting = list(range(num_pieces))
        self._held: dict[int, int] = {}  # worker -> piece
        self._doubted: set[int] = set()  # workers that have had their pieces for too long
        self._found: dict[int, Answer | BaseException] = {}  # that have not come out yet
        self._next = 0  # to come out
        self._losses: Counter[int] = Counter()

    @property
    def done(self) -> bool:
        """Whether all answers have come out."""
        return self._next == self._num_pieces

    def give(self, worker: int) -> int | None:
        """What an idle worker is to answer next, if anything.

        When nothing waits, the first of those that one other worker has: that may be slow, or hang.
        """
        if self._waiting:
            piece = heappop(self._waiting)
        else:
            holders = Counter(self._trusted().values())
            alone = [piece for piece, number in holders.items() if number == 1 and not self._is_found(piece)]
            if not alone:
                return None
            piece = min(alone)
        self._held[worker] = piece
        return piece

    def doubt(self, worker: int) -> None:
        """What it was given may be given to others, as if it were lost. It may still answer."""
        self._doubted.add(worker)
        self._put_back(self._held[worker])

    def answered(self, worker: int, answer: Answer) -> None:
        """The worker has answered what it was given."""
        self._settle(self._release(worker), answer)

    def failed(self, worker: int, error: BaseException) -> None:
        """What it was given raises. Nothing behind that is worth an answer."""
        self._settle(self._release(worker), error)

    def returned(self, worker: int) -> None:
        """The worker leaves for a reason of its own: what it was given, if anything, is for others."""
        if worker in self._held:
            self._put_back(self._release(worker))

    def lost(self, worker: int, why: str) -> None:
        """The worker is gone.    Raises: ClusterError when its piece has taken too many workers with it."""
        if worker not in self._held:
            return
        piece = self._release(worker)
        if self._is_found(piece):
            return
        self._losses[piece] += 1
        if self._losses[piece] > MAX_LOSSES_OF_A_PIECE:
            raise ClusterError(
                f"{self._losses[piece]} workers of the evaluation died over the same part of it, at last because of {why}; look "
                "into the logs of the cluster, or evaluate in this process: leave --workers out"
            )
        self._put_back(piece)

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

    def _trusted(self) -> dict[int, int]:
        return {worker: piece for worker, piece in self._held.items() if worker not in self._doubted}

    def _release(self, worker: int) -> int:
        self._doubted.discard(worker)
        return self._held.pop(worker)

    def _settle(self, piece: int, found: Answer | BaseException) -> None:
        if self._is_found(piece):
            return
        self._found[piece] = found
        last = piece if isinstance(found, BaseException) else self._num_pieces
        self._waiting = [other for other in self._waiting if other != piece and other < last]
        heapify(self._waiting)

    def _put_back(self, piece: int) -> None:
        """Unless somebody else is at it, or nobody needs it: it is found, or behind one that failed."""
        failed = [number for number, found in self._found.items() if isinstance(found, BaseException)]
        is_wanted = not self._is_found(piece) and piece < min(failed, default=self._num_pieces)
        if is_wanted and piece not in self._waiting and piece not in self._trusted().values():
            heappush(self._waiting, piece)
