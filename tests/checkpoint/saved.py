"""Small states, saved and damaged, for tests of what is made of them."""

from __future__ import annotations

import hashlib
import json

import torch

from elastic_lm.checkpoint import layout, store
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.storage import Storage

PART_BYTES = 64  # two of the tensors below


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("parameters/a.weight", "parameters/b.bias", "exp_avg/a.weight", "exp_avg/b.bias")
    return {name: torch.randn(2, 4, generator=generator) for name in names}


def save(run: Storage, step: int, seed: int = 0, **meta: object) -> CheckpointInfo:
    return store.save(run, step, state(seed), {"fingerprint": "f", **meta}, part_bytes=PART_BYTES)


def change_version(run: Storage, step: int, version: object) -> str:
    """As if another version of the format had written the checkpoint.    Returns: the manifest's path."""
    path = f"{layout.folder_of(step)}/{layout.MANIFEST}"
    body = {**json.loads(run.read(path)), "version": version}
    del body["sha256"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    run.write(path, json.dumps({**body, "sha256": hashlib.sha256(text).hexdigest()}).encode())
    return path


def parts_of(run: Storage, step: int) -> list[str]:
    return [path for path in run.list(layout.folder_of(step)) if path.endswith(".safetensors")]


def flip(run: Storage, path: str, index: int = -1) -> None:
    data = bytearray(run.read(path))
    data[index] ^= 1
    run.write(path, bytes(data))


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
