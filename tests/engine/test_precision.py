"""A GPU that has no units for a precision is refused by name, with what it has. Needs no GPU."""

from __future__ import annotations

import pytest
import torch

from elastic_lm.engine.precision import refuse_lacking
from elastic_lm.errors import ConfigError

CUDA = torch.device("cuda")


def have(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


@pytest.mark.parametrize(
    ("capability", "precision", "remedy"),
    [
        ((7, 0), "bf16", "use fp32 or fp16"),
        ((7, 5), "tf32", "use fp32 or fp16"),
        ((6, 1), "fp16", "use fp32"),
    ],
)
def test_lacking_precision_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], precision: str, remedy: str
) -> None:
    have(monkeypatch, *capability)
    with pytest.raises(ConfigError) as caught:
        refuse_lacking(precision, CUDA)
    assert str(caught.value).startswith(f"training.precision={precision} needs a GPU of compute capability ")
    assert str(caught.value).endswith(f"and Some GPU has {capability[0]}.{capability[1]}; {remedy}")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_a_gpu_since_ampere_has_all(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    have(monkeypatch, 8, 0)
    refuse_lacking(precision, CUDA)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cpu_is_asked_nothing(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("asked"))
    refuse_lacking(precision, torch.device("cpu"))
