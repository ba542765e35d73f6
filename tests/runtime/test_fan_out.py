"""Preparation over a cluster: the bytes of one process, whatever happens to the tasks."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_lm.data import prepare as local
from elastic_lm.data.prepare import PrepareOptions
from elastic_lm.errors import DataError
from elastic_lm.runtime import fan_out
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.faults.harness import processes_titled

pytestmark = pytest.mark.ray

NUM_PARTS = 16  # more than may be under way at a time
WAIT_S = 60.0
OPTIONS = PrepareOptions(vocab_size=300, block_tokens=1025, held_out=0.1, part_bytes=1, tokenizer_bytes=50_000)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of files, each of them a part of its own that takes a moment to encode."""
    folder = tmp_path_factory.mktemp("sources")
    for number in range(NUM_PARTS):
        write_lines(folder / f"{number:02}.jsonl", texts(2000, seed=number))
    return str(folder)


@pytest.fixture(scope="module")
def expected(sources: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What preparation in one process leaves."""
    out = Storage.open(str(tmp_path_factory.mktemp("expected")))
    local.prepare([sources], out, OPTIONS)
    return content(out)


def content(storage: Storage) -> dict[str, str]:
    return {path: hashlib.sha256(storage.read(path)).hexdigest() for path in storage.list()}


def test_cluster_leaves_the_bytes_of_one_process(
    cluster: LocalCluster, sources: str, expected: dict[str, str], tmp_path: Path
) -> None:
    out = Storage.open(str(tmp_path))
    manifest = fan_out.prepare([sources], out, OPTIONS)
    assert manifest.num_tokens > 0
    assert content(out) == expected


def test_killed_tasks_are_run_again(
    cluster: LocalCluster, sources: str, expected: dict[str, str], tmp_path: Path
) -> None:
    out = Storage.open(str(tmp_path))
    killed: set[int] = set()

    def kill_one() -> bool:
        for pid in processes_titled(cluster, "ray::encode_one"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        return len(killed) >= 3

    with ThreadPoolExecutor(1) as pool:
        preparing = pool.submit(fan_out.prepare, [sources], out, OPTIONS)
        wait_for(lambda: kill_one() or preparing.done(), timeout_s=WAIT_S, what="three tasks to kill")
        preparing.result(WAIT_S)
    assert len(killed) >= 3
    assert content(out) == expected


def test_bad_document_is_refused_with_its_place_as_in_one_process(cluster: LocalCluster, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", texts(50))
    (tmp_path / "b.jsonl").write_text('{"text": "well"}\n{"txt": 1}\n')
    told = list(refusals(str(tmp_path), Storage.open(str(tmp_path / "out"))))
    assert told[0] == told[1]
    assert "b.jsonl, byte 0 plus 1 lines: not an object with a string" in told[0]


def refusals(sources: str, out: Storage) -> Iterator[str]:
    options = PrepareOptions(vocab_size=300, part_bytes=1, tokenizer_bytes=2000)
    for prepare in (local.prepare, fan_out.prepare):
        with pytest.raises(DataError) as caught:
            prepare([sources], out, options)
        yield str(caught.value)
