"""The admission probe: one fixed micro-batch's gradient, as a hash. Equal bits across machines are checked, not assumed."""

from __future__ import annotations

import hashlib
import platform

import torch

from elastic_lm.engine.compiled import compiler
from elastic_lm.engine.step import Replica


def environment(threads: int, device: str, *, compiles: bool = False) -> dict[str, str]:
    """What a gradient's bits may depend on besides the run's identity, for people to compare."""
    found = {
        "torch": str(torch.__version__),  # else whoever unpickles it imports PyTorch
        "machine": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(threads),
        "device": device,
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = str(torch.version.cuda)
    if compiles:
        found["compiler"] = compiler(torch.device(device))
    return found


def probe(replica: Replica) -> str:
    """sha256 of the summed gradient of one synthetic micro-batch on the initial weights, and of what Muon makes of those.

    Warms the process up, too.
    """
    spec = replica.spec
    reduction = replica.new_reduction()
    reduction.begin(0)
    shape = (spec.micro_batch_size, spec.sequence_length + 1)
    positions = torch.arange(shape[0] * shape[1])
    tokens_BS = (positions * 2_654_435_761 % 2**32 % spec.model.vocab_size).reshape(shape)
    replica.add_micro_batch(reduction, tokens_BS, step=0, micro_batch=0)
    digest = hashlib.sha256(reduction.raw_total())
    for tensor in replica.optimizer.trial():
        digest.update(tensor.float().cpu().contiguous().numpy().data)
    return digest.hexdigest()
