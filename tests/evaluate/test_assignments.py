"""Who answers which piece: all are answered once, in order, whoever is lost; what fails is told as by one process."""

from __future__ import annotations

import random

import pytest

from elastic_lm.errors import ClusterError, ConfigError
from elastic_lm.evaluate.assignments import MAX_LOSSES_OF_A_PIECE, Assignments
from elastic_lm.evaluate.pieces import Answer


def of(piece: int) -> Answer:
    return Answer(piece, 1, "0" * 64)


def values(assignments: Assignments) -> list[int]:
    return [answer.value for answer in assignments.coming()]


def test_answers_come_out_in_the_order_of_the_pieces() -> None:
    assignments = Assignments(3)
    assert [assignments.give(worker) for worker in (0, 1, 2)] == [0, 1, 2]
    assignments.answered(2, of(2))
    assignments.answered(1, of(1))
    assert values(assignments) == [] and not assignments.done
    assignments.answered(0, of(0))
    assert values(assignments) == [0, 1, 2] and assignments.done


def test_piece_of_a_lost_worker_is_given_out_before_all_others() -> None:
    assignments = Assignments(9)
    assert [assignments.give(worker) for worker in (0, 1, 2)] == [0, 1, 2]
    assignments.lost(1, "its node went")
    assert assignments.give(3) == 1
    assert assignments.give(4) == 3
    assignments.lost(5, "it had nothing yet")
    assert assignments.give(5) == 4


def test_piece_of_a_worker_that_leaves_is_given_to_another_as_often_as_it_takes() -> None:
    assignments = Assignments(2)
    for _ in range(2 * MAX_LOSSES_OF_A_PIECE):
        assert assignments.give(0) == 0
        assignments.returned(0)
    assignments.returned(1)  # it had nothing
    assert [assignments.give(worker) for worker in (1, 0)] == [0, 1]


def test_idle_worker_takes_over_what_another_may_hang_at_and_the_first_answer_counts() -> None:
    assignments = Assignments(2)
    assert [assignments.give(worker) for worker in (0, 1, 2, 3, 4)] == [0, 1, 0, 1, None]
    assignments.answered(2, of(0))
    assignments.answered(0, Answer("late", 1, ""))
    assert values(assignments) == [0]
    assignments.lost(1, "it hung")
    assignments.answered(3, of(1))
    assert values(assignments) == [1] and assignments.done
    assert assignments.give(0) is None


def test_piece_that_two_workers_have_waits_only_when_both_are_lost() -> None:
    assignments = Assignments(1)
    assert [assignments.give(worker) for worker in (0, 1)] == [0, 0]
    assignments.lost(0, "it died")
    assert [assignments.give(worker) for worker in (2, 3)] == [0, None]  # 1 and 2 are at it
    assignments.lost(1, "it died, too")
    assignments.lost(2, "so did this one")
    assert [assignments.give(worker) for worker in (3, 4, 5)] == [0, 0, None]


def test_piece_of_workers_that_are_doubted_is_given_to_as_many_as_it_takes() -> None:
    assignments = Assignments(2)
    assert [assignments.give(worker) for worker in (0, 1, 2)] == [0, 1, 0]
    assignments.doubt(0)
    assert assignments.give(3) == 0  # as the only one that is not doubted, 2, may hang, too
    assignments.doubt(2)
    assignments.doubt(3)
    assert assignments.give(4) == 0
    assignments.doubt(4)
    assignments.answered(2, of(0))
    assert values(assignments) == [0]
    assert [assignments.give(worker) for worker in (5, 6)] == [1, None]  # 0 waits no more


def test_nothing_behind_a_failure_is_given_out_again() -> None:
    assignments = Assignments(4)
    assert [assignments.give(worker) for worker in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assignments.failed(1, ConfigError("it is wrong"))
    assignments.lost(2, "it died")
    assignments.doubt(3)
    assert [assignments.give(worker) for worker in (2, 4)] == [0, None]


def test_failure_is_told_once_what_is_before_it_is_answered() -> None:
    """Of several the one that one process would have met, whichever came first; nothing behind it is begun."""
    assignments = Assignments(6)
    assert [assignments.give(worker) for worker in (0, 1, 2, 3)] == [0, 1, 2, 3]
    assignments.failed(3, ConfigError("the third is wrong"))
    assignments.failed(1, ConfigError("the first is wrong"))
    assert values(assignments) == []
    assert assignments.give(1) == 0  # not 4
    assignments.lost(0, "it died")
    assignments.answered(1, of(0))
    coming = assignments.coming()
    assert next(coming).value == 0
    with pytest.raises(ConfigError, match="the first is wrong"):
        next(coming)


def test_piece_that_takes_worker_after_worker_with_it_ends_the_evaluation() -> None:
    assignments = Assignments(2)
    for worker in range(MAX_LOSSES_OF_A_PIECE):
        assert assignments.give(worker) == 0
        assignments.lost(worker, "no memory is left")
    assert assignments.give(99) == 0
    with pytest.raises(ClusterError, match="6 workers of the evaluation died over the same part .* no memory is left"):
        assignments.lost(99, "no memory is left")


@pytest.mark.parametrize("seed", range(20))
def test_every_piece_is_answered_whatever_is_lost_and_whoever_is_slow(seed: int) -> None:
    draw = random.Random(seed)
    assignments, holds, told = Assignments(12), dict[int, int](), list[int]()
    losses = dict.fromkeys(range(12), 0)
    while not assignments.done:
        for worker in range(4):
            if worker not in holds and (piece := assignments.give(worker)) is not None:
                holds[worker] = piece
        worker = draw.choice(sorted(holds))
        piece = holds.pop(worker)
        if draw.random() < 0.3 and losses[piece] < MAX_LOSSES_OF_A_PIECE:
            losses[piece] += 1
            assignments.lost(worker, "chance")
        else:
            assignments.answered(worker, of(piece))
        told += values(assignments)
    assert told == list(range(12))
