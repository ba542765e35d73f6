"""The loop most people would write: PyTorch, one process or DDP under torchrun. Prints a JSON line per step until ended.

python bench/rivals/ddp.py                                                                one process
python -m torch.distributed.run --standalone --nproc-per-node 2 bench/rivals/ddp.py       two, with DistributedDataParallel
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    model = GPT(ModelSpec(vocab_size=common.VOCAB_SIZE, max_tokens=common.SEQUENCE_LENGTH, **common.MODEL)).to(device)
    wrapped: torch.nn.Module = model
    if world_size > 1:
        dist.init_process_group("gloo")
        wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    mine = range(rank, common.MICRO_BATCHES, world_size)
    for step in itertools.count():
        began = time.monotonic()
        for micro_batch in mine:
            tokens_BS = torch.from_numpy(common.synthetic_tokens(step, micro_batch).astype("int64")).to(device)
            last = micro_batch == mine[-1]
            silent = wrapped.no_sync() if world_size > 1 and not last else contextlib.nullcontext()
            with silent:
                logits_BTV = wrapped(tokens_BS[:, :-1])
                loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BS[:, 1:].flatten())
                (loss / len(mine)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if rank == 0:
            print(json.dumps({"step": step, "began": began, "ended": time.monotonic()}), flush=True)


if __name__ == "__main__":
    main()
