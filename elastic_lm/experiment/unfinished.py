"""What a fork that was cut short is finished with: it needs its parent no more.

`fork-HASH.json` in the folder of the fork's checkpoint: the manifest that is to be published, and the parent's config, against
which the same command is known again whatever the parent has become since. HASH is of the lineage that it belongs to. It is
written once all parts are there, before that lineage, and deleted when there is a run. So whoever finds a lineage finds what
finishes it; and of two forks that are made at once under one name, that counts whose lineage is there.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import Manifest, folder_of
from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError, ConfigError, NotFoundError
from elastic_lm.experiment.lineage import FILE, Lineage
from elastic_lm.storage import Storage

FORMAT, VERSION = "elastic-lm unfinished fork", 1
_NAME = re.compile(r"fork-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class Unfinished:
    """`before`: the parent's config; `manifest`: of the fork's state, all parts of which are there."""

    before: RunConfig
    manifest: Manifest

    @classmethod
    def load(cls, folder: Storage) -> Unfinished | None:
        """That of the lineage in this folder; None when it is not there, or damaged, or of another version.

        Raises: StorageError.
        """
        try:
            data = folder.read(FILE)
            lineage = Lineage.from_json(data)
            body = json.loads(folder.read(path_of(data, lineage.parent.step)))
            if (body["format"], body["version"]) != (FORMAT, VERSION):
                return None
            found = cls(RunConfig(**body["before"]), Manifest.from_json(json.dumps(body["manifest"]).encode()))
            fingerprints = found.before.identity_fingerprint(), found.config.identity_fingerprint()
        except (
            NotFoundError,
            CheckpointError,
            ConfigError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):
            return None
        told = lineage.parent.fingerprint, lineage.fingerprint
        return found if fingerprints == told and found.manifest.step == lineage.parent.step else None

    @property
    def config(self) -> RunConfig:
        """The fork's."""
        return RunConfig(**self.manifest.meta["config"])

    def store(self, folder: Storage, lineage: Lineage) -> None:
        """Raises: StorageError."""
        body = {"format": FORMAT, "version": VERSION, "before": self.before.model_dump(mode="json")}
        data = json.dumps({**body, "manifest": json.loads(self.manifest.to_json())}, indent=1).encode()
        folder.write(path_of(lineage.to_json(), self.manifest.step), data)

    def damage(self, folder: Storage) -> str | None:
        """Why the state in the fork's folder is not whole; None: every byte is as it is to be.    Raises: StorageError."""
        there = folder.child(folder_of(self.manifest.step))
        try:
            for part in self.manifest.parts:
                registry.read_part(there, part)
        except (CheckpointError, NotFoundError) as error:
            return str(error)
        return None


def path_of(lineage: bytes, step: int) -> str:
    """In the run's folder. `lineage`: the file of it that it belongs to."""
    return f"{folder_of(step)}/fork-{hashlib.sha256(lineage).hexdigest()[:16]}.json"


def is_unfinished(name: str) -> bool:
    """Whether an object in a checkpoint's folder has such a name."""
    return _NAME.fullmatch(name) is not None
