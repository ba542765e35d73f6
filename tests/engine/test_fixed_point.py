"""Fixed point: both implementations give the same bits, sums do not depend on order, nothing overflows, errors are bounded.

The expected values come from Python's fractions, never from the code under test.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_lm.engine import fixed_point, kernel
from elastic_lm.engine.fixed_point import (
    Unit,
    fold,
    fold_with_torch,
    gradient_unit,
    loss_unit,
    number_to_units,
    to_float,
)

torch.set_num_threads(1)

KERNEL_BLOCK = 4096
SIZES = [0, 1, 2, 15, KERNEL_BLOCK - 1, KERNEL_BLOCK, KERNEL_BLOCK + 1, 2 * KERNEL_BLOCK + 3,
         fixed_point.BLOCK - 1, fixed_point.BLOCK, fixed_point.BLOCK + 1]  # fmt: skip
SUBNORMAL, LARGEST = 2.0**-149, float(np.finfo(np.float32).max)
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, SUBNORMAL, -SUBNORMAL, LARGEST, -LARGEST]

float32s = st.floats(width=32) | st.sampled_from(SPECIAL)
units = st.builds(Unit, st.integers(-30, 60), st.integers(1, 1 << 16))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True, scope="module")
def _needs_the_kernel() -> None:
    assert kernel.available(torch.device("cpu")), "without a C compiler these tests would compare torch with itself"


def exact_units(value: float, unit: Unit) -> int | None:
    """What one contribution is worth, by exact arithmetic; None when it is refused."""
    if not math.isfinite(value):
        return None
    scaled = Fraction(value) * Fraction(2) ** unit.fraction_bits
    return None if abs(scaled) > Fraction(unit.bound) else round(scaled)  # round of a Fraction: half to even


def many_values(size: int, kind: str, unit: Unit, seed: int) -> Tensor:
    """`halves`: half units, which the vector path takes; `bits`: any bit pattern, which it does not; `edge`: around 2^51."""
    rng = np.random.default_rng(seed)
    if kind == "bits":
        return torch.from_numpy(rng.integers(0, 2**32, size, dtype=np.uint32).view(np.float32))
    halves = rng.integers(-(2**20), 2**20, size).astype(np.float64) / 2
    if kind == "edge":
        halves = 2.0**51 * rng.choice([-1, 1], size) * (1 + rng.integers(-4, 5, size) * 2.0**-24)
    return torch.from_numpy((halves * 2.0**-unit.fraction_bits).astype(np.float32))


def both_ways(total: Tensor, values: Tensor, unit: Unit, first: bool) -> tuple[Tensor, int]:
    """Fold with the kernel and with torch; they must agree.    Returns: the total and the refused count."""
    by_kernel, by_torch = total.clone(), total.clone()
    refused = fold(by_kernel, values, unit, first=first)
    assert type(refused) is int  # so it was the kernel
    assert refused == int(fold_with_torch(by_torch, values, unit, first=first))
    assert torch.equal(by_kernel, by_torch)
    return by_kernel, refused


@given(st.lists(float32s, min_size=1, max_size=40), units, st.booleans())
def test_kernel_and_torch_and_exact_arithmetic_agree_on_any_float(values: list[float], unit: Unit, first: bool) -> None:
    before = torch.arange(len(values)) * 1_000_003 - 17
    total, refused = both_ways(before, torch.tensor(values), unit, first)
    expected = [exact_units(value, unit) for value in values]
    assert refused == expected.count(None)
    kept = [0 if first else int(b) for b in before]
    assert total.tolist() == [b + (e or 0) for b, e in zip(kept, expected, strict=True)]


@settings(max_examples=120)
@given(
    st.sampled_from(SIZES),
    st.sampled_from(["halves", "bits", "edge"]),
    st.lists(st.tuples(st.floats(0, 1), float32s), max_size=4),
    st.integers(20, 44),
    st.booleans(),
    seeds,
)
def test_kernel_and_torch_agree_around_block_edges(
    size: int, kind: str, specials: list[tuple[float, float]], fraction_bits: int, first: bool, seed: int
) -> None:
    unit = Unit(fraction_bits, 8)
    values = many_values(size, kind, unit, seed)
    for share, special in specials if size else []:
        values[min(size - 1, int(share * size))] = special
    before = torch.from_numpy(np.random.default_rng(seed + 1).integers(-(2**60), 2**60, size))
    both_ways(before, values, unit, first)


@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("place", [0, KERNEL_BLOCK - 1, KERNEL_BLOCK, fixed_point.BLOCK - 1, fixed_point.BLOCK])
def test_one_special_value_changes_no_other_element(special: float, place: int) -> None:
    unit = Unit(30, 4)
    values = many_values(fixed_point.BLOCK + 1, "halves", unit, seed=3)
    values[place] = 0.0
    clean, _ = both_ways(torch.zeros(len(values), dtype=torch.int64), values, unit, True)
    values[place] = special
    total, refused = both_ways(torch.zeros(len(values), dtype=torch.int64), values, unit, True)
    expected = exact_units(special, unit)
    assert refused == (expected is None)
    assert total[place] == (expected or 0)
    clean[place] = total[place]
    assert torch.equal(total, clean)


@pytest.mark.parametrize("implementation", [fold, fold_with_torch])
def test_halves_round_to_even(implementation: object) -> None:
    halves = [-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5]
    total = torch.zeros(8, dtype=torch.int64)
    implementation(total, torch.tensor(halves) / 4, Unit(2, 1), first=True)  # type: ignore[operator]
    assert total.tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


@pytest.mark.parametrize("num_contributions", [1, 2, 3, 7, 512, 4096])
@pytest.mark.parametrize("sign", [1, -1])
def test_as_many_contributions_of_the_bound_as_promised_do_not_overflow(num_contributions: int, sign: int) -> None:
    unit = Unit(20, num_contributions)
    largest = np.float32(unit.bound / unit.scale)
    if float(largest) > unit.bound / unit.scale:
        largest = np.nextafter(largest, np.float32(0))
    values = torch.full((3,), sign * float(largest))
    total = torch.zeros(3, dtype=torch.int64)
    for number in range(num_contributions):
        assert fold(total, values, unit, first=number == 0) == 0
    expected = sign * num_contributions * int(Fraction(float(largest)) * 2**20)
    assert 2**61 < abs(expected) < 2**63
    assert total.tolist() == [expected] * 3


@pytest.mark.parametrize("num_contributions", [1, 3, 512])
def test_the_first_float_above_the_bound_is_refused(num_contributions: int) -> None:
    unit = Unit(20, num_contributions)
    above = np.nextafter(np.float32(unit.bound / unit.scale), np.float32(np.inf))
    total, refused = both_ways(torch.full((2,), 5), torch.tensor([above, -above]), unit, first=False)
    assert (total.tolist(), refused) == ([5, 5], 2)


@settings(max_examples=30)
@given(st.integers(1, 12), seeds, st.randoms(use_true_random=False))
def test_sum_depends_neither_on_order_nor_on_partition(count: int, seed: int, random: object) -> None:
    unit = Unit(40, count)
    rng = np.random.default_rng(seed)
    spread = 10.0 ** rng.integers(-12, 5, (count, 1))  # magnitudes that a float sum would lose
    contributions = torch.from_numpy((rng.standard_normal((count, 37)) * spread).astype(np.float32))

    def total_of(members: list[list[int]]) -> Tensor:
        """Every member folds its own, then the integers are added, as the reduction does."""
        total = torch.zeros(37, dtype=torch.int64)
        for own in members:
            part = torch.zeros(37, dtype=torch.int64)
            for number, index in enumerate(own):
                fold(part, contributions[index], unit, first=number == 0)
            total += part
        return total

    order = list(range(count))
    alone = total_of([order])
    random.shuffle(order)  # type: ignore[attr-defined]
    cuts = sorted(random.sample(range(1, count), random.randint(0, count - 1)))  # type: ignore[attr-defined]
    members = [order[low:high] for low, high in zip([0, *cuts], [*cuts, count], strict=True)]
    random.shuffle(members)  # type: ignore[attr-defined]
    assert torch.equal(total_of(members), alone)


def test_a_float_sum_of_the_same_numbers_depends_on_the_order() -> None:
    """Otherwise the test above would prove nothing."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy((rng.standard_normal(100) * 10.0 ** rng.integers(-12, 5, 100)).astype(np.float32))
    forwards, backwards = torch.zeros(()), torch.zeros(())
    for value in values:
        forwards = forwards + value
    for value in values.flip(0):
        backwards = backwards + value
    assert forwards != backwards


@settings(max_examples=200)
@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=20), st.integers(1, 2**24), st.integers(0, 44))
def test_to_float_is_within_one_rounding_of_the_exact_quotient(
    integers: list[int], divisor: int, fraction_bits: int
) -> None:
    """Three roundings in fp64 (2^-53 each) and one to fp32 (half of its last place, or of the smallest subnormal)."""
    unit = Unit(fraction_bits, 1)
    total = torch.tensor(integers)
    found = to_float(total, unit, divisor, torch.empty(len(integers)))
    for integer, value in zip(integers, found.tolist(), strict=True):
        exact = Fraction(integer, 2**fraction_bits * divisor)
        bound = abs(exact) * (Fraction(1, 2**24) + Fraction(4, 2**53)) + Fraction(1, 2**150)
        assert abs(Fraction(value) - exact) <= bound


@settings(max_examples=60)
@given(st.sampled_from(SIZES), st.integers(1, 2**30), st.integers(-10, 60), st.integers(1, 62), seeds)
def test_to_float_gives_the_same_bits_with_kernel_and_torch(
    size: int, divisor: int, fraction_bits: int, magnitude: int, seed: int
) -> None:
    limit = 2**magnitude
    total = torch.from_numpy(np.random.default_rng(seed).integers(-limit, limit, size, endpoint=True))
    unit = Unit(fraction_bits, 1)
    by_kernel = to_float(total, unit, divisor, torch.full((size,), math.nan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "available", lambda tensor: False)
        by_torch = to_float(total, unit, divisor, torch.full((size,), math.nan))
    assert torch.equal(by_kernel.view(torch.int32), by_torch.view(torch.int32))
    assert not by_torch.isnan().any()


@settings(max_examples=200)
@given(st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 0.5 * 2**-30, 1.5 * 2**-30]), units)
def test_number_to_units_equals_exact_arithmetic(value: float, unit: Unit) -> None:
    """For any double; a product too small for a double is zero units either way."""
    assert number_to_units(value, unit) == exact_units(value, unit)


def test_number_to_units_refuses_from_just_above_the_bound() -> None:
    unit = loss_unit(4)
    largest = 2.0**60 / 2**30
    assert number_to_units(largest, unit) == 2**60
    assert number_to_units(-largest, unit) == -(2**60)
    assert number_to_units(math.nextafter(largest, math.inf), unit) is None
    assert number_to_units(math.nan, unit) is None


TARGETS = [1, 2, 3, 5, 192, 4095, 4096, 4097, 524_288, 3_000_000]


@pytest.mark.parametrize("targets", TARGETS)
def test_gradient_unit_holds_means_up_to_the_documented_range(targets: int) -> None:
    """ "may be as large as 2^18 / M": every one of M contributions, as a share of the mean."""
    unit = gradient_unit(targets, 8)
    assert Fraction(unit.bound) / Fraction(unit.scale) / targets >= Fraction(2**18, 8)


@pytest.mark.parametrize("targets", TARGETS)
def test_gradient_unit_rounds_a_contribution_by_less_than_2_to_minus_44_of_the_mean(targets: int) -> None:
    half_a_unit = Fraction(1, 2) / Fraction(gradient_unit(targets, 8).scale) / targets
    assert half_a_unit < Fraction(1, 2**44)


@pytest.mark.parametrize("targets", TARGETS)
def test_gradient_unit_is_no_finer_than_it_needs_to_be(targets: int) -> None:
    """A finer unit would take range away."""
    assert Fraction(1) / Fraction(gradient_unit(targets, 8).scale) / targets >= Fraction(1, 2**44)
