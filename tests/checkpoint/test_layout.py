"""Shares: every tensor in exactly one, about equally large, whatever there is to share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from elastic_lm.checkpoint.layout import Entry, Manifest, Part, part_name, shares

SIZES = st.dictionaries(st.text(max_size=8), st.integers(0, 1_000_000), max_size=40)


@given(sizes=SIZES, num_shares=st.integers(1, 20))
def test_shares_are_a_partition_in_order_and_even_to_within_a_tensor(sizes: dict[str, int], num_shares: int) -> None:
    cut = shares(sizes, num_shares)
    assert len(cut) == num_shares
    assert [name for share in cut for name in share] == sorted(sizes)
    even = sum(sizes.values()) / num_shares
    for share in cut:
        assert sum(sizes[name] for name in share) <= even + max(sizes.values(), default=0)


def test_shares_by_hand() -> None:
    assert shares({"a": 4, "b": 1, "c": 1, "d": 2}, 2) == [["a"], ["b", "c", "d"]]
    assert shares({"a": 4}, 3) == [[], ["a"], []]
    assert shares({}, 2) == [[], []]


def test_part_is_named_by_its_content_and_its_place() -> None:
    one, other = ({"a": Entry("F32", (2,), letter * 64)} for letter in "01")
    names = {part_name(0, 0, one), part_name(0, 1, one), part_name(1, 0, one), part_name(0, 0, other)}
    assert len(names) == 4
    assert part_name(0, 0, one) == part_name(0, 0, {"a": Entry("F32", (2,), "0" * 64)})


def test_any_number_of_shares_and_parts_has_names_that_are_read_again() -> None:
    names = [part_name(share, number, {}) for share, number in ((0, 0), (7, 1_000), (100_000, 54_321))]
    manifest = Manifest(1, tuple(Part(name, 0, {}) for name in names))
    assert Manifest.from_json(manifest.to_json()) == manifest
