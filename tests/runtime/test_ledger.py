"""The ledger commits each step once and in order, and never hides a disagreement."""

from dataclasses import replace

from elastic_lm.protocol import Generation, StepRecord
from elastic_lm.runtime.ledger import Ledger


def record(step: int, loss: float = 2.5) -> StepRecord:
    return StepRecord(
        step=step, loss=loss, num_targets=64, learning_rate=1e-3, grad_norm=1.0, sample_hash=step * 7, refused=0,
        generation=Generation(0, 1), world_size=2,
        step_s=0.1, compute_s=0.05, data_wait_s=0.0, reduce_wait_s=0.04, optimizer_s=0.01,
    )  # fmt: skip


def test_records_told_twice_commit_once():
    ledger = Ledger()
    committed, mismatches = ledger.add((record(0), record(1)))
    assert [r.step for r in committed] == [0, 1]
    committed, mismatches = ledger.add((record(0), record(1), record(2)))
    assert [r.step for r in committed] == [2]
    assert mismatches == []


def test_records_ahead_of_a_gap_wait_for_it():
    ledger = Ledger()
    assert ledger.add((record(1), record(2)))[0] == []
    assert ledger.next_step == 0
    committed, _ = ledger.add((record(0),))
    assert [r.step for r in committed] == [0, 1, 2]
    assert ledger.next_step == 3


def test_other_timing_is_no_mismatch():
    ledger = Ledger()
    ledger.add((record(0),))
    assert ledger.add((replace(record(0), step_s=9.0, world_size=1, generation=Generation(0, 2)),)) == ([], [])


def test_another_loss_for_a_committed_step_is_told_and_not_taken():
    ledger = Ledger()
    ledger.add((record(0),))
    _, mismatches = ledger.add((record(0, loss=2.5000001),))
    assert [(m.logged.loss, m.told.loss) for m in mismatches] == [(2.5, 2.5000001)]
    assert ledger.last().loss == 2.5


def test_disagreement_ahead_of_a_gap_is_told():
    ledger = Ledger()
    ledger.add((record(1),))
    assert len(ledger.add((record(1, loss=3.0),))[1]) == 1


def test_restored_steps_are_compared_when_trained_again():
    ledger = Ledger()
    for step in range(5):
        ledger.restore(record(step))
    assert ledger.next_step == 5
    committed, mismatches = ledger.add((record(3, loss=1.0), record(4), record(5)))
    assert [r.step for r in committed] == [5]
    assert [m.told.step for m in mismatches] == [3]


def test_what_is_known_behind_a_gap_is_committed_when_the_gap_is_given_up():
    ledger = Ledger()
    ledger.add((record(0), record(3), record(4), record(6)))
    known, missing = ledger.skip_to(6)
    assert ([r.step for r in known], missing) == ([3, 4], [1, 2, 5])
    assert [r.step for r in ledger.add((record(7),))[0]] == [6, 7]
    assert ledger.skip_to(8) == ([], [])


def test_records_from_a_step_on_are_those_that_were_committed():
    ledger = Ledger()
    ledger.add((record(0), record(1), record(2), record(4)))
    assert [r.step for r in ledger.since(1)] == [1, 2]


def test_mean_loss_is_that_of_the_last_steps_before():
    ledger = Ledger()
    ledger.add(tuple(record(step, loss=float(step)) for step in range(10)))
    assert ledger.mean_loss(8, 4) == (4 + 5 + 6 + 7) / 4
    assert ledger.mean_loss(2, 4) == 0.5  # there are no more
    assert ledger.mean_loss(0, 4) is None


def test_mean_loss_of_steps_that_nobody_logged_is_unknown():
    ledger = Ledger()
    ledger.skip_to(100)  # they are in the checkpoint that the run goes on from
    assert ledger.mean_loss(100, 4) is None
    ledger.add((record(100, loss=3.0), record(101, loss=4.0)))
    assert ledger.mean_loss(102, 4) == 3.5
