"""The laptop overlay without Kubernetes: the very commands of its containers, as far as Ray is not needed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.schemas import KUBERAY, ROOT, cluster_spec, rendered
from tests.test_cli import run

Command = list[str]
PORT = "5000"  # of the server in the cluster


@pytest.fixture(scope="module")
def objects() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in rendered(KUBERAY / "overlays/kind-cpu")}


@pytest.fixture(scope="module")
def port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def environment(port: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The Secret's variables with the server's address here, and a PATH on which our commands are."""
    folder = tmp_path_factory.mktemp("bin")
    program = folder / "elastic-lm"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m elastic_lm "$@"\n')
    program.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }


def command_of(container: dict[str, Any]) -> Command:
    return [
        sys.executable if part == "python" else part for part in [*container["command"], *container.get("args", [])]
    ]


def of_pod(document: dict[str, Any]) -> Command:
    return command_of(document["spec"]["template"]["spec"]["containers"][0])


@pytest.fixture(scope="module")
def waiting(objects: dict[str, dict[str, Any]], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """What holds the head back until there is a corpus; it begins before there is a server."""
    (container,) = cluster_spec(objects["RayJob"])["headGroupSpec"]["template"]["spec"]["initContainers"]
    with subprocess.Popen(command_of(container), env=environment, stdout=subprocess.DEVNULL) as process:
        yield process
        process.kill()


@pytest.fixture(scope="module")
def server(objects: dict[str, dict[str, Any]], environment: dict[str, str], port: str) -> Iterator[None]:
    command = [port if part == PORT else part for part in of_pod(objects["Deployment"])]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield
        process.terminate()


@pytest.mark.s3
@pytest.mark.slow
def test_corpus_is_there_before_the_run_begins(
    objects: dict[str, dict[str, Any]],
    environment: dict[str, str],
    waiting: subprocess.Popen[bytes],
    server: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert waiting.poll() is None
    prepare = [part.replace("/*.py", "/c*.py") for part in of_pod(objects["Job"])]  # less of the library: seconds
    for _ in range(objects["Job"]["spec"]["backoffLimit"]):  # as Kubernetes does, until the server is there
        done = subprocess.run(prepare, env=environment, capture_output=True, text=True, timeout=90)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stderr
    assert waiting.wait(timeout=90) == 0
    file = tmp_path / "run.yaml"
    file.write_text(objects["ConfigMap"]["data"]["run.yaml"])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = run("train", str(file), "--dry-run")
    assert told.exit_code == 0, told.stderr
    assert "The run would begin at step 0." in told.stdout
