"""What an undisturbed run comes to: one replica in this process, no Ray, no readers, no coordinator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.data.windows import LocalTokens
from elastic_lm.engine.determinism import make_deterministic
from elastic_lm.engine.lease import Member, Restore, run_lease
from elastic_lm.engine.spec import CAUSAL
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.huggingface import initial
from elastic_lm.model.spec import ModelSpec
from elastic_lm.protocol import Evaluation, Generation, Lease, LeaseEnd, Phase, StepRecord
from elastic_lm.runtime.coordinator import Plan
from elastic_lm.runtime.held_out_client import HeldOutClient
from elastic_lm.runtime.plan import make_plan

Bits = tuple[Any, ...]


_known: dict[tuple[str, int], tuple[str, tuple[Bits, ...]]] = {}


def undisturbed(config: RunConfig) -> tuple[str, tuple[Bits, ...]]:
    """Digest of the final state, and of every step what the promise covers. Computed once per identity and length."""
    plan = make_plan(config.replace("name=oracle", "failpoints=[]"))
    key = plan.config.identity_fingerprint(), plan.config.training.steps
    if key not in _known:
        _known[key] = _train(plan)
    return _known[key]


def evaluations(config: RunConfig) -> dict[int, Evaluation]:
    """What every evaluation of an undisturbed run comes to, by step."""
    plan = make_plan(config.replace("name=oracle", "failpoints=[]"))
    make_deterministic("cpu", exact=True, threads=1)
    member = member_of(plan, restore=lambda step, on_part: {})
    assert plan.held_out is not None
    source = HeldOutClient(config.data.tokens, plan.held_out, 60.0, is_all_text=plan.spec.objective == CAUSAL)
    batches = tuple(range(plan.held_out.num_batches))
    slots = tuple(range(plan.spec.micro_batches))
    found, step, every = {}, 0, config.evaluation.every
    assert every is not None
    while step < config.training.steps:
        stop = min(step + every, config.training.steps)
        report = run_lease(member, Lease(Generation(1, stop), ("w0",), None, step, stop, (slots,)), _Watch())
        assert report.end is LeaseEnd.COMPLETED, report.error
        measures = []
        for batch in batches:
            tokens = source.batch(batch, lambda: False)
            measure = member.runner.replica.measure(tokens, batch)
            measures.append(replace(measure, num_bytes=source.num_bytes(tokens)))
        found[stop], step = Evaluation.of(stop, measures), stop
    return found


def _train(plan: Plan) -> tuple[str, tuple[Bits, ...]]:
    make_deterministic("cpu", exact=True, threads=1)
    member = member_of(plan, restore=lambda step, on_part: {})
    slots = tuple(range(plan.spec.micro_batches))
    lease = Lease(Generation(1, 1), ("w0",), None, 0, plan.config.training.steps, (slots,))
    watch = _Watch()
    report = run_lease(member, lease, watch)
    assert report.end is LeaseEnd.COMPLETED, report.error
    return member.state.digest(), tuple(watch.steps)


def member_of(plan: Plan, restore: Restore) -> Member:
    """The only member of a run, in this process."""
    member = Member("w0", StepRunner(Replica(plan.spec), LocalTokens(*plan.start_reader.args)), restore)
    if plan.init is not None:
        (folder, digest), spec = plan.init, plan.spec.model
        assert isinstance(spec, ModelSpec)
        member.initial = lambda on_part: initial.read(folder, spec, digest, on_part)[0]
    return member


class _Watch:
    """A lease control that nobody reaches into."""

    def __init__(self) -> None:
        self.steps: list[Bits] = []

    def cancelled(self) -> bool:
        return False

    def wants_end(self) -> bool:
        return False

    def report(self, phase: Phase) -> None:
        pass

    def committed(self, record: StepRecord, micro_batch_s: float | None) -> None:
        self.steps.append(bits_of(record))


def bits_of(record: StepRecord) -> Bits:
    return (record.step, record.loss, record.num_targets, record.grad_norm, record.sample_hash, record.learning_rate)
