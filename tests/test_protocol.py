"""The protocol's words: what equal bits means, which generation outranks which, and that all of it survives pickling."""

from __future__ import annotations

import dataclasses
import math
import pickle
import random
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from elastic_lm import protocol
from elastic_lm.protocol import (
    Evaluation,
    Generation,
    Heartbeat,
    Lease,
    LeaseEnd,
    LeaseReport,
    Measure,
    Phase,
    ReadyReport,
    Rendezvous,
    ReturnReport,
    StepRecord,
)

RECORD = StepRecord(
    step=7,
    loss=2.5,
    num_targets=512,
    learning_rate=3e-4,
    grad_norm=0.75,
    sample_hash=123_456_789,
    refused=0,
    generation=Generation(1, 2),
    world_size=3,
    step_s=0.5,
    compute_s=0.3,
    data_wait_s=0.05,
    reduce_wait_s=0.1,
    optimizer_s=0.05,
)
LEASE = Lease(
    generation=Generation(1, 2),
    members=("w4", "w1", "w9"),
    rendezvous=Rendezvous("10.0.0.1", 4321),
    start_step=10,
    stop_step=20,
    assignments=((0, 1), (2,), (3,)),
    source=1,
    receivers=(2,),
    logged_step=8,
)
READY = ReadyReport("w1", "node-a", 4242, "abc123", {"torch": "2.13"}, 3.5)
MESSAGES = (
    Generation(1, 2),
    Rendezvous("10.0.0.1", 4321),
    LEASE,
    RECORD,
    LeaseReport("w1", Generation(1, 2), LeaseEnd.RAISED, 11, True, (RECORD,), "boom", 11, 0.25),
    Heartbeat("w1", Generation(1, 2), Phase.COMPUTE, 11, 99, 0.25, (RECORD,)),
    READY,
    ReturnReport(READY, 11, True, (RECORD,), 0.25),
    Measure(3, 12.5, 4, 1, 17),
    Evaluation(10, 3.0, 0.5, 16, 6, 70),
)

# The least change that the promise must see: one bit of a float, one of a count.
PROMISED: dict[str, Any] = {
    "step": 8,
    "loss": 2.5000000000000004,
    "num_targets": 511,
    "learning_rate": 3.0000000000000003e-4,
    "grad_norm": 0.7500000000000001,
    "sample_hash": 123_456_790,
    "refused": 1,
}
OWN_CLOCK: dict[str, Any] = {
    "generation": Generation(2, 0),
    "world_size": 4,
    "step_s": 9.0,
    "compute_s": 9.0,
    "data_wait_s": 9.0,
    "reduce_wait_s": 9.0,
    "optimizer_s": 9.0,
}


def test_every_field_of_a_record_is_either_promised_or_a_clock() -> None:
    assert {field.name for field in fields(StepRecord)} == {*PROMISED, *OWN_CLOCK}


@pytest.mark.parametrize("name", PROMISED)
def test_records_that_differ_in_a_promised_field_are_not_the_same_bits(name: str) -> None:
    other = replace(RECORD, **{name: PROMISED[name]})
    assert getattr(other, name) != getattr(RECORD, name)
    assert not RECORD.same_bits(other)
    assert not other.same_bits(RECORD)


@pytest.mark.parametrize("name", OWN_CLOCK)
def test_records_that_differ_in_clocks_or_membership_are_the_same_bits(name: str) -> None:
    other = replace(RECORD, **{name: OWN_CLOCK[name]})
    assert other != RECORD
    assert RECORD.same_bits(other)
    assert other.same_bits(RECORD)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (Generation(0, 0), Generation(0, 1)),
        (Generation(1, 9), Generation(1, 10)),  # numbers, not text
        (Generation(0, 1_000_000), Generation(1, 0)),  # a later owner outranks every number of an earlier one
    ],
)
def test_later_generation_outranks_earlier(earlier: Generation, later: Generation) -> None:
    assert earlier < later
    assert later > earlier
    assert max(later, earlier) is later


def test_generation_reads_as_owner_epoch_and_number() -> None:
    assert str(Generation(3, 14)) == "3.14"


def test_equal_generations_are_one_key() -> None:
    assert {Generation(1, 2), Generation(1, 2), Generation(1, 3)} == {Generation(1, 3), Generation(1, 2)}


def test_lease_knows_its_world_size_and_every_rank() -> None:
    assert LEASE.world_size == 3
    assert [LEASE.rank_of(member_id) for member_id in ("w4", "w1", "w9")] == [0, 1, 2]


def test_rank_of_a_stranger_is_refused() -> None:
    with pytest.raises(ValueError):
        LEASE.rank_of("w2")


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_survives_pickling(message: Any) -> None:
    copy = pickle.loads(pickle.dumps(message))
    assert copy == message
    assert type(copy) is type(message)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_cannot_be_changed(message: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(message, fields(message)[0].name, None)


def test_every_message_of_the_protocol_is_checked_here() -> None:
    named = {kind.__name__ for kind in vars(protocol).values() if dataclasses.is_dataclass(kind)}
    assert named == {type(message).__name__ for message in MESSAGES}


@pytest.mark.parametrize("word", [*Phase, *LeaseEnd])
def test_phases_and_ends_survive_pickling_as_themselves(word: Phase | LeaseEnd) -> None:
    assert pickle.loads(pickle.dumps(word)) is word


# -- evaluations -------------------------------------------------------------------------------------------------------

MEASURES = [Measure(0, 10.0, 4, 1), Measure(1, 30.0, 8, 5), Measure(2, 8.0, 4, 0)]


def test_evaluation_is_the_loss_by_target_with_its_error() -> None:
    """48 nats over 16 targets are 3; residuals are -2, 6 and -4, so that the error is sqrt(56 * 3 / 2) / 16."""
    found = Evaluation.of(7, MEASURES)
    assert (found.step, found.loss, found.num_targets, found.num_correct) == (7, 3.0, 16, 6)
    assert found.loss_stderr == pytest.approx(math.sqrt(84) / 16)


def test_evaluation_has_the_same_bits_in_any_order() -> None:
    draw = random.Random(0)
    measures = [Measure(number, draw.uniform(0, 1e4), draw.randint(1, 99), 0) for number in range(200)]
    expected = Evaluation.of(1, measures)
    for _ in range(20):
        draw.shuffle(measures)
        assert Evaluation.of(1, measures) == expected


def test_one_batch_has_no_error_and_an_objective_may_tell_no_hits() -> None:
    assert Evaluation.of(1, MEASURES[:1]).loss_stderr is None
    assert Evaluation.of(1, [*MEASURES, Measure(3, 1.0, 1, None)]).num_correct is None


def test_bytes_are_those_of_all_batches_or_not_known() -> None:
    told = [replace(measure, num_bytes=10) for measure in MEASURES]
    assert (Evaluation.of(1, told).num_bytes, Evaluation.of(1, [*told, MEASURES[0]]).num_bytes) == (30, None)
