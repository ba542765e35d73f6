"""What is computed in fewer bits, and which devices can: weights, moments and sums are fp32 or more in all of them."""

from __future__ import annotations

import torch

from elastic_lm.errors import ConfigError

LOW_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products, by autocast
OLDEST = {"bf16": (8, 0), "tf32": (8, 0), "fp16": (7, 0)}  # compute capability: Ampere and Volta have units for them


def refuse_lacking(precision: str, device: torch.device) -> None:
    """Raises: ConfigError when this device has no units for the precision."""
    if device.type != "cuda" or precision not in OLDEST:
        return
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST[precision]:
        usable = ["fp32", *(name for name, oldest in OLDEST.items() if found >= oldest)]
        needed = ".".join(map(str, OLDEST[precision]))
        raise ConfigError(
            f"training.precision={precision} needs a GPU of compute capability {needed}, and "
            f"{torch.cuda.get_device_name(device)} has {found[0]}.{found[1]}; use {' or '.join(usable)}"
        )
