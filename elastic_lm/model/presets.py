"""Known shapes by name, each with what it needs. Vocabulary and sequence length come from the data and the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """`shape` are fields of ModelSpec; `parameters` leaves out embedding, positions and head; `needs` is for people."""

    shape: dict[str, Any]
    parameters: int
    needs: str


GPT2: dict[str, Any] = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu",
    "bias": True,
    "tied": True,
}

PRESETS: dict[str, Preset] = {
    "tiny": Preset({"num_layers": 2, "num_heads": 4, "width": 64}, 100_672, "any CPU; tests"),
    "mini": Preset({"num_layers": 4, "num_heads": 4, "width": 128}, 803_968, "a laptop CPU; the demo"),
    "10m": Preset({"num_layers": 6, "num_heads": 6, "width": 384, **GPT2}, 10_647_552, "a few CPU cores; benchmarks"),
    "gpt2": Preset({"num_layers": 12, "num_heads": 12, "width": 768, **GPT2}, 85_056_000, "one GPU with 8 GiB"),
    "gpt2-medium": Preset(
        {"num_layers": 24, "num_heads": 16, "width": 1024, **GPT2}, 302_311_424, "one GPU with 24 GiB"
    ),
    "1.3b": Preset(
        {"num_layers": 24, "num_heads": 16, "width": 2048, "tied": False}, 1_209_632_768, "GPUs with 80 GiB"
    ),
}
