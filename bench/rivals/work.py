"""What every rival does in a step: the model, batch and precision of our engine; and how it tells of its steps.

A rival differs from another in who adds up gradients and in what becomes of a loss, never in the work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from common import CHECKPOINT_STEPS as CHECKPOINT_STEPS
from workload import Workload, peak_memory

from elastic_lm.model.transformer import GPT

LOW_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def arguments(description: str, *more: str) -> argparse.Namespace:
    """What every rival is told, and `more` names of files and folders."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    Workload.add_to(parser)
    parser.add_argument("--compile", action="store_true", help="the model by torch.compile, with its defaults")
    parser.add_argument(
        "--steps", type=Path, help="a folder where every process tells of its steps; else rank 0 prints"
    )
    for name in more:
        parser.add_argument(name, type=Path)
    return parser.parse_args()


class Work:
    """A replica and its optimizer, the same weights in every process."""

    def __init__(self, workload: Workload, *, compiles: bool = False) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.manual_seed(0)
        self.workload = workload
        self.device = torch.device(workload.device)
        torch.backends.cuda.matmul.allow_tf32 = workload.precision != "fp32"
        self._low = LOW_PRECISIONS.get(workload.precision)
        self._scaler = torch.amp.GradScaler(workload.device, enabled=workload.precision == "fp16")
        self.model = GPT(workload.model).to(self.device)
        if compiles:
            self.model.compile()
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)

    def split(self, rank: int, world_size: int) -> range:
        """The micro-batches of a step that this rank computes."""
        return range(rank, self.workload.micro_batches, world_size)

    def gradient(self, wrapped: Any, step: int, mine: Sequence[int]) -> None:
        """Add the mean gradient of some micro-batches to `.grad`; a `wrapped` model may reduce it with the last of them."""
        for micro_batch in mine:
            tokens_BS = torch.from_numpy(self.workload.tokens(step, micro_batch).astype("int64")).to(self.device)
            last = micro_batch == mine[-1]
            silent = wrapped.no_sync() if hasattr(wrapped, "no_sync") and not last else contextlib.nullcontext()
            with silent:
                with torch.autocast(self.device.type, self._low, enabled=self._low is not None):
                    logits_BTV = wrapped(tokens_BS[:, :-1])
                    loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BS[:, 1:].flatten())
                self._scaler.scale(loss / len(mine)).backward()

    def update(self) -> None:
        """One optimizer step from what is in `.grad`."""
        self._scaler.unscale_(self.optimizer)
        self.clip()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def save(self, path: Path, next_step: int) -> None:
        """Whole or not at all."""
        partial = path.with_suffix(".partial")
        torch.save({**self.state_dict(), "next_step": next_step}, partial)
        partial.replace(path)

    def restore(self, path: Path | None) -> int:
        """The state of a checkpoint if there is one.    Returns: the step to go on with."""
        if path is None or not path.exists():
            return 0
        state = torch.load(path, map_location=self.device, weights_only=True)
        self.load_state_dict(state)
        return int(state["next_step"])


class Teller:
    """A JSON line per step, by a clock that all processes of the machine share."""

    def __init__(self, folder: Path | None, rank: int, world_size: int, device: str = "cpu") -> None:
        self._device = device
        self._always = {"rank": rank, "world_size": world_size, "pid": os.getpid()}
        self._file = sys.stdout if folder is None else (folder / f"{os.getpid()}.jsonl").open("a")
        self._silent = folder is None and rank > 0

    def tell(self, step: int, began: float, **more: Any) -> None:
        """A step that began then has ended now."""
        if not self._silent:
            ended = time.monotonic()
            always = {**self._always, "peak_bytes": peak_memory(self._device)}
            line = {"step": step, "began": began, "ended": ended, **always, **more}
            print(json.dumps(line), file=self._file, flush=True)
