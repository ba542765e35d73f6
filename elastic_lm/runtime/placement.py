"""Where Ray may put a worker, and whether it can compute there: found out before anything is started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from elastic_lm import gpus
from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError

ACCELERATOR = "accelerator_type:"  # what Ray names a node's GPU by, among its resources


def worker_options(config: RunConfig) -> dict[str, Any]:
    """What a worker's actor holds, as options of Ray."""
    workers = config.workers
    return {"num_cpus": workers.num_cpus, "num_gpus": workers.num_gpus, "resources": dict(workers.resources)}


def _fits(config: RunConfig, node: Mapping[str, Any]) -> bool:
    """A worker could come to this node, were it idle."""
    workers, has = config.workers, node["Resources"]
    wanted = {"CPU": workers.num_cpus, "GPU": workers.num_gpus, **workers.resources}
    return bool(node["Alive"]) and all(has.get(name, 0.0) >= amount for name, amount in wanted.items())


def refuse_lacking(config: RunConfig) -> None:
    """Of a run on GPUs. A GPU that is not known here is left to the worker that gets it, which refuses by itself.

    Raises: ConfigError when a worker could come to a node whose GPU has no units for the run's precision.
    """
    if config.device != "cuda":
        return
    for node in ray.nodes():
        if not _fits(config, node):
            continue
        for gpu in (name.removeprefix(ACCELERATOR) for name in node["Resources"] if name.startswith(ACCELERATOR)):
            capability = gpus.OLD.get(gpu)
            if capability is None:
                continue
            sentence = gpus.lacking(config.training.precision, f"the {gpu} of node {_name(node)}", capability)
            if sentence is not None:
                raise ConfigError(
                    f"{sentence}, or keep workers to other GPUs with workers.resources, e.g. {ACCELERATOR}A100: 0.001"
                )


def _name(node: Mapping[str, Any]) -> str:
    return str(node.get("NodeManagerHostname") or node.get("NodeID"))
