"""How well a model predicts held-out tokens: its loss on a batch of them, and how often it is right.

Invariant: that is a pure function of weights, tokens and the batch's number. Dropout is off, and what the masked objective
hides follows from the number alone, not from the run's seed: every run over a corpus is asked the same.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from elastic_lm.engine import compiled
from elastic_lm.engine.cross_entropy import hits_at
from elastic_lm.engine.masking import Masked
from elastic_lm.engine.objectives import Causal, Objective
from elastic_lm.protocol import Measure


def measure(model: nn.Module, objective: Objective, tokens_BS: Tensor, batch: int) -> Measure:
    """The loss is summed over the targets of tokens [B, S], in fp64 where the objective is ours.

    A user's objective tells its loss sum and its number of targets, and nothing of what was right; neither does a loss that is
    not finite.
    """
    return measure_with_samples(model, objective, tokens_BS, batch)[0]


@torch.no_grad()
def measure_with_samples(
    model: nn.Module, objective: Objective, tokens_BS: Tensor, batch: int
) -> tuple[Measure, list[Measure]]:
    """That of the batch, and that of each of its samples, by the same pass; of a user's objective there are none of samples."""
    key = hashlib.blake2b(struct.pack("<q", batch), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(key, "little") >> 1)
    with _eager_and_without_dropout(model):
        if not isinstance(objective, Causal | Masked):
            loss, num_targets = objective(model, tokens_BS)
            return Measure(batch, float(loss), int(num_targets), None), []
        inputs_BT, targets_N, places_N = objective.targets(tokens_BS)
        found = hits_at(model, inputs_BT, targets_N, places_N)
    whole = _measure(batch, found.loss, len(targets_N), int(found.hit_N.sum()))
    rows_N = torch.arange(len(targets_N)) if places_N is None else places_N.cpu()
    rows_N = rows_N.div(inputs_BT.shape[1], rounding_mode="floor")
    weights = found.loss_N.cpu(), None, found.hit_N.cpu().double()
    of_rows = [torch.bincount(rows_N, each, len(tokens_BS)).tolist() for each in weights]
    return whole, [_measure(batch, loss, n, int(hits)) for loss, n, hits in zip(*of_rows, strict=True)]


def _measure(batch: int, loss: float, num_targets: int, num_correct: int) -> Measure:
    """argmax finds a NaN the highest: where there are any, the count of hits says nothing."""
    return Measure(batch, loss, num_targets, num_correct if math.isfinite(loss) else None)


@contextmanager
def _eager_and_without_dropout(model: nn.Module) -> Iterator[None]:
    trains = model.training
    model.eval()
    try:
        with compiled.not_compiled(model):
            yield
    finally:
        model.train(trains)
