"""A model's blocks through torch.compile, pinned, so that equal inputs give equal bits on every worker: the probe looks.

Block by block, and not the model whole: blocks are alike, so that one graph serves them all, and it is a small one. Head and
loss stay outside; they are written by chunks already. Shapes never change in a run, so nothing is compiled twice, whatever
comes and goes; what was compiled stays in a cache of the machine, where the next worker finds it.

Pinned means: no kernel is chosen by a measurement, which another worker might make otherwise. Compiled blocks do not have the
bits of those that are not: to compile is a part of a run's identity.
"""

from __future__ import annotations

import os
import subprocess
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from elastic_lm.errors import ConfigError
from elastic_lm.model.transformer import GPT

# Read when torch._inductor is first imported: what is set in its config holds for one thread, and a GPU's backward runs in
# another. One thread of compilation, for more are processes of their own, which outlive a worker that is killed.
SETTINGS = {"TORCHINDUCTOR_DETERMINISTIC": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def prepare() -> None:
    """Pin what is compiled. To be called in each thread that computes, and before anything imports torch._inductor.

    Deterministic algorithms on CPUs, too: whenever something was compiled, PyTorch gives Inductor that setting for its own.
    """
    os.environ.update(SETTINGS)
    torch.use_deterministic_algorithms(True)
    # It is for finding bugs, and costs a write of every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def compile_blocks(model: nn.Module, device: torch.device) -> None:
    """In place: names and parameters stay. Of a model that is not ours, the whole.

    Raises: ConfigError when this machine has no compiler for the device.
    """
    compiler(device)
    if isinstance(model, GPT):
        for block in model.blocks:
            block.compile(fullgraph=True, dynamic=False)
    else:
        model.compile(dynamic=False)


def not_compiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Within it blocks run as they are written: without dropout they would be compiled once more."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()  # the stance's module takes a second to import


def compiler(device: torch.device) -> str:
    """Name and version of what makes machine code of graphs.    Raises: ConfigError when there is none."""
    if device.type == "cuda":
        try:
            return f"triton {version('triton')}"
        except PackageNotFoundError:
            raise ConfigError(
                "training.compile=true on GPUs needs Triton, which comes with a CUDA build of PyTorch; install one, or set "
                "training.compile: false"
            ) from None
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        found = get_cpp_compiler()
        told = subprocess.run([found, "--version"], check=True, capture_output=True, text=True, timeout=30)
    except (InvalidCxxCompiler, OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            "training.compile=true on CPUs needs a C++ compiler on every node, and here is none that works; install one "
            "(apt-get install g++), or set training.compile: false"
        ) from error
    return told.stdout.splitlines()[0]
