"""A process, named so that another one on the same machine knows for certain whether it has ended.

BOOT/NAMESPACE/PID/TICKS: the kernel's boot, the space in which the process id counts, the id, and when the process began in
clock ticks since the boot. Ids are used again, so equal ids alone say nothing; of another machine's or container's processes
nothing is known here, and nothing is said. Linux only: elsewhere a process has no name, and nobody is known to have ended.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")


def this_process() -> str:
    """This one's name; "" where the system tells too little."""
    try:
        return f"{_space()}/{os.getpid()}/{_ticks(os.getpid())}"
    except (OSError, ValueError, IndexError):
        return ""


def has_ended(name: str) -> bool:
    """Whether the process of this name is known to have ended. False when it lives, and when nobody here can know."""
    space, _, rest = name.rpartition("/")[0].rpartition("/")
    ticks = name.rpartition("/")[2]
    try:
        if not space or space != _space():
            return False
        return _ticks(int(rest)) != int(ticks)
    except FileNotFoundError:
        return not _answers(int(rest))
    except ProcessLookupError:
        return True
    except (OSError, ValueError, IndexError):
        return False


def _answers(pid: int) -> bool:
    """Whether there is one of this id. Where /proc is mounted with hidepid, it does not show those of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _space() -> str:
    """In which process ids are unique, as long as the machine is up."""
    boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat(PROC / 'self/ns/pid').st_ino}"


def _ticks(pid: int) -> int:
    """When the process began.    Raises: FileNotFoundError or ProcessLookupError when there is none."""
    state, *_, ticks = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[:20]
    if state in "ZX":  # nothing of it runs any more; only its parent has not asked yet
        raise ProcessLookupError
    return int(ticks)
