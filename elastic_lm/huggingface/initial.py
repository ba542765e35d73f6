"""A run that begins from the weights of a folder that transformers wrote: `model.init`.

Invariant: what a run begins from is part of what it is: the sha256 of the weights is settled with its config, and whoever reads
them again checks it. All that can be wrong with a folder is found where the run is planned: its shape, each of its tensors, and
that the corpus was made with its tokenizer. Whatever the folder's type of numbers, weights are fp32 here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.passages import encoder_of
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.errors import ConfigError, DataError, NotFoundError
from elastic_lm.huggingface.architecture import Place, architecture_of
from elastic_lm.huggingface.folder import WEIGHTS
from elastic_lm.huggingface.shape import Shape, shape_of
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT
from elastic_lm.storage import Storage

PART_BYTES = 64 * 2**20
INDEX = f"{WEIGHTS}.index.json"  # of weights in several files
TOKENIZER = "tokenizer.json"
SCHEME = "hf:"
PREFIXES = ("model.", "transformer.", "bert.")  # a folder of the model without its head has none
# Of their classes, and without a say in what ours computes: a tied head, which has to be the same, buffers, and heads of other
# objectives.
TIED = {
    "lm_head.weight": ("embed_tokens.weight", "wte.weight"),
    "cls.predictions.decoder.weight": ("word_embeddings.weight",),
    "cls.predictions.decoder.bias": ("cls.predictions.bias",),
}
IDLE = (*TIED, ".attn.bias", ".attn.masked_bias", ".inv_freq", ".position_ids")
IDLE_PARTS = ("bert.pooler.", "pooler.", "cls.seq_relationship.")
GROWING = ("embedding.weight", "head.weight", "head.bias")  # a row for each token

SETTLED = {*ModelSpec.__dataclass_fields__, "init_hash"} - {"dropout", "document_separator"}


def settled(config: RunConfig, tokens: Storage, manifest: Manifest) -> RunConfig:
    """`config` with the shape of model.init's folder and the sha256 of its weights, once all of it suits the corpus at `tokens`.

    Raises: ConfigError naming what stands in the way; DataError when the sha256 is not the one in `config`; StorageError.
    """
    found = with_shape(config, manifest.vocab_size)
    folder = folder_of(config)
    with _told(config):
        _check_tokenizer(config, folder, tokens, manifest)
    spec = found.model_spec(found.model.vocab_size or manifest.vocab_size)
    assert isinstance(spec, ModelSpec)
    rows = _shape(config).spec.vocab_size
    return _replaced(found, {"init_hash": read(folder, spec, found.model.init_hash, num_rows=rows)[1]})


def as_begun(config: RunConfig, begun: RunConfig) -> RunConfig | None:
    """`config` with what was found in its folder when the run began as `begun`; None when they do not begin from the same.

    So a run that goes on needs its folder no more. The corpus has to be the one that was found suitable then.
    """
    return _as_begun(config, begun) if begun.data.manifest == config.data.manifest else None


def _as_begun(config: RunConfig, begun: RunConfig) -> RunConfig | None:
    """The same for any corpus."""
    found = {name: getattr(begun.model, name) for name in ("init", *SETTLED)}
    chosen = {name: value for name, value in config.model if name in found and value is not None}
    if found["init_hash"] is None or any(found[name] != value for name, value in chosen.items()):
        return None
    return _replaced(config, found)


def with_shape(config: RunConfig, vocab_size: int, begun: RunConfig | None = None) -> RunConfig:
    """`config` with the shape that model.init's folder describes, for a corpus of so many tokens. Reads its config.json alone.

    Not even that where the run is there already, as `begun`: it may be a fork, whose shape is another.
    Raises: ConfigError when a field of the config says something else, or we do not compute what the folder holds; StorageError.
    """
    if begun is not None and (found := _as_begun(config, begun)) is not None:
        return found
    shape = _shape(config)
    fields = {name: value for name, value in shape.fields.items() if value is not None}
    chosen = config.model.shape()
    if config.model.max_tokens is not None:
        chosen["max_tokens"] = config.model.max_tokens
    for name, value in shape.fields.items():
        if (mine := chosen.get(name)) is None or mine == value or _is_free(name, mine, value, shape):
            continue
        raise ConfigError(
            f"model.{name}={mine} is not what the folder of model.init={config.model.init} has, {name}={value}; remove it, or "
            "leave model.init out"
        )
    fields |= {name: mine for name, mine in chosen.items() if name in shape.fields and mine is not None}
    rows = shape.spec.vocab_size
    if config.model.vocab_size is not None and config.model.vocab_size < rows:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} is less than the {rows} rows of model.init={config.model.init}; use at "
            f"least {max(rows, vocab_size)}, or remove it"
        )
    fields["vocab_size"] = config.model.vocab_size or max(rows, vocab_size)
    return _replaced(config, fields)


def read(
    folder: Storage,
    spec: ModelSpec,
    expected: str | None = None,
    on_part: Callable[[], None] = lambda: None,
    num_rows: int | None = None,
) -> tuple[dict[str, Tensor], str]:
    """(weights in fp32 by the names of a model of `spec`, sha256 of the files they are from).

    The embedding, and what else has a row for each token, may have fewer of them than `spec` wants.
    Args: `expected`: the sha256 that it has to be; `on_part` is called after each part read, and may raise to end it;
    `num_rows`: how many there have to be for tokens, by the folder's config.json.
    Raises: ConfigError when a tensor is missing, unknown, of another shape, or not zero where ours has none; DataError when the
    sha256 is another; StorageError.
    """
    theirs: dict[str, Tensor] = {}
    names = _files(folder)
    hashes = []
    for name in names:
        data = _read_in_parts(folder, name, on_part)
        hashes.append(hashlib.sha256(data).hexdigest())
        try:
            theirs |= safetensors.torch.load(data)
        except SafetensorError as error:
            raise ConfigError(f"{folder.url}/{name} is damaged: {error}; copy the folder again") from error
    digest = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    if expected not in (None, digest):
        raise DataError(
            f"the weights in {folder.url} have the sha256 {digest[:12]} instead of {str(expected)[:12]}: they are not those that "
            "the run was planned with; put those back, or begin a run of another name without model.init_hash"
        )
    try:
        return _ours(theirs, spec, num_rows), digest
    except ConfigError as error:
        raise ConfigError(f"{folder.url} cannot be begun from: {error}") from None


def folder_of(config: RunConfig) -> Storage:
    """Where model.init is."""
    assert config.model.init is not None
    return Storage.open(config.model.init.removeprefix(SCHEME))


# -- config.json and tokenizer ---------------------------------------------------------------------------------------


class _told:
    """Says in a ConfigError which folder it is about."""

    def __init__(self, config: RunConfig) -> None:
        self._init = config.model.init

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, ConfigError):
            raise ConfigError(f"model.init={self._init} cannot be begun from: {error}") from None


def _shape(config: RunConfig) -> Shape:
    folder = folder_of(config)
    with _told(config):
        try:
            told = json.loads(_read(folder, "config.json"))
        except ValueError as error:
            raise ConfigError(f"its config.json is damaged: {error}; copy the folder again") from error
        if not isinstance(told, dict):
            raise ConfigError("its config.json is damaged; copy the folder again")
        return shape_of(told)


def _is_free(name: str, mine: Any, value: Any, shape: Shape) -> bool:
    """Whether the config may say something else than the folder."""
    if name == "num_kv_heads":
        return bool(mine == shape.spec.num_heads) and value is None
    if name == "max_tokens" or name.startswith("rope_"):  # nothing is stored for a position: a context may be stretched
        return shape.spec.position == "rotary"
    return name == "bias" and mine is False and shape.may_lack_bias  # they have to be zero then


def _check_tokenizer(config: RunConfig, folder: Storage, tokens: Storage, manifest: Manifest) -> None:
    """Raises: ConfigError unless every token of the folder's has the same id in the corpus's tokenizer, which cuts as it does."""
    text = _read(folder, TOKENIZER)
    try:
        their_encoder = TextEncoder(text.decode("utf-8", "replace"))
    except DataError as error:
        raise ConfigError(f"its {TOKENIZER} is of no use: {error}") from error
    our_encoder = encoder_of(tokens, manifest)
    ours = our_encoder.vocabulary
    remedy = (
        f"the corpus at data.tokens={config.data.tokens}, which was made with another tokenizer; make one with this: "
        f"elastic-lm prepare --tokenizer {folder.url}/{TOKENIZER}"
    )
    for token, number in sorted(their_encoder.vocabulary.items(), key=lambda item: item[1]):
        if ours.get(token) != number:
            known = f"has the id {ours[token]}" if token in ours else "is none"
            raise ConfigError(f"its token {token!r}, id {number}, {known} in {remedy}")
    for part in ("normalizer", "pre_tokenizer", "model"):
        if _behaviour(their_encoder, part) != _behaviour(our_encoder, part):
            raise ConfigError(f"its tokenizer cuts text in another way ({part}) than that of {remedy}")


def _behaviour(encoder: TextEncoder, part: str) -> Any:
    """How it cuts text, apart from the ids."""
    found = json.loads(encoder.json)[part]
    return {name: value for name, value in found.items() if name != "vocab"} if isinstance(found, dict) else found


def _replaced(config: RunConfig, fields: dict[str, Any]) -> RunConfig:
    model = config.model.model_dump() | fields
    return RunConfig(**{name: value for name, value in config if name != "model"}, model=model)


# -- weights ---------------------------------------------------------------------------------------------------------


def _files(folder: Storage) -> list[str]:
    if folder.exists(WEIGHTS):
        return [WEIGHTS]
    try:
        names = sorted(set(json.loads(folder.read(INDEX))["weight_map"].values()))
    except NotFoundError:
        raise ConfigError(
            f"{folder.url} has neither {WEIGHTS} nor {INDEX}; write it with save_pretrained, which makes safetensors"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder.url}/{INDEX} is damaged: {error}; copy the folder again") from error
    if not names or not all(isinstance(name, str) and name.endswith(".safetensors") for name in names):
        raise ConfigError(f"{folder.url}/{INDEX} names files that are no safetensors; write the folder again")
    return names


def _read(folder: Storage, name: str) -> bytes:
    try:
        return folder.read(name)
    except NotFoundError:
        raise ConfigError(
            f"{folder.url} has no {name}; name a folder that transformers wrote, with its tokenizer, where every worker sees it"
        ) from None


def _read_in_parts(folder: Storage, name: str, on_part: Callable[[], None]) -> bytes:
    """Gigabytes: whoever waits for the end of it asks after each part."""
    parts = []
    try:
        size = folder.size(name)
        for offset in range(0, size, PART_BYTES):
            parts.append(folder.read_range(name, offset, min(PART_BYTES, size - offset)))
            on_part()
    except NotFoundError:
        raise ConfigError(f"{folder.url} has no {name}, which its {INDEX} names; copy the folder again") from None
    return b"".join(parts)


def _ours(theirs: dict[str, Tensor], spec: ModelSpec, num_rows: int | None) -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPT(spec).named_parameters()}
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    added: dict[str, Tensor] = {}
    left = set(theirs)
    for place in architecture_of(spec).places:
        name = _found(place.theirs, theirs)
        left.discard(name)
        tensor = theirs[name].float()
        if place.into is not None:
            added[place.into] = tensor
        elif place.ours is None:
            _check_zero(name, tensor, spec)
        else:
            pieces.setdefault(place.ours, []).append(_piece(name, place, tensor))
    _check_tied(theirs, left)
    if unknown := sorted(name for name in left if not name.endswith(IDLE) and not name.startswith(IDLE_PARTS)):
        raise ConfigError(f"its tensor {unknown[0]} has no place in our model; choose another model")
    ours = {name: _joined(name, parts, shapes[name], num_rows) for name, parts in pieces.items()}
    for name, tensor in added.items():
        if not len(tensor) or tensor.shape[1:] != ours[name].shape[1:]:
            raise ConfigError(f"its tensor that is added to {name} is {list(tensor.shape)}; copy the folder again")
        ours[name] = ours[name] + tensor[0]
    return ours


def _found(name: str, theirs: dict[str, Tensor]) -> str:
    for candidate in (name, *(name.removeprefix(prefix) for prefix in PREFIXES)):
        if candidate in theirs:
            return candidate
    raise ConfigError(f"it has no tensor {name}; write the folder again with save_pretrained")


def _piece(name: str, place: Place, tensor: Tensor) -> tuple[int, Tensor]:
    """(the row of ours that it begins at, its rows)"""
    if place.turned and tensor.dim() == 2:
        tensor = tensor.T
    begin, stop = place.rows or (0, None)
    if stop is not None and (not tensor.dim() or len(tensor) != stop - begin):
        raise ConfigError(
            f"its tensor {name} is {list(tensor.shape)}, and its config.json means {stop - begin} rows; copy the folder again"
        )
    return begin, tensor


def _joined(name: str, parts: list[tuple[int, Tensor]], shape: torch.Size, num_rows: int | None) -> Tensor:
    try:
        tensor = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])]).contiguous()
    except (RuntimeError, IndexError) as error:
        raise ConfigError(f"its tensors for {name} do not fit each other: {error}; copy the folder again") from error
    fits = tensor.shape == shape
    if name in GROWING and tensor.shape[1:] == shape[1:] and tensor.dim():
        fits = tensor.shape[0] == num_rows if num_rows is not None else tensor.shape[0] <= shape[0]
        shape = torch.Size([num_rows or shape[0], *shape[1:]])
    if not fits:
        raise ConfigError(
            f"its tensor for {name} is {list(tensor.shape)}, and its config.json means {list(shape)}; copy the folder again"
        )
    return tensor


def _check_tied(theirs: dict[str, Tensor], left: set[str]) -> None:
    """Two tensors that are one for us have to be: transformers uses the second where it differs."""
    for ending, same in TIED.items():
        for name in (name for name in left if name.endswith(ending)):
            first = next((theirs[other] for other in theirs if other.endswith(same) and other != name), None)
            if first is None or not torch.equal(first, theirs[name]):
                raise ConfigError(
                    f"its tensor {name} is not the embedding's, though its config.json ties them; write "
                    "tie_word_embeddings=false there, or choose another model"
                )


def _check_zero(name: str, tensor: Tensor, spec: ModelSpec) -> None:
    if tensor.count_nonzero():
        remedy = "choose another model" if spec.bias or "bias" not in name else "remove model.bias=false"
        raise ConfigError(f"its tensor {name} is not zero, and our model has none; {remedy}")
