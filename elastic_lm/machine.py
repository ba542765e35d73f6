"""What this machine has, and what of it the container may use. Read from files of the kernel, which are arguments for tests."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")
CPUINFO = Path("/proc/cpuinfo")


def system_name() -> str:
    """Distribution, kernel, architecture and C library."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        distribution = ""
    parts = [
        distribution,
        f"{platform.system()} {platform.release()}",
        platform.machine(),
        " ".join(platform.libc_ver()),
    ]
    return ", ".join(part.strip() for part in parts if part.strip())


def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """As the kernel tells it; the architecture where it tells none."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_limit(root: Path = CGROUPS, own: Path = OWN_GROUP) -> float | None:
    """CPUs that the control groups of this process allow; None when they set no limit.

    Version 2: the lowest on the way from its group to the root. Version 1: the root's, which is the container's own.
    """
    quotas = [_words(folder / "cpu.max") for folder in _groups(root, own)]
    quotas.append(_words(root / "cpu/cpu.cfs_quota_us") + _words(root / "cpu/cpu.cfs_period_us"))
    return min(
        (int(quota[0]) / int(quota[1]) for quota in quotas if len(quota) == 2 and quota[0].isdigit()), default=None
    )


def memory_limit(root: Path = CGROUPS, own: Path = OWN_GROUP) -> int | None:
    """The same for bytes of memory. Version 1 says no limit by a number larger than any memory."""
    found = [_words(folder / "memory.max") for folder in _groups(root, own)]
    found.append(_words(root / "memory/memory.limit_in_bytes"))
    return min((int(words[0]) for words in found if words and words[0].isdigit()), default=None)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    name = next((word[3:] for word in _words(own) if word.startswith("0::/")), "/")
    folder = root / name.strip("/")
    yield folder
    while root in folder.parents:
        folder = folder.parent
        yield folder


def _words(file: Path) -> list[str]:
    """Nothing when the file is not there: each version of control groups has files of its own."""
    try:
        return file.read_text().split()
    except OSError:
        return []
