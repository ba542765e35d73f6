"""Whether a stored state fits a config: the tensors that its engine would keep, against those that are stored.

They are found out by building the model on the meta device, which computes nothing: what counts is what the engine does, not a
list of fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from elastic_lm.checkpoint.layout import Entry
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest as Corpus
from elastic_lm.engine.build import build, hidden_matrices
from elastic_lm.engine.loss_scale import LossScale
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.engine.state import ReplicaState
from elastic_lm.errors import ConfigError, ElasticLMError
from elastic_lm.experiment.lineage import Change
from elastic_lm.storage import Storage

# Changes of these may change what is kept.
KEPT_BY = ("model.", "optimizer.kind", "training.precision", "data.manifest")
# The same tensors, read in another way: what was learned would be lost.
READ_BY = ("model.num_heads", "model.position", "model.norm")


def check(tensors: dict[str, Entry], after: RunConfig, changes: Sequence[Change], step: int) -> None:
    """Raises: ConfigError saying which of the changes the state of `step` cannot take; DataError, StorageError."""
    relevant = [change for change in changes if change.identity and change.name.startswith(KEPT_BY)]
    if not relevant:
        return
    wanted = _shapes(after)
    was = {name: entry.shape for name, entry in tensors.items()}
    if wanted == was:
        _check_meaning(relevant, step)
        return
    name = next(name for name in sorted({*wanted, *was}) if wanted.get(name) != was.get(name))
    told = "; ".join(map(str, relevant))
    raise ConfigError(
        f"the state of step {step} cannot take {told}: {name} {_told(was.get(name), 'is stored')}, and "
        f"{_told(wanted.get(name), 'is wanted')}. A fork keeps the shape of its parent's model, its vocabulary, its kind of "
        "optimizer and its loss scale; leave these as they were, or begin a new run"
    )


def _check_meaning(changes: Sequence[Change], step: int) -> None:
    for change in changes:
        if change.name in READ_BY:
            raise ConfigError(
                f"{change}: the state of step {step} has the same tensors, but they would mean something else; leave it as it "
                "was, or begin a new run"
            )


def _told(shape: tuple[int, ...] | None, verb: str) -> str:
    return f"{'none' if shape is None else list(shape)} {verb}"


def _shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors that the engine keeps, by name."""
    corpus = Corpus.load(Storage.open(config.data.tokens))
    spec = config.engine_spec(corpus.vocab_size, corpus.special_ids)
    try:
        try:
            with torch.device("meta"):
                state = _state(spec)
        except (RuntimeError, NotImplementedError):  # a factory that looks at a tensor's value
            state = _state(spec)
    except ElasticLMError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise ConfigError(
            f"the model cannot be built: {type(error).__name__}: {error}; correct model.factory"
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in state.tensors().items()}


def _state(spec: EngineSpec) -> ReplicaState:
    module = build(spec.model)
    device = next(module.parameters()).device
    scale = LossScale(1, device) if spec.precision == "fp16" else None
    return ReplicaState(module, device, scale, hidden_matrices(module) if spec.optimizer.kind == "muon" else {})
