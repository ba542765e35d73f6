"""A proxy before the S3 server that does to chosen requests what networks and busy servers do.

A fault is a function of one `Exchange`: it answers by itself, or forwards the request and spoils the answer. Requests are
passed on as they came, the Host header too, so signatures stay valid. What is not chosen passes through.
"""

from __future__ import annotations

import random
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}
CODES = {400: "InvalidRequest", 403: "AccessDenied", 404: "NoSuchKey", 409: "ConditionalRequestConflict", 429: "TooManyRequests",
         500: "InternalError", 503: "SlowDown"}  # fmt: skip
SLICES_PER_S = 20  # of a slow body


@dataclass(frozen=True)
class Answer:
    """What the server said. `length` is what a HEAD tells of a body that it does not send."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    length: str | None = None


Fault = Callable[["Exchange"], None]


@dataclass
class Rule:
    """A fault, and the requests that meet it: those whose line (`GET /bucket/key?query`) matches, as long as it holds."""

    fault: Fault
    pattern: re.Pattern[str]
    times: int | None
    until: float | None
    probability: float
    hits: list[float] = field(default_factory=list)  # when they came, on the monotonic clock

    def holds(self, now: float) -> bool:
        return (self.times is None or len(self.hits) < self.times) and (self.until is None or now < self.until)


class FaultyProxy:
    """Listens from the start, on a free port of this machine. `requests` are the lines of all that came since `calm`."""

    def __init__(self, server: str) -> None:
        address = urlsplit(server)
        self.server = (address.hostname or "", address.port or 80)
        self.requests: list[str] = []
        self.closing = threading.Event()
        self._rules: list[Rule] = []
        self._draw = random.Random()
        self._lock = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), Exchange)
        self._listener.proxy = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        threading.Thread(target=self._listener.serve_forever, args=(0.02,), name="s3-proxy", daemon=True).start()

    def inject(
        self,
        fault: Fault,
        on: str = "",
        *,
        times: int | None = None,
        seconds: float | None = None,
        probability: float = 1.0,
    ) -> Rule:
        """From now on, for so many requests or seconds. Of several rules that match, the first one counts."""
        until = None if seconds is None else time.monotonic() + seconds
        rule = Rule(fault, re.compile(on), times, until, probability)
        with self._lock:
            self._rules.append(rule)
        return rule

    def calm(self, seed: int = 0) -> None:
        """No more faults, and nothing counted. `seed`: which requests rules with a probability meet from here on."""
        with self._lock:
            self._rules, self.requests, self._draw = [], [], random.Random(seed)

    def fault_for(self, line: str) -> Fault:
        with self._lock:
            self.requests.append(line)
            now = time.monotonic()
            for rule in self._rules:
                if rule.holds(now) and rule.pattern.search(line) and self._draw.random() < rule.probability:
                    rule.hits.append(now)
                    return rule.fault
        return passed

    def close(self) -> None:
        """Cut every connection and stop listening."""
        self.closing.set()
        self._listener.shutdown()
        self._listener.cut()
        self._listener.server_close()


class Exchange(BaseHTTPRequestHandler):
    """One request, and what faults can do about it."""

    server: _Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def forward(self) -> Answer:
        """Let the server do what is asked."""
        connection = HTTPConnection(*self.server.proxy.server, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(self.body)))
            connection.endheaders(self.body)
            response = connection.getresponse()
            headers = tuple((n, v) for n, v in response.getheaders() if n.lower() not in HOP_BY_HOP)
            return Answer(response.status, headers, response.read(), response.getheader("Content-Length"))
        finally:
            connection.close()

    def refuse(self, status: int, code: str | None = None) -> Answer:
        """An error in S3's words."""
        code = code or CODES[status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>The proxy says {status}.</Message></Error>"
        return Answer(status, (("Content-Type", "application/xml"),), b"" if self.command == "HEAD" else body.encode())

    def send(self, answer: Answer, *, share: float = 1.0, bytes_per_s: float = float("inf")) -> None:
        """Tell the client; of the body only a share, after which the connection is of no more use."""
        self.send_response_only(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        told = answer.length if self.command == "HEAD" else str(len(answer.body))
        if told is not None:
            self.send_header("Content-Length", told)
        self.end_headers()
        self._write(answer.body[: int(len(answer.body) * share)], bytes_per_s)
        self.close_connection |= share < 1

    def reset(self) -> None:
        """Close the connection so that the other side sees a reset."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def stall(self) -> None:
        """Do nothing until the client gives up."""
        while not self.server.proxy.closing.is_set() and not select.select([self.connection], [], [], 0.05)[0]:
            continue
        self.close_connection = True

    def pause(self, seconds: float) -> None:
        if self.server.proxy.closing.wait(seconds):
            raise ConnectionAbortedError("the proxy was closed")

    def _write(self, body: bytes, bytes_per_s: float) -> None:
        size = len(body) if bytes_per_s == float("inf") else max(1, int(bytes_per_s / SLICES_PER_S))
        for start in range(0, len(body), max(1, size)):
            if start:
                self.pause(size / bytes_per_s)
            self.wfile.write(body[start : start + size])

    def _handle(self) -> None:
        self.body = self._read_body()
        try:
            self.server.proxy.fault_for(f"{self.command} {self.path}")(self)
        except OSError:  # the client has hung up, which is its right, or the proxy was closed
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            continue
        return body

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


class _Listener(ThreadingHTTPServer):
    proxy: FaultyProxy
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._connections: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Without the orderly good-bye of the base class, which no reset could follow."""
        self._connections.discard(request)
        self.close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up between two requests is no error."""

    def cut(self) -> None:
        for connection in list(self._connections):
            connection.close()


# -- faults ----------------------------------------------------------------------------------------------------------


def passed(exchange: Exchange) -> None:
    """None at all."""
    exchange.send(exchange.forward())


def status(number: int, code: str | None = None) -> Fault:
    """Refused, and nothing is done. `code`: what S3 calls it, if not the usual."""
    return lambda exchange: exchange.send(exchange.refuse(number, code))


def reset(exchange: Exchange) -> None:
    """The connection breaks before anything is done."""
    exchange.reset()


def answer_lost(exchange: Exchange) -> None:
    """What is asked is done, and then the connection breaks."""
    exchange.forward()
    exchange.reset()


def stalled(exchange: Exchange) -> None:
    """Nothing is done, and no answer comes."""
    exchange.stall()


def stalled_in_body(exchange: Exchange) -> None:
    """The answer stops half way."""
    exchange.send(exchange.forward(), share=0.5)
    exchange.stall()


def truncated(exchange: Exchange) -> None:
    """The connection ends half way through the answer."""
    exchange.send(exchange.forward(), share=0.5)


def shortened(exchange: Exchange) -> None:
    """The answer is half of what it should be, and says that this is all. No checksum tells otherwise."""
    answer = exchange.forward()
    headers = tuple((name, value) for name, value in answer.headers if not name.lower().startswith("x-amz-checksum"))
    exchange.send(replace(answer, headers=headers, body=answer.body[: len(answer.body) // 2]))


def flipped(exchange: Exchange) -> None:
    """One bit of the answer is another."""
    answer = exchange.forward()
    middle = len(answer.body) // 2
    exchange.send(replace(answer, body=answer.body[:middle] + bytes(b ^ 1 for b in answer.body[middle:][:1])
                          + answer.body[middle + 1 :]))  # fmt: skip


def slow(bytes_per_s: float) -> Fault:
    """The answer trickles."""
    return lambda exchange: exchange.send(exchange.forward(), bytes_per_s=bytes_per_s)


def delayed(seconds: float) -> Fault:
    """All is well, but late."""

    def fault(exchange: Exchange) -> None:
        exchange.pause(seconds)
        passed(exchange)

    return fault
