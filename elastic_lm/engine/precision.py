"""What is computed in fewer bits, on which devices: weights, moments and sums are fp32 or more in all of them."""

from __future__ import annotations

import torch

from elastic_lm.errors import ConfigError
from elastic_lm.gpus import lacking

LOW_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of matrix products, by autocast


def refuse_lacking(precision: str, device: torch.device) -> None:
    """Raises: ConfigError when this device has no units for the precision."""
    if device.type != "cuda":
        return
    found = lacking(precision, torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    if found is not None:
        raise ConfigError(found)
