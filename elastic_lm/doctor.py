"""Whether this machine, its cluster and its storage can train: a list of findings, fit for a bug report.

Invariant: no finding holds a secret or says who the user is; every one goes through `Privacy`. Nothing hangs: what may (a
driver, a cluster) is asked in a process of its own, with a deadline. Nothing is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from elastic_lm import __version__, machine, storage_probe
from elastic_lm.config import MetricsConfig, RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.windows import read_block
from elastic_lm.errors import DataError, NotFoundError, StorageError
from elastic_lm.privacy import Privacy, variables
from elastic_lm.storage import Storage
from elastic_lm.storage_probe import Probe
from elastic_lm.terminal import bytes_told

PACKAGES = ("torch", "ray", "pyarrow", "s3fs", "numpy", "pydantic", "tokenizers", "safetensors", "typer")
DEVICES_S, CLUSTER_S = 60.0, 45.0  # importing torch takes a second, joining a cluster three; ten times that under load
OPEN_FILES = 4096  # Ray raises the soft limit towards the hard one, and warns below this
SHARED_MEMORY_BYTES = 1e9  # Ray's object store lies there, and windows of tokens of 32 to 64 MiB in it
FULL_DISK = 0.95  # Ray makes no more objects on a disk that is fuller
FREE_DISK_BYTES = 1e9  # logs of a long run
# `status` compares a run's times with this machine's clock. S3 refuses requests only from 15 minutes off.
CLOCK_S = 5.0
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")

REMEDIES = {
    "write": "check the address, AWS_ENDPOINT_URL where it is not AWS, and that these credentials may write there",
    "read": "check that these credentials may read, and that no cache is in between",
    "ranged read": "tokens are read by ranges; check what is between here and the storage",
    "create-only": "two runs of one name could both go on; use a storage that refuses a second create (If-None-Match: *)",
    "list": "checkpoints and logs are found by listing; check the right to list",
    "delete": "old checkpoints are deleted; check the right to, and remove the object by hand",
    "clock": "check the right to see the properties of objects",
}


@dataclass(frozen=True)
class Check:
    """One finding. A warning is something to know; a failure keeps runs from training. `remedy` is for what is not ok."""

    name: str
    status: Literal["ok", "warning", "failed"]
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Answer:
    """What a process was found to say; None with the reason when it gave no answer."""

    value: dict[str, Any] | None
    error: str = ""


def examine(config: RunConfig | None = None, url: str | None = None) -> Iterator[Check]:
    """Every check, each as it is done. `config`: of the run that is meant; `url`: of a storage alone."""
    metrics = config.metrics if config else MetricsConfig()
    wants_gpu = config is not None and config.device == "cuda"
    address = os.environ.get("RAY_ADDRESS")
    parts: tuple[Callable[[], Iterable[Check]], ...] = (
        lambda: versions(importlib.metadata.version),
        lambda: [Check("system", "ok", machine.system_name())],
        lambda: [
            cpus(os.cpu_count() or 1, len(os.sched_getaffinity(0)), machine.cpu_limit(), joins=address is not None)
        ],
        lambda: [memory(psutil.virtual_memory(), machine.memory_limit())],
        lambda: devices(ask("elastic_lm.engine.devices", DEVICES_S), driver_in(NVIDIA_DRIVER), wants_gpu=wants_gpu),
        lambda: [shared_memory(shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0)],
        lambda: [open_files(*resource.getrlimit(resource.RLIMIT_NOFILE))],
        lambda: [temporary_folder(tempfile.gettempdir(), shutil.disk_usage(tempfile.gettempdir()))],
        lambda: [metrics_port(metrics.host, metrics.port)],
        lambda: [cluster(address)],
        lambda: storages(config, url),
        lambda: [Check("environment", "ok", ", ".join(variables(os.environ)) or "no variable that matters is set")],
    )
    privacy = Privacy.of_this_user()
    for part in parts:
        for check in part():
            yield replace(check, text=privacy.mask(check.text), remedy=privacy.mask(check.remedy))


def ask(module: str, timeout_s: float, **environment: str) -> Answer:
    """What `python -m module` prints as JSON. It is ended, with all it has started, when it takes longer than `timeout_s`."""
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    with subprocess.Popen(
        [sys.executable, "-m", module],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    ) as process:
        try:
            told, complaint = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return Answer(None, f"no answer within {timeout_s:.0f} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    try:
        return Answer(json.loads(told.strip().rpartition("\n")[2]))
    except ValueError:
        last = complaint.strip().rpartition("\n")[2]
        return Answer(None, last or f"ended with code {process.returncode} and said nothing")


# -- the machine -------------------------------------------------------------------------------------------------------


def versions(version_of: Callable[[str], str]) -> Iterator[Check]:
    """Of elastic-lm, Python and the packages it stands on."""
    yield Check("elastic-lm", "ok", f"{__version__}, Python {platform.python_version()}")
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version_of(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    yield Check("packages", "ok", ", ".join(found))
    if missing:
        yield Check("packages", "failed", f"not installed: {', '.join(missing)}", "install elastic-lm anew, with pip")


def cpus(num_cpus: int, num_usable: int, limit: float | None, *, joins: bool) -> Check:
    """How many there are, and how many may be used. `joins`: a cluster is there, so none is started with these CPUs."""
    usable = min(num_usable, limit or math.inf)
    text = f"{usable:g} of {num_cpus} may be used; {machine.processor_name()}"
    if usable >= num_cpus or joins:
        return Check("CPUs", "ok", text)
    most = max(1, int(usable))
    return Check("CPUs", "warning", text, f"a local cluster counts {num_cpus}; keep to workers.max x num_cpus = {most}")


def memory(found: Any, limit: int | None) -> Check:
    """Of the machine (as psutil tells it), and what the container may use of it."""
    held = f"; {bytes_told(limit)} allowed in this container" if limit is not None and limit < found.total else ""
    return Check("memory", "ok", f"{bytes_told(found.available)} of {bytes_told(found.total)} free{held}")


def driver_in(file: Path) -> str | None:
    """Version of NVIDIA's kernel module; None where there is none."""
    with contextlib.suppress(OSError, StopIteration):
        return next(word for word in file.read_text().split() if word[0].isdigit() and "." in word)
    return None


def devices(answer: Answer, driver: str | None, *, wants_gpu: bool) -> Iterator[Check]:
    """What PyTorch sees, and whether the C kernel of exact sums works. `driver`: NVIDIA's, if it is loaded."""
    found = answer.value
    if found is None:
        yield Check("PyTorch", "failed", f"does not start: {answer.error}", "install elastic-lm anew, with pip")
        return
    build = f"CUDA {found['cuda']}" if found["cuda"] else "CPUs only"
    told = f"built for {build}, instruction set {found['instruction_set']}"
    yield Check("PyTorch", "ok", told + (f", NCCL {found['nccl']}" if found["nccl"] else ""))
    seen = f"{', '.join(found['gpus']) or 'none'}{f'; driver {driver}' if driver else ''}"
    if not found["gpus"] and (driver or wants_gpu):
        remedy = (
            "install a driver" if not driver else "check CUDA_VISIBLE_DEVICES, and that PyTorch is built for this CUDA"
        )
        yield Check("GPUs", "warning", seen, remedy)
    else:
        yield Check("GPUs", "ok", seen)
    if found["kernel"]:
        yield Check("C kernel", "ok", "compiles and loads")
    else:
        remedy = "install a C compiler (apt-get install gcc libc6-dev), on every node; the bits are the same without"
        yield Check("C kernel", "warning", "none: exact sums by torch operations, over sockets, slower", remedy)


def shared_memory(free: float) -> Check:
    """Room for Ray's object store."""
    text = f"{bytes_told(free)} free"
    if free >= SHARED_MEMORY_BYTES:
        return Check("/dev/shm", "ok", text)
    return Check(
        "/dev/shm", "warning", text, "Ray then keeps objects on disk; in Docker, run with --shm-size=2gb or more"
    )


def open_files(soft: int, hard: int) -> Check:
    """Limits of this process. Ray raises the soft one itself."""
    text = _limit(soft) + (f", can be raised to {_limit(hard)}" if soft != hard else "")
    if hard == resource.RLIM_INFINITY or hard >= OPEN_FILES:
        return Check("open files", "ok", text)
    return Check(
        "open files", "warning", text, f"every worker needs sockets; raise the hard limit to {OPEN_FILES} or more"
    )


def _limit(number: int) -> str:
    return "any number" if number == resource.RLIM_INFINITY else f"{number:,}"


def temporary_folder(path: str, usage: Any) -> Check:
    """Where Ray puts its logs and what does not fit into memory. `usage`: as shutil tells it."""
    text = f"{path}, {bytes_told(usage.free)} of {bytes_told(usage.total)} free"
    if usage.free >= FREE_DISK_BYTES and usage.free >= (1 - FULL_DISK) * usage.total:
        return Check("temporary folder", "ok", text)
    remedy = f"Ray stops making objects when a disk is {FULL_DISK:.0%} full; make room, or set TMPDIR to another disk"
    return Check("temporary folder", "warning", text, remedy)


# -- ports and the cluster ---------------------------------------------------------------------------------------------


def metrics_port(host: str, port: int | None) -> Check:
    """Whether the Prometheus endpoint gets the port it wants."""
    if port is None:
        return Check("metrics port", "ok", "no endpoint, as configured")
    try:
        socket.create_server((host, port)).close()
    except (OSError, TypeError, ValueError, OverflowError) as error:  # a name that cannot be one is not an OSError
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            remedy = "a run takes the next free one, and says which; or set metrics.port"
            return Check("metrics port", "warning", f"{port} on {host} is taken", remedy)
        return Check(
            "metrics port", "warning", f"{port} on {host} cannot be had: {error}", "set metrics.host or metrics.port"
        )
    return Check("metrics port", "ok", f"{port} on {host} is free")


def cluster(address: str | None, timeout_s: float = CLUSTER_S) -> Check:
    """Whether the cluster that runs would join answers."""
    if address is None:
        return Check("cluster", "ok", "RAY_ADDRESS is not set: `elastic-lm train` starts a local one")
    answer = ask("elastic_lm.runtime.look", timeout_s, RAY_ADDRESS=address)
    if answer.value is not None:
        return Check("cluster", "ok", answer.value["sentence"])
    if answer.error.startswith("RAY_ADDRESS"):  # our own message, with its remedy
        return Check("cluster", "failed", answer.error)
    remedy = "start a cluster there with `ray start --head`, or unset RAY_ADDRESS to train on a local one"
    return Check("cluster", "failed", f"RAY_ADDRESS={address}: {answer.error}", remedy)


# -- storage -----------------------------------------------------------------------------------------------------------


def storages(config: RunConfig | None, url: str | None) -> Iterator[Check]:
    """Of a run: where it is kept, and its corpus. Or an address that was given."""
    address = config.storage if config else url
    if address is None:
        yield Check("storage", "ok", "not tried: name a RUN.YAML or an address")
        return
    yield from storage(address, storage_probe.probe(address))
    if config is not None:
        yield corpus(config.data.tokens)


def storage(address: str, probe: Probe) -> Iterator[Check]:
    """What a probe has found."""
    worked = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in probe.seconds.items())
    if not probe.failures:
        yield Check("storage", "ok", f"{address}: {worked}")
    for name, reason in probe.failures.items():
        yield Check("storage", "failed", f"{reason}{f' (what worked: {worked})' if worked else ''}", REMEDIES[name])
    if probe.ahead_s is not None:
        yield clock(probe.ahead_s, probe.uncertain_s)


def clock(ahead_s: float, uncertain_s: float) -> Check:
    """`ahead_s`: of storage's clock before this machine's, known up to `uncertain_s`."""
    if abs(ahead_s) - uncertain_s <= CLOCK_S:
        return Check("clock", "ok", f"within {abs(ahead_s) + uncertain_s:.1f} s of storage's")
    text = f"{abs(ahead_s):.0f} s {'behind' if ahead_s > 0 else 'ahead of'} storage's"
    return Check(
        "clock", "warning", text, "set this machine's clock (NTP); what `status` says of times is off by as much"
    )


def corpus(address: str) -> Check:
    """Whether a run's tokens are there and can be read."""
    tokens = Storage.open(address, deadline_s=storage_probe.DEADLINE_S, retries=storage_probe.RETRIES)
    try:
        manifest = Manifest.load(tokens)
    except DataError as error:
        return Check("corpus", "warning" if isinstance(error.__cause__, NotFoundError) else "failed", str(error))
    except StorageError as error:
        return Check("corpus", "failed", str(error), REMEDIES["read"])
    try:
        if manifest.blocks:
            read_block(tokens, manifest, 0)
    except (DataError, StorageError) as error:
        return Check("corpus", "failed", str(error))
    told = f"{manifest.num_tokens:,} tokens, vocabulary {manifest.vocab_size:,}"
    return Check("corpus", "ok", f"{address}: {told}; the first block is whole")


def failed(checks: Iterable[Check]) -> bool:
    """Whether anything keeps runs from training."""
    return any(check.status == "failed" for check in checks)
