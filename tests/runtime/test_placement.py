"""A precision that a cluster's GPUs have no units for is refused before anything is started there. Needs no GPU, no Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic_lm.config import RunConfig
from elastic_lm.errors import ConfigError
from elastic_lm.runtime import cluster, trainer
from elastic_lm.runtime.placement import refuse_lacking, worker_options
from tests.data.corpora import small_corpus


def node(gpu: str | None, *, alive: bool = True, **resources: float) -> dict[str, Any]:
    """As `ray.nodes()` describes one."""
    has: dict[str, float] = {"CPU": 8.0, **resources}
    if gpu is not None:
        has |= {"GPU": 2.0, f"accelerator_type:{gpu}": 1.0}
    return {"NodeID": "0a1b", "NodeManagerHostname": "box-7", "Alive": alive, "Resources": has}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    small_corpus(tmp_path)
    return RunConfig(
        name="placed",
        storage=str(tmp_path),
        data={"tokens": str(tmp_path / "tokens")},
        model={"preset": "tiny"},
        batch={"micro_batches": 2, "micro_batch_size": 2, "sequence_length": 16},
        training={"steps": 10, "precision": "bf16"},
        workers={"num_gpus": 1},
    )


@pytest.fixture
def cluster_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a cluster of these nodes the one that Ray knows."""

    def are(*nodes: dict[str, Any]) -> None:
        monkeypatch.setattr(ray, "nodes", lambda: list(nodes))

    return are


def with_precision(config: RunConfig, precision: str) -> RunConfig:
    return config.model_copy(update={"training": config.training.model_copy(update={"precision": precision})})


@pytest.mark.parametrize(
    ("gpu", "precision", "remedy"),
    [
        ("T4", "bf16", "use fp32 or fp16"),
        ("V100", "tf32", "use fp32 or fp16"),
        ("P100", "fp16", "use fp32,"),
        ("K80", "bf16", "use fp32,"),
    ],
)
def test_a_gpu_without_units_is_refused_by_node(
    config: RunConfig, cluster_of: Callable[..., None], gpu: str, precision: str, remedy: str
) -> None:
    cluster_of(node("A100"), node(gpu))
    with pytest.raises(ConfigError) as caught:
        refuse_lacking(with_precision(config, precision))
    assert f"training.precision={precision} needs a GPU of compute capability" in str(caught.value)
    assert f"the {gpu} of node box-7 has" in str(caught.value)
    assert remedy in str(caught.value)
    assert "workers.resources, e.g. accelerator_type:A100: 0.001" in str(caught.value)


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [node(None)],
        [node("H100"), node("A100")],
        [node("some-later-gpu")],  # not known here: its worker looks
        [node("T4", alive=False)],
    ],
)
def test_others_are_taken(config: RunConfig, cluster_of: Callable[..., None], nodes: list[dict[str, Any]]) -> None:
    cluster_of(*nodes)
    refuse_lacking(config)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_t4_is_taken_for_what_it_can(config: RunConfig, cluster_of: Callable[..., None], precision: str) -> None:
    cluster_of(node("T4"))
    refuse_lacking(with_precision(config, precision))


def test_a_run_on_cpus_asks_for_no_gpu(config: RunConfig, cluster_of: Callable[..., None]) -> None:
    on_cpus = config.model_copy(update={"workers": config.workers.model_copy(update={"num_gpus": 0.0})})
    cluster_of(node("T4"))
    refuse_lacking(on_cpus)


def test_a_node_that_no_worker_fits_is_not_asked(config: RunConfig, cluster_of: Callable[..., None]) -> None:
    pinned = {"accelerator_type:A100": 0.001}
    kept = config.model_copy(update={"workers": config.workers.model_copy(update={"resources": pinned})})
    cluster_of(node("T4"), node("A100"))
    refuse_lacking(kept)
    assert worker_options(kept) == {"num_cpus": 1.0, "num_gpus": 1.0, "resources": pinned}


def test_fit_refuses_before_any_actor(
    config: RunConfig, cluster_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "connected", lambda min_cpus: contextlib.nullcontext("connected"))
    cluster_of(node("T4"))
    monkeypatch.setattr(trainer, "create_mailbox", lambda name: pytest.fail("an actor was made"))
    with pytest.raises(ConfigError, match="training.precision=bf16 needs a GPU"):
        trainer.fit(config, quiet=True)
    assert not Path(config.run_url.removeprefix("file://")).exists(), "and nothing was written"
