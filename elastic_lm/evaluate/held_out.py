"""The task `held_out`: how well a model predicts the text that its corpus keeps from training.

Invariant: the batches are those of data/held_out.py, so every run over a corpus is asked the same. fp32 here; a run that
trains in another precision measures itself in that. Figures are those of the batches; how sure they are is said by documents,
since the samples of one are alike and the shuffle spreads them over batches.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from elastic_lm.config import RunConfig
from elastic_lm.data.document_index import DocumentIndex
from elastic_lm.data.held_out import HeldOut, HeldOutTokens
from elastic_lm.data.manifest import Manifest
from elastic_lm.engine.measure import measure_with_samples
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
FEW = 20  # documents, below which their variance is not known well enough (docs/evaluation.md)


class HeldOutText:
    """Of the corpus that a run trains on, or the first `max_samples` in the order of all."""

    kind = NAME

    def __init__(self, config: RunConfig, max_samples: int | None = None) -> None:
        """Raises: ConfigError when nothing is held out; DataError, StorageError."""
        self._tokens = Storage.open(config.data.tokens)
        manifest = self._manifest = Manifest.load(self._tokens)
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
        """Raises: DataError when the index of documents is damaged; StorageError."""
        source, documents = HeldOutTokens(self._tokens, self._held_out), self._documents()
        size = max(1, PIECE_TOKENS // (self._held_out.order.micro_batch_size * self._spec.sequence_length))
        number = self._held_out.num_batches
        return Plan(
            [
                Batches(source, self._spec.objective, self._spec.masking, start, min(start + size, number))
                for start in range(0, number, size)
            ],
            lambda answers: self._outcome(answers, documents, keeps_text=model.encoder.keeps_text),
        )

    def _documents(self) -> NDArray[np.int64] | None:
        """The number of the document in which each sample begins, in the order of the batches; None: the corpus has no index."""
        index = DocumentIndex.load(self._tokens, self._manifest, held_out=True)
        if index is None:
            return None
        starts = [start for batch in range(self._held_out.num_batches) for start in self._held_out.first_tokens(batch)]
        return np.searchsorted(index.first_tokens(), starts, side="right")

    def _outcome(
        self,
        answers: Sequence[list[tuple[Measure, list[Measure]]]],
        documents: NDArray[np.int64] | None,
        *,
        keeps_text: bool,
    ) -> Outcome:
        measures = [measured for answer in answers for measured, _ in answer]
        samples = [each for answer in answers for _, measured in answer for each in measured]
        counts = {
            "samples": self._held_out.num_samples,
            "batches": len(measures),
            "targets": sum(each.num_targets for each in measures),
        }
        draws, clusters = "batches", np.arange(len(measures))
        if samples and documents is not None:
            draws, clusters = "documents", np.unique(documents, return_inverse=True)[1]
            counts["documents"] = int(clusters.max()) + 1
        metrics = self._metrics(measures, Draws(samples if draws == "documents" else measures, clusters))
        if self._spec.objective == CAUSAL:
            counts["bytes"] = sum(each.num_bytes or 0 for each in measures)
        method = {"intervals": f"ratio estimator over {draws}"}
        cautions = []
        if (number := int(clusters.max()) + 1) == 1:
            cautions.append(f"there are no intervals: they take two {draws} at least")
        elif number < FEW:
            cautions.append(f"the intervals may be too narrow: {number} {draws} are few")
        if "bits_per_byte" in metrics and not keeps_text:
            cautions.append(
                "bits per byte are of the text as the tokenizer changes it, and do not compare over tokenizers"
            )
        if cautions:
            method["caution"] = "; ".join(cautions)
        return Outcome(metrics, counts, method)

    def _metrics(self, measures: list[Measure], draws: Draws) -> dict[str, Metric]:
        def figure(
            above: Callable[[Measure], float], below: Callable[[Measure], float], *, is_share: bool = False
        ) -> Metric:
            value = ratio([above(each) for each in measures], [below(each) for each in measures]).value
            return Metric(None) if value is None else replace(draws.ratio(above, below, is_share=is_share), value=value)

        loss = figure(lambda each: each.loss, lambda each: each.num_targets)
        if self._spec.objective not in (CAUSAL, MASKED):  # what the user's own objective tells need be no nats
            return {"loss": loss}
        accuracy = figure(
            lambda each: math.nan if each.num_correct is None else each.num_correct,
            lambda each: each.num_targets,
            is_share=True,
        )
        metrics = {"loss": loss, "perplexity": loss.through(math.exp), "accuracy": accuracy}
        if self._spec.objective == CAUSAL:
            metrics["bits_per_byte"] = figure(lambda each: each.loss / BITS, lambda each: each.num_bytes or 0)
        return metrics


@dataclass(frozen=True)
class Draws:
    """What varies as a whole: samples of a document, or of a batch. `clusters`: the number of each one's, from 0."""

    measures: Sequence[Measure]
    clusters: NDArray[np.int64]

    def ratio(
        self, above: Callable[[Measure], float], below: Callable[[Measure], float], *, is_share: bool = False
    ) -> Metric:
        """Sum over sum, with its interval."""
        y, x = ([term(each) for each in self.measures] for term in (above, below))
        return ratio(np.bincount(self.clusters, y).tolist(), np.bincount(self.clusters, x).tolist(), is_share=is_share)


@dataclass(frozen=True)
class Batches:
    """A piece: held-out batches [start, stop), of each its measure and those of its samples.

    Their `num_bytes` are those of their texts but the first tokens, with the causal objective. `source` keeps the windows that it
    has read, for all pieces that share it.
    """

    source: HeldOutTokens
    objective: str
    masking: MaskingSpec | None
    start: int
    stop: int

    def answer(self, model: TrainedModel) -> list[tuple[Measure, list[Measure]]]:
        """Raises: ConfigError when the user's objective cannot be imported; DataError, StorageError."""
        objective = find_objective(self.objective, self.masking)  # the loss is told without z_loss
        found = []
        for number in range(self.start, self.stop):
            tokens_BS = torch.from_numpy(self.source.batch(number).astype(np.int64))
            whole, samples = measure_with_samples(model.module, objective, tokens_BS.to(model.device), number)
            if self.objective == CAUSAL:
                bytes_B = model.token_bytes[tokens_BS[:, 1:]].sum(1).tolist()
                whole = replace(whole, num_bytes=sum(bytes_B))
                samples = [replace(each, num_bytes=size) for each, size in zip(samples, bytes_B, strict=True)]
            found.append((whole, samples))
        return found

    def num_tokens(self, answer: list[tuple[Measure, list[Measure]]]) -> int:
        return self.source.num_tokens(self.start, self.stop)
