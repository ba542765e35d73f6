"""How a checkpoint looks in storage: names, and the manifest that makes its parts count.

`checkpoints/step-00001000/` holds parts (safetensors) and `manifest.json`, written last: no manifest, no checkpoint.
A manifest carries the hash of every tensor and of itself, so that a torn, cut or flipped one is known as such. Tensors and
not parts are hashed, because the same state may be cut into parts by any number of members. The step in a name is the
number of steps that the state has applied, which is also the next step to train.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_lm.errors import CheckpointError, CheckpointVersionError

FORMAT = "elastic-lm checkpoint"
VERSION = 2
PART_BYTES = 64 * 2**20  # held twice more while it is written; a larger tensor is a part of its own
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
SET_ASIDE = "manifest.damaged.json"
_PART = re.compile(r"part-\d{5,}-\d{3,}-[0-9a-f]{16}\.safetensors")
_STEP = re.compile(r"checkpoints/step-(\d{8,})/")


@dataclass(frozen=True)
class Entry:
    """One tensor: safetensors' name for its type, its shape, and the sha256 of its bytes (little-endian, row by row)."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Part:
    """One safetensors object: its name in the checkpoint's folder, its size, and the tensors in it by name."""

    name: str
    size_bytes: int
    tensors: dict[str, Entry]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of. `meta` is the writer's: fingerprint of the run's identity, digests, environment.

    `owner_epoch`: which owner of the run wrote it; 0 when it had none.
    """

    step: int
    parts: tuple[Part, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    owner_epoch: int = 0

    @property
    def tensors(self) -> dict[str, Entry]:
        """The whole state, however it is cut."""
        return {name: entry for part in self.parts for name, entry in part.tensors.items()}

    def to_json(self) -> bytes:
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**body, "sha256": hash_of(body)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The inverse of `to_json`.    Raises: CheckpointError on anything else, with the reason; of its kinds
        CheckpointVersionError when another version wrote it.
        """
        try:
            body = json.loads(data)
            _refuse_other_version(body)
            told = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"its manifest of {len(data)} bytes is torn or not one") from error
        if (body.get("format"), body.get("version")) != (FORMAT, VERSION) or told != hash_of(body):
            raise CheckpointError("its manifest does not have the hash that it names")
        parts = tuple(
            Part(part["name"], part["size_bytes"], {name: _entry(entry) for name, entry in part["tensors"].items()})
            for part in body["parts"]
        )
        for part in parts:
            if not is_part(part.name):
                raise CheckpointError(f"its manifest names the part {part.name!r}, which is not a name of ours")
        return cls(body["step"], parts, body["meta"], body.get("owner_epoch", 0))


def folder_of(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def part_name(share: int, number: int, tensors: Mapping[str, Entry]) -> str:
    """Named by content: two writers of one step can only disagree about the manifest, never about a part.

    Args: `share`: which member's; `number`: of the part in it.
    """
    content = hash_of({name: asdict(entry) for name, entry in tensors.items()})
    return f"part-{share:05d}-{number:03d}-{content[:16]}.safetensors"


def shares(sizes: Mapping[str, int], num_shares: int) -> list[list[str]]:
    """Names in alphabetical order, cut into about equally large shares; some may be empty. `sizes` in any unit."""
    total = sum(sizes.values())
    cut: list[list[str]] = [[] for _ in range(num_shares)]
    before = 0
    for name in sorted(sizes):
        middle = before + sizes[name] / 2
        cut[min(num_shares - 1, int(middle * num_shares / total)) if total else 0].append(name)
        before += sizes[name]
    return cut


def is_part(name: str) -> bool:
    """Whether an object in a checkpoint's folder has a part's name."""
    return _PART.fullmatch(name) is not None


def steps_in(paths: list[str]) -> dict[int, list[str]]:
    """Objects by the step of their checkpoint; whatever else lies there is left out."""
    found: dict[int, list[str]] = {}
    for path in paths:
        if match := _STEP.match(path):
            found.setdefault(int(match[1]), []).append(path)
    return found


def _refuse_other_version(body: dict[str, Any]) -> None:
    """A format names its version first, whatever else is in it. One flipped bit of ours is no other version."""
    version = body.get("version")
    if body.get("format") != FORMAT or type(version) is not int or version == VERSION:
        return
    ours = {**body, "version": VERSION}
    if ours.pop("sha256", None) != hash_of(ours):
        raise CheckpointVersionError(
            f"its manifest is of version {version} of the format, and this program reads version {VERSION}"
        )


def _entry(body: dict[str, Any]) -> Entry:
    return Entry(body["dtype"], tuple(body["shape"]), body["sha256"])


def hash_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
