"""A word for a run from outside: commands left in its mailbox by somebody who joins its cluster for a moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from elastic_lm.errors import ClusterError, ConfigError
from elastic_lm.runtime import cluster
from elastic_lm.runtime.mailbox import Command, find_mailbox

ANSWER_S = 10.0


def command(run: str, kind: str, arguments: dict[str, Any], *, node: str | None = None) -> str:
    """Leave a command for the run's coordinator. `node`: the beginning of a node's id, for `drain`.

    Returns: the whole id of that node, or "".
    Raises: ClusterError when there is no cluster, the run is not trained on it, or does not answer; ConfigError when no worker
    is there.
    """
    with _mailbox(run) as mailbox:
        node_id = "" if node is None else _node(ray.get(mailbox.status.remote(), timeout=ANSWER_S), node)
        if node_id:
            arguments = {**arguments, "node_id": node_id, "member_id": None}
        ray.get(mailbox.post.remote(Command(kind, arguments)), timeout=ANSWER_S)
    return node_id


def run_url(run: str) -> str:
    """Where a run that is being trained is stored.    Raises: ClusterError as `command`."""
    with _mailbox(run) as mailbox:
        url = ray.get(mailbox.status.remote(), timeout=ANSWER_S).get("run_url")
    if url is None:
        raise ClusterError(f"run {run} is just starting; try again in a few seconds")
    return str(url)


@contextlib.contextmanager
def _mailbox(run: str) -> Iterator[Any]:
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        raise ClusterError(
            "RAY_ADDRESS is not set, so it is not known which cluster trains the run; set it to the head's address"
        )
    with cluster.connected():
        try:
            mailbox = find_mailbox(run)
        except ValueError as error:
            raise ClusterError(
                f"run {run} is not being trained on this cluster; one that has ended is found by its YAML file or its "
                "address (STORAGE/runs/NAME)"
            ) from error
        try:
            yield mailbox
        except GetTimeoutError as error:
            raise ClusterError(
                f"run {run} has not answered within {ANSWER_S:.0f} s, so it may or may not have heard; its head is busy or "
                "cannot be reached. Give the command again"
            ) from error
        except RayError as error:
            raise ClusterError(
                f"run {run} could not be told: {type(error).__name__}, so its job has ended or its cluster is in trouble; "
                "elastic-lm status tells whether it still trains. If it does, give the command again"
            ) from error


def _node(status: dict[str, Any], beginning: str) -> str:
    """The one node with workers of the run whose id begins so."""
    nodes = {member["node_id"] for member in status.get("members", {}).values() if member["node_id"]}
    found = [node_id for node_id in nodes if node_id.startswith(beginning)]
    if len(found) != 1:
        raise ConfigError(
            f"{len(found)} nodes with workers of this run have an id that begins with {beginning!r}; "
            f"they are on {', '.join(sorted(nodes)) or 'none'}"
        )
    return found[0]
