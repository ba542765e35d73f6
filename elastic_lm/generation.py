"""Text from a run's weights: a prompt continued token by token, or the masks of one filled in.

Invariant: the same weights, prompt, choices and seed give the same text on the same machine. A document begins behind the token
that ended the one before, in training as here. Each text is computed alone, so that no other one shows in its bits; for speed a
token is read only once, for as long as all fit into the model's context.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_lm.engine.spec import MASKED
from elastic_lm.errors import CheckpointError, ConfigError
from elastic_lm.trained_model import TrainedModel

MASK = "<|mask|>"
INCOMPLETE = "\ufffd"  # what a character decodes to, of which tokens are missing


class NotFiniteError(CheckpointError):
    """The weights give logits that are not finite: there is no most probable token, nor one to be drawn."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `temperature` 0: the most probable one. `top_k`: of the k most probable ones;
    `top_p`: of the fewest whose probabilities sum to p (Holtzman et al. 2020).

    Raises: ConfigError.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature={self.temperature} is not a number from 0; 0 takes the most probable token")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ConfigError(
                f"top_k={self.top_k} is no number of tokens to draw from; use at least 1, or leave it out"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} is not in (0, 1]; 1 leaves all tokens")
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} is no length; use at least 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed} is not in [0, 2^63)")

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """One token id."""
        if self.temperature == 0:
            return int(logits_V.argmax())
        order_V = logits_V.argsort(descending=True, stable=True)
        ordered_V = logits_V[order_V].double()
        # From 0 down, as softmax would have it in any case: no temperature, however small, makes the highest overflow.
        probability_V = ((ordered_V - ordered_V[0]) / self.temperature).softmax(0)
        before_V = probability_V.cumsum(0) - probability_V
        kept_V = before_V < self.top_p
        kept_V[len(kept_V) if self.top_k is None else self.top_k :] = False
        chosen = torch.multinomial(probability_V * kept_V, 1, generator=generator)
        return int(order_V[chosen])


class Prefix:
    """The tokens before the next one, of which the model sees the newest, as many as its context has.

    When they are more, each new token takes the oldest one out of sight, and all others move to the place before theirs. What a
    cache holds is of the old places, so from there on every token takes a pass over the whole context; in a model that has no
    cache it does from the beginning.
    """

    def __init__(self, model: TrainedModel, ids: Sequence[int], num_new_tokens: int) -> None:
        self._model, self._ids = model, list(ids)
        # The last new token is read by nobody.
        self._cache = model.make_cache(len(ids) + num_new_tokens - 1)

    def append(self, token: int) -> None:
        self._ids.append(token)

    def next_logits(self) -> Tensor:
        """[V], of the token behind all of them."""
        if len(self._ids) > self._model.max_tokens:
            self._cache = None
        if self._cache is None:
            return self._model.next_logits(self._ids[-self._model.max_tokens :])
        return self._model.next_logits(self._ids[self._cache.num_tokens :], self._cache)


class Generator:
    """Text from a trained model."""

    def __init__(self, model: TrainedModel) -> None:
        self._model = model
        self._special = model.special_ids

    def generate(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The text behind the prompt, piece by piece as it comes; of a masked model the whole prompt, its masks filled.

        Raises: ConfigError when a masked model's prompt has no mask, or is longer than its context; NotFiniteError; DataError.
        """
        if self._model.objective == MASKED:
            yield self._filled(prompt)
            return
        ids: list[int] = []
        told = ""
        for token in self._continued(self._model.encoder.encode(prompt)[:-1], sampling):
            ids.append(token)
            text = self._model.encoder.decode(ids)
            if not text.endswith(INCOMPLETE):
                yield text[len(told) :]
                told = text
        if rest := self._model.encoder.decode(ids)[len(told) :]:
            yield rest

    def _continued(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        end = self._special["end_of_text"]
        generator = torch.Generator().manual_seed(sampling.seed)
        prefix = Prefix(self._model, [end, *prompt], sampling.max_new_tokens)
        for _ in range(sampling.max_new_tokens):
            logits_V = prefix.next_logits()
            never = [number for number in self._special.values() if number != end]
            logits_V[never] = -math.inf
            self._check(logits_V)
            token = sampling.draw(logits_V, generator)
            if token == end:
                return
            prefix.append(token)
            yield token

    def _filled(self, prompt: str) -> str:
        parts = prompt.split(MASK)
        if len(parts) == 1:
            raise ConfigError(
                f"this run fills in what is hidden, and the prompt hides nothing; put {MASK} where a token is missing"
            )
        mask = self._special["mask"]
        ids = self._model.encoder.encode(parts[0])[:-1]
        for part in parts[1:]:
            ids += [mask, *self._model.encoder.encode(part)[:-1]]
        if len(ids) >= self._model.max_tokens:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self._model.max_tokens} with the one that "
                "begins a document; shorten it"
            )
        logits_TV = self._model.logits([self._special["end_of_text"], *ids])[1:]
        logits_TV[:, list(self._special.values())] = -math.inf
        self._check(logits_TV[[token == mask for token in ids]])
        best_T = logits_TV.argmax(-1).tolist()
        return self._model.encoder.decode(
            [best if token == mask else token for token, best in zip(ids, best_T, strict=True)]
        )

    def _check(self, logits: Tensor) -> None:
        """One may be -inf, for a token that never comes; not all of them.    Raises: NotFiniteError."""
        if not logits.amax(-1).isfinite().all():
            raise NotFiniteError(
                f"the weights of step {self._model.step} give no text: what they come to is not finite; take another checkpoint"
            )
