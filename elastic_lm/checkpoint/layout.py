"""How a checkpoint looks in storage: names, and the manifest that makes its parts count.

`checkpoints/step-00001000/` holds parts (safetensors) and `manifest.json`, written last: no manifest, no checkpoint.
A manifest carries the hash of every part and of itself, so that a torn, cut or flipped one is known as such. The step in
a name is the number of steps that the state has applied, which is also the next step to train.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from elastic_lm.errors import CheckpointError

FORMAT = "elastic-lm checkpoint"
VERSION = 1
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
SET_ASIDE = "manifest.damaged.json"
_PART = re.compile(r"part-\d{5}-[0-9a-f]{16}\.safetensors")
_STEP = re.compile(r"checkpoints/step-(\d{8,})/")


@dataclass(frozen=True)
class Part:
    """One safetensors object: its name in the checkpoint's folder, its size, its hash and the tensors in it."""

    name: str
    size_bytes: int
    sha256: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of. `meta` is the writer's: fingerprint of the run's identity, digests, environment."""

    step: int
    parts: tuple[Part, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> bytes:
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps({**body, "sha256": _hash(body)}, indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """The inverse of `to_json`.    Raises: CheckpointError on anything else, with the reason."""
        try:
            body = json.loads(data)
            told = body.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"its manifest of {len(data)} bytes is torn or not one") from error
        if body.get("format") != FORMAT or body.get("version") != VERSION:
            raise CheckpointError(
                f"its manifest is {body.get('format')!r} version {body.get('version')!r}; this program reads {FORMAT!r} "
                f"version {VERSION}"
            )
        if told != _hash(body):
            raise CheckpointError("its manifest does not have the hash that it names")
        parts = tuple(Part(**{**part, "tensors": tuple(part["tensors"])}) for part in body["parts"])
        for part in parts:
            if not _PART.fullmatch(part.name):
                raise CheckpointError(f"its manifest names the part {part.name!r}, which is not a name of ours")
        return cls(body["step"], parts, body["meta"])


def folder_of(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}"


def part_name(index: int, sha256: str) -> str:
    """Named by content: two writers of one step can only disagree about the manifest, never about a part."""
    return f"part-{index:05d}-{sha256[:16]}.safetensors"


def steps_in(paths: list[str]) -> dict[int, list[str]]:
    """Objects by the step of their checkpoint; whatever else lies there is left out."""
    found: dict[int, list[str]] = {}
    for path in paths:
        if match := _STEP.match(path):
            found.setdefault(int(match[1]), []).append(path)
    return found


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
