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

# Devlin et al. 2019 (base, large) and Turc et al. 2019 (the smaller ones).
BERT: dict[str, Any] = {
    **GPT2,
    "attention": "bidirectional",
    "norm_placement": "post",
    "embedding_norm": True,
    "head_transform": True,
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
    "bert-tiny": Preset({"num_layers": 2, "num_heads": 2, "width": 128, **BERT}, 396_544, "any CPU"),
    "bert-mini": Preset({"num_layers": 4, "num_heads": 4, "width": 256, **BERT}, 3_159_040, "a laptop CPU"),
    "bert-small": Preset({"num_layers": 4, "num_heads": 8, "width": 512, **BERT}, 12_609_536, "a few CPU cores"),
    "bert-base": Preset({"num_layers": 12, "num_heads": 12, "width": 768, **BERT}, 85_054_464, "one GPU with 8 GiB"),
    "bert-large": Preset(
        {"num_layers": 24, "num_heads": 16, "width": 1024, **BERT}, 302_309_376, "one GPU with 24 GiB"
    ),
}
