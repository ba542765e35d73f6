"""The state that a fork begins with: which checkpoint of the parent, and the config that it was trained with.

Invariant: the config that is returned has the fingerprint that the checkpoint was written with, or that with the batches left out
which the run has left out since, behind it. The parent may be training, and go back meanwhile: so what it went back from is read
once, before the checkpoint is chosen, and a rewind that comes later is not the fork's. Reads manifests only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import Manifest
from elastic_lm.checkpoint.registry import Found
from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.engine.digest import checkpoint_digests
from elastic_lm.errors import CheckpointError, CheckpointVersionError, ConfigError, NotFoundError
from elastic_lm.experiment import standing
from elastic_lm.experiment.lineage import Lineage, Parent, WentBack
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class Origin:
    """One complete checkpoint of a run. `rewinds`: all that the run had made when it was chosen."""

    folder: Storage
    name: str
    manifest: Manifest
    config: RunConfig
    rewinds: Rewinds = Rewinds()

    @classmethod
    def of(cls, run: RunAddress, step: int | None = None) -> Origin:
        """That of `step`, or the newest complete one.

        Raises: CheckpointError saying which there are; ConfigError when there is no such run; StorageError.
        """
        folder = run.folder()
        rewinds = Rewinds.if_readable(folder)
        chosen = _chosen(run, standing.found(folder, rewinds), step)
        try:
            manifest = registry.manifest_of(folder, chosen.step)
        except NotFoundError as error:
            raise CheckpointError(f"checkpoint {chosen.url} was deleted this moment; give the command again") from error
        return cls(folder, run.name, manifest, _config(run, manifest, rewinds), rewinds)

    @property
    def step(self) -> int:
        return self.manifest.step

    @cached_property
    def parent(self) -> Parent:
        """As a fork names it.    Raises: CheckpointError when the manifest contradicts itself; StorageError."""
        digest = checkpoint_digests(self.step, self.manifest.tensors)
        told = {**digest, **self.manifest.meta.get("digest", {})}
        if told != digest:
            raise CheckpointError(
                f"the checkpoint of step {self.step} in {self.folder.url} says that its state has the sha256 "
                f"{told['state'][:12]}, and its tensors make {digest['state'][:12]}; fork another step"
            )
        fingerprint = self.config.identity_fingerprint()
        rewinds = tuple(WentBack(r.number, r.cause, r.to_step, tuple(r.left_out)) for r in self.rewinds)
        return Parent(self.folder.url, self.name, self.step, digest, fingerprint, Lineage.load(self.folder), rewinds)


def _chosen(run: RunAddress, there: list[Found], step: int | None) -> Found:
    complete = [found.step for found in there if found.state == "complete"]
    where = f"run {run.name} in {run.folder().url}"
    if step is None:
        usable = [found for found in there if found.state in ("complete", "other version")]
        if not usable:
            raise _without_any(run, where)
        return _usable(usable[-1], complete)
    for found in there:
        if found.step == step:
            return _usable(found, complete)
    if not complete:
        raise _without_any(run, where)
    raise CheckpointError(f"{where} has no checkpoint of step {step}; {registry.nearest(step, complete)}")


def _usable(found: Found, complete: list[int]) -> Found:
    if found.state == "other version":
        raise CheckpointVersionError(
            f"checkpoint {found.url} cannot be forked: {found.reason}; fork with the version of elastic-lm that wrote it, or "
            "name an older step that this one reads: RUN@STEP"
        )
    if found.state != "complete":
        raise CheckpointError(
            f"checkpoint {found.url} cannot be forked, it is {found.state}: {found.reason}; "
            f"{registry.nearest(found.step, complete)}"
        )
    return found


def _without_any(run: RunAddress, where: str) -> Exception:
    if not run.folder().exists(CONFIG_FILE) and not run.folder().list():
        return ConfigError(
            f"there is no run at {run.folder().url}; name one by its address (STORAGE/runs/NAME) or its YAML file"
        )
    return CheckpointError(
        f"{where} has no complete checkpoint yet; it gets one every checkpoint.every_steps, at its end, and when it is asked to "
        f"stop: elastic-lm stop {run.name}"
    )


def _config(run: RunAddress, manifest: Manifest, rewinds: Rewinds) -> RunConfig:
    """What the run was last trained with, which also knows what is operational; else what the checkpoint's writer knew."""
    fingerprint = manifest.meta.get("fingerprint")
    for candidate in (_stored(run), _told(manifest)):
        if candidate is None:
            continue
        was = rewinds.as_was(candidate, manifest.meta)
        if was.identity_fingerprint() == fingerprint:
            return rewinds.applied(was)
    raise CheckpointError(
        f"the checkpoint of step {manifest.step} in {run.folder().url} was trained with a config that this version does not "
        f"understand (its fingerprint is {str(fingerprint)[:12]}); fork with the version of elastic-lm that wrote it"
    )


def _stored(run: RunAddress) -> RunConfig | None:
    try:
        return run.stored_config()
    except (ConfigError, NotFoundError):
        return None


def _told(manifest: Manifest) -> RunConfig | None:
    config = manifest.meta.get("config")
    try:
        return RunConfig(**config) if isinstance(config, dict) else None
    except (ConfigError, TypeError):
        return None
