"""A run's model as a checkpoint holds it, with the tokenizer of its corpus: what those who only read a run begin with.

Invariant: weights, shape and tokenizer belong together, or nothing is loaded. In fp32, without dropout.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.passages import encoder_of
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.engine.build import build
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.engine.state import digest_of
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment.weights import PARAMETERS, weights_of
from elastic_lm.model.cache import Cache
from elastic_lm.model.transformer import GPT
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class ModelInterface:
    """How text gets into a run's model: what is known of it without its weights.

    `vocab_size`: tokens that the corpus has, which come first; the model's rows may be more.
    """

    encoder: TextEncoder
    special_ids: Mapping[str, int]
    objective: str
    max_tokens: int
    vocab_size: int

    @cached_property
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes of text that each token stands for, int64 [V]."""
        return torch.from_numpy(self.encoder.bytes_by_token(self.vocab_size))


@dataclass(frozen=True)
class TrainedModel(ModelInterface):
    """`step`: how long it was trained. `digest`: sha256 of its weights, as the run's result and its checkpoint tell it."""

    module: nn.Module
    step: int
    digest: str
    device: str = "cpu"

    @classmethod
    def load(
        cls, run_storage: Storage, config: RunConfig, step: int | None = None, *, device: str = "cpu"
    ) -> TrainedModel:
        """Of the newest complete checkpoint, or of the one of `step`.

        Raises: CheckpointError when there is none, or the model takes other weights; as `interface_of`.
        """
        interface, spec = _opened(config)
        step, weights = weights_of(run_storage, step)
        module = build(spec.model).eval()
        _fill(module, weights)
        return cls(
            interface.encoder,
            interface.special_ids,
            interface.objective,
            interface.max_tokens,
            interface.vocab_size,
            module.to(device),
            step,
            digest_of({f"{PARAMETERS}{name}": tensor for name, tensor in weights.items()}, step),
            device,
        )

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] in fp32, of tokens that the corpus has."""
        with torch.no_grad():
            logits_TV = self.module(torch.tensor([ids], device=self.device))[0].float()
        return logits_TV[:, : self.vocab_size].cpu().clone()

    def next_logits(self, ids: Sequence[int], cache: Cache | None = None) -> Tensor:
        """[V] in fp32, of the token behind these, and behind those that the cache holds; it takes these in."""
        tokens_BT = torch.tensor([ids], device=self.device)
        with torch.no_grad():
            if type(self.module) is GPT:  # computes no other logits; what a factory makes of it may not know how
                logits_V = self.module(tokens_BT, torch.tensor([len(ids) - 1], device=self.device), cache)[0]
            else:
                logits_V = self.module(tokens_BT)[0, -1]
        return logits_V[: self.vocab_size].float().cpu().clone()

    def make_cache(self, capacity: int) -> Cache | None:
        """For so many tokens. None of a model that sees what comes behind a token, too, and of one that is not ours."""
        if type(self.module) is GPT and self.module.spec.attention == "causal":
            return Cache(self.module.spec, capacity)
        return None


def interface_of(config: RunConfig) -> ModelInterface:
    """That of a run's model.

    Raises: ConfigError when the corpus is not the one that the run was trained on; DataError when it has lost its tokenizer;
    StorageError.
    """
    return _opened(config)[0]


def _opened(config: RunConfig) -> tuple[ModelInterface, EngineSpec]:
    """Raises: as `interface_of`."""
    tokens = Storage.open(config.data.tokens)
    manifest = Manifest.load(tokens)
    config.settled(manifest=manifest.hash, window_blocks=manifest.window_blocks)  # another corpus, other tokens
    encoder = encoder_of(tokens, manifest)
    spec = config.engine_spec(manifest.vocab_size, manifest.special_ids)
    max_tokens = spec.model.max_tokens
    return ModelInterface(encoder, manifest.special_ids, spec.objective, max_tokens, manifest.vocab_size), spec


def _fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    wrong = parameters.keys() ^ weights.keys()
    wrong |= {name for name in parameters.keys() & weights.keys() if parameters[name].shape != weights[name].shape}
    if wrong:
        raise CheckpointError(f"the checkpoint and the model differ in {len(wrong)} tensors, the first is {min(wrong)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
