"""From a config to a plan: everything that can be wrong is found here, before any actor starts."""

from __future__ import annotations

import functools
from typing import Any

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.errors import CheckpointError, ConfigError
from elastic_lm.runtime.coordinator import Plan
from elastic_lm.runtime.reader import start_reader
from elastic_lm.storage import Storage


def make_plan(config: RunConfig) -> Plan:
    """Read the corpus's manifest and that of the run's newest checkpoint; settle what was left open. Changes nothing.

    A checkpoint's bytes are read when it is restored: whoever takes a run over with its workers needs none.
    Raises: ConfigError, DataError, CheckpointError, StorageError, each with a remedy.
    """
    tokens = Storage.open(config.data.tokens)
    manifest = Manifest.load(tokens)
    config = config.settled(manifest=manifest.hash, window_blocks=manifest.window_blocks)
    order = manifest.order(**config.order_fields())
    run_storage = Storage.open(config.run_url)
    skipped: list[str] = []
    newest = registry.newest_complete(run_storage, on_skipped=skipped.append, thorough=False)
    if newest is not None:
        _check_identity(config, newest)
    return Plan(
        config=config,
        spec=config.engine_spec(manifest.vocab_size, manifest.special_ids),
        order=order,
        run_storage=run_storage,
        start_reader=functools.partial(
            start_reader,
            tokens,
            manifest,
            order,
            prefetch_windows=config.data.prefetch_windows,
            num_cpus=config.data.reader_num_cpus,
        ),
        newest=newest,
        skipped=tuple(skipped),
    )


def _check_identity(config: RunConfig, newest: CheckpointInfo) -> None:
    """A run goes on only as what it began."""
    if newest.meta.get("fingerprint") == config.identity_fingerprint():
        return
    told = "; ".join(_changes(config, newest.meta.get("config"))) or "its fingerprint differs"
    raise CheckpointError(
        f"run {config.name} in {config.storage} has a checkpoint of step {newest.step} that was trained with other "
        f"settings: {told}. Set them back to resume it. Other settings make another run, which begins at step 0: give it a "
        f"name of its own, e.g. --set name={config.name}-2"
    )


def _changes(config: RunConfig, began: Any) -> list[str]:
    """What differs from the config in a checkpoint; nothing when another version wrote one that is not understood."""
    try:
        return config.identity_changes(RunConfig(**began)) if isinstance(began, dict) else []
    except ConfigError:
        return []
