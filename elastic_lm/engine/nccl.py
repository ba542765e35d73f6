"""NCCL as a generation's backend, with what keeps a lost peer from taking its neighbours along.

Written from NCCL's and PyTorch's documentation and known reports; not run with two GPUs yet (README, limits). As everywhere,
nobody blocks on a peer: communicators are non-blocking, waiting is polling, and a dropped group is aborted on a thread of
its own. Integer sums are exact in NCCL as in gloo, so the backend does not show in the bits.
"""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from elastic_lm.engine.process_group import ProcessGroup
from elastic_lm.errors import ConfigError

# Must be in the environment before the first communicator. What the user has set stays.
SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # the watchdog must not end the process: a lost peer is our business
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # nor may the watchdog's watchdog
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_PROPAGATE_ERROR": "0",
    "TORCH_NCCL_USE_COMM_NONBLOCKING": "1",  # an abort can then interrupt a communicator that is still forming
    "TORCH_NCCL_NONBLOCKING_TIMEOUT": "15",  # seconds; the default is half an hour
    "NCCL_NVLS_ENABLE": "0",  # communicators with multicast objects have hung in abort
}
ABORT_HANGS = ((2, 28, 3), (2, 28, 8))  # first and last version in which an abort may hang


def prepare() -> None:
    """Put the settings into the environment.    Raises: ConfigError when this build has no NCCL or a version to avoid."""
    if not dist.is_nccl_available():
        raise ConfigError("workers.collectives=nccl, but this build of PyTorch has no NCCL; use gloo")
    version = tuple(torch.cuda.nccl.version())
    if ABORT_HANGS[0] <= version <= ABORT_HANGS[1]:
        told = ".".join(map(str, version))
        raise ConfigError(f"NCCL {told} may hang when a communicator is aborted; use another version, or gloo")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def form(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> ProcessGroup:
    """A backend with a communicator of these members. Blocks until all have come: call it on a thread."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = dist.ProcessGroupNCCL(store, rank, world_size, options)
    backend.eager_connect_single_device(torch.device("cuda", torch.cuda.current_device()))
    return ProcessGroup(backend)
