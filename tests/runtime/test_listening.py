"""What listens where: a run opens what the table of docs/operations.md says, and nothing else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray

from elastic_lm.runtime.cluster import LocalCluster
from tests.faults.harness import Run, processes_titled

pytestmark = pytest.mark.ray

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations.md"
ANY = "::"  # all interfaces


def listening(pid: int) -> Counter[str]:
    """Addresses of a process, one for each port."""
    connections = psutil.Process(pid).net_connections(kind="inet")
    return Counter(found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN)


def table() -> dict[str, str]:
    """What listens, and where."""
    section = DOCUMENT.read_text().partition("## What listens where")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|", section, re.MULTILINE)
    return dict(rows[2:])  # below the head and its line


def test_run_listens_where_the_table_says(start: Callable[..., Run], cluster: LocalCluster) -> None:
    before = listening(psutil.Process().pid)
    run = start(steps=100_000, held_at=20, workers={"min": 3, "max": 3})
    run.await_three_at_work(20)
    node = ray.util.get_node_ip_address()
    assert node not in ("127.0.0.1", "0.0.0.0", ANY)
    rows = table()
    assert list(rows) == [
        "Ray's own ports (6379, 8265, 10001, one of each worker and actor, and the like)",
        "metrics",
        "lifelines",
        "rendezvous of a generation",
        "key-value store of a generation",
        "sums between nodes (gloo, NCCL)",
    ]

    # The coordinator, which is this process here.
    assert "127.0.0.1:9464 unless changed" in rows["metrics"]
    assert rows["lifelines"] == rows["rendezvous of a generation"] == "head node's address, a free port"
    assert listening(psutil.Process().pid) - before == Counter({"127.0.0.1": 1, node: 2})

    # Actors: Ray's one port each, on all interfaces; and the first member's store.
    assert "all interfaces" in rows["key-value store of a generation"]
    assert "all interfaces" in rows["Ray's own ports (6379, 8265, 10001, one of each worker and actor, and the like)"]
    workers = [listening(pid) for pid in processes_titled(cluster, "ray::Worker")]
    assert sorted(sum(found.values()) for found in workers) == [1, 1, 2]
    others = [*processes_titled(cluster, "ray::Reader"), *processes_titled(cluster, "ray::Mailbox")]
    assert len(others) == 3
    assert all(found.keys() == {ANY} for found in workers)
    assert all(listening(pid) == Counter({ANY: 1}) for pid in others)
    run.command("stop", reason="enough")
    assert run.result().verdict == "stopped"
