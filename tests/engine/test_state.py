"""The flat state: parameters are views, tied ones once; digests name every byte; refusals come before anything is written."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_lm.engine.state import ALIGNMENT, ReplicaState, digest_of
from elastic_lm.errors import CheckpointError, ConfigError

torch.set_num_threads(1)


class Tied(nn.Module):
    """A scalar, vectors, matrices, a tied weight, and a constant that is nobody's state."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.kernel = nn.Parameter(torch.randn(2, 3, 4))
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(3), persistent=False)


def make(seed: int = 0) -> tuple[Tied, ReplicaState]:
    torch.manual_seed(seed)
    module = Tied()
    return module, ReplicaState(module)


def make_whole(step: int = 0) -> ReplicaState:
    """With numbers everywhere."""
    _, state = make()
    with state.writing(step):
        for number, name in enumerate(sorted(state.tensors())):
            state.tensors()[name].normal_(generator=torch.Generator().manual_seed(number))
    return state


def filled(state: ReplicaState, value: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.full(tensor.shape, value) for name, tensor in state.tensors().items()}


# -- layout ----------------------------------------------------------------------------------------------------------


def test_matrices_come_first_then_vectors_each_in_the_modules_order() -> None:
    _, state = make()
    found = [(slot.name, slot.number) for slot in state.slots]
    matrices = [("kernel", 1), ("embedding.weight", 2)]
    assert found == [*matrices, ("gain", 0), ("norm.weight", 3), ("norm.bias", 4), ("head.bias", 5)]


def test_slots_begin_on_cache_lines_and_do_not_overlap() -> None:
    _, state = make()
    end = 0
    for slot in state.slots:
        assert slot.start % ALIGNMENT == 0
        assert end <= slot.start < end + ALIGNMENT
        assert slot.size == slot.shape.numel()
        end = slot.start + slot.size
    assert end <= state.size < end + ALIGNMENT
    decayed = [slot.start + slot.size <= state.decayed for slot in state.slots]
    assert decayed == [len(slot.shape) >= 2 for slot in state.slots]


def test_tied_parameters_are_held_once() -> None:
    module, state = make()
    assert state.num_parameters == 1 + 15 + 3 + 3 + 24 + 5
    assert sum("embedding" in name or "head.weight" in name for name in state.tensors()) == 3  # weight and two moments
    assert module.head.weight is module.embedding.weight


def test_parameters_are_views_both_ways() -> None:
    module, state = make()
    with torch.no_grad():
        state.weights.fill_(3.0)
    assert all((parameter == 3).all() for parameter in module.parameters())
    with torch.no_grad():
        module.head.weight.fill_(4.0)
    assert (state.tensors()["parameters/embedding.weight"] == 4).all()
    assert state.weights.eq(4).sum() == 15


def test_taking_a_module_over_keeps_its_values_and_starts_without_moments() -> None:
    torch.manual_seed(0)
    before = {name: parameter.detach().clone() for name, parameter in Tied().named_parameters()}
    module, state = make(0)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(state.tensors()[f"parameters/{name}"], before[name])
    assert state.exp_avg.count_nonzero() == state.exp_avg_sq.count_nonzero() == 0


def test_names_of_tensors_are_kinds_and_parameters() -> None:
    _, state = make()
    names = {slot.name for slot in state.slots}
    assert set(state.tensors()) == {f"{kind}/{n}" for kind in ("parameters", "exp_avg", "exp_avg_sq") for n in names}


def test_gradients_flow_into_the_modules_parameters() -> None:
    module, _ = make()
    (module.head(module.embedding(torch.tensor([1, 2]))).sum() * module.gain).backward()
    assert module.embedding.weight.grad is not None and module.gain.grad is not None
    assert module.embedding.weight.grad.shape == (5, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_another_precision_become_single(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).to(dtype)
    expected = module.weight.detach().float()
    ReplicaState(module)
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, expected)
    module(torch.ones(1, 3)).sum().backward()
    assert module.weight.grad is not None and module.weight.grad.dtype == torch.float32


# -- what cannot be held ---------------------------------------------------------------------------------------------


def test_a_module_with_kept_buffers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"buffer 1\.running_mean is persistent.*Use LayerNorm instead"):
        ReplicaState(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_a_parameter_that_is_no_floating_point_number_is_refused() -> None:
    module = nn.Linear(2, 2)
    module.register_parameter("table", nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False))
    with pytest.raises(ConfigError, match=r"parameter table is torch\.int32; only floating-point"):
        ReplicaState(module)


def test_a_frozen_parameter_is_refused() -> None:
    """Weight decay would move it, and it never has a gradient to fold."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight.requires_grad = False
    with pytest.raises(ConfigError, match=r"parameter 1\.weight is frozen .*persistent=False"):
        ReplicaState(module)


# -- torn ------------------------------------------------------------------------------------------------------------


def test_a_new_state_is_nobodys() -> None:
    _, state = make()
    assert state.torn
    assert state.next_step == 0


def test_it_is_torn_inside_a_write_and_at_the_new_step_after() -> None:
    _, state = make()
    with state.writing(7):
        assert (state.torn, state.next_step) == (True, 0)
    assert (state.torn, state.next_step) == (False, 7)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_it_torn_at_the_old_step(error: type[BaseException]) -> None:
    state = make_whole(3)

    def interrupted() -> None:
        with state.writing(4):
            raise error

    with pytest.raises(error):
        interrupted()
    assert (state.torn, state.next_step) == (True, 3)


@pytest.mark.parametrize("digest", ["digest", "weights_digest"])
def test_a_torn_state_has_no_digest(digest: str) -> None:
    _, state = make()
    with pytest.raises(AssertionError):
        getattr(state, digest)()


# -- loading ---------------------------------------------------------------------------------------------------------


def test_loading_brings_tensors_and_step() -> None:
    source = make_whole(5)
    module, target = make(1)
    target.load({name: tensor.clone() for name, tensor in source.tensors().items()}, 5)
    assert (target.torn, target.next_step) == (False, 5)
    assert target.digest() == source.digest()
    assert torch.equal(module.kernel, source.tensors()["parameters/kernel"])
    assert torch.equal(module.head.weight, source.tensors()["parameters/embedding.weight"])


def without(name: str) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def with_one(name: str, tensor: Tensor) -> Any:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensor

    return change


REFUSED = [
    (without("exp_avg/kernel"), "differ in 1 tensors, the first is exp_avg/kernel"),
    (with_one("parameters/other", torch.zeros(1)), "differ in 1 tensors, the first is parameters/other"),
    (with_one("parameters/kernel", torch.zeros(3, 2, 4)), r"kernel is .*\(3, 2, 4\).* in the checkpoint.*\(2, 3, 4\)"),
    (with_one("exp_avg/gain", torch.zeros(1)), r"gain is .*\(1,\).* in the checkpoint"),  # would broadcast
    (with_one("exp_avg_sq/norm.weight", torch.zeros(3).half()), r"norm.weight is .*float16 in the checkpoint.*float32"),
    (with_one("exp_avg_sq/norm.weight", torch.zeros(3).int()), r"norm.weight is .*int32 in the checkpoint"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_loading_something_else_is_refused_before_a_byte_is_written(change: Any, message: str) -> None:
    state = make_whole(3)
    before = state.digest()
    tensors = filled(state)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        state.load(tensors, 9)
    assert (state.torn, state.next_step) == (False, 3)
    assert state.digest() == before


# -- digests ---------------------------------------------------------------------------------------------------------


def test_digest_depends_on_every_element_of_every_tensor() -> None:
    state = make_whole()
    seen = {state.digest()}
    elements = 0
    for tensor in state.tensors().values():
        for element in tensor.view(-1):
            with torch.no_grad():
                kept = element.item()
                element.fill_(kept + 1.0)
                seen.add(state.digest())
                element.fill_(kept)
            elements += 1
    assert elements == 3 * state.num_parameters
    assert len(seen) == elements + 1
    assert state.digest() in seen


def test_weights_digest_depends_on_the_weights_alone() -> None:
    state = make_whole()
    before = state.weights_digest()
    with torch.no_grad():
        state.exp_avg.add_(1)
        state.exp_avg_sq.add_(1)
    assert state.weights_digest() == before
    with torch.no_grad():
        state.tensors()["parameters/gain"].add_(1)
    assert state.weights_digest() != before


def test_digest_tells_zero_from_minus_zero() -> None:
    zero, minus = {"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}
    assert digest_of(zero, 0) != digest_of(minus, 0)


def test_digest_depends_on_step_name_and_shape() -> None:
    one = {"a": torch.zeros(2, 3)}
    others = [
        digest_of(one, 1),
        digest_of({"b": torch.zeros(2, 3)}, 0),
        digest_of({"a": torch.zeros(3, 2)}, 0),
        digest_of({"a": torch.zeros(2, 3), "b": torch.zeros(0)}, 0),
        digest_of({}, 0),
    ]
    assert len({digest_of(one, 0), *others}) == 1 + len(others)


def test_digest_does_not_depend_on_the_order_of_names_or_the_layout_in_memory() -> None:
    a, b = torch.randn(2, 3), torch.randn(4)
    expected = digest_of({"a": a, "b": b}, 0)
    assert digest_of({"b": b, "a": a}, 0) == expected
    assert digest_of({"a": a.t().contiguous().t(), "b": torch.stack([b, b], 1)[:, 0]}, 0) == expected


def test_digest_by_hand() -> None:
    """It names a state across machines and years."""
    tensors = {"parameters/a": torch.tensor([[1.0, 2.0]]), "exp_avg/a": torch.tensor([[3.0, 4.0]])}
    first, second = (hashlib.sha256(struct.pack("<2f", *values)).hexdigest() for values in ((3, 4), (1, 2)))
    message = f"next_step=12\nexp_avg/a [1, 2] {first}\nparameters/a [1, 2] {second}\n"
    assert digest_of(tensors, 12) == hashlib.sha256(message.encode()).hexdigest()


def test_digest_of_an_empty_tensor_is_that_of_its_name() -> None:
    assert digest_of({"a": torch.zeros(0, 3)}, 0) != digest_of({"a": torch.zeros(0, 2)}, 0)
