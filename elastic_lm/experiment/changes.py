"""What a fork may change, and what its state cannot take.

Invariant: the steps that the state has applied stay what they were. So a fork trains, from its step on, exactly its parent's
batches but for those that are left out; what would change, repeat or undo a trained one is refused before anything is written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from elastic_lm import config_text
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest as Corpus
from elastic_lm.data.order import batch_of, merged
from elastic_lm.errors import ConfigError, DataError, StorageError, UnfitError
from elastic_lm.experiment.lineage import Change
from elastic_lm.experiment.skip import Skip
from elastic_lm.storage import Storage

PLACE = ("name", "storage")  # another run has another one anyway
CORPUS = ("tokens", "manifest", "window_blocks")  # of `data`
BEGINNING = ("model.init", "model.init_hash")
# With these, batches are other samples.
ORDER = ("batch.", "data.", "training.seed")


def changed(config: RunConfig, overrides: Sequence[str], *, name: str, storage: str) -> RunConfig:
    """`config` as another run's, with `a.b=value` overrides; whatever was left open is settled by the corpus.

    Raises: UnfitError when they make no config; ConfigError when the corpus is not the one that it names; DataError;
    StorageError.
    """
    for text in overrides:
        if (field := text.partition("=")[0].strip()) in PLACE:
            raise ConfigError(f"--set {field}=... names another run; write --name and --storage")
    fields = {**config.model_dump(mode="json"), "name": name, "storage": storage}
    try:
        after = RunConfig(**config_text.override(fields, overrides))  # at once: one may need another
    except ConfigError as error:
        raise UnfitError(str(error)) from error
    if after.data.tokens != config.data.tokens and after.data.manifest == config.data.manifest:
        after = after.replace("data.manifest=null")  # whatever is there; the hash says whether it is another corpus
    was, now = ([getattr(data, field) for field in CORPUS] for data in (config.data, after.data))
    if was != now or None in now:
        corpus = Corpus.load(Storage.open(after.data.tokens))
        after = after.settled(manifest=corpus.hash, window_blocks=corpus.window_blocks)
    return after


def changes(before: RunConfig, after: RunConfig) -> tuple[Change, ...]:
    """Field by field, those first that change bits."""
    found = _differences(before.identity(), after.identity(), identity=True)
    known = {*config_text.flatten(before.identity()), *config_text.flatten(after.identity()), *PLACE}
    rest = _differences(before.model_dump(mode="json"), after.model_dump(mode="json"), identity=False)
    return (*found, *(change for change in rest if change.name not in known))


def _differences(before: dict[str, Any], after: dict[str, Any], *, identity: bool) -> list[Change]:
    was, now = (json.loads(json.dumps(values)) for values in (before, after))
    return [Change(*found, identity) for found in config_text.differences(was, now)]


def check_steps(after: RunConfig, step: int) -> None:
    """Raises: UnfitError when the fork would have nothing to train."""
    if after.training.steps <= step:
        raise UnfitError(
            f"the state has applied {step} steps and training.steps={after.training.steps}, so that nothing would be trained; "
            f"name an earlier step (RUN@STEP), or add steps: --set training.steps={2 * step or 1}"
        )


def check_beginning(found: Sequence[Change]) -> None:
    """Raises: UnfitError when weights are named to begin with. A run's identity holds their hash and not their place."""
    for change in found:
        if change.name in BEGINNING:
            raise UnfitError(
                f"{change}: a fork begins from its parent's state and from nothing else; leave it as it was"
            )


def order_note(found: Sequence[Change], after: RunConfig, step: int) -> str | None:
    """Sentences where the fork does not go on in its parent's order."""
    names = [change.name for change in found if change.identity and change.name.startswith(ORDER)]
    if not names:
        return None
    told = (
        f"From step {step} on samples come in another order ({', '.join(names)}): of the epoch that is under way some come "
        "twice, and some not at all."
    )
    first = batch_of(step, after.training.skip)
    left_out = [[start, stop] for start, stop in after.training.skip if stop > first]
    if left_out:
        told += f" training.skip={left_out} counts batches in that order: they are not the samples that its parent has there."
    return told


def corpus_note(found: Sequence[Change]) -> str | None:
    """A sentence where the fork goes on with another corpus."""
    if all(change.name != "data.manifest" for change in found):
        return None
    return "What the other corpus holds out may be text that the state was trained on: held_out may then measure no unseen text."


def spike_note(after: RunConfig, step: int) -> str | None:
    """A sentence where the fork may do something else about a spike than its parent does."""
    if after.spikes.policy == "ignore" and not after.may_go_back:
        return None
    return (
        f"Spikes are judged by the fork's own steps, and it does not go back behind step {step:,}: of a spike soon behind that "
        "it may make something else than its parent."
    )


# -- batches that are left out -----------------------------------------------------------------------------------------


def leaving_out_more(config: RunConfig, ranges: Skip, step: int, *, called: str = "--skip") -> RunConfig:
    """`config` with these ranges of batch indices left out as well. `called`: what they were given as, for errors.

    Raises: UnfitError when one is none, or holds a batch that the first `step` steps have trained.
    """
    left_out = config.training.skip
    first = batch_of(step, left_out)
    for start, stop in ranges:
        if not 0 <= start < stop:
            raise UnfitError(
                f"{called} {start}:{stop} is no range of batches; write START:STOP with START < STOP, e.g. 500:520"
            )
        trained = _kept(start, left_out)
        if trained < min(first, stop):
            raise UnfitError(
                f"{called} {start}:{stop} begins before batch {first}, the first that the fork trains, in step {step}: batch "
                f"{trained} is in the state and cannot be left out any more; begin at {first} or later, or fork an earlier step"
            )
    more = [(start, stop) for start, stop in ranges if _kept(start, left_out) < stop]
    if not more:
        return config
    return config.replace(f"training.skip={json.dumps(merged((*left_out, *more)))}")


def _kept(batch: int, skip: Skip) -> int:
    """The first batch from this one on that is in none of these ascending ranges."""
    for start, stop in skip:
        if start <= batch < stop:
            batch = stop
    return batch


def check_reach(before: RunConfig, after: RunConfig, ranges: Skip, *, called: str = "--skip") -> None:
    """`after` leaves out more than `before`: `ranges`, given as `called`, and what its own changes say.

    Raises: UnfitError when one of these begins behind the last batch that is trained: it would leave out nothing.
    """
    last = batch_of(after.training.steps - 1, after.training.skip)
    named = [(f"{called} {start}:{stop}", start) for start, stop in ranges]
    named += [
        (f"training.skip=[..., [{start}, {stop}], ...]", start)
        for start, stop in after.training.skip
        if _kept(start, before.training.skip) < stop
    ]
    for told, start in named:
        if start > last:
            raise UnfitError(
                f"{told} begins behind batch {last}, the last that is trained, in step {after.training.steps - 1}, and so would "
                f"leave out nothing; begin at {last} or earlier, or leave it out (training.steps={after.training.steps})"
            )


def check_skip(before: RunConfig, after: RunConfig, step: int) -> None:
    """Raises: UnfitError unless the first `step` steps have trained the same batches under both."""
    trained = batch_of(step - 1, before.training.skip) + 1 if step else 0  # batches from here on are the fork's
    was, now = (merged(_below(config.training.skip, trained)) for config in (before, after))
    if was != now:
        kept = [list(each) for each in was]
        raise UnfitError(
            f"training.skip={[list(each) for each in after.training.skip]} does not agree with what the {step} steps before the "
            f"fork have trained; below batch {trained} it has to leave out {kept or 'nothing'}, as the parent did"
        )


def _below(ranges: Skip, limit: int) -> Skip:
    return tuple((start, min(stop, limit)) for start, stop in ranges)


# -- the corpus --------------------------------------------------------------------------------------------------------


def check_corpus(after: RunConfig) -> None:
    """Raises: DataError when the corpus is not there; ConfigError when it is another than the config names; StorageError."""
    try:
        corpus = Corpus.load(Storage.open(after.data.tokens))
        after.settled(manifest=corpus.hash, window_blocks=corpus.window_blocks)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{error}; or fork to where the corpus is now: --set data.tokens=URL") from error


def check_vocabulary(before: RunConfig, after: RunConfig) -> None:
    """Raises: UnfitError when another corpus has other tokens than the model has learned; ConfigError when that cannot be known;
    DataError; StorageError.
    """
    if before.data.manifest == after.data.manifest:
        return
    theirs = Corpus.load(Storage.open(after.data.tokens))
    try:
        ours = Corpus.load(Storage.open(before.data.tokens))
    except (DataError, StorageError) as error:
        raise ConfigError(
            f"it cannot be known whether the corpus at data.tokens={after.data.tokens} has the tokens that the model has "
            f"learned, because the parent's cannot be read: {error}"
        ) from error
    if ours.hash != before.data.manifest:
        raise ConfigError(
            f"it cannot be known whether the corpus at data.tokens={after.data.tokens} has the tokens that the model has "
            f"learned, because the one at {before.data.tokens} is not the parent's any more: its manifest has the hash "
            f"{ours.hash}, and the parent's has {before.data.manifest}; put the parent's corpus back there, or "
            "fork to where that is now (--set data.tokens=URL), and then fork that"
        )
    if ours.tokenizer_hash != theirs.tokenizer_hash:
        raise UnfitError(
            f"the corpus at data.tokens={after.data.tokens} was made with another tokenizer ({theirs.tokenizer_hash[:12]}) than "
            f"the parent's ({ours.tokenizer_hash[:12]}), so the model has learned other tokens; make one with the parent's: "
            f"elastic-lm prepare --tokenizer {before.data.tokens}/tokenizer.json"
        )
