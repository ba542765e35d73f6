"""What the benchmarks share: how figures are told, and what a run on a cluster has beside its work."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

CORPUS_VOCAB_SIZE = 512  # where the engine reads a corpus; the least that a tokenizer may have is more than 256
CHECKPOINT_STEPS = 20  # between two checkpoints of those who cannot do without


def machine() -> str:
    """One line that says where figures come from."""
    with open("/proc/cpuinfo") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores, {name}, Python {platform.python_version()}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """`median (lowest - highest)`."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
