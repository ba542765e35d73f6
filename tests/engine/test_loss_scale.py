"""Dynamic loss scaling: an overflow is computed again with half the scale, the scale is state, and it shows in no bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from elastic_lm.engine import loss_scale
from elastic_lm.engine.loss_scale import FIRST, LOWEST, LossScale
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.engine.step import PoisonedStep
from elastic_lm.protocol import LeaseEnd
from tests.engine.members import LENGTH, SIZE, Cluster, M, tiny_spec
from tests.engine.test_step import EVERYTHING, Recorder, Trainee, WithPeers

CPU = torch.device("cpu")
BEGIN = FIRST - math.ceil(math.log2(SIZE * LENGTH))
LOUD = "tests.engine.user_code:loud"  # overflows at once


def spec_of(**changes: Any) -> EngineSpec:
    return tiny_spec(precision="fp16", **changes)


def exponent(trainee: Trainee) -> int:
    assert trainee.state.loss_scale is not None
    return trainee.state.loss_scale.exponent


def test_a_scale_begins_halves_and_grows_by_its_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWTH_STEPS", 3)
    scale = LossScale(512, CPU)
    assert scale.flat.tolist() == [FIRST - 9, 0]
    told = []
    for ended_with in (7, 7, 7, 8, 6, 6, 6, 7):
        scale.settle(ended_with)
        told.append(tuple(scale.flat.tolist()))
    assert told == [(7, 1), (7, 2), (8, 0), (8, 1), (6, 0), (6, 1), (6, 2), (7, 0)]
    scale.begin()
    assert scale.flat.tolist() == [FIRST - 9, 0]


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_step_that_overflows_is_computed_again_until_it_does_not(reduction: Any) -> None:
    trainee = Trainee(spec_of(objective=LOUD, reduction=reduction))
    record = trainee.run().record
    lower = exponent(trainee)
    assert lower < BEGIN and trainee.state.next_step == 1
    assert record.refused == 0 and math.isfinite(record.grad_norm)
    asked = [micro_batch for _, micro_batch in trainee.tokens.asked]
    assert asked == list(EVERYTHING) * (BEGIN - lower + 1)
    trainee.run()
    assert exponent(trainee) == lower  # it remembers
    assert len(trainee.tokens.asked) == len(asked) + M


def test_the_result_is_that_of_the_scale_it_ended_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits and all: nothing of an attempt that overflowed is left."""
    found = Trainee(spec_of(objective=LOUD))
    found.run()
    monkeypatch.setattr(loss_scale, "FIRST", FIRST - (BEGIN - exponent(found)))
    known = Trainee(spec_of(objective=LOUD))
    assert exponent(known) == exponent(found)
    known.run()
    assert known.state.weights_digest() == found.state.weights_digest()


def test_a_scaled_loss_has_the_gradient_of_one_that_is_not() -> None:
    """Where fp16 loses nothing to overflow; what scaling saves from zero is a small part of it."""
    half, full = Trainee(spec_of()), Trainee(tiny_spec())
    ours, theirs = half.run().record, full.run().record
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize(("objective", "attempts"), [("nan_loss", 1), ("infinite_gradient", BEGIN - LOWEST + 1)])
def test_what_no_scale_helps_is_poisoned_and_leaves_the_state(reduction: Any, objective: str, attempts: int) -> None:
    """The loss is not scaled before it is looked at, so one that is not finite is tried once; a gradient, with every scale."""
    trainee = Trainee(spec_of(objective=f"tests.engine.user_code:{objective}", reduction=reduction))
    before = trainee.state.digest()
    with pytest.raises(PoisonedStep, match="not finite"):
        trainee.run()
    assert trainee.state.digest() == before
    assert len(trainee.tokens.asked) == attempts * M


def test_scale_is_saved_loaded_and_hashed() -> None:
    one, other = Trainee(spec_of()), Trainee(spec_of())
    assert one.state.loss_scale is not None and other.state.loss_scale is not None
    assert one.state.digest() == other.state.digest()
    one.state.loss_scale.settle(3)
    assert one.state.digest() != other.state.digest()
    assert one.state.weights_digest() == other.state.weights_digest()
    other.state.load({name: tensor.clone() for name, tensor in one.state.tensors().items()}, 0)
    assert exponent(other) == 3 and one.state.digest() == other.state.digest()
    other.replica.initialise()
    assert exponent(other) == BEGIN


def test_other_precisions_have_none() -> None:
    assert Trainee(tiny_spec()).state.loss_scale is None
    assert "loss_scale" not in Trainee(tiny_spec(precision="bf16")).state.tensors()


def test_assignment_does_not_show_in_the_bits() -> None:
    spec = spec_of()
    alone, first, second = Trainee(spec), Trainee(spec), Trainee(spec)
    expected = alone.run().record
    sent = second.contribution((1, 3, 5))
    assert isinstance(sent, Recorder)
    assert first.run((4, 0, 2), group=WithPeers(sent)).record.same_bits(expected)
    assert first.state.digest() == alone.state.digest()


# -- of several members ----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(spec_of(objective=LOUD))
    yield cluster
    cluster.close()


def test_members_overflow_together_and_a_joiner_receives_their_scale(cluster: Cluster) -> None:
    """Two from the start, a third later; the bits are those of one alone."""
    alone = Trainee(spec_of(objective=LOUD))
    for _ in range(4):
        alone.run()
    cluster.start("w0", "w1", "w2")
    cluster.grant(["w0"], 0, 1)
    assert cluster.report("w0").end is LeaseEnd.COMPLETED
    cluster.grant(["w0", "w1"], 1, 2, source="w0", joiners=("w1",))
    assert {report.end for report in cluster.reports("w0", "w1").values()} == {LeaseEnd.COMPLETED}
    cluster.grant(["w0", "w1", "w2"], 2, 4, source="w1", joiners=("w2",))
    assert {report.end for report in cluster.reports("w0", "w1", "w2").values()} == {LeaseEnd.COMPLETED}
    assert {cluster.digest(name) for name in ("w0", "w1", "w2")} == {alone.state.digest()}
