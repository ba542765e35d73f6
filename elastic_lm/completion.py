"""What a shell proposes for a run or its config: names in ./runs, and YAML files.

Where nothing fits, shells propose files and folders themselves.
"""

from __future__ import annotations

import glob
import os

RUNS = "runs"
OF_A_RUN = ("config.yaml", "events")  # a folder in ./runs without either is a corpus, or something else


def configs(incomplete: str) -> list[str]:
    """YAML files whose path begins so."""
    found = glob.glob(f"{glob.escape(incomplete)}*.yaml") + glob.glob(f"{glob.escape(incomplete)}*.yml")
    return sorted(path for path in found if os.path.isfile(path))


def runs(incomplete: str) -> list[str]:
    """Names of runs in ./runs that begin so, and YAML files."""
    names = sorted(os.listdir(RUNS)) if os.path.isdir(RUNS) else []
    return [name for name in names if name.startswith(incomplete) and _is_run(name)] + configs(incomplete)


def _is_run(name: str) -> bool:
    return any(os.path.exists(os.path.join(RUNS, name, part)) for part in OF_A_RUN)
