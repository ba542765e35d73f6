"""Which evaluators stand in the way of workers that wait, worked out by hand. Needs no Ray."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated import gcs_pb2

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


# -- what Ray knows ------------------------------------------------------------------------------------------------------

A, B = "aa" * 28, "b2" * 28  # ids of nodes


def pending(name: str, *, namespace: str = "elastic_lm", pid: int = 0, selector: str = "", **cpus: float) -> bytes:
    """An actor as Ray lists it."""
    told: Any = gcs_pb2.ActorTableData(
        actor_id=name.encode(), class_name=name, ray_namespace=namespace, pid=pid, required_resources=cpus
    )
    if selector:
        told.label_selector["ray.io/node-id"] = selector
    return bytes(told.SerializeToString())


def test_those_wait_who_are_ours_and_have_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a reader; not one of the evaluation, one that has its place and starts, or somebody else's."""
    actors = [
        pending("Worker", CPU=1.0, GPU=0.5),
        pending("Worker1", CPU=1.0, selector=f"!{A}"),
        pending("Worker2", CPU=1.0, selector=f"!in({A},{B})"),
        pending("Worker3", CPU=1.0, selector=A),
        pending("Reader", CPU=0.1),
        pending("Evaluator", CPU=1.0),
        pending("Starting", CPU=1.0, pid=7),
        pending("Theirs", CPU=1.0, namespace="serve"),
    ]
    asked = []
    state = SimpleNamespace(
        _connect_and_get_accessor=lambda: SimpleNamespace(
            get_actor_table=lambda job, state_name: asked.append((job, state_name)) or actors
        ),
        available_resources_per_node=lambda: {A: {"CPU": 1.0}, B: {"memory": 9.0}},
        get_draining_nodes=lambda: {B: 0},
    )
    monkeypatch.setattr(ray._private.state, "state", state)
    found = Demand.now(besides="Evaluator")
    assert asked == [(None, "PENDING_CREATION")]
    assert found.free == {A: {"CPU": 1.0}}
    avoids = {"Worker1": {A}, "Worker2": {A, B}}
    names = ("Worker", "Worker1", "Worker2", "Worker3", "Reader")
    assert [actor.actor_id for actor in found.waiting] == [name.encode().hex() for name in names]
    assert [actor.avoids for actor in found.waiting] == [avoids.get(name, set()) for name in names]
    assert found.waiting[0].resources == {"CPU": 1.0, "GPU": 0.5}


def test_where_nobody_waits_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large cluster the list of nodes is long."""
    accessor = SimpleNamespace(get_actor_table=lambda job, state_name: [pending("Evaluator", CPU=1.0)])
    monkeypatch.setattr(ray._private.state, "state", SimpleNamespace(_connect_and_get_accessor=lambda: accessor))
    assert Demand.now(besides="Evaluator") == Demand((), {})
