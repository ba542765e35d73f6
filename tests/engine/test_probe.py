"""The admission probe: one hash for one identity in one environment, and nothing is changed by asking."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from elastic_lm.engine.fixed_point import fold_with_torch
from elastic_lm.engine.probe import environment, probe
from elastic_lm.engine.spec import FactorySpec, OptimizerSpec
from elastic_lm.engine.step import Replica
from tests.engine.members import LENGTH, VOCAB, M, tiny_spec

torch.set_num_threads(1)


def test_probe_is_a_hash_that_repeats() -> None:
    replica = Replica(tiny_spec())
    first = probe(replica)
    assert re.fullmatch("[0-9a-f]{64}", first)
    torch.rand(5)
    assert probe(replica) == probe(Replica(tiny_spec())) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 8},
        {"precision": "bf16"},
        {"micro_batch_size": 3},
        {"sequence_length": LENGTH - 1},
        {"micro_batches": 2 * M},  # the unit of the sum
        {"model": replace(tiny_spec().model, dropout=0.0)},
        {"model": replace(tiny_spec().model, num_heads=4)},
        {"model": FactorySpec("tests.engine.user_code:bag", VOCAB, LENGTH)},
        {"objective": "tests.engine.user_code:every_second"},
        {"reduction": "fast"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_probe_depends_on_what_a_gradient_depends_on(changes: dict[str, Any]) -> None:
    assert probe(Replica(tiny_spec(**changes))) != probe(Replica(tiny_spec()))


def test_probe_does_not_depend_on_what_comes_after_the_gradient() -> None:
    assert probe(Replica(tiny_spec(optimizer=OptimizerSpec(learning_rate=1.0)))) == probe(Replica(tiny_spec()))


def test_one_bit_of_one_gradient_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = probe(Replica(tiny_spec()))
    flips = iter([True])

    def fold(total: Any, values: Any, unit: Any, *, first: bool) -> Any:
        if next(flips, False):
            values = values.clone()
            values.view(torch.int32)[-1] ^= 1
        return fold_with_torch(total, values, unit, first=first)

    monkeypatch.setattr("elastic_lm.engine.fixed_point.fold", fold)
    assert probe(Replica(tiny_spec())) != expected
    assert probe(Replica(tiny_spec())) == expected  # without the flip torch and the kernel agree


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has one instruction set")
def test_another_instruction_set_shows() -> None:
    """PyTorch's own kernels, told to do without this CPU's vectors, as on an older CPU."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from elastic_lm.engine.probe import environment, probe\n"
        "from elastic_lm.engine.step import Replica\n"
        "from tests.engine.members import tiny_spec\n"
        "print(environment(1, 'cpu')['instruction_set'], probe(Replica(tiny_spec())))"
    )
    told = {}
    for capability in (torch.backends.cpu.get_cpu_capability().lower(), "default"):
        environ = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        name, told[capability] = done.stdout.split()
        assert name.lower() == capability
    here, other = told.values()
    assert here == probe(Replica(tiny_spec())) != other


def test_probing_changes_nothing() -> None:
    replica = Replica(tiny_spec())
    weights = replica.state.weights.clone()
    probe(replica)
    assert torch.equal(replica.state.weights, weights)
    assert replica.state.exp_avg.count_nonzero() == 0
    assert (replica.state.torn, replica.state.next_step) == (True, 0)
    assert all(parameter.grad is None for parameter in replica.model.parameters())


def test_environment_names_what_bits_may_depend_on() -> None:
    found = environment(3, "cpu")
    assert found.keys() == {"torch", "machine", "instruction_set", "threads", "device"}
    assert (found["torch"], found["threads"], found["device"]) == (torch.__version__, "3", "cpu")
    assert all(isinstance(value, str) and value for value in found.values())


def test_environment_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    found = environment(1, "cuda:0")
    assert (found["gpu"], found["device"]) == ("a GPU", "cuda:0")
    assert "cuda" in found
