"""The probe finds each thing that a storage may do wrong, and leaves nothing behind, whatever it finds."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from elastic_lm.errors import StorageError
from elastic_lm.storage import Storage
from elastic_lm.storage_probe import probe

OPERATIONS = ["write", "read", "ranged read", "create-only", "list", "delete"]


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}" if request.param == "file" else str(request.getfixturevalue("s3_url"))


def test_storage_that_is_well_passes_every_operation(url: str) -> None:
    found = probe(url)
    assert found.failures == {}
    assert list(found.seconds) == OPERATIONS
    assert all(0 <= seconds < 10 for seconds in found.seconds.values())
    assert Storage.open(url).list() == []


def test_clocks_agree_on_one_machine(url: str) -> None:
    found = probe(url)
    assert found.ahead_s is not None
    assert abs(found.ahead_s) <= found.uncertain_s + 0.1  # a file system's clock is a few milliseconds behind


# -- files -----------------------------------------------------------------------------------------------------------


def test_folder_that_was_not_there_is_gone_again(tmp_path: Path) -> None:
    assert probe(f"file://{tmp_path}/new/deep").failures == {}
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").write_text("precious")
    assert probe(f"file://{tmp_path}/runs").failures == {}
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]
    assert probe(f"file://{tmp_path}").failures == {}
    (tmp_path / "empty").mkdir()
    assert probe(f"file://{tmp_path}/empty").failures == {}
    assert (tmp_path / "empty").is_dir()


def test_folder_that_cannot_be_one_fails_at_the_write_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = probe(f"file://{tmp_path}/file")
    assert list(found.failures) == ["write"]
    assert "is a file, not a folder" in found.failures["write"]
    assert (found.seconds, found.ahead_s) == ({}, None)


def test_folder_that_cannot_even_be_looked_for_fails_at_the_write_alone(tmp_path: Path) -> None:
    found = probe(f"file://{tmp_path}/{'x' * 300}")  # the same error to `exists` as a folder one has no right to search
    assert list(found.failures) == ["write"]
    assert "name too long" in found.failures["write"]


def test_address_that_is_none_is_refused() -> None:
    with pytest.raises(StorageError, match="not supported"):
        probe("gs://bucket")


# -- a server that does one thing wrong --------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """A small S3: one bucket, in memory. `fault` is what it does wrong; `ahead_s` how far its clock is ahead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.fault = ""
        self.ahead_s = 0.0


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    @property
    def key(self) -> str:
        return self.path.partition("?")[0].removeprefix("/bucket").strip("/")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.fault == "refuses writes":
            return self.answer(403)
        is_conditional = self.headers["If-None-Match"] == "*" and self.server.fault != "ignores conditions"
        if is_conditional and self.key in self.server.objects:
            return self.answer(412)
        self.server.objects[self.key] = body
        return self.answer(200, headers={"ETag": '"x"'})

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            return self.answer(200, self.listing())
        if self.key not in self.server.objects:
            return self.answer(404)
        body = self.server.objects[self.key]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if wanted is None:
            return self.answer(200, bytes(len(body)) if self.server.fault == "flips bytes" else body)
        start = int(wanted[1]) + (1 if self.server.fault == "shifts ranges" else 0)
        return self.answer(206, body[start : start + int(wanted[2]) - int(wanted[1]) + 1])

    def do_HEAD(self) -> None:
        if self.server.fault == "hides properties":
            return self.answer(403)
        if self.key not in self.server.objects:
            return self.answer(404)
        stamp = {"Last-Modified": formatdate(time.time() + self.server.ahead_s, usegmt=True), "ETag": '"x"'}
        return self.answer(200, self.server.objects[self.key], stamp)

    def do_DELETE(self) -> None:
        if self.server.fault != "keeps everything":
            self.server.objects.pop(self.key, None)
        self.answer(204)

    def listing(self) -> bytes:
        keys = [] if self.server.fault == "lists nothing" else sorted(self.server.objects)
        found = "".join(
            f"<Contents><Key>{key}</Key><Size>1</Size><ETag>x</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key in keys
        )
        return (
            f"<ListBucketResult><Name>bucket</Name><KeyCount>{len(keys)}</KeyCount>{found}</ListBucketResult>".encode()
        )

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield server
    server.shutdown()
    server.server_close()


def test_small_server_is_well_without_a_fault(server: Server) -> None:
    found = probe("s3://bucket")
    assert found.failures == {}
    assert list(found.seconds) == OPERATIONS
    assert server.objects == {}


@pytest.mark.parametrize(
    ("fault", "operation", "words"),
    [
        ("refuses writes", "write", "access denied"),
        ("flips bytes", "read", "other bytes than were written a moment ago"),
        ("shifts ranges", "ranged read", "other bytes than were written there"),
        ("ignores conditions", "create-only", "an object that was there was replaced"),
        ("lists nothing", "list", r"\[\] in place of the one object"),
        ("keeps everything", "delete", "it is still there"),
    ],
)
def test_each_fault_is_found_and_named_alone(fault: str, operation: str, words: str, server: Server) -> None:
    server.fault = fault
    found = probe("s3://bucket/runs")
    assert list(found.failures) == [operation]
    assert re.search(words, found.failures[operation])
    assert "hidden" not in str(found.failures)
    worked = [] if operation == "write" else [name for name in OPERATIONS if name != operation]
    assert list(found.seconds) == worked
    assert fault == "keeps everything" or server.objects == {}


def test_properties_that_may_not_be_seen_leave_the_clock_unknown(server: Server) -> None:
    server.fault = "hides properties"
    found = probe("s3://bucket")
    assert "access denied" in found.failures["clock"]
    assert found.ahead_s is None
    assert server.objects == {}


@pytest.mark.parametrize("ahead_s", [-3600.0, 0.0, 90.0])
def test_clock_of_storage_is_compared_with_ours(ahead_s: float, server: Server) -> None:
    server.ahead_s = ahead_s
    found = probe("s3://bucket")
    assert found.ahead_s is not None
    assert abs(found.ahead_s - ahead_s) <= found.uncertain_s + 0.01
    assert 0.5 <= found.uncertain_s < 10
