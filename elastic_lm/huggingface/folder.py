"""A folder that transformers loads by name: weights, config, tokenizer.

Invariant: it is whole or it is not there: everything is written beside it first. fp32, as the run holds its weights.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from elastic_lm.errors import ConfigError
from elastic_lm.huggingface.architecture import Architecture, Place

WEIGHTS = "model.safetensors"


def write(
    folder: str,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    *,
    tied: bool,
    vocab_size: int,
    max_tokens: int,
    tokenizer_json: str,
    special_ids: Mapping[str, int],
    special_tokens: Mapping[str, str],
) -> None:
    """`weights`: ours, by name. `folder` must not be there, or be empty.    Raises: ConfigError when it cannot be written."""
    scheme, separator, rest = folder.partition("://")
    if separator and scheme != "file":
        raise ConfigError(
            f"{folder} is no folder of this machine, and transformers loads from one; name one, then copy it"
        )
    path = Path(rest if separator else folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{folder} is there already; name a folder that is not, or is empty")
    ends = {"eos_token_id": special_ids["end_of_text"], "pad_token_id": special_ids["pad"]}
    config = {
        "architectures": [architecture.name],
        **architecture.config,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "dtype": "float32",
        "bos_token_id": special_ids["end_of_text"],  # what stands between documents
        **ends,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            _write_json(beside / "config.json", config)
            _write_json(beside / "tokenizer_config.json", _tokenizer_config(max_tokens, special_tokens))
            (beside / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
            tensors = {place.theirs: _theirs(place, weights) for place in architecture.places}
            safetensors.torch.save_file(tensors, beside / WEIGHTS, metadata={"format": "pt"})
            beside.chmod(0o755)
            if path.exists():
                path.rmdir()
            os.replace(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _theirs(place: Place, weights: Mapping[str, Tensor]) -> Tensor:
    if place.ours is None:
        return torch.zeros(place.shape)
    tensor = weights[place.ours] if place.rows is None else weights[place.ours][slice(*place.rows)]
    return (tensor.T if place.turned else tensor).contiguous()


def _tokenizer_config(max_tokens: int, special_tokens: Mapping[str, str]) -> dict[str, Any]:
    names = {"eos": "end_of_text", "bos": "end_of_text", "pad": "pad", "mask": "mask", "cls": "cls", "sep": "sep"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": special_tokens[name] for role, name in names.items()},
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
