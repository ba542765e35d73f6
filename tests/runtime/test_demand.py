"""Which evaluators stand in the way of workers that wait, worked out by hand. Needs no Ray."""

from __future__ import annotations

import pytest

from elastic_lm.runtime.demand import Demand, Waiting

CPU, TWO, GPU = {"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("waiting", "free", "evaluators", "each", "expected"),
    [
        ([], {"a": {}}, {0: "a"}, CPU, (0, [])),
        ([CPU], {"a": CPU}, {0: "a"}, CPU, (1, [])),  # it has room
        ([CPU], {"a": {}, "b": {}}, {1: "b", 0: "a"}, CPU, (1, [1])),  # who is named first leaves first
        ([TWO], {"a": {}, "b": {}}, {0: "a", 1: "b"}, CPU, (0, [])),  # two halves on two nodes are no room
        ([TWO], {"a": {}, "b": {}}, {0: "a", 1: "b", 2: "b"}, CPU, (1, [1, 2])),
        ([TWO], {"a": CPU, "b": {}}, {0: "a", 1: "b", 2: "b"}, CPU, (1, [0])),  # where the fewest leave
        ([GPU], {"a": {"CPU": 8.0}}, {0: "a"}, CPU, (0, [])),  # they hold no GPU
        ([CPU], {"a": {}}, {0: "a", 1: "a"}, GPU, (1, [0])),
        ([CPU, CPU], {"a": {}}, {0: "a", 1: "a", 2: "a"}, CPU, (2, [0, 1])),
        ([CPU, CPU], {"a": {}}, {0: "a"}, TWO, (2, [0])),  # its room is for both
        ([CPU, TWO], {"a": CPU}, {0: "a"}, CPU, (1, [])),  # what the first takes is not free for the next
        ([{"CPU": 0.3}], {"a": {"CPU": 0.1}}, {0: "a"}, {"CPU": 0.2}, (1, [0])),  # 0.1 + 0.2 in floats
        ([CPU], {}, {0: "gone"}, CPU, (0, [])),  # its node drains
        ([{}], {"a": {}}, {0: "a"}, CPU, (1, [])),
    ],
)
def test_those_leave_who_stand_in_the_way(
    waiting: list[dict[str, float]],
    free: dict[str, dict[str, float]],
    evaluators: dict[int, str],
    each: dict[str, float],
    expected: tuple[int, list[int]],
) -> None:
    actors = tuple(Waiting(str(number), resources) for number, resources in enumerate(waiting))
    assert Demand(actors, free).room(evaluators, each) == expected


def test_node_that_is_kept_away_from_is_no_room() -> None:
    one = Waiting("w", CPU, frozenset("a"))
    assert Demand((one,), {"a": {}, "b": {}}).room({0: "a", 1: "b"}, CPU) == (1, [1])
    assert Demand((one,), {"a": CPU}).room({0: "a"}, CPU) == (0, [])
