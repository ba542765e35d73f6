"""Which GPUs have units for which precision. Knows no torch: a driver asks it about GPUs of other machines.

Source: NVIDIA's CUDA C programming guide, compute capabilities: Volta (7.0) multiplies matrices in fp16, Ampere (8.0) in bf16
and TF32, too. An older GPU computes them slower than fp32, or not at all.
"""

from __future__ import annotations

Capability = tuple[int, int]

OLDEST: dict[str, Capability] = {"bf16": (8, 0), "tf32": (8, 0), "fp16": (7, 0)}

# Ray's names for NVIDIA's data-centre GPUs before Ampere. One that is not here has all, or its worker finds out.
OLD: dict[str, Capability] = {"K80": (3, 7), "P100": (6, 0), "P4": (6, 1), "V100": (7, 0), "T4": (7, 5)}


def lacking(precision: str, gpu: str, capability: Capability) -> str | None:
    """The sentence that refuses this precision on this GPU, with a remedy; None when the GPU has units for it."""
    oldest = OLDEST.get(precision)
    if oldest is None or capability >= oldest:
        return None
    usable = ["fp32", *(name for name, needed in OLDEST.items() if capability >= needed)]
    return (
        f"training.precision={precision} needs a GPU of compute capability {_dotted(oldest)}, and {gpu} has "
        f"{_dotted(capability)}; use {' or '.join(usable)}"
    )


def _dotted(capability: Capability) -> str:
    return ".".join(map(str, capability))
