"""From a config to a plan: everything that can be wrong is found here, before any actor starts."""

from __future__ import annotations

import functools
from typing import Any

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.data.held_out import HeldOut
from elastic_lm.data.manifest import Manifest
from elastic_lm.errors import CheckpointError, ConfigError, NotFoundError
from elastic_lm.experiment.lineage import check_fork_has_its_state, step_of_fork
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.runtime import way_back
from elastic_lm.runtime.coordinator import Plan
from elastic_lm.runtime.reader import start_reader
from elastic_lm.storage import Storage


def make_plan(config: RunConfig, *, may_be_held: bool = False) -> Plan:
    """Read the corpus's manifest and that of the run's newest checkpoint; settle what was left open. Changes nothing.

    A checkpoint's bytes are read when it is restored: whoever takes a run over with its workers needs none. `may_be_held`: such
    workers may be there, so that a fork which cannot begin any more is planned all the same, with its `problem`.
    Raises: ConfigError, DataError, CheckpointError, StorageError, each with a remedy.
    """
    tokens = Storage.open(config.data.tokens)
    manifest = Manifest.load(tokens)
    config = config.settled(manifest=manifest.hash, window_blocks=manifest.window_blocks)
    run_storage = Storage.open(config.run_url)
    rewinds = Rewinds.load(run_storage)
    config = rewinds.applied(config)
    order = manifest.order(**config.order_fields())
    skipped: list[str] = []
    newest = registry.newest_complete(run_storage, on_skipped=skipped.append, thorough=False, wanted=rewinds.keep)
    begins_at, problem = 0, None
    try:
        begins_at = check_fork_has_its_state(run_storage, None if newest is None else newest.step, skipped)
    except CheckpointError as error:
        if not may_be_held:
            raise
        begins_at, problem = step_of_fork(run_storage), error
    if (told := way_back.lack(run_storage, config, rewinds, begins_at=begins_at)) is not None:
        skipped.append(told)
    config, init = _initial(config, tokens, manifest, run_storage, is_new=newest is None and not rewinds)
    if newest is not None:
        _check_identity(rewinds.as_was(config, newest.meta), newest)
    elif rewinds and config.identity_fingerprint() != rewinds.made[-1].fingerprint:
        told = "; ".join(_changes(config, _begun(run_storage)))
        raise _other_identity(config, f"went back to step {rewinds.made[-1].to_step} and", told)
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
        init=init,
        held_out=_held_out(config, manifest),
        begins_at=begins_at,
        problem=problem,
        rewinds=rewinds,
    )


def _held_out(config: RunConfig, manifest: Manifest) -> HeldOut | None:
    """What evaluations measure.    Raises: ConfigError when the corpus holds nothing out."""
    if config.evaluation.every is None:
        return None
    batch = config.batch
    return HeldOut.of(
        manifest,
        sequence_length=batch.sequence_length,
        batch_size=batch.micro_batch_size,
        max_samples=config.evaluation.samples,
    )


def _initial(
    config: RunConfig, tokens: Storage, manifest: Manifest, run_storage: Storage, *, is_new: bool
) -> tuple[RunConfig, tuple[Storage, str] | None]:
    """The config with what model.init's folder says; where its weights are, and their sha256.

    A run that goes on, and a coordinator that is told all of it, need the folder no more.
    """
    if config.model.init is None:
        return config, None
    from elastic_lm.huggingface import initial  # it imports torch

    begun = None if is_new and config.model.init_hash is None else _begun(run_storage)
    config = (begun and initial.as_begun(config, begun)) or initial.settled(config, tokens, manifest)
    assert config.model.init_hash is not None
    return config, (initial.folder_of(config), config.model.init_hash)


def _begun(run_storage: Storage) -> RunConfig | None:
    """What the run was last trained with; None when it begins, or another version trained it."""
    try:
        return RunConfig.from_yaml(run_storage.read(CONFIG_FILE).decode(errors="replace"), CONFIG_FILE)
    except (NotFoundError, ConfigError):
        return None


def _check_identity(config: RunConfig, newest: CheckpointInfo) -> None:
    """A run goes on only as what it began."""
    if newest.meta.get("fingerprint") == config.identity_fingerprint():
        return
    told = "; ".join(_changes(config, newest.meta.get("config")))
    raise _other_identity(config, f"has a checkpoint of step {newest.step} that", told)


def _other_identity(config: RunConfig, what: str, told: str) -> CheckpointError:
    return CheckpointError(
        f"run {config.name} in {config.storage} {what} was trained with other settings: {told or 'its fingerprint differs'}. Set "
        "them back to resume it. Other settings make another run: one that goes on from here with them (elastic-lm fork "
        f"{config.run_url} --name {config.name}-2 --set ...), or one that begins at step 0 (--set name={config.name}-2)"
    )


def _changes(config: RunConfig, began: Any) -> list[str]:
    """What differs from the config in a checkpoint; nothing when another version wrote one that is not understood."""
    try:
        began = RunConfig(**began) if isinstance(began, dict) else began
        return config.identity_changes(began) if isinstance(began, RunConfig) else []
    except ConfigError:
        return []
