"""Who waits for a place on the cluster, what is free there, and which evaluators stand in the way.

Invariant: an evaluator is in the way where a worker that waits would have a place on its node without it, and nowhere else: one
that waits for more than any node has, or keeps away from a node, costs nobody its work. Trade-off: Ray has no public call for
what an actor waits for, nor for what is free on a node; the private ones that this takes stand here alone (0.5 ms each).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import ray

from elastic_lm.runtime.cluster import NAMESPACE
from elastic_lm.runtime.nodes import draining_nodes

NODE_LABEL = "ray.io/node-id"
ROUNDING = 1e-4  # Ray counts in these
_NODE_ID = re.compile(r"[0-9a-f]{8,}")

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Waiting:
    """An actor of elastic-lm without a place. `avoids`: ids of nodes that it does not come to."""

    actor_id: str
    resources: Resources
    avoids: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Demand:
    """`free`: of each node that takes actors, by its id; of none where nobody waits."""

    waiting: tuple[Waiting, ...]
    free: Mapping[str, Resources]

    @classmethod
    def now(cls, besides: str) -> Demand:
        """Of all actors but those of the class `besides`.    Source: Ray 2.60's global state."""
        from ray.core.generated import gcs_pb2

        state = ray._private.state.state
        pending = state._connect_and_get_accessor().get_actor_table(None, "PENDING_CREATION")
        actors = [gcs_pb2.ActorTableData.FromString(each) for each in pending]
        waiting = tuple(
            Waiting(actor.actor_id.hex(), dict(actor.required_resources), _avoided(actor.label_selector))
            for actor in actors
            if not actor.pid and actor.ray_namespace == NAMESPACE and actor.class_name != besides
        )
        if not waiting:
            return cls((), {})
        gone = draining_nodes()
        free = {node: resources for node, resources in state.available_resources_per_node().items() if node not in gone}
        return cls(waiting, free)

    def room(self, evaluators: Mapping[int, str], each: Resources) -> tuple[int, list[int]]:
        """How many of those who wait have a place when some evaluators leave, and which these are.

        Args: `evaluators`: the node of each, those first that leave first; `each` of them holds so much.
        """
        free = {node: dict(resources) for node, resources in self.free.items()}
        staying = {number: node for number, node in evaluators.items() if node in free}
        order = {number: place for place, number in enumerate(evaluators)}
        leaving: list[int] = []
        num_placed = 0
        for actor in self.waiting:
            nodes = [node for node in free if node not in actor.avoids]
            ways = [way for node in nodes if (way := _way(actor, node, free[node], staying, each)) is not None]
            if not ways:
                continue
            node, numbers = min(ways, key=lambda way: (len(way[1]), [order[number] for number in way[1]]))
            for number in numbers:
                del staying[number]
                _add(free[node], each, 1)
            _add(free[node], actor.resources, -1)
            leaving += numbers
            num_placed += 1
        return num_placed, leaving


def _way(
    actor: Waiting, node: str, free: Resources, staying: Mapping[int, str], each: Resources
) -> tuple[str, list[int]] | None:
    """The node, and who has to leave it for this actor; None where that would not do."""
    there = [number for number, at in staying.items() if at == node]
    for num_leaving in range(len(there) + 1):
        room = dict(free)
        _add(room, each, num_leaving)
        if all(room.get(name, 0.0) >= amount - ROUNDING for name, amount in actor.resources.items()):
            return node, there[:num_leaving]
    return None


def _add(room: dict[str, float], resources: Resources, times: int) -> None:
    for name, amount in resources.items():
        room[name] = room.get(name, 0.0) + times * amount


def _avoided(selector: Mapping[str, str]) -> frozenset[str]:
    """As `Members.start` asks for it."""
    value = selector.get(NODE_LABEL, "")
    return frozenset(_NODE_ID.findall(value)) if value.startswith("!") else frozenset()
