"""Verdicts: what a run is said to have come to."""

from __future__ import annotations

import pytest

from elastic_lm.control.actions import Verdict
from elastic_lm.control.ending import Ending
from elastic_lm.control.events import SPOILED

TOTAL = 100
TRIES = "3 tries: the store is full"
UNSAVED = f"the checkpoint of step 40 could not be written in {TRIES}"


def test_run_that_trained_every_step_is_done() -> None:
    ending = Ending(TOTAL)
    assert not ending.is_wanted
    assert ending.verdict(TOTAL, 70) == Verdict("done", "trained 100 steps", TOTAL)


@pytest.mark.parametrize(("head", "newest", "step"), [(40, 30, 40), (None, 30, 30), (None, None, 0)])
def test_stopped_run_ends_where_it_can_go_on(head: int | None, newest: int | None, step: int) -> None:
    ending = Ending(TOTAL)
    ending.stop("enough")
    ending.stop("never mind")
    assert ending.is_wanted
    assert ending.verdict(head, newest) == Verdict("stopped", "enough", step)


def test_run_that_is_stopped_before_its_last_evaluation_can_go_on_to_it() -> None:
    ending = Ending(TOTAL)
    ending.stop("enough")
    assert ending.verdict(TOTAL, TOTAL, lacks_evaluation=True) == Verdict("stopped", "enough", TOTAL)
    assert ending.verdict(TOTAL, TOTAL).kind == "done"


def test_failure_outranks_a_stop() -> None:
    ending = Ending(TOTAL)
    ending.stop("enough")
    ending.fail("unavailable", "no tokens")
    ending.stop("at last")
    assert ending.verdict(40, 40) == Verdict("unavailable", "no tokens", 40)


@pytest.mark.parametrize("kind", ["unavailable", *SPOILED])
def test_only_poison_speaks_against_a_run_that_trained_every_step(kind: str) -> None:
    ending = Ending(TOTAL)
    ending.fail(kind, "why")
    assert ending.verdict(TOTAL, TOTAL).kind == (kind if kind in SPOILED else "done")


def test_checkpoint_that_cannot_be_written_fails_a_run_that_did_not_fail_already() -> None:
    ending = Ending(TOTAL)
    assert ending.verdict_unsaved(40, TRIES) == Verdict("failed", UNSAVED, 40)
    ending.stop("enough")
    assert ending.verdict_unsaved(40, TRIES) == Verdict("failed", UNSAVED, 40)
    ending.fail("unavailable", "no tokens")
    assert ending.verdict_unsaved(40, TRIES) == Verdict("unavailable", f"no tokens; and {UNSAVED}", 40)
