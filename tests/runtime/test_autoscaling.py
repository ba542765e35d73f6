"""Workers that wait are demand: Ray's autoscaler starts nodes for them, takes idle ones away, and is left without demand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from ray.autoscaler.v2.sdk import get_cluster_status

from elastic_lm import Run
from elastic_lm.config import RunConfig
from elastic_lm.errors import NotFoundError
from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import wait_for
from tests.faults.harness import make_config
from tests.runtime.head import Head, autoscaled_head, nodes

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1000)]

MAX = 3
WAIT_S = 300  # a machine whose processors others use starves what Ray starts: workers have the lowest priority


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with autoscaled_head(MAX, idle_s=3) as head:
        yield head


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "elastic_lm", *arguments]


def workers(config: RunConfig) -> int:
    with suppress(NotFoundError):  # no log yet
        return Run.open(config).status().workers
    return 0


def demand(head: Head) -> list[object]:
    """What waits for resources, by the autoscaler's own account."""
    waiting = get_cluster_status(head.gcs).resource_demands
    return [*waiting.ray_task_actor_demand, *waiting.placement_group_demand]


@contextmanager
def told_on_failure(head: Head, said: Path) -> Iterator[None]:
    """What the run and the autoscaler said goes with an error: nobody can ask them afterwards."""
    try:
        yield
    except (AssertionError, TimeoutError) as error:
        log = next(head.folder.glob("session_*/logs/monitor.log")).read_text().splitlines()
        told = [line for line in log if " INFO " in line or " ERROR " in line]
        error.add_note("\n".join([said.read_text(), *told[-60:]]))
        raise


def test_run_starts_at_its_minimum_grows_with_the_nodes_and_gives_them_back(
    head: Head, corpus: str, tmp_path: Path
) -> None:
    config = make_config(corpus, f"file://{tmp_path}", "autoscaled", steps=100_000, workers={"min": 1, "max": MAX})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    environment = {**head.environment, "RAY_ADDRESS": head.gcs}
    assert len(nodes(head)) == 1
    with open(tmp_path / "said", "wb") as said:
        train = subprocess.Popen(command("train", str(path)), env=environment, stdout=said, stderr=said)
    try:
        with told_on_failure(head, tmp_path / "said"):
            wait_for(
                lambda: train.poll() is not None or workers(config) == MAX,
                timeout_s=WAIT_S,
                what="a node for every worker",
                poll_s=0.5,
            )
            assert train.poll() is None, "it trains"
        sizes = [e.fields["world_size"] for e in Run.open(config).events() if e.kind is EventKind.LEASE_GRANTED]
        assert sizes[0] < MAX, "it began with the first node that came"

        scale = command("scale", str(path), "--workers", "1")
        subprocess.run(scale, env=environment, check=True, timeout=WAIT_S, stdout=subprocess.DEVNULL)
        wait_for(lambda: len(nodes(head)) == 2, timeout_s=WAIT_S, what="idle nodes are taken away", poll_s=0.5)
        assert workers(config) == 1 and train.poll() is None

        stop = command("stop", str(path))
        subprocess.run(stop, env=environment, check=True, timeout=WAIT_S, stdout=subprocess.DEVNULL)
        assert train.wait(WAIT_S) == 5, (tmp_path / "said").read_text()
    finally:
        if train.poll() is None:
            train.kill()
            train.wait(10)
    wait_for(lambda: not demand(head), timeout_s=WAIT_S, what="nothing waits for resources", poll_s=0.5)
    wait_for(lambda: len(nodes(head)) == 1, timeout_s=WAIT_S, what="the last node is taken away", poll_s=0.5)
    losses = [event for event in Run.open(config).events() if event.kind is EventKind.MEMBER_LOST]
    assert not losses, "nodes that are taken away are idle"
