"""Runs as Ray jobs, against a real head with its job server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import ray
from ray.job_submission import JobSubmissionClient

from elastic_lm import Run, __version__, job_version
from elastic_lm.config import RunConfig
from elastic_lm.errors import ClusterError, ConfigError
from elastic_lm.runtime import jobs
from elastic_lm.runtime.cluster import wait_for
from elastic_lm.runtime.jobs import Jobs, modules_of, pack
from elastic_lm.terminal import Exit
from tests.runtime.head import Head, running_head
from tests.solo import solo_config

RUN_S = 240
STEPS = 100
WORKER = {"min": 1, "max": 1}
CANARY = "canary-b7e0c1d2"


@pytest.fixture(scope="module")
def head(forks: None) -> Iterator[Head]:
    """Its nodes have a secret, as those have that read from a bucket."""
    with running_head(num_cpus=2, AWS_SECRET_ACCESS_KEY=CANARY) as head:
        yield head


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and no word about clusters in the environment."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(
    *arguments: str, head: Head, timeout: float = RUN_S, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`elastic-lm ARGUMENTS --address` in the current folder."""
    everything = {**os.environ, "PYTHONPATH": head.environment["PYTHONPATH"], **environment}
    whole = [sys.executable, "-m", "elastic_lm", *arguments, "--address", head.address]
    return subprocess.run(whole, env=everything, capture_output=True, text=True, timeout=timeout)


def written(config: RunConfig) -> str:
    Path("run.yaml").write_text(config.to_yaml())
    return "run.yaml"


# -- on a cluster ----------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_job_trains_a_model_of_this_folder_to_its_end_and_tells_all_of_it(
    head: Head, here: Path, small_corpus: str
) -> None:
    """The code that it takes along is what is named, and nothing else that is here."""
    Path("mine").mkdir()
    Path("mine/__init__.py").touch()
    Path("mine/models.py").write_text("from tests.engine.user_code import bag as build\n")
    Path("secrets.txt").write_text("not for the cluster")
    model = {"factory": "mine.models:build"}
    config = solo_config(small_corpus, f"file://{here}", "of-a-job", workers=WORKER, model=model)
    done = command("submit", written(config), "--follow", head=head)
    assert done.returncode == Exit.DONE, done.stdout + done.stderr
    assert "6 steps" in done.stdout or "step 6" in done.stdout.lower()
    result = Run.open(config).result
    assert result is not None and result.verdict == "done" and result.last_step == 6

    again = command("logs", "of-a-job", "-f", head=head)
    assert again.returncode == Exit.DONE
    assert again.stdout and done.stdout.endswith(again.stdout)
    told = json.loads(command("status", "of-a-job", "--json", head=head).stdout)
    assert (told["job"], told["exit_code"], told["stored_in"]) == ("SUCCEEDED", 0, config.run_url)
    assert "not for the cluster" not in json.dumps(told) + done.stdout

    # The secret is in nothing that anybody keeps: the job's record, the run's folder, the logs of the cluster.
    record = Jobs(head.address).details("of-a-job").model_dump_json()
    kept = [*here.rglob("*"), *head.folder.rglob("*.log"), *head.folder.rglob("*.out"), *head.folder.rglob("*.err")]
    assert len([path for path in kept if path.is_file()]) > 20
    told_by = [path for path in kept if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert not told_by and CANARY not in record + done.stdout + done.stderr


@pytest.mark.ray
def test_job_that_is_stopped_leaves_a_checkpoint_and_goes_on_when_submitted_again(
    head: Head, here: Path, small_corpus: str
) -> None:
    held = [f"*:data@10=wait:{here}/go-on"]
    config = solo_config(small_corpus, f"file://{here}", "stopped", steps=STEPS, workers=WORKER, failpoints=held)
    name = written(config)
    assert command("submit", name, head=head).returncode == Exit.DONE
    wait_for(lambda: _step(config) > 3, timeout_s=RUN_S, what="the job trains", poll_s=0.2)
    twice = command("submit", name, head=head)
    assert twice.returncode == Exit.USAGE
    assert "has a job at" in twice.stderr
    assert command("stop", "stopped", head=head).returncode == Exit.DONE
    assert command("logs", "stopped", "-f", head=head).returncode == Exit.STOPPED
    result = Run.open(config).result
    assert result is not None and result.verdict == "stopped" and result.last_step > 3
    assert json.loads(command("status", "stopped", "--json", head=head).stdout)["job"] == "STOPPED"
    ours = ("ray::Worker", "ray::Reader", "ray::Mailbox")
    wait_for(lambda: not [t for t in titles(head) if t.startswith(ours)], timeout_s=RUN_S, what="all actors' end")
    assert command("stop", "stopped", head=head).returncode == Exit.USAGE

    Path("go-on").touch()
    again = command("submit", name, "-f", head=head)
    assert again.returncode == Exit.DONE
    assert again.stdout.count("Running entrypoint for job") == 1, "its predecessor's log comes first"
    assert Run.open(config).metrics()["step"].to_pylist() == list(range(STEPS))


def titles(head: Head) -> list[str]:
    """Of all processes of the cluster."""
    found = []
    for process in head.processes():
        with suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    assert any("raylet" in title for title in found)
    return found


def _step(config: RunConfig) -> int:
    with suppress(Exception):
        return Run.open(config).status().step
    return 0


@pytest.mark.ray
def test_exit_code_is_that_of_the_command_in_the_job(head: Head, here: Path) -> None:
    config = solo_config(f"file://{here}/nothing", f"file://{here}", "without-corpus", workers=WORKER)
    done = command("submit", written(config), "-f", head=head)
    assert done.returncode == Exit.DATA
    assert "nothing" in done.stdout


@pytest.mark.ray
def test_job_of_another_version_is_refused_before_its_run_has_anything(
    head: Head, here: Path, small_corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_version, "__version__", "9.9.9")
    Jobs(head.address).submit(solo_config(small_corpus, f"file://{here}/store", "of-tomorrow", workers=WORKER))
    done = command("logs", "of-tomorrow", "-f", head=head)
    assert done.returncode == Exit.USAGE
    assert f"submitted by elastic-lm 9.9.9, and the cluster has elastic-lm {__version__}" in done.stdout
    assert list(here.iterdir()) == []


@pytest.mark.ray
def test_cluster_without_elastic_lm_is_told_as_such(head: Head, here: Path) -> None:
    """A command that no node has stands for it."""
    JobSubmissionClient(head.address).submit_job(
        entrypoint="elastic-lm-of-nobody train run.yaml", submission_id="bare", metadata={"run": "bare"}
    )
    remedy = f"no elastic-lm on its PATH; install elastic-lm {__version__} on all nodes"
    followed = command("logs", "bare", "-f", head=head)
    assert followed.returncode == 127 and remedy in followed.stderr
    assert remedy in command("logs", "bare", head=head).stderr
    told = json.loads(command("status", "bare", "--json", head=head).stdout)
    assert told["exit_code"] == 127 and remedy in told["message"]


@pytest.mark.ray
def test_job_of_somebody_else_is_neither_stopped_nor_forgotten(head: Head, here: Path, small_corpus: str) -> None:
    other = JobSubmissionClient(head.address).submit_job(entrypoint="sleep 60", submission_id="etl")
    server = Jobs(head.address)
    with pytest.raises(ConfigError, match="somebody else's has its name"):
        server.stop("etl")
    with pytest.raises(ConfigError, match=r"has a job etl already, of somebody else; choose another name"):
        server.submit(solo_config(small_corpus, f"file://{here}", "etl", workers=WORKER))
    with pytest.raises(ConfigError, match="looks like an id that Ray gives to jobs"):
        server.submit(solo_config(small_corpus, f"file://{here}", "02000000", workers=WORKER))
    assert not JobSubmissionClient(head.address).get_job_status(other).is_terminal()
    JobSubmissionClient(head.address).stop_job(other)


@pytest.mark.ray
def test_log_is_whole_however_often_the_connection_breaks(
    head: Head, here: Path, small_corpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = solo_config(small_corpus, f"file://{here}", "cut", steps=40, workers=WORKER)
    Jobs(head.address).submit(config)
    monkeypatch.setattr(jobs, "RETRY_S", 0.1)
    monkeypatch.setattr(jobs, "AWAY_S", 10.0)  # less than the whole takes: each answer counts
    away: list[str] = []
    with Relay(head.address) as relay:
        through = Jobs(relay.address)
        told = ""
        for piece in through.follow("cut", on_away=away.append):
            told += piece
            if len(away) < 3:
                relay.cut()
    assert told == Jobs(head.address).log("cut")
    assert away and "asking again" in away[0]
    assert Jobs(head.address).exit_code("cut") == Exit.DONE


@pytest.mark.ray
def test_cluster_with_tokens_refuses_who_has_none_or_another(forks: None, here: Path, small_corpus: str) -> None:
    secret = "canary-4f1c9a"
    config = solo_config(small_corpus, f"file://{here}", "with-token", workers=WORKER)
    name = written(config)
    with running_head(num_cpus=2, token=secret) as head:
        for environment in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong"}):
            refused = command("submit", name, head=head, **environment)
            assert refused.returncode == Exit.UNAVAILABLE
            assert "RAY_AUTH_TOKEN" in refused.stderr
        right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secret}
        done = command("submit", name, "-f", head=head, **right)
        assert done.returncode == Exit.DONE, done.stdout + done.stderr
        assert secret not in done.stdout + done.stderr + command("status", "with-token", head=head, **right).stdout


# -- without one -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("http://127.0.0.1:1", "no answer from a job server at http://127.0.0.1:1"),
        ("127.0.0.1:1", "no answer from a job server at http://127.0.0.1:1"),
        ("ray://127.0.0.1:10001", "no address of a job server; write http://HEAD:8265"),
        ("http://", "no address of a job server"),
        ("http://[::1", "no address of a job server"),
        ("https://user:hunter2@head", "^--address holds a user or a password"),
    ],
)
def test_address_that_is_none_is_told_with_a_remedy(address: str, told: str) -> None:
    with pytest.raises(ClusterError, match=told):
        Jobs(address)


@pytest.mark.parametrize(("version", "fits"), [(ray.__version__, True), ("2.9.0", False)])
def test_another_ray_version_is_refused_before_anything_is_sent(version: str, fits: bool) -> None:
    with job_server({"/api/version": {"ray_version": version, "version": "4"}}) as (address, asked):
        if fits:
            Jobs(address)
        else:
            with pytest.raises(ClusterError, match=r"runs Ray 2\.9\.0, and here .*install ray==2\.9\.0"):
                Jobs(address)
    assert {path for path, _ in asked} == {"/api/version"}


def test_a_job_is_told_which_version_submits_it() -> None:
    answers = {
        "/api/version": {"ray_version": ray.__version__, "version": "4"},
        "/api/jobs/": [],
        "/api/packages/": {},  # the cluster has it already
    }
    with job_server(answers) as (address, asked):
        run = Jobs(address).submit(solo_config("file:///tokens", "file:///runs", "told", workers=WORKER))
    (sent,) = [body for path, body in asked if path == "/api/jobs/" and body is not None]
    assert run == sent["submission_id"] == "told"
    assert sent["runtime_env"]["env_vars"] == {
        "ELASTIC_LM_SUBMITTED_BY": __version__,
        "RAY_JOB_STOP_WAIT_TIME_S": str(jobs.STOP_S),
    }


@contextmanager
def job_server(answers: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
    """Answers each request by how its path begins, and a job as taken.    Yields: its address, and (path, body) of all it got."""
    asked: list[tuple[str, Any]] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, None))
            self._answer(next(answer for path, answer in answers.items() if self.path.startswith(path)))

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, sent))
            self._answer({"job_id": sent["submission_id"], "submission_id": sent["submission_id"]})

        def _answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_a_job_takes_along_the_named_modules_only(here: Path, tmp_path: Path) -> None:
    config = solo_config("file:///tokens", "file:///runs", model={"factory": "mine.models:build"},
                         objective={"name": "aim:loss"})  # fmt: skip
    for path in ("mine/models.py", "mine/__pycache__/models.pyc", "aim.py", "other.py", "data/huge.bin"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("")
    out = Path("out")
    out.mkdir()
    assert modules_of(config) == {"mine", "aim"}
    pack(config, out)
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {"run.yaml", "aim.py", "mine/models.py"}
    assert RunConfig.load(str(out / "run.yaml")) == config


def test_code_that_is_too_much_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_CODE_BYTES", 1_000_000)
    Path("mine").mkdir()
    Path("mine/weights.bin").write_bytes(bytes(2_000_000))
    Path("out").mkdir()
    config = solo_config("file:///tokens", "file:///runs", model={"factory": "mine.models:build"})
    with pytest.raises(ConfigError, match="hold 2 MB, and a job may take 1 MB along; keep data out of them"):
        pack(config, Path("out"))


class Relay:
    """Passes TCP connections on to a server, and cuts all of them when told to."""

    def __init__(self, address: str) -> None:
        place = urlsplit(address)
        self._server = str(place.hostname), int(place.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        while self._sockets:
            with suppress(OSError):
                self._sockets.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                ours, _ = self._listener.accept()
                theirs = socket.create_connection(self._server)
                self._sockets += [ours, theirs]
                for source, sink in ((ours, theirs), (theirs, ours)):
                    threading.Thread(target=_pass_on, args=(source, sink), daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for one in (source, sink):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
