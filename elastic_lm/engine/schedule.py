"""The learning rate of a step: arithmetic, so that any member at any time knows it."""

from __future__ import annotations

import math

from elastic_lm.engine.spec import ScheduleSpec


def learning_rate(spec: ScheduleSpec, peak: float, step: int) -> float:
    """Learning rate for `step` (from 0). Past `total_steps` it stays at its last value.

    Source: cosine by Loshchilov and Hutter (2017); warm-up, stable, decay by Hu et al. (2024).
    """
    if step < spec.warmup_steps:
        return peak * (step + 1) / spec.warmup_steps
    step = min(step, spec.total_steps)
    if spec.kind == "cosine":
        progress = (step - spec.warmup_steps) / max(1, spec.total_steps - spec.warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    elif spec.kind == "wsd":
        share = min(1.0, (spec.total_steps - step) / max(1, spec.decay_steps))
    else:
        return peak
    return peak * (spec.final_ratio + (1 - spec.final_ratio) * share)
