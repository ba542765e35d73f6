"""An experiment before it begins: every attempt's config, tasks and parents are gone through, and nothing is written.

Invariant: what can be known beforehand to be wrong is found here, and told with the attempt that it is about. Which attempt will
be forked is not known yet where that depends on scores; then the likely ones are gone through: the base, the attempt before, and
all attempts one after another.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_lm.checkpoint.layout import Entry
from elastic_lm.config import RunConfig
from elastic_lm.config_text import flatten
from elastic_lm.data.manifest import Manifest as Corpus
from elastic_lm.errors import ConfigError, ElasticLMError
from elastic_lm.experiment import changes
from elastic_lm.experiment.beginning import Beginning, forked_step
from elastic_lm.experiment.journal import Setup
from elastic_lm.experiment.plan import LAST_STEP, Planned
from elastic_lm.experiment.target import Target, exact
from elastic_lm.experiment.trainer import Asked, Trainer
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class Prospect:
    """An attempt that can be made. `config`: from scratch. `changes`: against the base's. `tokens`: that it would train on.

    `same_as`: an earlier attempt that it would repeat bit for bit. `note`: what one should know of it.
    """

    planned: Planned
    config: RunConfig
    changes: tuple[changes.Change, ...]
    tokens: int
    same_as: int | None = None
    note: str | None = None


@dataclass(frozen=True)
class Rehearsal:
    """`setup`: what the experiment is, to be kept."""

    prospects: tuple[Prospect, ...]
    setup: Setup

    @classmethod
    def of(cls, beginning: Beginning, trainer: Trainer, begun: Collection[int]) -> Rehearsal:
        """Args: `begun`: numbers of the attempts that have begun already, whose runs are there.

        Raises: ConfigError when an attempt cannot be made; DataError, StorageError.
        """
        configs = [_scratch(beginning, planned) for planned in beginning.planned]
        questions = _Questions(trainer, beginning.plan.wanted, {})
        asked = _tasks(beginning, questions, configs)
        same_as = _repeated(beginning, configs)
        _check_tokenizers(beginning, configs)
        for number, config in enumerate(configs):
            if number not in begun and same_as[number] is None:
                _check_free(config)
                with _About(beginning.planned[number]):
                    _check_alone(beginning, trainer, number, config)
        tokens = [config.batch.tokens * config.training.steps for config in configs]
        for number, num_tokens in _forks(beginning, questions, configs):
            tokens[number] = num_tokens
        _check_budget(beginning, tokens)
        prospects = tuple(
            Prospect(
                planned=beginning.planned[number],
                config=config,
                changes=_changed(configs[0], config),
                tokens=tokens[number],
                same_as=same_as[number],
                note=_note(beginning, asked[0], asked[number]),
            )
            for number, config in enumerate(configs)
        )
        return cls(prospects, _setup(beginning, configs[0], asked[0]))


@dataclass(frozen=True)
class _Questions:
    """What attempts are asked. Those that differ in nothing that tasks depend on are asked the same."""

    trainer: Trainer
    target: Target
    known: dict[str, Mapping[str, Asked]]

    def of(self, config: RunConfig) -> Mapping[str, Asked]:
        """Raises: ConfigError when a task is broken or does not fit the model, or none tells what is wanted."""
        key = json.dumps([config.model_dump(mode="json")[part] for part in ("data", "batch", "objective", "model")])
        if key not in self.known:
            asked = self.trainer.asked(config)
            self.target.check({name: task.figures for name, task in asked.items()})
            self.known[key] = asked
        return self.known[key]


class _About:
    """Whatever goes wrong inside is told with the attempt that it is about."""

    def __init__(self, planned: Planned, more: str = "") -> None:
        self._told = f"attempt {planned.number} ({planned.told}){more}"

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ElasticLMError):
            raise type(error)(f"{self._told}: {error}") from None


# -- each for itself -------------------------------------------------------------------------------------------------


def _scratch(beginning: Beginning, planned: Planned) -> RunConfig:
    with _About(planned):
        return beginning.scratch(planned.number)


def _tasks(beginning: Beginning, questions: _Questions, configs: list[RunConfig]) -> list[Mapping[str, Asked]]:
    """Of each attempt.    Raises: ConfigError."""
    found = []
    for planned, config in zip(beginning.planned, configs, strict=True):
        with _About(planned):
            found.append(questions.of(config))
    return found


def _changed(base: RunConfig, config: RunConfig) -> tuple[changes.Change, ...]:
    return tuple(change for change in changes.changes(base, config) if change.name not in changes.PLACE)


def _repeated(beginning: Beginning, configs: list[RunConfig]) -> list[int | None]:
    """For each the earlier attempt that it would repeat. Of a grid that is left out, in a list it is a mistake."""
    first: dict[str, int] = {}
    found: list[int | None] = []
    for planned, config in zip(beginning.planned, configs, strict=True):
        key = json.dumps([config.identity_fingerprint(), config.training.steps, _policies(config)])
        same = first.setdefault(key, planned.number)
        is_repeated = same != planned.number and not beginning.plan.forks
        if is_repeated and not beginning.plan.grid:
            raise ConfigError(
                f"attempt {planned.number} ({planned.told}) would repeat attempt {same} ({beginning.planned[same].told}) bit for "
                "bit; leave it out, or have it change something else"
            )
        found.append(same if is_repeated else None)
    return found


def _policies(config: RunConfig) -> dict[str, Any]:
    """What is no run's identity, because it decides only which batches are left out and whether a run ends early."""
    spikes, on_nonfinite = config.spikes, config.training.on_nonfinite
    is_used = spikes.policy != "ignore" or on_nonfinite == "rewind"
    return {"training.on_nonfinite": on_nonfinite, **(flatten({"spikes": spikes.model_dump()}) if is_used else {})}


def _check_tokenizers(beginning: Beginning, configs: list[RunConfig]) -> None:
    """Raises: ConfigError when an attempt's tokens are others than the base's: their scores would not compare."""
    hashes: dict[str, str] = {}
    for planned, config in zip(beginning.planned, configs, strict=True):
        place = config.data.tokens
        if place not in hashes:
            with _About(planned):
                hashes[place] = Corpus.load(Storage.open(place)).tokenizer_hash
        ours, theirs = hashes[configs[0].data.tokens], hashes[place]
        if ours != theirs and beginning.plan.wanted.figure != "bits_per_byte":
            raise ConfigError(
                f"attempt {planned.number} ({planned.told}): the corpus at {place} was made with another tokenizer "
                f"({theirs[:12]}) than the base's ({ours[:12]}), so {beginning.plan.wanted.figure} would not compare; make it "
                f"with the base's (elastic-lm prepare --tokenizer {configs[0].data.tokens}/tokenizer.json), or want bits_per_byte"
            )


def _check_free(config: RunConfig) -> None:
    """Raises: ConfigError when the name of a run that is still to come is taken."""
    if Storage.open(config.run_url).list():
        raise ConfigError(
            f"{config.run_url} holds a run already, and it is not this experiment's; choose another name for the experiment, or "
            "move that run"
        )


def _check_alone(beginning: Beginning, trainer: Trainer, number: int, config: RunConfig) -> None:
    """Raises: ConfigError when the attempt could not begin from scratch. In another shape than model.init's folder has, only a
    fork can, so one that is to be a fork is looked at with the base's.
    """
    try:
        trainer.check(config)
    except ConfigError:
        if not beginning.is_from_folder(number):
            raise
        model = beginning.base.model.model_dump(mode="json")
        trainer.check(RunConfig(**{**config.model_dump(mode="json"), "model": model}))


def _note(beginning: Beginning, base: Mapping[str, Asked], mine: Mapping[str, Asked]) -> str | None:
    task = beginning.plan.wanted.task
    if mine[task].hash == base[task].hash:
        return None
    return f"its {task} is not the base's (another corpus, batch or objective), so that scores compare by their meaning only"


# -- forks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parent:
    """A run that may be forked. `begins_at`: the step that it begins at itself."""

    config: RunConfig
    begins_at: int = 0


def _forks(beginning: Beginning, questions: _Questions, configs: list[RunConfig]) -> Iterator[tuple[int, int]]:
    """(number, tokens that it trains on when it is a fork of the base) of each, all likely parents being gone through."""
    plan = beginning.plan
    if not plan.forks:
        return
    base = _Parent(configs[0])
    before = chained = base
    for planned in beginning.planned[1:]:
        mine = _fork(beginning, questions, planned, base)
        yield planned.number, mine.config.batch.tokens * (mine.config.training.steps - mine.begins_at)
        if plan.parent != "base":
            _fork(beginning, questions, planned, before)
            before, chained = mine, _fork(beginning, questions, planned, chained)


def _fork(beginning: Beginning, questions: _Questions, planned: Planned, parent: _Parent) -> _Parent:
    """Raises: ConfigError when the attempt cannot be a fork of it."""
    with _About(planned, f", as a fork of {parent.config.name}"):
        step = forked_step(beginning.plan, parent.config, parent.begins_at)
        config = beginning.fork(planned.number, parent.config, step)
        if config.training.steps <= step:
            raise ConfigError(
                f"it would begin at step {step:,} and {LAST_STEP} is {config.training.steps:,}, so nothing would be trained; "
                "say how many steps it trains beyond its parent's (steps: N, of the plan or of the attempt), or fork an earlier "
                "step (parent_step: N)"
            )
        found = changes.changes(parent.config, config)
        changes.check_beginning(found)
        changes.check_vocabulary(parent.config, config)
        _check_state(parent.config, config, found, step)
        questions.of(config)
    return _Parent(config, step)


def _check_state(before: RunConfig, after: RunConfig, found: tuple[changes.Change, ...], step: int) -> None:
    """Raises: ConfigError when the state that the parent will have does not fit."""
    if not any(change.identity for change in found):
        return
    from elastic_lm.experiment import fit  # it imports torch

    if any(change.name.startswith(fit.KEPT_BY) for change in found):
        corpus = Corpus.load(Storage.open(before.data.tokens))
        spec = before.engine_spec(corpus.vocab_size, corpus.special_ids)
        kept = {name: Entry("F32", shape, "") for name, shape in fit.shapes_of(spec).items()}
        fit.check(kept, before, after, found, step)


# -- all together ------------------------------------------------------------------------------------------------------


def _check_budget(beginning: Beginning, tokens: list[int]) -> None:
    limit = beginning.plan.budget.tokens
    if limit is not None and tokens[0] > limit:
        raise ConfigError(
            f"budget.tokens={exact(limit)} does not allow one attempt: the base alone trains on {tokens[0]:,} tokens; give more, "
            f"or lower its {LAST_STEP}"
        )


def _setup(beginning: Beginning, base: RunConfig, asked: Mapping[str, Asked]) -> Setup:
    plan = beginning.plan
    attempts = [{"changes": each.changes, "skip": each.skip, "steps": each.steps} for each in beginning.planned]
    values: dict[str, Any] = {
        "target": str(plan.wanted),
        "tasks": {name: task.hash for name, task in asked.items()},
        "parent": plan.parent,
        "parent_step": plan.parent_step,
        "base": {
            **flatten(base.identity()),
            **_policies(base),
            LAST_STEP: base.training.steps,
            "storage": base.storage,
        },
        "attempts": attempts,
        "budget": plan.budget.model_dump(),
    }
    return Setup(**json.loads(json.dumps(values)))  # plain, as it is read back
