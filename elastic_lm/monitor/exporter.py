"""The Prometheus endpoint of a run: one small HTTP server in the coordinator.

Invariant: whatever happens to the endpoint, the run goes on. A taken port means the next one, no port at all means none,
and either is said. Scrapers that connect and then say nothing cost a thread each for a few seconds, and beyond
`MAX_CONNECTIONS` the oldest is cut off, so they cannot pile up (the server of prometheus_client keeps a thread for each).
A run that has ended keeps its endpoint until those who scrape it have seen the verdict: the price is a scrape's interval.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector, CollectorRegistry

from elastic_lm import __version__
from elastic_lm.events.types import Event
from elastic_lm.monitor.figures import Figures
from elastic_lm.monitor.metrics import PREFIX, by_name
from elastic_lm.monitor.task_results import TaskWatcher
from elastic_lm.monitor.visitors import Visitors
from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

PORTS_TRIED = 100
MAX_CONNECTIONS = 16
CONNECTION_S = 5.0
POLL_S = 0.5  # the longest that `close` waits for the server's loop; each look costs 50 us
LAST_SCRAPE_S = 20.0  # our scrape configs come every 15 s; who comes less often than this may miss the end of a run
PORT_ERRORS = (errno.EADDRINUSE, errno.EACCES)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # what every Prometheus reads


class Exporter:
    """Serves the figures of one run at http://host:port/metrics from `open` to `close`. Never raises."""

    def __init__(self, run: str, num_micro_batches: int) -> None:
        self.figures = Figures(run, __version__, num_micro_batches)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(self.figures))
        self._server: _Server | None = None
        self._tasks: TaskWatcher | None = None
        self.visitors = Visitors()
        self.sentence = "No metrics endpoint, as configured."

    def open(self, host: str, port: int | None, certificate: str | None = None, key: str | None = None) -> None:
        """Listen. `port` None for no endpoint, 0 for any free port. With files of a certificate and its key: by TLS."""
        if port is None:
            return
        try:
            tls = None if certificate is None else _tls(certificate, key)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            self.sentence = (
                f"No metrics endpoint: {certificate} and {key} are no certificate with its key ({error}). "
                "Set metrics.tls_certificate and metrics.tls_key to PEM files of this node. Training goes on without it."
            )
            logger.warning("%s", self.sentence)
            return
        self._open(host, port, tls)

    @property
    def address(self) -> tuple[str, int] | None:
        """Where the endpoint listens, if there is one."""
        return None if self._server is None else (self._server.server_address[0], self._server.server_address[1])  # type: ignore[return-value]

    def observe(self, event: Event) -> None:
        """Take the event into account."""
        self.figures.observe(event)

    def watch(self, run_storage: Storage) -> None:
        """From now on tell the results of tasks in the run's folder, too. Without an endpoint there is nobody to tell."""
        if self._server is not None and self._tasks is None:
            self._tasks = TaskWatcher(run_storage, self.figures.tell_tasks)

    def text(self) -> str:
        """What a scrape returns."""
        return generate_latest(self._registry).decode()

    @property
    def farewell_s(self) -> float:
        """For which `close` would wait at the most."""
        if self._server is None or not self.figures.has_ended:
            return 0.0
        return self.visitors.longest_wait_s(LAST_SCRAPE_S)

    def close(self) -> None:
        """End the server and its threads; when the run has ended, as soon as its regular visitors know."""
        if self._server is not None:
            if self.figures.has_ended:
                self.visitors.await_all(LAST_SCRAPE_S)
            self._server.stop()
            self._server = None
        if self._tasks is not None:
            self._tasks.close()

    def _open(self, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        for candidate in range(port, min(port + PORTS_TRIED, 65_536)):
            try:
                self._server = _Server(host, candidate, self, tls)
                got = self._server.server_address[1]
                taken = f" (port {port} is taken)" if port not in (0, got) else ""
                scheme = "http" if tls is None else "https"
                self.sentence = f"Metrics at {scheme}://{host}:{got}/metrics{taken}."
                return
            except (OSError, TypeError, ValueError) as error:  # the last two: a host name that cannot be one
                ports = f"port {port}" if candidate == port else f"ports {port} to {candidate}"
                self.sentence = (
                    f"No metrics endpoint: {ports} cannot be had on {host!r} ({error}). "
                    "Set metrics.host or metrics.port. Training goes on without it."
                )
                if getattr(error, "errno", None) not in PORT_ERRORS:
                    break  # another port of that host would be no better, and looking a name up may take seconds
        logger.warning("%s", self.sentence)


def _tls(certificate: str, key: str | None) -> ssl.SSLContext:
    """Raises: OSError when one of the files is not what it should be."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key, password="")
    return context


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024  # with 64, the kernel made 300 connections at once wait for 4 s; with this, 0.04 s

    def __init__(self, host: str, port: int, exporter: Exporter, tls: ssl.SSLContext | None) -> None:
        self.exporter = exporter
        self._tls = tls
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def server_bind(self) -> None:
        """Bind without the base class's reverse look-up of our own name, which may block for seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        if self._tls is not None:  # hands are shaken in a connection's own thread, which waits for nobody for long
            self.socket = self._tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open.append(request)
            oldest = self._open.pop(0) if len(self._open) > MAX_CONNECTIONS else None
        if oldest is not None:
            with contextlib.suppress(OSError):  # it may have ended meanwhile
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            if request in self._open:
                self._open.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is its own business."""
        logger.debug("A metrics connection from %s failed", client_address, exc_info=True)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        with self._lock:
            left = list(self._open)
        for request in left:
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=CONNECTION_S)


class _Handler(BaseHTTPRequestHandler):
    timeout = CONNECTION_S
    server: _Server

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "metrics are at /metrics")
            return
        began_s = time.monotonic()
        body = self.server.exporter.text().encode()
        self.send_response(200)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        who = f"{self.client_address[0]} {self.headers.get('User-Agent', '')}"
        self.server.exporter.visitors.came(who, began_s)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


class _Collector(Collector):
    """Figures in the words of prometheus_client."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Family]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        catalogue = by_name()
        for name, labels, value in self._figures.values():
            metric = catalogue[name]
            if name not in families:
                family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
                families[name] = family(PREFIX + name, metric.help, labels=metric.labels)
            families[name].add_metric(list(labels), value)
        yield from families.values()
