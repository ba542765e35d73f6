"""Text from a run's newest weights: a prompt continued token by token, or the masks of one filled in.

Invariant: the same weights, prompt, choices and seed give the same text on the same machine. A document begins behind the token
that ended the one before, in training as here. Every token is computed from the whole context again, without a cache: for
looking at what a run has learned, not for serving it.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_lm.checkpoint.weights import newest_weights
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.passages import encoder_of
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.engine.build import build
from elastic_lm.engine.spec import MASKED
from elastic_lm.errors import CheckpointError, ConfigError
from elastic_lm.storage import Storage

MASK = "<|mask|>"
INCOMPLETE = "\ufffd"  # what a character decodes to, of which tokens are missing


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
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k} leaves no token to draw from; use at least 1, or leave it out")
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
        probability_V = (logits_V[order_V].double() / self.temperature).softmax(0)
        before_V = probability_V.cumsum(0) - probability_V
        kept_V = before_V < self.top_p
        kept_V[len(kept_V) if self.top_k is None else self.top_k :] = False
        chosen = torch.multinomial(probability_V * kept_V, 1, generator=generator)
        return int(order_V[chosen])


class Generator:
    """A run's newest weights and its corpus's tokenizer, on the CPU. `step`: how long it was trained."""

    def __init__(self, run_storage: Storage, config: RunConfig) -> None:
        """Raises: CheckpointError when there is none yet, or the model takes others; ConfigError, DataError, StorageError."""
        tokens = Storage.open(config.data.tokens)
        manifest = Manifest.load(tokens)
        self._encoder: TextEncoder = encoder_of(tokens, manifest)
        self._special = manifest.special_ids
        self._fills = config.objective.name == MASKED
        spec = config.model_spec(config.model.vocab_size or manifest.vocab_size, manifest.special_ids)
        self._max_tokens = spec.max_tokens
        self._vocab_size = manifest.vocab_size
        self.step, weights = newest_weights(run_storage)
        self._model = build(spec).eval()
        _load(self._model, weights)

    def generate(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        """The text behind the prompt, piece by piece as it comes; of a masked model the whole prompt, its masks filled.

        Raises: ConfigError when a masked model's prompt has no mask, or is longer than its context; DataError.
        """
        if self._fills:
            yield self._filled(prompt)
            return
        ids: list[int] = []
        told = ""
        for token in self._continued(self._encoder.encode(prompt)[:-1], sampling):
            ids.append(token)
            text = self._encoder.decode(ids)
            if not text.endswith(INCOMPLETE):
                yield text[len(told) :]
                told = text
        if rest := self._encoder.decode(ids)[len(told) :]:
            yield rest

    def _continued(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        end = self._special["end_of_text"]
        generator = torch.Generator().manual_seed(sampling.seed)
        context = [end, *prompt]
        for _ in range(sampling.max_new_tokens):
            logits_V = self._logits(context[-self._max_tokens :])[-1]
            never = [number for number in self._special.values() if number != end]
            logits_V[never] = -math.inf
            token = sampling.draw(logits_V, generator)
            if token == end:
                return
            context.append(token)
            yield token

    def _filled(self, prompt: str) -> str:
        parts = prompt.split(MASK)
        if len(parts) == 1:
            raise ConfigError(
                f"this run fills in what is hidden, and the prompt hides nothing; put {MASK} where a token is missing"
            )
        mask = self._special["mask"]
        ids = self._encoder.encode(parts[0])[:-1]
        for part in parts[1:]:
            ids += [mask, *self._encoder.encode(part)[:-1]]
        if len(ids) >= self._max_tokens:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, and the model's context is {self._max_tokens} with the one that begins a "
                "document; shorten it"
            )
        logits_TV = self._logits([self._special["end_of_text"], *ids])[1:]
        logits_TV[:, list(self._special.values())] = -math.inf
        best_T = logits_TV.argmax(-1).tolist()
        return self._encoder.decode([best if token == mask else token for token, best in zip(ids, best_T, strict=True)])

    def _logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] in fp32, of tokens that the corpus has: the model's rows may be more."""
        with torch.no_grad():
            logits_TV = self._model(torch.tensor([ids]))[0].float()
        return logits_TV[:, : self._vocab_size].clone()


def _load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    if wrong := sorted(parameters.keys() ^ weights.keys()):
        raise CheckpointError(f"the checkpoint and the model differ in {len(wrong)} tensors, the first is {wrong[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
