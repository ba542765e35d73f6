"""elastic-lm: pre-training on a Ray cluster whose size changes under it, while losses and weights keep their bits.

Importing the package imports neither ray nor torch; the names below arrive when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Event",
    "EventKind",
    "Experiment",
    "ExperimentResult",
    "Run",
    "RunConfig",
    "RunResult",
    "RunStatus",
    "__version__",
    "fit",
]

if TYPE_CHECKING:
    from elastic_lm.config import RunConfig
    from elastic_lm.events.types import Event, EventKind
    from elastic_lm.experiment.result import ExperimentResult
    from elastic_lm.experiments import Experiment
    from elastic_lm.result import RunResult
    from elastic_lm.run import Run, RunStatus
    from elastic_lm.runtime.trainer import fit

_HOMES = {
    "Event": "elastic_lm.events.types",
    "EventKind": "elastic_lm.events.types",
    "Experiment": "elastic_lm.experiments",
    "ExperimentResult": "elastic_lm.experiment.result",
    "Run": "elastic_lm.run",
    "RunConfig": "elastic_lm.config",
    "RunResult": "elastic_lm.result",
    "RunStatus": "elastic_lm.run",
    "fit": "elastic_lm.runtime.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'elastic_lm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
