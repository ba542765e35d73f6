"""Settings under which equal inputs give equal bits, named and switched on when the reduction is exact."""

from __future__ import annotations

import os

import torch

from elastic_lm.engine import compiled
from elastic_lm.engine.spec import EngineSpec

CUDA_SETTINGS = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS picks its algorithm by workspace; must be set before its first use
}


def prepare(spec: EngineSpec) -> None:
    """`make_deterministic` as a run wants it: in each process and thread that computes for it."""
    if spec.compile:
        compiled.prepare()
    make_deterministic(
        spec.device, exact=spec.reduction == "exact", threads=spec.threads, tf32=spec.precision == "tf32"
    )


def make_deterministic(device: str, *, exact: bool, threads: int, tf32: bool = False) -> None:
    """Called once per process and thread that computes, before the first operation.

    CPU: a fixed number of threads, for reductions split their sums by thread. CUDA: TF32 where it is asked for and nowhere
    else; deterministic algorithms only, no run-time choice of kernels (cuDNN benchmark), no reduced-precision accumulation
    in bf16 and fp16 products. Attention in flash's kernels or plain products: which, follows from precision and mask.
    """
    torch.set_num_threads(threads)
    if not device.startswith("cuda"):
        return
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    if not exact:
        return
    for name, value in CUDA_SETTINGS.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # their backward need not repeat its bits; what is
    torch.backends.cuda.enable_cudnn_sdp(False)  # left is flash, whose does, or plain products
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
