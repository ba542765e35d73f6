"""The loop most people would write: PyTorch, one process or DDP under torchrun. A JSON line per step until ended.

With `--checkpoint FILE` rank 0 saves there now and then, and whoever starts goes on from it: what torchrun's restarts need.

python bench/rivals/ddp.py                                                                one process
python -m torch.distributed.run --standalone --nproc-per-node 2 bench/rivals/ddp.py       two, with DistributedDataParallel
"""

from __future__ import annotations

import itertools
import os
import time

import torch
import torch.distributed as dist
import work
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    arguments = work.arguments(__doc__, "--checkpoint")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    replica = work.Work(work.Workload.of(arguments), compiles=arguments.compile)
    start = replica.restore(arguments.checkpoint)
    wrapped: torch.nn.Module = replica.model
    if world_size > 1:
        dist.init_process_group("gloo")
        wrapped = DistributedDataParallel(replica.model, gradient_as_bucket_view=True)
    teller = work.Teller(arguments.steps, rank, world_size, arguments.device)
    for step in itertools.count(start):
        began = time.monotonic()
        replica.gradient(wrapped, step, replica.split(rank, world_size))
        replica.update()
        teller.tell(step, began)
        if arguments.checkpoint is not None and rank == 0 and (step + 1) % work.CHECKPOINT_STEPS == 0:
            replica.save(arguments.checkpoint, step + 1)


if __name__ == "__main__":
    main()
