"""What a run's model answers to lm-evaluation-harness: tokens, log-likelihoods, continuations.

Invariant: the context and the continuation are the harness's tokens as they come. What is too long loses its beginning, as the
harness has it for models of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.likelihood import Reading, scores
from elastic_lm.generation import Generator, NotFiniteError, Sampling
from elastic_lm.trained_model import TrainedModel


class Answers:
    """Counts what is worth to know beside the figures: `num_cut` contexts and prompts without their beginning, and scores and
    continuations that are `num_not_finite`.

    `heard` is told, as they are answered, of how many requests and of the tokens that were read for them, or written.
    """

    def __init__(self, model: TrainedModel, heard: Callable[[int, int], None] = lambda requests, tokens: None) -> None:
        self._model, self._heard = model, heard
        self.num_cut = self.num_not_finite = 0

    def to(self, question: str, about: Any) -> Any:
        """Raises: ConfigError when a continuation is too long, or no token of its own, or cannot be drawn as asked; DataError."""
        if question == "encode":
            return self._encode(about)
        return self._score(about) if question == "score" else self._generate(about)

    def _encode(self, text: str) -> list[int]:
        return self._model.encoder.encode(text)[:-1]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of each continuation behind its context: the log-likelihood in nats, and whether each token is the most probable."""
        readings = [self._reading(context, continuation) for context, continuation in pairs]
        found = scores(
            self._model, readings, lambda batch: self._heard(len(batch), sum(len(each.ids) for each in batch))
        )
        self.num_cut += sum(reading.cut for reading in readings)
        self.num_not_finite += sum(not math.isfinite(score.log_p) for score in found)
        return [(score.log_p, score.is_most_probable) for score in found]

    def _reading(self, context: list[int], continuation: list[int]) -> Reading:
        most, num_asked = self._model.max_tokens, len(continuation)
        if not 0 < num_asked <= most:
            text = self._model.encoder.decode([*context, *continuation])
            raise ConfigError(
                f"a choice in {text[:60]!r} has {num_asked} tokens of its own, and must have 1 to {most}, the model's context; "
                "leave the task out"
            )
        ids = [*context, *continuation]
        read = ids[-most - 1 : -1]
        places = range(len(read) - num_asked, len(read))
        return Reading(tuple(read), tuple(places), tuple(continuation), cut=len(ids) - 1 > most)

    def _generate(self, requests: Sequence[Mapping[str, Any]]) -> list[str]:
        """One text for each, up to the end of the document or the first of its stops. Each is drawn from a seed of its own."""
        samplings = [_sampling(request, seed) for seed, request in enumerate(requests)]  # all of them, before any work
        return [self._continued(request, sampling) for request, sampling in zip(requests, samplings, strict=True)]

    def _continued(self, request: Mapping[str, Any], sampling: Sampling) -> str:
        prompt, stops, text = request["prompt"], request["stops"], ""
        self.num_cut += len(self._model.encoder.encode(prompt)) > self._model.max_tokens
        try:
            for piece in Generator(self._model).generate(prompt, sampling):
                text += piece
                if any(stop in text for stop in stops):
                    break
        except NotFiniteError:
            self.num_not_finite += 1
        self._heard(1, len(self._encode(text)))
        for stop in stops:
            text = text.partition(stop)[0]
        return text


def _sampling(request: Mapping[str, Any], seed: int) -> Sampling:
    """Raises: ConfigError."""
    try:
        return Sampling(
            temperature=request["temperature"],
            top_k=request["top_k"] or None,
            top_p=1.0 if request["top_p"] is None else request["top_p"],
            max_new_tokens=request["max_new_tokens"],
            seed=seed,
        )
    except ConfigError as error:
        raise ConfigError(f"generation_kwargs of a task of lm-evaluation-harness: {error}") from error
