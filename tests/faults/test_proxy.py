"""The proxy: what is not chosen passes unchanged, what is chosen meets its fault, and seeds repeat."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from tests.faults import proxy as p
from tests.faults.proxy import FaultyProxy


class Echo(BaseHTTPRequestHandler):
    """Answers with the request; `server.bodies` are those that arrived."""

    protocol_version = "HTTP/1.1"
    bodies: list[bytes]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        Echo.bodies.append(body)
        told = json.dumps({"line": self.requestline, "headers": dict(self.headers), "body": body.decode()}).encode()
        self.send_response(200)
        self.send_header("X-Told", "yes")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(told)

    do_GET = do_PUT = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def echo() -> Iterator[FaultyProxy]:
    """A proxy before a server that echoes."""
    Echo.bodies = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    proxy = FaultyProxy(f"http://127.0.0.1:{server.server_port}")
    yield proxy
    proxy.close()
    server.shutdown()
    server.server_close()


def ask(proxy: FaultyProxy, method: str = "GET", path: str = "/bucket/key", body: bytes | None = None) -> bytes:
    """The body of the answer, over a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(proxy.url).netloc, timeout=10)
    try:
        connection.request(method, path, body=body, headers={"Host": "store.example", "Authorization": "Signed"})
        return connection.getresponse().read()
    finally:
        connection.close()


def test_request_and_answer_pass_unchanged(echo: FaultyProxy) -> None:
    path = "/bucket/a%20b?list-type=2&prefix=x%2F"
    told = json.loads(ask(echo, "PUT", path, b"content"))
    assert told["line"] == f"PUT {path} HTTP/1.1"
    assert told["body"] == "content"
    # What a signature covers; the host above all, which is not the server's own address.
    assert told["headers"]["Host"] == "store.example" and told["headers"]["Authorization"] == "Signed"
    assert echo.requests == [f"PUT {path}"]


def test_answer_to_head_has_the_length_of_a_body_that_does_not_come(echo: FaultyProxy) -> None:
    connection = http.client.HTTPConnection(urlsplit(echo.url).netloc, timeout=10)
    for _ in range(2):  # over one connection, which a body that nobody reads would confuse
        connection.request("HEAD", "/x")
        response = connection.getresponse()
        assert response.read() == b"" and int(response.headers["Content-Length"]) > 50
    connection.close()


def test_body_in_chunks_arrives_whole(echo: FaultyProxy) -> None:
    connection = http.client.HTTPConnection(urlsplit(echo.url).netloc, timeout=10)
    connection.request("PUT", "/x", body=iter([b"one", b"two"]), encode_chunked=True)
    connection.getresponse().read()
    connection.close()
    assert Echo.bodies == [b"onetwo"]


def test_rule_holds_for_its_requests_and_its_number(echo: FaultyProxy) -> None:
    rule = echo.inject(p.status(503), on="^GET .*/shards/", times=2)
    assert b"SlowDown" not in ask(echo, path="/bucket/other")
    assert b"SlowDown" not in ask(echo, "PUT", "/bucket/shards/a", b"")
    assert [b"SlowDown" in ask(echo, path="/bucket/shards/a") for _ in range(3)] == [True, True, False]
    assert len(rule.hits) == 2


def test_rule_ends_with_its_time_and_with_a_calm(echo: FaultyProxy) -> None:
    began = time.monotonic()
    echo.inject(p.status(503), seconds=0.2)
    while b"SlowDown" in ask(echo):
        assert time.monotonic() < began + 5
    assert time.monotonic() >= began + 0.2
    echo.inject(p.reset)
    echo.calm()
    assert b"Signed" in ask(echo) and echo.requests == ["GET /bucket/key"]


def test_same_seed_chooses_the_same_requests(echo: FaultyProxy) -> None:
    def chosen(seed: int) -> list[bool]:
        echo.calm(seed)
        echo.inject(p.status(500), probability=0.5)
        return [b"InternalError" in ask(echo) for _ in range(20)]

    first = chosen(1)
    assert chosen(1) == first != chosen(2)
    assert 0 < sum(first) < 20


def test_connection_that_breaks_is_a_reset(echo: FaultyProxy) -> None:
    echo.inject(p.reset, times=1)
    echo.inject(p.answer_lost, times=1)
    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            ask(echo, "PUT", body=b"content")
    assert Echo.bodies == [b"content"], "the second one was done"


def test_spoilt_answers_are_spoilt_as_they_say(echo: FaultyProxy) -> None:
    whole = ask(echo)
    echo.inject(p.truncated, times=1)
    with pytest.raises(http.client.IncompleteRead):
        ask(echo)
    echo.inject(p.shortened, times=1)
    assert ask(echo) == whole[: len(whole) // 2]
    echo.inject(p.flipped, times=1)
    assert sum((a ^ b).bit_count() for a, b in zip(ask(echo), whole, strict=True)) == 1
    echo.inject(p.slow(bytes_per_s=len(whole) * 4), times=1)
    began = time.monotonic()
    assert ask(echo) == whole and 0.1 < time.monotonic() - began < 5


@pytest.mark.parametrize(
    "fault", [p.stalled, p.stalled_in_body, p.delayed(1000)], ids=["at once", "in body", "delayed"]
)
def test_closed_proxy_keeps_nobody_waiting(echo: FaultyProxy, fault: p.Fault) -> None:
    rule = echo.inject(fault)
    ended = threading.Event()

    def wait() -> None:
        with pytest.raises((OSError, http.client.HTTPException)):
            ask(echo)
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    while not rule.hits:
        time.sleep(0.005)
    echo.close()
    assert ended.wait(5)
    with pytest.raises(ConnectionRefusedError):
        ask(echo)
