"""Runs to fork, trained in this process, what lies in their folders, and what a log says they have trained on."""

from __future__ import annotations

import dataclasses

from elastic_lm.checkpoint import store
from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.data.windows import LocalTokens
from elastic_lm.engine.reduce import HASH_MASK
from elastic_lm.engine.step import as_tokens, sample_hash
from elastic_lm.events.log import read
from elastic_lm.events.types import EventKind
from elastic_lm.experiment.fork import Forked, Request, fork
from elastic_lm.result import RunResult
from elastic_lm.run_address import RunAddress
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.solo import Solo

MOST_BATCHES = 40


def trained(config: RunConfig, *pauses: int) -> RunResult:
    """To the end, with a checkpoint there and at each of these steps."""
    for step in pauses:
        Solo(config).train(until=step)
    return Solo(config).train()


def address_of(config: RunConfig) -> RunAddress:
    return RunAddress.at(config.run_url)


def forked(parent: RunConfig, name: str = "new", **more: object) -> Forked:
    return fork(Request(address_of(parent), name, **more))  # type: ignore[arg-type]


def step_fields(config: RunConfig) -> dict[int, dict[str, object]]:
    """What the log says of each step, of what the promise covers."""
    events = [e for e in read(Storage.open(config.run_url).child("events")) if e.kind is EventKind.STEP_COMMITTED]
    names = ("loss", "learning_rate", "grad_norm", "num_targets", "sample_hash")
    return {event.step: {name: event.fields[name] for name in names} for event in events if event.step is not None}


def batches(config: RunConfig) -> dict[int, int]:
    """Step -> index of the batch that it has trained, found out from the hash of the tokens that entered it."""
    plan = make_plan(config)
    storage, manifest, order = plan.start_reader.args
    tokens = LocalTokens(storage, manifest, dataclasses.replace(order, skip=()))
    found = {}
    for step, fields in step_fields(config).items():
        for batch in range(MOST_BATCHES):
            hashes = (
                sample_hash(step, j, as_tokens(tokens.tokens(batch, j))) for j in range(config.batch.micro_batches)
            )
            if sum(hashes) & HASH_MASK == fields["sample_hash"]:
                assert step not in found
                found[step] = batch
    return found


def cut_small(config: RunConfig, step: int, part_bytes: int = 3_000) -> None:
    """The checkpoint of this step again, in several parts."""
    folder = Storage.open(config.run_url)
    loaded = store.load(folder, step)
    for path in folder.list(folder_of(step)):
        folder.delete(path)
    store.save(folder, step, loaded.tensors, loaded.info.meta, part_bytes=part_bytes)


def forget(config: RunConfig, step: int) -> None:
    """Delete the checkpoint of this step as its owner does."""
    folder = Storage.open(config.run_url)
    for path in sorted(folder.list(folder_of(step)), key=lambda path: not path.endswith("manifest.json")):
        folder.delete(path)


def contents(url: str) -> dict[str, bytes]:
    folder = Storage.open(url)
    return {path: folder.read(path) for path in folder.list()}
