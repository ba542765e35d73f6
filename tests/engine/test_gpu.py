"""The promise on CUDA: the world's size does not show, nor who joined when, and the two kernels give the same bits.

Members are processes that share one GPU and meet over gloo, which adds up on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from elastic_lm.engine.fixed_point import fold, gradient_unit, to_float
from elastic_lm.engine.spec import EngineSpec
from elastic_lm.protocol import LeaseEnd, StepRecord
from tests.engine.members import Cluster, tiny_spec

pytestmark = pytest.mark.gpu

STEPS = 6
PRECISIONS = ["fp32", "tf32", "bf16", "fp16"]


def spec_of(precision: str) -> EngineSpec:
    return tiny_spec(device="cuda:0", precision=precision)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Members of the precision that the test is run with."""
    cluster = Cluster(spec_of(request.getfixturevalue("precision")))
    yield cluster
    cluster.close()


def train(cluster: Cluster, names: list[str], start: int, stop: int, joiners: tuple[str, ...] = ()) -> list[StepRecord]:
    """One lease, completed by all of them. Returns: its steps as rank 0 saw them."""
    cluster.grant(names, start, stop, source=names[0] if joiners else None, joiners=joiners)
    reports = cluster.reports(*names)
    assert {report.end for report in reports.values()} == {LeaseEnd.COMPLETED}, reports
    return [record for record in reports[names[0]].records if record.step >= start]


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[str | None, list[StepRecord]]]:
    """Digest and steps of one member alone, by precision."""
    found = {}
    for precision in PRECISIONS:
        cluster = Cluster(spec_of(precision))
        try:
            cluster.start("w0")
            records = train(cluster, ["w0"], 0, STEPS)
            found[precision] = (cluster.digest("w0"), records)
        finally:
            cluster.close()
    return found


def same_steps(records: list[StepRecord], expected: list[StepRecord]) -> bool:
    return len(records) == len(expected) and all(a.same_bits(b) for a, b in zip(records, expected, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_neither_repetition_nor_world_size_shows_in_the_bits(
    cluster: Cluster, undisturbed: dict, precision: str, world_size: int
) -> None:
    digest, expected = undisturbed[precision]
    names = [f"w{number}" for number in range(world_size)]
    cluster.start(*names)
    assert same_steps(train(cluster, names, 0, STEPS), expected)
    assert {cluster.digest(name) for name in names} == {digest}


@pytest.mark.parametrize("precision", ["fp32"])
def test_joiner_receives_the_state_and_the_bits_stay(cluster: Cluster, undisturbed: dict, precision: str) -> None:
    digest, expected = undisturbed[precision]
    cluster.start("w0", "w1")
    records = train(cluster, ["w0"], 0, STEPS // 2)
    records += train(cluster, ["w0", "w1"], STEPS // 2, STEPS, joiners=("w1",))
    assert same_steps(records, expected)
    assert cluster.digest("w0") == cluster.digest("w1") == digest


@pytest.mark.parametrize("precision", ["fp32"])
def test_death_of_a_member_leaves_the_same_bits(cluster: Cluster, undisturbed: dict, precision: str) -> None:
    digest, _ = undisturbed[precision]
    cluster.start("w0", "w1", armed=("w1:reduce.begin@3=kill",))
    cluster.grant(["w0", "w1"], 0, STEPS)
    cluster.wait_dead("w1")
    cluster.fence("w0")
    report = cluster.report("w0")
    assert report.whole
    train(cluster, ["w0"], report.next_step, STEPS)
    assert cluster.digest("w0") == digest


@pytest.mark.parametrize("size", [1, 4097, 1_000_003])
def test_fixed_point_on_cuda_has_the_bits_of_the_host(size: int) -> None:
    unit = gradient_unit(1024, 4)
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    values[1, 0] = float("nan")
    values[2, -1] = float("inf")
    found = {}
    for device in ("cpu", "cuda"):
        total = torch.empty(size, dtype=torch.int64, device=device)
        refused = [int(fold(total, row.to(device), unit, first=number == 0)) for number, row in enumerate(values)]
        mean = to_float(total, unit, 3072, torch.empty(size, device=device))
        found[device] = (refused, total.cpu(), mean.cpu())
    assert found["cpu"][0] == found["cuda"][0] == [0, 1, 1]
    assert torch.equal(found["cpu"][1], found["cuda"][1])
    assert torch.equal(found["cpu"][2], found["cuda"][2])
