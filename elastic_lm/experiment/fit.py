"""Whether a stored state fits a config, and what has to be made of it so that it does.

The tensors that the config's engine would keep are found out by building the model on the meta device, which computes nothing:
what counts is what the engine does, not a list of fields. Where our own model has another shape, its surgery says how each
parameter begins (model/surgery.py), and moments follow: kept where values are kept, zero where they are new.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_lm.checkpoint.alteration import Recipe
from elastic_lm.checkpoint.layout import Entry
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest as Corpus
from elastic_lm.engine.build import build, hidden_matrices
from elastic_lm.engine.loss_scale import LossScale
from elastic_lm.engine.optimizer import largest_update
from elastic_lm.engine.spec import EngineSpec, OptimizerSpec
from elastic_lm.engine.state import ReplicaState
from elastic_lm.errors import CheckpointError, ConfigError, ElasticLMError, UnfitError
from elastic_lm.experiment.lineage import Change
from elastic_lm.experiment.weights import PARAMETERS
from elastic_lm.model.account import Account
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.surgery import Beginning, Surgery
from elastic_lm.storage import Storage

# Changes of these may change what is kept.
KEPT_BY = ("model.", "optimizer.kind", "training.precision", "data.manifest")
LONG_UPDATE = 2.0  # learning rates; with the default betas it is at most 1.1
CALM_BETA = 0.95  # the default second one
SECOND_MOMENTS = "exp_avg_sq/"
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Alteration:
    """What has to be made of a state: `recipes` of tensors that are new or other than they were, and names that are `dropped`.

    `note`: what one should know about the moments.
    """

    account: Account
    recipes: Mapping[str, Recipe]
    dropped: frozenset[str]
    note: str | None = None


def check(
    tensors: Mapping[str, Entry], before: RunConfig, after: RunConfig, changes: Sequence[Change], step: int
) -> Alteration | None:
    """Returns: what has to be made of the state of `step`; None when it is to stay as it is.

    Raises: UnfitError saying which of the changes it cannot take; CheckpointError; DataError, StorageError.
    """
    relevant = [change for change in changes if change.identity and change.name.startswith(KEPT_BY)]
    if not relevant:
        return None
    corpus = Corpus.load(Storage.open(after.data.tokens))
    was, now = (config.engine_spec(corpus.vocab_size, corpus.special_ids) for config in (before, after))
    stored, wanted = {name: entry.shape for name, entry in tensors.items()}, shapes_of(now)
    told = f"the state of step {step} cannot take"
    changed = "; ".join(map(str, relevant))
    if not isinstance(was.model, ModelSpec) or not isinstance(now.model, ModelSpec):
        _check_same(stored, wanted, f"{told} {changed}: ")
        return None
    if stored != shapes_of(was):
        raise CheckpointError(
            f"the state of step {step} has other tensors than this version keeps for the config that it was trained with; fork "
            "with the version of elastic-lm that wrote it"
        )
    try:
        surgery = Surgery.between(was.model, now.model)
    except ConfigError as error:
        raise UnfitError(f"{told} {error}") from error
    _check_same(_expected(surgery, stored, wanted), wanted, f"{told} {changed}: ")
    if not surgery.account.fates:
        return None
    recipes, dropped = _recipes(surgery, wanted, now.seed), frozenset(stored.keys() - wanted.keys())
    return Alteration(surgery.account, recipes, dropped, _note(surgery, recipes, now.optimizer, step))


def _check_same(stored: Shapes, wanted: Shapes, told: str) -> None:
    """Raises: UnfitError naming the first tensor that is of another shape."""
    if stored == wanted:
        return
    name = next(name for name in sorted({*wanted, *stored}) if wanted.get(name) != stored.get(name))
    raise UnfitError(
        f"{told}{name} {_told(stored.get(name), 'is stored')}, and {_told(wanted.get(name), 'is wanted')}. A fork keeps its "
        "parent's kind of optimizer, its loss scale and the shape of a model from a factory; leave these as they were, or begin "
        "a new run"
    )


def _told(shape: tuple[int, ...] | None, verb: str) -> str:
    return f"{'none' if shape is None else list(shape)} {verb}"


# -- what is made of a state -------------------------------------------------------------------------------------------


def _recipes(surgery: Surgery, wanted: Shapes, seed: int) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    for name in wanted:
        kind, _, parameter = name.partition("/")
        beginning = surgery.beginnings.get(parameter)
        if beginning is None or beginning.kind is None:
            continue
        source = None if beginning.source is None else f"{kind}/{beginning.source}"
        recipes[name] = Recipe(beginning.shape, source, _maker(name, beginning, seed))
    return recipes


def _note(surgery: Surgery, recipes: Iterable[str], optimizer: OptimizerSpec, step: int) -> str | None:
    """A sentence where the first updates of what is new are unusually long.

    That is AdamW's: what Muon updates has no second moment, and a copy goes on with those of what it is a copy of.
    """
    made = (name.removeprefix(SECOND_MOMENTS) for name in recipes if name.startswith(SECOND_MOMENTS))
    size = largest_update(optimizer.betas, step)
    if size < LONG_UPDATE or all(surgery.beginnings[name].is_all_kept for name in made):
        return None
    told = (
        "Moments of what is new begin at zero, and AdamW corrects them by the run's step: with "
        f"optimizer.betas={list(optimizer.betas)} its first updates are up to {size:.1f} learning rates long"
    )
    remedied = largest_update((optimizer.betas[0], CALM_BETA), step) < LONG_UPDATE
    return f"{told}; a second beta of {CALM_BETA} avoids that." if remedied else f"{told}."


def _maker(name: str, beginning: Beginning, seed: int) -> functools.partial[Tensor]:
    if name.startswith(PARAMETERS):
        return functools.partial(beginning.weight, seed=seed)
    return functools.partial(beginning.moment)


def _expected(surgery: Surgery, stored: Shapes, wanted: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors that can be made of those that are stored: all that is wanted, unless something but the model is another."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in stored.items():
        kind, _, parameter = name.partition("/")
        beginning = surgery.beginnings.get(parameter)
        if not parameter:
            expected[name] = shape
        elif beginning is not None:
            expected[name] = beginning.shape
    new = (b for b in surgery.beginnings.values() if b.kind == "added")
    kinds = {name.partition("/")[0] for name in stored}
    added = {f"{kind}/{b.name}": b.shape for b in new for kind in kinds}
    return expected | {name: shape for name, shape in added.items() if name in wanted}


# -- what an engine keeps ----------------------------------------------------------------------------------------------


def shapes_of(spec: EngineSpec) -> dict[str, tuple[int, ...]]:
    """Of the tensors that the engine keeps, by name."""
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
