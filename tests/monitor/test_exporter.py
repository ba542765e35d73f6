"""The Prometheus endpoint: what it serves parses, and nothing that happens to it reaches the run."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from prometheus_client.parser import text_string_to_metric_families

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor import exporter as exporter_module
from elastic_lm.monitor.exporter import MAX_CONNECTIONS, Exporter
from elastic_lm.monitor.metrics import CATALOGUE, PREFIX
from elastic_lm.runtime.cluster import wait_for
from elastic_lm.storage import Storage
from tests.monitor.story import HISTORY, TASK_RESULTS, at, committed
from tests.monitor.test_task_results import store


class Endpoint(Exporter):
    """An exporter that listens."""

    def __init__(self, run: str, *, port: int | None, host: str, tls: tuple[str, str] | None = None) -> None:
        super().__init__(run, 4)
        self.open(host, port, *(tls or ()))

    def tell(self, *events: Event) -> None:
        for event in events:
            self.observe(event)


Start = Callable[..., Endpoint]
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts exporters; afterwards all are closed."""
    with ExitStack() as stack:

        def begin(
            *events: Event,
            port: int | None = 0,
            host: str = "127.0.0.1",
            run: str = "a-run",
            tls: tuple[str, str] | None = None,
        ) -> Endpoint:
            exporter = Endpoint(run, port=port, host=host, tls=tls)
            stack.callback(exporter.close)
            exporter.tell(*events)
            return exporter

        yield begin


def get(exporter: Exporter, path: str = "/metrics", method: str = "GET") -> tuple[int, str, str]:
    """Status, content type and body."""
    assert exporter.address is not None
    connection = http.client.HTTPConnection(*exporter.address, timeout=30)
    connection.request(method, path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, answer.headers["Content-Type"], body


def samples(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def occupied() -> socket.socket:
    """A port that is taken, until it is closed."""
    return socket.create_server(("127.0.0.1", 0))


# -- what it serves --------------------------------------------------------------------------------------------------


def test_scrape_parses_and_says_what_the_figures_say(start: Start) -> None:
    exporter = start(*HISTORY)
    status, content_type, body = get(exporter)
    assert (status, content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples(body)
    expected = {}
    labels_of = {metric.name: metric.labels for metric in CATALOGUE}
    for name, labels, value in exporter.figures.values():
        expected[PREFIX + name, tuple(sorted(zip(labels_of[name], labels, strict=True)))] = value
    assert found == expected


def test_families_have_the_catalogues_kind_and_help(start: Start) -> None:
    exporter = start(*HISTORY, port=None)
    exporter.figures.tell_tasks(TASK_RESULTS)
    text = exporter.text()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for metric in CATALOGUE:
        # The parser takes the ending off a counter's name.
        family = families[PREFIX + (metric.name.removesuffix("_total") if metric.kind == "counter" else metric.name)]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert {sample.name for sample in family.samples} == {PREFIX + metric.name}  # neither _created nor the like


def test_results_of_tasks_in_the_runs_folder_are_told(start: Start, tmp_path: Path) -> None:
    """Without anybody's doing, also those that come later; odd names and all."""
    folder = Storage.open(str(tmp_path))
    store(folder, 4, 'odd "task"', loss={"value": 2.5, "low": 2.25, "high": None})
    exporter = start()
    exporter.watch(folder)
    labels = (("figure", "loss"), ("task", 'odd "task"'))
    name = f"{PREFIX}task_figure"
    wait_for(lambda: (name, labels) in samples(get(exporter)[2]), timeout_s=20, what="the result")
    found = samples(get(exporter)[2])
    assert (found[name, labels], found[f"{name}_low", labels]) == (2.5, 2.25)
    assert (f"{name}_high", labels) not in found
    exporter.close()
    wait_for(
        lambda: "task-results" not in {t.name for t in threading.enumerate()}, timeout_s=20, what="the thread's end"
    )


def test_nobody_looks_for_results_without_an_endpoint(start: Start, tmp_path: Path) -> None:
    start(port=None).watch(Storage.open(str(tmp_path)))
    assert "task-results" not in {thread.name for thread in threading.enumerate()}


def test_label_values_with_odd_characters_come_through(start: Start) -> None:
    name = 'odd "run" \\ with\nlines é'
    found = samples(get(start(run=name))[2])
    assert any(dict(labels).get("run") == name for _, labels in found)


def test_counters_of_a_replayed_log_never_go_back(start: Start) -> None:
    """Scrapes of one life, and of a second one that begins with the log of the first."""
    first, totals = start(port=None), []
    for event in HISTORY:
        first.tell(event)
        totals.append(samples(first.text()))
    restarted = start(*(Event.from_json(event.to_json()) for event in HISTORY), port=None)
    totals.append(samples(restarted.text()))
    for step in range(6, 10):  # the last two steps once more, and two new ones
        restarted.tell(committed(step, step, attempt=1))
        totals.append(samples(restarted.text()))
    for before, after in zip(totals, totals[1:], strict=False):
        counters = {key: value for key, value in before.items() if key[0].endswith("_total")}
        assert all(after[key] >= value for key, value in counters.items())
    assert totals[-1][PREFIX + "steps_total", ()] == 10


def test_event_that_is_not_understood_is_left_out(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    exporter = start(*HISTORY, port=None)
    before = samples(exporter.text())
    exporter.observe(at(13, EventKind.REFORMED))  # of another release: no cause, no time
    exporter.observe(at(13, EventKind.LEASE_GRANTED, members=3))
    assert samples(exporter.text()) == before
    assert "leave out an event of kind reformed" in caplog.text


@pytest.mark.parametrize(("path", "status"), [("/metrics?x=1", 200), ("/", 404), ("/metrics/x", 404)])
def test_only_the_path_of_metrics_is_served(start: Start, path: str, status: int) -> None:
    assert get(start(), path)[0] == status


def test_other_methods_are_refused(start: Start) -> None:
    assert get(start(), method="POST")[0] == 501


# -- where it listens ------------------------------------------------------------------------------------------------


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """Files of a certificate for 127.0.0.1 that nobody but itself vouches for, and of its key."""
    now = datetime.now(UTC)
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a run")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
    hosts = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    made = builder.add_extension(hosts, critical=False).sign(key, hashes.SHA256())
    (tmp_path / "tls.crt").write_bytes(made.public_bytes(Encoding.PEM))
    (tmp_path / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")


def test_endpoint_with_a_certificate_speaks_tls_alone(start: Start, certificate: tuple[str, str]) -> None:
    exporter = start(*HISTORY, tls=certificate)
    assert exporter.address is not None
    host, port = exporter.address
    assert exporter.sentence == f"Metrics at https://127.0.0.1:{port}/metrics."
    trusting = ssl.create_default_context(cafile=certificate[0])
    with urllib.request.urlopen(f"https://{host}:{port}/metrics", context=trusting, timeout=10) as answer:
        assert samples(answer.read().decode()) == samples(exporter.text())
    with pytest.raises(OSError):
        get(exporter)
    half_open = [socket.create_connection((host, port)) for _ in range(40)]  # none of which shakes hands
    with urllib.request.urlopen(f"https://{host}:{port}/metrics", context=trusting, timeout=10) as answer:
        assert answer.status == 200
    for connection in half_open:
        connection.close()


@pytest.mark.parametrize("damaged", ["tls.crt", "tls.key", "none"])
def test_certificate_that_is_none_means_no_endpoint_and_is_said(
    damaged: str, start: Start, certificate: tuple[str, str], tmp_path: Path
) -> None:
    if damaged == "none":
        certificate = ("/no/tls.crt", certificate[1])
    else:
        (tmp_path / damaged).write_text("nothing of the kind")
    exporter = start(tls=certificate)
    assert exporter.address is None
    assert "are no certificate with its key" in exporter.sentence
    assert "metrics.tls_certificate" in exporter.sentence


def test_sentence_tells_the_address(start: Start) -> None:
    exporter = start()
    assert exporter.address is not None
    assert exporter.sentence == f"Metrics at http://127.0.0.1:{exporter.address[1]}/metrics."


def test_taken_port_means_the_next_free_one_and_is_said(start: Start) -> None:
    with occupied() as taken:
        port = taken.getsockname()[1]
        first, second = start(port=port), start(port=port)
        assert first.address is not None and second.address is not None
        assert port < first.address[1] < second.address[1] < port + 100
        assert f"(port {port} is taken)" in first.sentence
        assert get(first)[0] == get(second)[0] == 200


def test_no_free_port_means_no_endpoint_and_is_said(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(exporter_module, "PORTS_TRIED", 1)
    with occupied() as taken:
        port = taken.getsockname()[1]
        exporter = start(*HISTORY, port=port)
    assert exporter.address is None
    assert f"port {port} cannot be had on '127.0.0.1'" in exporter.sentence
    assert "Training goes on without it" in exporter.sentence
    assert exporter.sentence in caplog.text
    assert "elastic_lm_steps_total 8.0" in exporter.text()


def test_last_port_of_all_is_the_last_one_tried(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = refuse_every_port(monkeypatch)
    assert "ports 65530 to 65535 cannot be had" in start(port=65_530).sentence
    assert tried == list(range(65_530, 65_536))


def test_endpoint_that_is_not_wanted_is_not_opened(start: Start) -> None:
    exporter = start(*HISTORY, port=None)
    assert exporter.address is None
    assert exporter.sentence == "No metrics endpoint, as configured."


@pytest.mark.parametrize(
    "host",
    [
        "999.999.999.999",
        "192.0.2.1",  # an address of nobody's
        "a\0b",
        "ä" * 100,  # cannot be encoded as a host name
        "x" * 300,
        " ",
    ],
    ids=repr,
)
def test_host_that_cannot_be_had_means_no_endpoint_and_is_said(start: Start, host: str) -> None:
    exporter = start(host=host, port=9464)
    assert exporter.address is None
    assert f"port 9464 cannot be had on {host!r}" in exporter.sentence
    assert "Set metrics.host or metrics.port" in exporter.sentence


def test_host_that_cannot_be_had_is_asked_for_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # Looking a name up may take seconds; a hundred times that would hold up the run.
    tried = refuse_every_port(monkeypatch, socket.gaierror(-3, "Temporary failure in name resolution"))
    start(host="slow.invalid", port=9464)
    assert tried == [9464]


def refuse_every_port(monkeypatch: pytest.MonkeyPatch, error: OSError | None = None) -> list[int]:
    """Sockets that can be bound nowhere. Returns the ports that are tried."""
    tried = []

    class _Refused(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            tried.append(address[1])
            raise error or OSError(98, "Address already in use")

    monkeypatch.setattr(exporter_module.socket, "socket", _Refused)
    return tried


# -- clients that misbehave ------------------------------------------------------------------------------------------


def test_300_half_open_connections_do_not_keep_a_scrape_waiting(start: Start) -> None:
    exporter = start(*HISTORY)
    assert exporter.address is not None
    with ExitStack() as stack:
        for number in range(300):
            client = stack.enter_context(socket.create_connection(exporter.address, timeout=30))
            if number % 3:  # some say nothing at all, some stop in the middle
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: "[: 10 * (number % 3)])
        assert "elastic_lm_steps_total 8.0" in get(exporter)[2]
        wait_until(lambda: len(handlers()) <= MAX_CONNECTIONS, "threads of half-open connections to end")


def test_client_that_goes_away_in_the_middle_harms_nobody(start: Start) -> None:
    exporter = start(*HISTORY)
    assert exporter.address is not None
    for _ in range(20):
        client = socket.create_connection(exporter.address, timeout=30)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing resets
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        client.close()
    assert get(exporter)[0] == 200


@pytest.mark.parametrize("request_line", [b"\0\1\2\3\r\n\r\n", b"G" * 70_000 + b"\r\n\r\n", b"GET\r\n\r\n"])
def test_client_that_speaks_no_http_harms_nobody(start: Start, request_line: bytes) -> None:
    exporter = start()
    assert exporter.address is not None
    with socket.create_connection(exporter.address, timeout=30) as client:
        client.sendall(request_line)
        client.recv(1)  # an answer, or the end
    assert get(exporter)[0] == 200


def test_scrapes_at_one_time_all_get_an_answer(start: Start) -> None:
    exporter = start(*HISTORY)
    answers: list[str] = []
    clients = [threading.Thread(target=lambda: answers.append(get(exporter)[2])) for _ in range(MAX_CONNECTIONS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert len(answers) == MAX_CONNECTIONS
    assert len(set(answers)) == 1


# -- the end ---------------------------------------------------------------------------------------------------------


def test_close_leaves_neither_thread_nor_socket(start: Start) -> None:
    before = set(threading.enumerate())
    exporter = start(*HISTORY)
    assert exporter.address is not None
    port = exporter.address[1]
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30)) for _ in range(3)]
        wait_until(lambda: len(handlers()) == 3, "three connections to be accepted")
        exporter.close()
        assert all(client.recv(1) == b"" for client in clients)
    wait_until(lambda: set(threading.enumerate()) <= before, "the endpoint's threads to end")
    with socket.socket() as again:
        assert again.connect_ex(("127.0.0.1", port)) != 0
    assert exporter.address is None


def finished(verdict: str) -> Event:
    return at(20, EventKind.RUN_FINISHED, step=8, verdict=verdict, reason="")


def test_run_that_has_ended_is_there_until_its_scraper_knows(start: Start) -> None:
    exporter = start(*HISTORY)
    for seconds_ago in (45, 30, 15):
        exporter.visitors.came("127.0.0.1 ", time.monotonic() - seconds_ago)
    exporter.tell(finished("poisoned"))
    assert 0 < exporter.farewell_s <= 1.2 * 15 + 2 - 15
    closing = threading.Thread(target=exporter.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    assert samples(get(exporter)[2])[PREFIX + "run_ended", (("run", "a-run"), ("verdict", "poisoned"))] == 1
    closing.join(50)
    assert exporter.address is None


def test_endpoint_of_a_run_that_goes_on_elsewhere_waits_for_nobody(start: Start) -> None:
    exporter = start(*HISTORY)
    for seconds_ago in (30, 15, 0):
        exporter.visitors.came("127.0.0.1 ", time.monotonic() - seconds_ago)
    assert exporter.farewell_s == 0
    exporter.close()
    assert exporter.address is None


def test_close_may_come_twice_and_without_an_endpoint(start: Start) -> None:
    exporter = start()
    exporter.close()
    exporter.close()
    start(port=None).close()


def test_port_can_be_had_again_after_close(start: Start) -> None:
    exporter = start()
    assert exporter.address is not None
    port = exporter.address[1]
    get(exporter)
    exporter.close()
    assert start(port=port).address == ("127.0.0.1", port)


def handlers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    for _ in range(3_000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError(f"waited in vain for {what}")
