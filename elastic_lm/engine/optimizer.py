"""The update of a replica's flat buffers: AdamW, PyTorch's fused kernel once per weight-decay group; Muon, matrix by matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from elastic_lm import failpoints
from elastic_lm.engine import muon
from elastic_lm.engine.schedule import learning_rate
from elastic_lm.engine.spec import OptimizerSpec, ScheduleSpec
from elastic_lm.engine.state import ReplicaState, Slot

LOOKS = 1000  # at the length of a late update
NORM_BLOCK = 1 << 16  # elements: one fp32 sum over 124 M elements is off by 1.3 %, over blocks of this size by 2e-7


class Optimizer:
    """Updates `state` in place: its hidden matrices by Muon, if it has any, all else by AdamW.

    Everything that a step needs is an argument or in `state`; nothing is kept here.
    """

    def __init__(self, state: ReplicaState, optimizer: OptimizerSpec, schedule: ScheduleSpec) -> None:
        self._state, self._spec, self._schedule = state, optimizer, schedule

    def learning_rate(self, step: int) -> float:
        return learning_rate(self._schedule, self._spec.learning_rate, step)

    def clip(self, gradient: Tensor) -> float:
        """Scale the flat gradient in place to at most `clip_norm`.    Returns: its global L2 norm before."""
        norm = _norm(gradient)
        limit = self._spec.clip_norm
        if limit is not None and norm > limit:
            gradient.mul_(limit / norm)
        return norm

    def apply(self, gradient: Tensor, step: int, loss_exponent: int | None = None) -> None:
        """One update with the flat gradient; the state goes from `step` to `step + 1` and is torn meanwhile.

        `loss_exponent`: that of the loss scale with which the gradient was computed, where the state has one.
        """
        state = self._state
        assert state.next_step == step and not state.torn
        with state.writing(step + 1), torch.no_grad():
            for slot, rows in state.hidden:
                self._update_hidden(slot, rows, gradient, step)
            self._update(slice(state.hidden_size, state.decayed), self._spec.weight_decay, gradient, step)
            failpoints.hit("optimizer.middle", step)
            self._update(slice(state.decayed, state.size), 0.0, gradient, step)
            if state.loss_scale is not None and loss_exponent is not None:
                state.loss_scale.settle(loss_exponent)

    def _update_hidden(self, slot: Slot, rows: tuple[int, ...], gradient: Tensor, step: int) -> None:
        """Each part of the matrix is one of its own."""
        state, spec = self._state, self._spec
        parts = (slot.of(flat).view(slot.shape).split(rows) for flat in (state.weights, gradient, state.exp_avg))
        for weight_RC, gradient_RC, exp_avg_RC in zip(*parts, strict=True):
            muon.update(
                weight_RC,
                gradient_RC,
                exp_avg_RC,
                learning_rate=self.learning_rate(step),
                momentum=spec.momentum,
                weight_decay=spec.weight_decay,
            )

    def trial(self) -> list[Tensor]:
        """What of an update may depend on the machine beside a gradient: of the weights' bits, one for each shape."""
        state = self._state
        parts = [part for slot, rows in state.hidden for part in slot.of(state.weights).view(slot.shape).split(rows)]
        with torch.no_grad():
            return [muon.orthogonalised(part) for part in {part.shape: part for part in parts}.values()]

    def _update(self, part: slice, weight_decay: float, gradient: Tensor, step: int) -> None:
        if part.start == part.stop:
            return
        state, spec = self._state, self._spec
        torch._fused_adamw_(
            [state.weights[part]],
            [gradient[part]],
            [state.exp_avg[part]],
            [state.exp_avg_sq[part.start - state.hidden_size : part.stop - state.hidden_size]],
            [],
            [torch.tensor(float(step + 1), device=gradient.device)],
            lr=self.learning_rate(step),
            beta1=spec.betas[0],
            beta2=spec.betas[1],
            weight_decay=weight_decay,
            eps=spec.eps,
            amsgrad=False,
            maximize=False,
        )


def largest_update(betas: tuple[float, float], step: int) -> float:
    """Of a parameter whose moments are zero at `step`, under a gradient that stays the same, in learning rates; 1 at step 0.

    AdamW divides its moments by what they lack when they begin with the run: 1 - beta^steps. Of those that begin later they lack
    more, and the second one for longer than the first.
    """

    def update(num_steps: int) -> float:
        first, second = ((1 - beta**num_steps) / (1 - beta ** (step + num_steps)) for beta in betas)
        return first / math.sqrt(second)

    settled = math.ceil(math.log(1e-4) / math.log(betas[0])) if betas[0] else 1  # the first moment is what it will be
    # All numbers of steps where they are few; of many those that are 1 % or so apart, which the curve does not notice.
    return max(
        map(update, {math.ceil(settled ** (i / LOOKS)) for i in range(LOOKS + 1)} | {*range(1, min(settled, LOOKS))})
    )


def _norm(gradient: Tensor) -> float:
    """The global L2 norm: of blocks in fp32 (a CPU adds them up one by one; a GPU in a tree), of their norms in fp64."""
    block = NORM_BLOCK if gradient.device.type == "cpu" else gradient.numel()
    norms = torch.stack([torch.linalg.vector_norm(part) for part in gradient.split(max(1, block))])
    return float(torch.linalg.vector_norm(norms.double()))
