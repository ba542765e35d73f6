"""The version of elastic-lm that submits a job, told to the one that is to train it.

Invariant: a job trains with the version that checked its configuration, or nothing of its run is touched. A client packs a
configuration with all of its own version's fields and defaults, and the bits depend on the code, so any difference is refused.
The versions of PyTorch and Python are not compared: a client computes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from elastic_lm import __version__
from elastic_lm.errors import ConfigError

VARIABLE = "ELASTIC_LM_SUBMITTED_BY"


def variables() -> dict[str, str]:
    """What a client adds to its job's environment."""
    return {VARIABLE: __version__}


def check(environment: Mapping[str, str]) -> None:
    """Raises: ConfigError when this is a job of another version. What nobody submitted passes."""
    client = environment.get(VARIABLE, __version__)
    if client != __version__:
        raise ConfigError(
            f"this job was submitted by elastic-lm {client}, and the cluster has elastic-lm {__version__}; nothing of the run "
            f"was touched. Give `elastic-lm submit` with elastic-lm {__version__} (the wheel of the cluster's image), or have "
            f"{client} on all nodes of the cluster and submit again; `elastic-lm version` tells what is installed"
        )
