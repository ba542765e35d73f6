"""From a run's newest checkpoint to a folder that transformers loads."""

from __future__ import annotations

from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.passages import encoder_of
from elastic_lm.errors import ConfigError
from elastic_lm.experiment.weights import weights_of
from elastic_lm.huggingface import folder
from elastic_lm.huggingface.architecture import architecture_of
from elastic_lm.model.spec import ModelSpec
from elastic_lm.storage import Storage


def export(run_storage: Storage, config: RunConfig, out: str) -> int:
    """Write the run's newest complete checkpoint to the folder `out`.    Returns: its step.

    Raises: ConfigError when transformers has no such model, or `out` cannot be written; CheckpointError when there is none;
    DataError when the corpus has lost its tokenizer; StorageError.
    """
    tokens = Storage.open(config.data.tokens)
    manifest = Manifest.load(tokens)
    spec = config.model_spec(config.model.vocab_size or manifest.vocab_size)
    if not isinstance(spec, ModelSpec):
        raise ConfigError(f"model.factory={spec.path} builds a model of your own, which transformers does not know")
    architecture = architecture_of(spec)
    encoder = encoder_of(tokens, manifest)
    step, weights = weights_of(run_storage)
    folder.write(
        out,
        architecture,
        weights,
        tied=spec.tied,
        vocab_size=spec.vocab_size,
        max_tokens=spec.max_tokens,
        tokenizer_json=encoder.json,
        special_ids=manifest.special_ids,
        special_tokens=encoder.special_tokens,
    )
    return step
