"""Muon: singular values about 1, PyTorch's own Muon to its precision, the rest by AdamW, and one moment less to keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_lm.engine import muon
from elastic_lm.engine.build import build, hidden_matrices
from elastic_lm.engine.optimizer import Optimizer
from elastic_lm.engine.probe import probe
from elastic_lm.engine.spec import FactorySpec, OptimizerSpec, ScheduleSpec
from elastic_lm.engine.state import ReplicaState
from elastic_lm.engine.step import Replica
from elastic_lm.errors import ConfigError
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT
from elastic_lm.protocol import LeaseEnd
from tests.engine.members import Cluster, tiny_spec
from tests.engine.test_step import Trainee

torch.set_num_threads(1)

MUON = OptimizerSpec(kind="muon", learning_rate=1e-2, weight_decay=0.1)
SHAPES = [(8, 8), (24, 8), (8, 24), (64, 16), (1, 5)]


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_singular_values_become_about_one(shape: tuple[int, int], scale: float) -> None:
    """Those that were not far below the largest; the vectors stay."""
    matrix = random(shape) * scale
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = muon.orthogonalised(matrix)
    inner = u.T @ found @ vh.T
    large = s / s.norm() > 0.02
    assert large.any() and ((inner.diag()[large] > 0.65) & (inner.diag()[large] < 1.25)).all()
    assert (inner - inner.diag().diag()).abs().max() < 1e-3


def test_nothing_stays_nothing() -> None:
    assert muon.orthogonalised(torch.zeros(4, 6)).count_nonzero() == 0


def test_polynomial_by_hand() -> None:
    """Of a diagonal matrix each value goes its own way."""
    values = torch.tensor([0.8, 0.5, 0.3], dtype=torch.float64)
    expected = values / values.norm()
    a, b, c = muon.COEFFICIENTS
    for _ in range(5):
        expected = a * expected + b * expected**3 + c * expected**5
    torch.testing.assert_close(
        muon.orthogonalised(values.float().diag()).diag().double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_pytorchs_muon_to_its_bf16(shape: tuple[int, int]) -> None:
    """Whose products are rounded to 8 bits, five times over: a few percent of an update."""
    weight, theirs = random(shape, 1), nn.Parameter(random(shape, 1))
    exp_avg = torch.zeros(shape)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.5, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = random(shape, 10 + step)
        theirs.grad = gradient.clone()
        before, their_before = weight.clone(), theirs.detach().clone()
        muon.update(weight, gradient, exp_avg, learning_rate=0.01, momentum=0.9, weight_decay=0.5)
        reference.step()
        torch.testing.assert_close(exp_avg, reference.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-6)
        ours, other = weight - before * 0.995, theirs.detach() - their_before * 0.995
        assert (ours - other).norm() < 0.05 * other.norm()
        with torch.no_grad():
            theirs.copy_(weight)


@pytest.mark.parametrize("name", PRESETS)
def test_hidden_matrices_are_all_but_embedding_positions_and_head(name: str) -> None:
    spec = ModelSpec(100, max_tokens=8, **{**PRESETS[name].shape, "num_layers": 2, "width": 24, "num_heads": 2})
    model = GPT(replace(spec, hidden=None, num_kv_heads=None))
    found = hidden_matrices(model)
    others = {n for n, p in model.named_parameters() if p.dim() == 2} - found.keys()
    assert others <= {"embedding.weight", "positions.weight", "head.weight"} and "embedding.weight" in others
    parameters = dict(model.named_parameters())
    assert sum(parameters[n].numel() for n in found) == model.spec.hidden_parameters
    assert found["blocks.0.attention.qkv.weight"] == (24, 24, 24)


def test_grouped_queries_are_cut_where_they_end() -> None:
    found = hidden_matrices(
        GPT(ModelSpec(100, num_layers=1, num_heads=4, num_kv_heads=2, width=16, max_tokens=8, hidden=20))
    )
    assert found == {
        "blocks.0.attention.qkv.weight": (16, 8, 8),
        "blocks.0.attention.residual.weight": (16,),
        "blocks.0.feed_forward.gate_and_up.weight": (20, 20),
        "blocks.0.feed_forward.residual.weight": (16,),
    }


def whole(spec: OptimizerSpec) -> tuple[nn.Module, ReplicaState, Optimizer]:
    torch.manual_seed(0)
    model = build(tiny_spec().model)
    hidden = hidden_matrices(model) if spec.kind == "muon" else {}
    state = ReplicaState(model, hidden=hidden)
    with state.writing(0):
        pass
    return model, state, Optimizer(state, spec, ScheduleSpec(kind="constant"))


def test_matrices_go_by_muon_and_the_rest_as_before() -> None:
    """Part by part, and nothing else is touched by it."""
    ours, state, optimizer = whole(MUON)
    theirs, other, adamw = whole(replace(MUON, kind="adamw"))
    gradient, same = torch.zeros(state.size), torch.zeros(other.size)
    for number, slot in enumerate(state.slots):
        slot.of(gradient).copy_(random((slot.size,), number))
        there = next(theirs for theirs in other.slots if theirs.name == slot.name)
        there.of(same).copy_(slot.of(gradient))
    before = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    optimizer.apply(gradient, 0)
    adamw.apply(same, 0)
    expected = dict(theirs.named_parameters())
    hidden = hidden_matrices(ours)
    slots = {slot.name: slot for slot in state.slots}
    for name, parameter in ours.named_parameters():
        if name not in hidden:
            torch.testing.assert_close(parameter, expected[name], rtol=2.0**-22, atol=1e-8)
            continue
        weight, given = before[name].clone(), slots[name].of(gradient).view(parameter.shape)
        for begin, stop in zip(*_bounds(hidden[name]), strict=True):
            muon.update(
                weight[begin:stop], given[begin:stop], torch.zeros(stop - begin, weight.shape[1]),
                learning_rate=MUON.learning_rate, momentum=0.95, weight_decay=0.1,
            )  # fmt: skip
        assert torch.equal(parameter, weight)


def _bounds(rows: tuple[int, ...]) -> tuple[list[int], list[int]]:
    stops = [sum(rows[: number + 1]) for number in range(len(rows))]
    return [0, *stops[:-1]], stops


def test_state_has_no_second_moment_of_them_and_loads_again() -> None:
    model, state, optimizer = whole(MUON)
    optimizer.apply(torch.ones(state.size), 0)
    hidden = hidden_matrices(model)
    tensors = {name: tensor.clone() for name, tensor in state.tensors().items()}
    for name, _ in model.named_parameters():
        assert (f"exp_avg_sq/{name}" in tensors) == (name not in hidden)
        assert f"exp_avg/{name}" in tensors and f"parameters/{name}" in tensors
    assert sum(flat.numel() for flat in state.flats()) == 3 * state.size - state.hidden_size
    _, other, _ = whole(MUON)
    other.load(tensors, 1)
    assert other.digest() == state.digest()
    other.begin(build(tiny_spec().model))
    assert other.exp_avg.count_nonzero() == other.exp_avg_sq.count_nonzero() == 0


def test_update_is_about_as_large_as_adamws() -> None:
    """So that learning rates carry over."""
    _, state, optimizer = whole(replace(MUON, weight_decay=0.0))
    before = state.weights.clone()
    optimizer.apply(random((state.size,)), 0)
    moved = (state.weights - before)[: state.hidden_size]
    rms = float(moved[moved != 0].square().mean().sqrt()) / MUON.learning_rate
    assert 0.1 < rms < 0.3


class Told(nn.Module):
    def __init__(self, told: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.told = nn.Linear(3, 4), told

    def hidden_matrices(self) -> dict[str, Any]:
        return self.told


@pytest.mark.parametrize(
    "told", [{"inner.weight": (3,)}, {"inner.bias": (4,)}, {"outer": (4,)}, {"inner.weight": (0, 4)}]
)
def test_model_that_tells_of_what_it_has_not_is_refused(told: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"hidden_matrices\(\) of Told says .* name matrices, with rows that add up"):
        hidden_matrices(Told(told))


def test_model_that_tells_nothing_is_refused_with_what_it_needs() -> None:
    assert hidden_matrices(Told({"inner.weight": (2, 2)})) == {"inner.weight": (2, 2)}
    with pytest.raises(
        ConfigError, match=r"Linear does not tell which those are; give it a method hidden_matrices\(\)"
    ):
        hidden_matrices(nn.Linear(2, 2))
    spec = tiny_spec(model=FactorySpec("tests.engine.user_code:bag", 97, 16), optimizer=MUON)
    with pytest.raises(ConfigError, match="Bag does not tell which those are"):
        Replica(spec)


def test_probe_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose products differ only there is told from the others."""
    spec = tiny_spec(optimizer=MUON)
    expected = probe(Replica(spec))
    assert expected != probe(Replica(tiny_spec()))
    monkeypatch.setattr(muon, "COEFFICIENTS", (3.4445, -4.7750, 2.0316))
    assert probe(Replica(spec)) != expected


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(tiny_spec(optimizer=MUON))
    yield cluster
    cluster.close()


@pytest.mark.slow
def test_death_in_an_update_and_a_joiner_leave_the_same_bits(cluster: Cluster) -> None:
    """w1 dies with half of its weights written; w2 receives all that w0 has."""
    alone = Trainee(cluster.spec)
    for _ in range(4):
        alone.run()
    cluster.start("w0", "w2")
    cluster.start("w1", armed=("w1:optimizer.middle@1=kill",))
    cluster.grant(["w0", "w1"], 0, 4)
    cluster.wait_dead("w1")
    cluster.fence("w0")
    report = cluster.report("w0")
    assert report.whole
    cluster.grant(["w0", "w2"], report.next_step, 4, source="w0", joiners=("w2",))
    assert {report.end for report in cluster.reports("w0", "w2").values()} == {LeaseEnd.COMPLETED}
    assert {cluster.digest("w0"), cluster.digest("w2")} == {alone.state.digest()}
