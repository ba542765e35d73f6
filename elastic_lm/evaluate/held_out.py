"""The task `held_out`: how well a model predicts the text that its corpus keeps from training.

Invariant: the batches are those of data/held_out.py, so every run over a corpus is asked the same. fp32 here; a run that
trains in another precision measures itself in that.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from elastic_lm.config import RunConfig
from elastic_lm.data.held_out import HeldOut, HeldOutTokens
from elastic_lm.data.manifest import Manifest
from elastic_lm.engine.measure import measure
from elastic_lm.engine.objectives import find_objective
from elastic_lm.engine.spec import CAUSAL, MASKED, MaskingSpec
from elastic_lm.evaluate.intervals import Metric, ratio
from elastic_lm.evaluate.pieces import PIECE_TOKENS, Plan
from elastic_lm.evaluate.result import Outcome
from elastic_lm.protocol import Measure
from elastic_lm.storage import Storage
from elastic_lm.trained_model import ModelInterface, TrainedModel

NAME = "held_out"
BITS = math.log(2)  # nats of a bit


class HeldOutText:
    """Of the corpus that a run trains on, or the first `max_samples` in the order of all."""

    kind = NAME

    def __init__(self, config: RunConfig, max_samples: int | None = None) -> None:
        """Raises: ConfigError when nothing is held out; DataError, StorageError."""
        self._tokens = Storage.open(config.data.tokens)
        manifest = Manifest.load(self._tokens)
        self._held_out = HeldOut.of(
            manifest,
            sequence_length=config.batch.sequence_length,
            batch_size=config.batch.micro_batch_size,
            max_samples=max_samples,
        )
        self._spec = config.engine_spec(manifest.vocab_size, manifest.special_ids)
        asked = [manifest.hash, config.batch.sequence_length, config.batch.micro_batch_size, self._held_out.num_samples]
        objective = {name: value for name, value in config.objective.identity().items() if name != "z_loss"}
        self.hash = hashlib.sha256(json.dumps([*asked, objective]).encode()).hexdigest()

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of what is told of this objective."""
        if self._spec.objective not in (CAUSAL, MASKED):
            return ("loss",)
        return ("loss", "perplexity", "accuracy", *(("bits_per_byte",) if self._spec.objective == CAUSAL else ()))

    def plan(self, model: ModelInterface) -> Plan:
        source = HeldOutTokens(self._tokens, self._held_out)
        size = max(1, PIECE_TOKENS // (self._held_out.order.micro_batch_size * self._spec.sequence_length))
        number = self._held_out.num_batches
        return Plan(
            [
                Batches(source, self._spec.objective, self._spec.masking, start, min(start + size, number))
                for start in range(0, number, size)
            ],
            self._outcome,
        )

    def _outcome(self, answers: Sequence[list[tuple[Measure, int]]]) -> Outcome:
        measures = [measured for answer in answers for measured, _ in answer]
        counts = {
            "samples": self._held_out.num_samples,
            "batches": len(measures),
            "targets": sum(each.num_targets for each in measures),
        }
        metrics = self._metrics(measures)
        if self._spec.objective == CAUSAL:
            num_bytes = [size for answer in answers for _, size in answer]
            counts["bytes"] = sum(num_bytes)
            metrics["bits_per_byte"] = ratio([each.loss / BITS for each in measures], num_bytes)
        return Outcome(metrics, counts, {"intervals": "ratio estimator over batches"})

    def _metrics(self, measures: list[Measure]) -> dict[str, Metric]:
        targets = [each.num_targets for each in measures]
        loss = ratio([each.loss for each in measures], targets)
        if self._spec.objective not in (CAUSAL, MASKED):  # what the user's own objective tells need be no nats
            return {"loss": loss}
        hits = [each.num_correct for each in measures if each.num_correct is not None]
        accuracy = ratio(hits, targets) if len(hits) == len(measures) else Metric(None)
        return {"loss": loss, "perplexity": loss.through(math.exp), "accuracy": accuracy}


@dataclass(frozen=True)
class Batches:
    """A piece: held-out batches [start, stop), of each its measure, and the UTF-8 bytes of its text but the first tokens.

    `source` keeps the windows that it has read, for all pieces that share it.
    """

    source: HeldOutTokens
    objective: str
    masking: MaskingSpec | None
    start: int
    stop: int

    def answer(self, model: TrainedModel) -> list[tuple[Measure, int]]:
        """Raises: ConfigError when the user's objective cannot be imported; DataError, StorageError."""
        objective = find_objective(self.objective, self.masking)  # the loss is told without z_loss
        found = []
        for number in range(self.start, self.stop):
            tokens_BS = torch.from_numpy(self.source.batch(number).astype(np.int64))
            measured = measure(model.module, objective, tokens_BS.to(model.device), number)
            found.append((measured, int(model.token_bytes[tokens_BS[:, 1:]].sum())))
        return found

    def num_tokens(self, answer: list[tuple[Measure, int]]) -> int:
        return self.source.num_tokens(self.start, self.stop)
