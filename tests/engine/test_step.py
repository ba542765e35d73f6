"""One step: what it sums, that nothing depends on who computes it, and that it leaves the state before or after itself.

Other members are faked: they are the buffers that a replica of their own has sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from elastic_lm import failpoints
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.engine.group import GroupBroken
from elastic_lm.engine.objectives import causal
from elastic_lm.engine.reduce import InconsistentSum, Reduction
from elastic_lm.engine.schedule import learning_rate
from elastic_lm.engine.spec import EngineSpec, FactorySpec, OptimizerSpec, ScheduleSpec
from elastic_lm.engine.step import PoisonedStep, Replica, StepOutcome, StepRunner, as_tokens, sample_hash
from elastic_lm.errors import ConfigError
from elastic_lm.model.spec import ModelSpec
from elastic_lm.protocol import Generation, Phase
from tests.engine.members import LENGTH, SIZE, VOCAB, M, SyntheticTokens, tiny_spec

torch.set_num_threads(1)

GENERATION = Generation(2, 5)
EVERYTHING = tuple(range(M))
HERE = "tests.engine.user_code"
CALM = ModelSpec(vocab_size=VOCAB, num_layers=2, num_heads=2, width=32, max_tokens=LENGTH)  # no dropout


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints._armed.clear()


class Control:
    """Never ends a step by itself; remembers phases."""

    def __init__(self, *, votes: bool = False, looks: float = math.inf) -> None:
        self.phases: list[Phase] = []
        self.votes, self.looks = votes, looks

    def cancelled(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wants_end(self) -> bool:
        return self.votes

    def report(self, phase: Phase) -> None:
        self.phases.append(phase)


class Asked(SyntheticTokens):
    """Remembers what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def tokens(self, step: int, micro_batch: int, cancelled: Any = None) -> np.ndarray:
        self.asked.append((step, micro_batch))
        return super().tokens(step, micro_batch, cancelled)


class Repetitive:
    """0 1 2 3 4 0 1 …, from anywhere."""

    def tokens(self, step: int, micro_batch: int, cancelled: Any = None) -> np.ndarray:
        start = np.random.default_rng([step, micro_batch]).integers(0, 5, (SIZE, 1))
        return ((start + np.arange(LENGTH + 1)) % 5).astype(np.uint16)


class Recorder:
    """A group that only keeps what its member put in."""

    world_size = 1

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.clone())
        return tensor

    def wait(self, pending: list[Any], cancelled: Any) -> None:
        pass


class WithPeers(Recorder):
    """A group whose sum is the caller's buckets and those recorded of others."""

    def __init__(self, *peers: Recorder) -> None:
        super().__init__()
        self.peers, self.world_size = peers, 1 + len(peers)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        for peer in self.peers:
            tensor += peer.sent[len(self.sent)]
        return super().all_reduce(tensor)


class Trainee:
    """A replica at the run's first state, its runner and its generation's buffer."""

    def __init__(self, spec: EngineSpec, *, tokens: Any = None) -> None:
        self.replica = Replica(spec)
        self.replica.initialise()
        self.state = self.replica.state
        self.tokens = tokens or Asked()
        self.runner = StepRunner(self.replica, self.tokens)
        self.reduction = self.replica.new_reduction()

    def run(
        self,
        micro_batches: tuple[int, ...] = EVERYTHING,
        *,
        group: Any = None,
        control: Control | None = None,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepOutcome:
        control = control or Control()
        return self.runner.run_step(micro_batches, self.reduction, group, control, GENERATION, before_update)

    def contribution(self, micro_batches: tuple[int, ...]) -> Recorder:
        """What this member would send; its own state stays (with too few micro-batches the step is refused)."""
        group = Recorder()
        with pytest.raises(InconsistentSum):
            self.run(micro_batches, group=group)
        return group


def batch(step: int, micro_batch: int) -> Tensor:
    return as_tokens(SyntheticTokens().tokens(step, micro_batch))


def by_autograd(spec: EngineSpec, step: int) -> tuple[float, dict[str, Tensor]]:
    """Mean loss and gradients of a whole step, in one backward pass over a replica's model."""
    replica = Replica(spec)
    losses = [causal(replica.model, batch(step, number))[0] for number in range(M)]
    mean = torch.stack(losses).sum() / (M * SIZE * LENGTH)
    mean.backward()
    return mean.item(), {name: p.grad for name, p in replica.model.named_parameters() if p.grad is not None}


# -- what is summed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_folded_micro_batches_are_autograds_gradient_of_the_mean_loss(reduction: Any) -> None:
    spec = tiny_spec(model=CALM, reduction=reduction)
    mean, expected = by_autograd(spec, 0)
    trainee = Trainee(spec)
    trainee.reduction.begin(0)
    for number in range(M):
        trainee.replica.add_micro_batch(trainee.reduction, batch(0, number), step=0, micro_batch=number)
    commit = trainee.reduction.complete(None, False, lambda: False)
    flat = trainee.reduction.gradient(commit, torch.empty(trainee.state.size))
    assert trainee.reduction.loss(commit) == pytest.approx(mean, rel=1e-6)
    assert len(expected) == len(trainee.state.slots)
    for slot in trainee.state.slots:
        # fp32 sums in another order: a few roundings of terms that are larger than their sum.
        torch.testing.assert_close(slot.of(flat).view(slot.shape), expected[slot.name], rtol=1e-4, atol=1e-7)


def test_gradients_of_one_micro_batch_do_not_stay_on_the_parameters() -> None:
    trainee = Trainee(tiny_spec())
    trainee.run()
    assert all(parameter.grad is None for parameter in trainee.replica.model.parameters())


def test_record_says_what_happened() -> None:
    spec = tiny_spec(model=CALM)
    trainee = Trainee(spec)
    for step in range(3):
        mean, gradients = by_autograd_at(trainee, step)
        record = trainee.run().record
        assert record.step == step
        assert record.loss == pytest.approx(mean, rel=1e-6)
        assert record.num_targets == M * SIZE * LENGTH
        assert record.learning_rate == learning_rate(spec.schedule, spec.optimizer.learning_rate, step)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert record.grad_norm == pytest.approx(norm, rel=1e-5)
        assert record.sample_hash == sum(sample_hash(step, n, batch(step, n)) for n in range(M)) % 2**63
        assert (record.refused, record.generation, record.world_size) == (0, GENERATION, 1)
        parts = [record.compute_s, record.data_wait_s, record.reduce_wait_s, record.optimizer_s]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts) == pytest.approx(record.step_s)


def by_autograd_at(trainee: Trainee, step: int) -> tuple[float, list[Tensor]]:
    """Mean loss and gradients of the trainee's next step, on its own model, which keeps no trace."""
    model = trainee.replica.model
    mean = torch.stack([causal(model, batch(step, n))[0] for n in range(M)]).sum() / (M * SIZE * LENGTH)
    return mean.item(), list(torch.autograd.grad(mean, list(model.parameters())))


def test_data_is_asked_for_by_step_and_micro_batch_in_the_order_of_the_assignment() -> None:
    trainee = Trainee(tiny_spec())
    trainee.run((4, 0, 2, 1, 5, 3))
    trainee.run()
    assert trainee.tokens.asked == [(0, n) for n in (4, 0, 2, 1, 5, 3)] + [(1, n) for n in EVERYTHING]


def test_phases_are_told_as_they_begin() -> None:
    control = Control()
    Trainee(tiny_spec()).run(control=control)
    assert control.phases == [Phase.DATA, Phase.COMPUTE] * M + [Phase.REDUCE, Phase.OPTIMIZER]


def test_clipping_is_at_the_norm_that_was_recorded() -> None:
    """Momentum of the first step is (1 - beta1) · the clipped gradient."""
    spec = tiny_spec(optimizer=OptimizerSpec(clip_norm=0.01, betas=(0.9, 0.95)))
    trainee = Trainee(spec)
    assert trainee.run().record.grad_norm > 0.1
    assert trainee.state.exp_avg.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_a_repetitive_sequence_is_learned(precision: Any, reduction: Any) -> None:
    spec = tiny_spec(precision=precision, reduction=reduction, schedule=ScheduleSpec(kind="constant"))
    trainee = Trainee(spec, tokens=Repetitive())
    losses = [trainee.run().record.loss for _ in range(20)]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)
    assert losses[-1] < 0.5


# -- who computes it does not show -----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "shares",
    [
        [(5, 4, 3, 2, 1, 0)],
        [(0, 2, 4), (1, 3, 5)],
        [(3,), (0, 1, 2, 4, 5)],
        [(), EVERYTHING],  # more members than micro-batches
        [(5, 0), (4, 1), (3, 2)],
    ],
)
def test_assignment_does_not_show_in_the_bits(shares: list[tuple[int, ...]], precision: Any) -> None:
    """With dropout, and with generators that were used for something else in between."""
    spec = tiny_spec(precision=precision)
    alone = Trainee(spec)
    together = [Trainee(spec) for _ in shares]
    for step in range(2):
        expected = alone.run().record
        sent = []
        for member, share in zip(together[1:], shares[1:], strict=True):
            torch.manual_seed(step)
            sent.append(member.contribution(share) if len(share) < M else recorded(member, share))
        torch.rand(100)
        record = together[0].run(shares[0], group=WithPeers(*sent) if sent else None).record
        assert record.same_bits(expected)
        assert record.world_size == len(shares)
        for member in together[1:]:
            member.state.load({n: t.clone() for n, t in together[0].state.tensors().items()}, step + 1)
    assert together[0].state.digest() == alone.state.digest()


def recorded(member: Trainee, share: tuple[int, ...]) -> Recorder:
    group = Recorder()
    member.run(share, group=group)
    return group


def total_of(replica: Replica, step: int, micro_batch: int, tokens: Any = None) -> bytes:
    reduction = replica.new_reduction()
    reduction.begin(step)
    tokens = batch(0, 0) if tokens is None else tokens
    replica.add_micro_batch(reduction, tokens, step=step, micro_batch=micro_batch)
    return reduction.raw_total()


def test_dropout_depends_on_seed_step_and_micro_batch_and_on_nothing_else() -> None:
    """One batch throughout: only its dropout differs."""
    spec = tiny_spec()
    replica, other_seed = Replica(spec), Replica(replace(spec, seed=8))
    other_seed.state.load({n: t.clone() for n, t in replica.state.tensors().items()}, 0)
    first = total_of(replica, 3, 2)
    torch.rand(17)
    assert total_of(replica, 3, 2) == first
    others = [total_of(replica, 3, 1), total_of(replica, 2, 3), total_of(replica, 4, 2), total_of(other_seed, 3, 2)]
    assert len({first, *others}) == 5


def test_without_dropout_a_batch_has_one_gradient() -> None:
    replica = Replica(tiny_spec(model=CALM))
    assert total_of(replica, 3, 2) == total_of(replica, 0, 5)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">u2"])
def test_kind_of_integers_does_not_show(dtype: str) -> None:
    replica = Replica(tiny_spec())
    tokens = SyntheticTokens().tokens(0, 0).astype(dtype)
    tokens.flags.writeable = False
    assert total_of(replica, 0, 0, tokens) == total_of(replica, 0, 0, torch.from_numpy(tokens.astype("int32")))


def test_sample_hash_names_step_micro_batch_and_every_token() -> None:
    tokens = batch(0, 0)
    seen = {sample_hash(0, 0, tokens), sample_hash(0, 1, tokens), sample_hash(1, 0, tokens)}
    for place in range(tokens.numel()):
        changed = tokens.clone()
        changed.view(-1)[place] += 1
        seen.add(sample_hash(0, 0, changed))
    assert len(seen) == 3 + tokens.numel()
    assert all(0 <= one < 2**62 for one in seen)
    assert sample_hash(0, 0, tokens.t().contiguous().t()) == sample_hash(0, 0, tokens)


def test_votes_of_any_member_end_the_lease() -> None:
    assert not Trainee(tiny_spec()).run().ends
    assert Trainee(tiny_spec()).run(control=Control(votes=True)).ends
    peer = Recorder()
    Trainee(tiny_spec()).run(EVERYTHING, group=peer, control=Control(votes=True))
    assert Trainee(tiny_spec()).run((), group=WithPeers(peer)).ends


def test_first_state_is_that_of_the_seed_however_often_it_is_made() -> None:
    spec = tiny_spec()
    trainee = Trainee(spec)
    first = trainee.state.digest()
    trainee.run()
    torch.rand(3)
    trainee.replica.initialise()
    assert trainee.state.digest() == Trainee(spec).state.digest() == first
    assert Trainee(replace(spec, seed=8)).state.digest() != first


def test_a_new_replica_holds_the_first_weights_but_nobodys_state() -> None:
    spec = tiny_spec()
    replica = Replica(spec)
    assert replica.state.torn
    assert torch.equal(replica.state.weights, Trainee(spec).state.weights)


# -- before or after, never in between -------------------------------------------------------------------------------


def assert_before(trainee: Trainee, spec: EngineSpec) -> None:
    """The state is the first one, and the step that is done now has the undisturbed bits."""
    assert (trainee.state.torn, trainee.state.next_step) == (False, 0)
    assert trainee.state.digest() == Trainee(spec).state.digest()
    undisturbed = Trainee(spec)
    assert trainee.run().record.same_bits(undisturbed.run().record)
    assert trainee.state.digest() == undisturbed.state.digest()


@pytest.mark.parametrize("place", ["step.begin", "micro_batch", "reduce.begin", "reduce.end"])
def test_exception_before_the_update_leaves_the_state_before_the_step(place: str) -> None:
    spec = tiny_spec()
    trainee = Trainee(spec)
    failpoints.arm([f"*:{place}@0=raise"], "w0")
    with pytest.raises(failpoints.InjectedError):
        trainee.run()
    assert_before(trainee, spec)


def test_exception_in_the_middle_of_the_update_leaves_it_torn() -> None:
    trainee = Trainee(tiny_spec())
    failpoints.arm(["*:optimizer.middle@0=raise"], "w0")
    with pytest.raises(failpoints.InjectedError):
        trainee.run()
    assert trainee.state.torn


def test_exception_after_the_update_leaves_the_state_after_the_step() -> None:
    trainee, undisturbed = Trainee(tiny_spec()), Trainee(tiny_spec())
    failpoints.arm(["*:step.end@0=raise"], "w0")
    with pytest.raises(failpoints.InjectedError):
        trainee.run()
    undisturbed.run()
    assert (trainee.state.torn, trainee.state.next_step) == (False, 1)
    assert trainee.state.digest() == undisturbed.state.digest()


def test_nothing_is_written_before_a_copy_in_flight_is_over() -> None:
    spec = tiny_spec()
    trainee = Trainee(spec)
    first = trainee.state.digest()
    seen = []

    def copying() -> None:
        seen.append(trainee.state.digest())
        raise GroupBroken("the receiver is gone")

    with pytest.raises(GroupBroken):
        trainee.run(before_update=copying)
    assert seen == [first]
    assert_before(trainee, spec)


# Looks at the flag: one before each micro-batch, one per parameter in its backward pass.
@pytest.mark.parametrize("looks", [0, 1, 5, 20, 40])
def test_fence_between_and_inside_micro_batches_leaves_the_state_before_the_step(looks: int) -> None:
    spec = tiny_spec()
    trainee = Trainee(spec)
    with pytest.raises(Cancelled):
        trainee.run(control=Control(looks=looks))
    assert all(parameter.grad is None for parameter in trainee.replica.model.parameters())
    assert_before(trainee, spec)


def test_group_that_breaks_inside_backward_leaves_the_state_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Recorder):
        def all_reduce(self, tensor: Tensor) -> Tensor:
            raise GroupBroken("a peer is gone")

    spec = tiny_spec()
    trainee = Trainee(spec)
    monkeypatch.setattr("elastic_lm.engine.reduce.BUCKET_ELEMENTS", 1024)
    trainee.reduction = trainee.replica.new_reduction()
    control = Control()
    with pytest.raises(GroupBroken):
        trainee.run(group=Broken(), control=control)
    assert control.phases[-1] is Phase.COMPUTE  # it was inside backward
    assert_before(trainee, spec)


def test_data_that_raises_leaves_the_state_before_the_step() -> None:
    class Fails(Asked):
        fails = True

        def tokens(self, step: int, micro_batch: int, cancelled: Any = None) -> np.ndarray:
            if self.fails and micro_batch == 3:
                raise OSError("no such window")
            return super().tokens(step, micro_batch, cancelled)

    spec = tiny_spec()
    trainee = Trainee(spec, tokens=Fails())
    with pytest.raises(OSError, match="no such window"):
        trainee.run()
    trainee.tokens.fails = False
    assert_before(trainee, spec)


@pytest.mark.parametrize(
    ("shares", "count"),
    [
        ([EVERYTHING[:-1]], M - 1),  # one is missing
        ([(*EVERYTHING, 0)], M + 1),  # one twice
        ([(0, 1), (2, 3)], 4),
        ([(), ()], 0),
    ],
)
def test_wrong_number_of_micro_batches_is_never_applied(shares: list[tuple[int, ...]], count: int) -> None:
    spec = tiny_spec()
    trainee = Trainee(spec)
    others = [Trainee(spec).contribution(share) for share in shares[1:]]
    with pytest.raises(InconsistentSum, match=rf"^step 0: {count} of {M} micro-batches$"):
        trainee.run(shares[0], group=WithPeers(*others) if others else None)
    assert_before(trainee, spec)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("objective", ["nan_loss", "infinite_gradient"])
def test_non_finite_contribution_is_never_applied(objective: str, reduction: Any) -> None:
    spec = tiny_spec(objective=f"{HERE}:{objective}", reduction=reduction)
    trainee = Trainee(spec)
    first = trainee.state.digest()
    with pytest.raises(PoisonedStep, match=r"^step 0: "):
        trainee.run()
    assert (trainee.state.torn, trainee.state.next_step) == (False, 0)
    assert trainee.state.digest() == first


@pytest.mark.parametrize("reduction", ["exact", "fast"])
@pytest.mark.parametrize("objective", ["nan_loss", "infinite_gradient"])
def test_step_that_is_left_out_changes_nothing_but_the_count(objective: str, reduction: Any) -> None:
    spec = tiny_spec(objective=f"{HERE}:{objective}", reduction=reduction, on_nonfinite="skip")
    trainee = Trainee(spec)
    first = {name: tensor.clone() for name, tensor in trainee.state.tensors().items()}
    record = trainee.run().record
    assert (trainee.state.torn, trainee.state.next_step) == (False, 1)
    assert all(torch.equal(tensor, first[name]) for name, tensor in trainee.state.tensors().items())
    assert record.refused > 0 and record.grad_norm == 0.0
    json.dumps(asdict(record), allow_nan=False)


def test_non_finite_contribution_of_one_member_is_seen_by_all() -> None:
    poisoned = Trainee(tiny_spec(objective=f"{HERE}:infinite_gradient"))
    sent = Recorder()
    with pytest.raises(PoisonedStep):
        poisoned.run(EVERYTHING, group=sent)
    healthy = Trainee(tiny_spec())
    first = healthy.state.digest()
    with pytest.raises(PoisonedStep, match="are not finite or out of range; lower optimizer.learning_rate"):
        healthy.run((), group=WithPeers(sent))
    assert healthy.state.digest() == first


# -- a user's own model and objective --------------------------------------------------------------------------------


def test_users_model_is_trained_like_any_other() -> None:
    """It has a part that is never used, which nothing but weight decay would move."""
    model = FactorySpec(f"{HERE}:bag", VOCAB, LENGTH, {"width": 16})
    spec = tiny_spec(model=model, optimizer=OptimizerSpec(learning_rate=0.1, weight_decay=0.0))
    trainee = Trainee(spec, tokens=Repetitive())
    spare = trainee.state.tensors()["parameters/spare.weight"].clone()
    assert trainee.state.tensors()["parameters/embedding.weight"].shape == (VOCAB, 16)
    losses = [trainee.run().record.loss for _ in range(5)]
    assert losses[-1] < losses[0] - 1
    assert torch.equal(trainee.state.tensors()["parameters/spare.weight"], spare)


def test_users_model_keeps_the_promise() -> None:
    spec = tiny_spec(model=FactorySpec(f"{HERE}:bag", VOCAB, LENGTH))
    alone, one, other = Trainee(spec), Trainee(spec), Trainee(spec)
    record = one.run((0, 3, 4), group=WithPeers(other.contribution((5, 1, 2)))).record
    assert record.same_bits(alone.run().record)
    assert one.state.digest() == alone.state.digest()


def test_users_objective_decides_what_counts() -> None:
    record = Trainee(tiny_spec(objective=f"{HERE}:every_second")).run().record
    assert record.num_targets == M * SIZE * LENGTH // 2
    assert record.loss == pytest.approx(math.log(VOCAB), abs=0.1)


def test_what_is_no_model_is_refused_before_the_first_step() -> None:
    with pytest.raises(TypeError, match=r"model\.factory='.*:no_module' returned object, not an nn\.Module"):
        Replica(tiny_spec(model=FactorySpec(f"{HERE}:no_module", VOCAB, LENGTH)))
    with pytest.raises(ConfigError, match=r"model\.factory='.*:nothing' cannot be imported"):
        Replica(tiny_spec(model=FactorySpec(f"{HERE}:nothing", VOCAB, LENGTH)))
    with pytest.raises(ConfigError, match=r"objective\.name='.*:nothing' cannot be imported"):
        Replica(tiny_spec(objective=f"{HERE}:nothing"))


def test_hooks_of_a_micro_batch_are_gone_afterwards() -> None:
    """A backward pass of somebody else (an evaluation, a probe) adds nothing to the sum."""
    trainee = Trainee(tiny_spec())
    trainee.reduction.begin(0)
    trainee.replica.add_micro_batch(trainee.reduction, batch(0, 0), step=0, micro_batch=0)
    before = trainee.reduction.raw_total()
    causal(trainee.replica.model, batch(0, 1))[0].backward()
    assert trainee.reduction.raw_total() == before


def test_buffers_are_made_for_the_spec() -> None:
    exact, fast = (Replica(tiny_spec(reduction=kind)).new_reduction() for kind in ("exact", "fast"))
    assert isinstance(exact, Reduction) and exact.exact and not fast.exact
    assert len(exact.raw_total()) == 2 * len(fast.raw_total())
