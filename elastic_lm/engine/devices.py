"""What this process's PyTorch finds on the machine, as one JSON object: `python -m elastic_lm.engine.devices`.

In a process of its own, because a broken driver may hang or crash whoever asks it.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from elastic_lm.engine import kernel


def devices() -> dict[str, Any]:
    """PyTorch's build, its devices, and whether the C kernel works."""
    has_cuda = torch.cuda.is_available()
    return {
        "torch": str(torch.__version__),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if has_cuda and dist.is_nccl_available() else None,
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count() if has_cuda else 0)],
        "kernel": kernel.available(torch.device("cpu")),
    }


if __name__ == "__main__":
    print(json.dumps(devices()))
