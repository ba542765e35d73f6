"""A run's model as a checkpoint holds it, with the tokenizer of its corpus: what those who only read a run begin with.

Invariant: weights, shape and tokenizer belong together, or nothing is loaded. On the CPU, in fp32, without dropout.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from elastic_lm.checkpoint.weights import PARAMETERS, newest_weights, weights_at
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.passages import encoder_of
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.engine.build import build
from elastic_lm.engine.state import digest_of
from elastic_lm.errors import CheckpointError
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class TrainedModel:
    """`step`: how long it was trained. `digest`: sha256 of its weights, as the run's result and its checkpoint tell it.

    `vocab_size`: tokens that the corpus has, which come first; the model's rows may be more.
    """

    module: nn.Module
    encoder: TextEncoder
    special_ids: Mapping[str, int]
    objective: str
    max_tokens: int
    vocab_size: int
    step: int
    digest: str

    @classmethod
    def load(cls, run_storage: Storage, config: RunConfig, step: int | None = None) -> TrainedModel:
        """Of the newest complete checkpoint, or of the one of `step`.

        Raises: CheckpointError when there is none, or the model takes other weights; ConfigError when the corpus is not the
        one that the run was trained on; DataError when it has lost its tokenizer; StorageError.
        """
        tokens = Storage.open(config.data.tokens)
        manifest = Manifest.load(tokens)
        config.settled(manifest=manifest.hash, window_blocks=manifest.window_blocks)  # another corpus, other tokens
        encoder = encoder_of(tokens, manifest)
        spec = config.engine_spec(manifest.vocab_size, manifest.special_ids)
        if step is None:
            step, weights = newest_weights(run_storage)
        else:
            weights = weights_at(run_storage, step)
        module = build(spec.model).eval()
        _fill(module, weights)
        return cls(
            module,
            encoder,
            manifest.special_ids,
            spec.objective,
            spec.model.max_tokens,
            manifest.vocab_size,
            step,
            digest_of({f"{PARAMETERS}{name}": tensor for name, tensor in weights.items()}, step),
        )

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[T, V] in fp32, of tokens that the corpus has."""
        with torch.no_grad():
            logits_TV = self.module(torch.tensor([ids]))[0].float()
        return logits_TV[:, : self.vocab_size].clone()


def _fill(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    wrong = parameters.keys() ^ weights.keys()
    wrong |= {name for name in parameters.keys() & weights.keys() if parameters[name].shape != weights[name].shape}
    if wrong:
        raise CheckpointError(f"the checkpoint and the model differ in {len(wrong)} tensors, the first is {min(wrong)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
