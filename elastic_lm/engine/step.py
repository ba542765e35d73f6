"""One step of one member: its micro-batches, the reduction, the update.

Invariant: whatever exception leaves `run_step`, the state is the one before the step or the one after it, unless the
optimizer itself was interrupted; then `state.torn` says so. Nothing a step computes depends on rank, world size or clock.
"""

from __future__ import annotations

import hashlib
import math
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from elastic_lm import failpoints
from elastic_lm.engine import compiled, fixed_point, kernel, nccl
from elastic_lm.engine.build import build, fill, hidden_matrices
from elastic_lm.engine.cancelled import Cancelled
from elastic_lm.engine.determinism import prepare
from elastic_lm.engine.group import Group, IsCancelled, synchronize
from elastic_lm.engine.loss_scale import LOWEST, LossScale
from elastic_lm.engine.measure import measure
from elastic_lm.engine.objectives import find_objective
from elastic_lm.engine.optimizer import Optimizer
from elastic_lm.engine.precision import LOW_PRECISIONS, refuse_lacking
from elastic_lm.engine.reduce import Commit, InconsistentSum, Reduction, size_bytes
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.engine.state import ReplicaState
from elastic_lm.errors import ConfigError
from elastic_lm.model.transformer import GPT
from elastic_lm.protocol import Generation, Measure, Phase, StepRecord


class PoisonedStep(Exception):
    """Some contribution was not finite or out of range; every member sees the same count."""


class TokenSource(Protocol):
    """Where tokens come from."""

    def tokens(self, step: int, micro_batch: int, cancelled: IsCancelled) -> Any:
        """Tokens [micro_batch_size, sequence_length + 1] of any integer dtype, as a NumPy array or tensor."""


class Control(Protocol):
    """How a running member is reached from outside."""

    def cancelled(self) -> bool: ...

    def wants_end(self) -> bool: ...

    def report(self, phase: Phase) -> None: ...


@dataclass(frozen=True)
class StepOutcome:
    """A step that is applied. `ends`: a vote in its sum says that the lease is over."""

    record: StepRecord
    ends: bool


class Replica:
    """A model, its state, its objective and its optimizer.

    A new replica holds the initial weights, but its state counts as torn until a lease says where the run's state is.
    """

    def __init__(self, spec: EngineSpec) -> None:
        prepare(spec)
        refuse_lacking(spec.precision, torch.device(spec.device))
        if spec.collectives == "nccl":
            nccl.prepare()
        kernel.available(torch.device(spec.device))  # compiled now, not while others wait for this member to form
        self.spec = spec
        self.device = torch.device(spec.device)
        torch.manual_seed(spec.seed)
        self.model = build(spec.model)
        self.model.train()
        if isinstance(self.model, GPT):
            self.model.recomputes = spec.recompute
        self.state = ReplicaState(self.model, self.device, self._new_loss_scale(), self._hidden_matrices())
        if spec.compile:
            compiled.compile_blocks(self.model, self.device)
        self.objective = find_objective(spec.objective, spec.masking, spec.z_loss)
        self.optimizer = Optimizer(self.state, spec.optimizer, spec.schedule)

    def _hidden_matrices(self) -> dict[str, tuple[int, ...]]:
        return hidden_matrices(self.model) if self.spec.optimizer.kind == "muon" else {}

    def _new_loss_scale(self) -> LossScale | None:
        if self.spec.precision != "fp16":
            return None
        return LossScale(max(1, self.spec.targets_per_batch // self.spec.micro_batches), self.device)

    def initialise(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Make the state the run's first one: a pure function of the spec, and of the `weights` to begin from."""
        torch.manual_seed(self.spec.seed)
        module = build(self.spec.model)
        if module is self.model:
            raise ConfigError("model.factory returned the same module twice; it must build a new one at each call")
        if weights is not None:
            fill(module, weights)
        self.state.begin(module)

    @property
    def sum_bytes(self) -> int:
        """What `new_reduction` takes."""
        return size_bytes(self.state.size, exact=self.spec.reduction == "exact")

    def new_reduction(self, group: Group | None = None) -> Reduction:
        """The buffer of one generation, out of the group's memory."""
        spec = self.spec
        return Reduction(
            self.state.slots,
            self.state.size,
            exact=spec.reduction == "exact",
            gradient_unit=fixed_point.gradient_unit(spec.targets_per_batch, spec.micro_batches),
            loss_unit=fixed_point.loss_unit(spec.micro_batches),
            device=self.device,
            group=group,
        )

    def add_micro_batch(
        self,
        reduction: Reduction,
        tokens: Any,
        *,
        step: int,
        micro_batch: int,
        cancelled: IsCancelled = lambda: False,
    ) -> None:
        """Forward, backward, fold. Each gradient is folded the moment it is complete, while it is in the cache.

        Raises: Cancelled, out of backward: survivors of a fault wait for this, and a micro-batch may take long.
        """
        tokens_BS = as_tokens(tokens)
        self._seed(step, micro_batch)
        handles = [
            parameter.register_post_accumulate_grad_hook(_folder(reduction, index, cancelled))
            for index, parameter in enumerate(self.state.parameters)
        ]
        try:
            with self._autocast():
                loss, num_targets = self.objective(self.model, self._sent(tokens_BS))
            exponent = reduction.loss_exponent
            (loss if exponent is None else loss * 2.0**exponent).backward()
        finally:
            for handle in handles:
                handle.remove()
            for parameter in self.state.parameters:
                parameter.grad = None
        reduction.add_micro_batch(loss, num_targets, sample_hash(step, micro_batch, tokens_BS))

    def measure(self, tokens: Any, batch: int) -> Measure:
        """How well the weights predict the held-out batch of this number; see `engine/measure.py`."""
        with self._autocast():
            return measure(self.model, self.objective, self._sent(as_tokens(tokens)), batch)

    def _sent(self, tokens_BS: Tensor) -> Tensor:
        """On the device; to a GPU from pinned memory, so that the copy waits for what is under way there, and nobody for it."""
        if self.device.type == "cuda":
            return tokens_BS.pin_memory().to(self.device, non_blocking=True)
        return tokens_BS.to(self.device)

    def _seed(self, step: int, micro_batch: int) -> None:
        """Dropout and the like depend on what is computed, never on who computes it."""
        key = hashlib.blake2b(struct.pack("<qqq", self.spec.seed, step, micro_batch), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(key, "little") >> 1)

    def _autocast(self) -> AbstractContextManager[Any]:
        low = LOW_PRECISIONS.get(self.spec.precision)
        return nullcontext() if low is None else torch.autocast(self.device.type, low)


def _folder(reduction: Reduction, index: int, cancelled: IsCancelled) -> Callable[[Tensor], None]:
    def fold(parameter: Tensor) -> None:
        if cancelled():
            raise Cancelled
        assert parameter.grad is not None
        reduction.add_gradient(index, parameter.grad)
        parameter.grad = None

    return fold


def as_tokens(tokens: Any) -> Tensor:
    """int64 tokens on the host, from a tensor or a NumPy array (which may be read-only or of an unsigned type)."""
    if isinstance(tokens, Tensor):
        return tokens.to(torch.int64)
    return torch.from_numpy(tokens.astype("int64"))


def sample_hash(step: int, micro_batch: int, tokens_BS: Tensor) -> int:
    """62 bits that name what entered forward for (step, micro_batch)."""
    message = hashlib.blake2b(struct.pack("<qq", step, micro_batch), digest_size=8)
    message.update(tokens_BS.contiguous().numpy().data.cast("B"))
    return int.from_bytes(message.digest(), "little") >> 2


class StepRunner:
    """Runs steps of one replica with one generation's buffer. `tokens`: others are others' batches, and another state's."""

    def __init__(self, replica: Replica, tokens: TokenSource) -> None:
        self.replica = replica
        self.tokens = tokens
        self._gradient = torch.empty_like(replica.state.weights)

    def run_step(
        self,
        micro_batches: tuple[int, ...],
        reduction: Reduction,
        group: Group | None,
        control: Control,
        generation: Generation,
        before_update: Callable[[], None] = lambda: None,
    ) -> StepOutcome:
        """Train the state's next step; compute `micro_batches` of it.

        `before_update` runs when the sum is complete and nothing is applied (a copy in flight must be over by then).
        Raises: Cancelled, GroupBroken, PoisonedStep, DataError, UnavailableError, and whatever the user's model raises.
        """
        step = self.replica.state.next_step
        clock = _Clock()
        failpoints.hit("step.begin", step)
        scale = self.replica.state.loss_scale
        exponent = None if scale is None else scale.exponent
        commit = self._sum(step, micro_batches, reduction, group, control, clock, exponent)
        while commit.refused and not commit.refused_losses and exponent is not None and exponent > LOWEST:
            exponent -= 1  # a loss itself is not scaled: when that is refused, no scale helps
            commit = self._sum(step, micro_batches, reduction, group, control, clock, exponent)
        self._check(commit, step)
        before_update()
        failpoints.hit("reduce.end", step)
        control.report(Phase.OPTIMIZER)
        norm, refused = self._update(step, reduction, commit, exponent)
        clock.lap("optimizer")
        world_size = 1 if group is None else group.world_size
        record = StepRecord(
            step=step,
            loss=reduction.loss(commit),
            num_targets=commit.num_targets,
            learning_rate=self.replica.optimizer.learning_rate(step),
            grad_norm=norm,
            sample_hash=commit.sample_hash,
            refused=refused,
            generation=generation,
            world_size=world_size,
            step_s=clock.total(),
            compute_s=clock.seconds["compute"],
            data_wait_s=clock.seconds["data"],
            reduce_wait_s=clock.seconds["reduce"],
            optimizer_s=clock.seconds["optimizer"],
        )
        failpoints.hit("step.end", step)
        return StepOutcome(record, ends=commit.end_votes > 0)

    def _sum(
        self,
        step: int,
        micro_batches: tuple[int, ...],
        reduction: Reduction,
        group: Group | None,
        control: Control,
        clock: _Clock,
        loss_exponent: int | None,
    ) -> Commit:
        """Compute my micro-batches, and add up over the group."""
        reduction.begin(step, loss_exponent)
        for micro_batch in micro_batches:
            if micro_batch == micro_batches[-1]:
                reduction.send_early(group)
            self._micro_batch(step, micro_batch, reduction, control, clock)
        synchronize(self.replica.device)
        clock.lap("compute")
        failpoints.hit("reduce.begin", step)
        control.report(Phase.REDUCE)
        commit = reduction.complete(group, control.wants_end(), control.cancelled)
        clock.lap("reduce")
        return commit

    def _micro_batch(self, step: int, micro_batch: int, reduction: Reduction, control: Control, clock: _Clock) -> None:
        control.report(Phase.DATA)
        failpoints.hit("data", step, control.cancelled)
        if control.cancelled():
            raise Cancelled
        tokens = self.tokens.tokens(step, micro_batch, control.cancelled)
        clock.lap("data")
        control.report(Phase.COMPUTE)
        failpoints.hit("micro_batch", step)
        self.replica.add_micro_batch(reduction, tokens, step=step, micro_batch=micro_batch, cancelled=control.cancelled)
        clock.lap("compute")

    def _check(self, commit: Commit, step: int) -> None:
        if commit.micro_batches != self.replica.spec.micro_batches:
            raise InconsistentSum(
                f"step {step}: {commit.micro_batches} of {self.replica.spec.micro_batches} micro-batches"
            )
        if not commit.num_targets:
            raise PoisonedStep(f"step {step}: the objective found no target in the whole batch; look at the data")
        if commit.refused and self.replica.spec.on_nonfinite == "stop":
            raise PoisonedStep(
                f"step {step}: {commit.refused} gradient or loss values are not finite or out of range; lower "
                "optimizer.learning_rate, or look at the data of this step"
            )

    def _update(self, step: int, reduction: Reduction, commit: Commit, loss_exponent: int | None) -> tuple[float, int]:
        """(the gradient's norm, how many values are refused). A step with some is left out: the weights stay, the norm is 0."""
        replica, refused = self.replica, commit.refused
        if not refused:
            gradient = reduction.gradient(commit, self._gradient)
            norm = replica.optimizer.clip(gradient)
            refused = int(not math.isfinite(norm))
            if refused and replica.spec.on_nonfinite == "stop":
                raise PoisonedStep(f"step {step}: the gradient's norm is {norm}")
        if refused:
            replica.state.leave_out(step)
            return 0.0, refused
        replica.optimizer.apply(gradient, step, loss_exponent)
        synchronize(replica.device)
        return norm, 0


class _Clock:
    """Seconds by activity since the step began."""

    def __init__(self) -> None:
        self._begin = self._last = time.perf_counter()
        self.seconds = {"data": 0.0, "compute": 0.0, "reduce": 0.0, "optimizer": 0.0}

    def lap(self, activity: str) -> None:
        now = time.perf_counter()
        self.seconds[activity] += now - self._last
        self._last = now

    def total(self) -> float:
        return self._last - self._begin
