"""Settings for equal bits: CUDA's are switched on for an exact run on CUDA, and for nothing else. Needs no CUDA."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from elastic_lm.engine import determinism
from elastic_lm.engine.determinism import make_deterministic
from tests.engine.members import tiny_spec

FLAGS = [
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
]


def settings() -> tuple[list[bool], bool]:
    attention = [torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()]
    return [getattr(module, name) for module, name in FLAGS] + attention, torch.are_deterministic_algorithms_enabled()


def set_to(flags: list[bool], algorithms: bool) -> None:
    *flags, efficient, cudnn = flags
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    for (module, name), value in zip(FLAGS, flags, strict=True):
        setattr(module, name, value)
    torch.use_deterministic_algorithms(algorithms)


LOOSE = ([True] * (len(FLAGS) + 2), False)
STRICT = ([False] * (len(FLAGS) + 2), True)


@pytest.fixture(autouse=True)
def _loose(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything as loose as it can be, and afterwards as it was."""
    before, threads = settings(), torch.get_num_threads()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "so that it is removed afterwards, whoever sets it")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    set_to(*LOOSE)
    yield
    set_to(*before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_exact_on_cuda_switches_everything(device: str) -> None:
    make_deterministic(device, exact=True, threads=1)
    assert settings() == STRICT
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_what_was_asked_for(exact: bool, tf32: bool) -> None:
    make_deterministic("cuda", exact=exact, threads=1, tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 is tf32 and torch.backends.cudnn.allow_tf32 is tf32


@pytest.mark.parametrize(
    ("device", "exact", "tf32"), [("cpu", True, False), ("cpu", False, False), ("cuda", False, True)]
)
def test_nothing_else_switches_anything(device: str, exact: bool, tf32: bool) -> None:
    make_deterministic(device, exact=exact, threads=1, tf32=tf32)
    assert settings() == LOOSE
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_workspace_that_somebody_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other value that is deterministic; torch itself refuses the rest."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic("cuda", exact=True, threads=1)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("device", "exact"), [("cpu", True), ("cpu", False), ("cuda", True)])
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_of_the_run(device: str, exact: bool, threads: int) -> None:
    make_deterministic(device, exact=exact, threads=threads)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_settings_of_a_run_follow_from_its_spec(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In each process and thread: tf32 is on where it was chosen."""
    told: list[Any] = []
    monkeypatch.setattr(determinism, "make_deterministic", lambda device, **settings: told.append((device, settings)))
    determinism.prepare(tiny_spec(precision=precision, reduction="fast", threads=2, device="cuda:0"))
    assert told == [("cuda:0", {"exact": False, "threads": 2, "tf32": precision == "tf32"})]
