"""What every test stands on: one thread per process, an embedded S3 server, and nothing left behind."""

from __future__ import annotations

import os

# Before torch or ray are imported by anybody: tests share few cores, and threads are part of what bits depend on.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# c10d looks up the name of every address that it meets; where DNS loses packets, each lost one would cost 5 s.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")

import gc
import itertools
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from elastic_lm.config import RunConfig
from elastic_lm.result import RunResult
from elastic_lm.terminal import say
from tests.notebook import Notebook, become_a_kernel

if TYPE_CHECKING:
    from elastic_lm.runtime.cluster import LocalCluster
    from tests.faults.harness import Run
    from tests.faults.proxy import FaultyProxy

# Deadlines measure the machine's load, not our code; pytest-timeout bounds what is stuck.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

_bucket_numbers = itertools.count()

# Whoever runs the tests is root in there, where the machine allows that.
NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make hundreds of thousands of objects that stay. To look for garbage among them took a third of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what this machine lacks are not collected at all, so that none is ever skipped."""
    for marker, is_there in (
        ("soak", lambda: "SOAK_SECONDS" in os.environ),
        ("gpu", _has_gpu),
        ("browser", lambda: find_chromium() is not None),
        ("prometheus", lambda: shutil.which("prometheus") is not None and shutil.which("promtool") is not None),
        ("mount", _may_mount),
    ):
        if any(item.get_closest_marker(marker) for item in items) and not is_there():
            items[:] = [item for item in items if not item.get_closest_marker(marker)]


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _may_mount() -> bool:
    """In a namespace of its own, so that nothing of it outlives the command or is seen outside."""
    try:
        script = f"mount -t tmpfs tmpfs {shlex.quote(tempfile.gettempdir())}"
        return subprocess.run([*NAMESPACE, "/bin/sh", "-c", script], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def find_chromium() -> str | None:
    """The browser that renders pages in tests."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def s3_proxy() -> Iterator[FaultyProxy]:
    """An S3 server in this process, behind a proxy, and the AWS_* environment that leads to it. See `proxy`."""
    from moto.server import ThreadedMotoServer

    from tests.faults.proxy import FaultyProxy

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = FaultyProxy(f"http://{host}:{port}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-from-everybody")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield proxy
    proxy.close()
    server.stop()


@pytest.fixture(scope="session")
def s3_server(s3_proxy: FaultyProxy) -> str:
    """The address of the S3 server for those who want nothing to go wrong with it."""
    return s3_proxy.url


@pytest.fixture
def proxy(s3_proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    """What is between everybody and the S3 server. It makes trouble when told to, until the test is over."""
    s3_proxy.calm()
    yield s3_proxy
    s3_proxy.calm()


@pytest.fixture
def s3_url(s3_server: str) -> str:
    """The address of a new, empty bucket."""
    import boto3

    bucket = f"bucket-{next(_bucket_numbers)}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def folder_url(tmp_path: Path) -> str:
    """The address of an empty folder, as storage sees it."""
    return f"file://{tmp_path}/store"


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Clusters that are made to have their workers forked, `ForkingCluster` and those of tests/runtime/head.py, may do so."""
    from tests.forking.cluster import fork_server

    with fork_server(tmp_path_factory.mktemp("fork")):
        yield


@pytest.fixture(scope="session")
def shared_cluster(s3_server: str, forks: None) -> Iterator[LocalCluster]:
    """Started after the S3 server: Ray's workers inherit the AWS_* environment of the process that starts the nodes."""
    from tests.forking.cluster import ForkingCluster

    with ForkingCluster(3, num_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: LocalCluster) -> LocalCluster:
    """A Ray cluster with a head and three whole nodes of two CPUs; tests may kill nodes."""
    while len(shared_cluster.nodes) < 3:
        shared_cluster.add_node()
    return shared_cluster


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a small corpus."""
    from tests.faults.harness import make_corpus

    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def on_s3(s3_server: str, corpus: str) -> str:
    """The address of a bucket with the corpus below tokens/."""
    import boto3

    from elastic_lm.storage import Storage

    boto3.client("s3").create_bucket(Bucket="with-a-corpus")
    here, there = Storage.open(corpus), Storage.open("s3://with-a-corpus/tokens")
    for path in here.list():
        there.write(path, here.read(path))
    return "s3://with-a-corpus"


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a corpus for runs without Ray (tests/solo.py)."""
    from tests.solo import solo_corpus

    return solo_corpus(tmp_path_factory.mktemp("small-corpus"))


@pytest.fixture(scope="session")
def held_out_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with a tenth held out."""
    from tests.solo import solo_corpus

    return solo_corpus(tmp_path_factory.mktemp("held-out"), held_out=0.1)


@pytest.fixture
def start(cluster: LocalCluster, corpus: str, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs, and lets them train `held_at` steps (None: all but the last) until their result is asked for.

    Afterwards nothing of them may be left.
    """
    from tests.faults.harness import Run, assert_nothing_left, held, make_config

    numbers = itertools.count(1)
    runs: list[Run] = []

    def begin(
        *,
        steps: int,
        tokens: str = corpus,
        storage: str = f"file://{tmp_path}",
        name: str | None = None,
        kind: type[Run] = Run,
        held_at: int | None = None,
        **changes: Any,
    ) -> Run:
        number = next(numbers)
        name = name or f"{tmp_path.name.replace('[', '-').replace(']', '')[:40]}-{number}"
        gate = tmp_path / f"end-{number}"
        config = make_config(tokens, storage, name, steps=steps, **changes)
        runs.append(kind(held(config, steps - 1 if held_at is None else held_at, gate), gate))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()
    assert_nothing_left(cluster)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    """This process looks like the kernel of this notebook."""
    return become_a_kernel(monkeypatch)


Fake = Callable[[RunResult | Exception], list[RunConfig]]


@pytest.fixture
def fake_fit(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Makes `fit` end as told; returns the configs it is given."""

    def fake(outcome: RunResult | Exception) -> list[RunConfig]:
        configs: list[RunConfig] = []

        def fit(config: RunConfig) -> RunResult:
            configs.append(config)
            say("Step 1.")
            if isinstance(outcome, RunResult):
                return outcome
            raise outcome

        monkeypatch.setattr("elastic_lm.runtime.trainer.fit", fit)
        return configs

    return fake
