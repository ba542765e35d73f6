"""The meeting place: everybody learns who hosts the store, whoever comes first, and closing it ends every wait."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from elastic_lm.engine.rendezvous import Place, RendezvousServer
from elastic_lm.protocol import Generation

LIMIT_S = 20.0
FIRST = Generation(0, 1)


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    server = RendezvousServer("127.0.0.1")
    yield server
    server.close()


def place(server: RendezvousServer, generation: Generation = FIRST, timeout_s: float = LIMIT_S) -> Place:
    return Place(server.rendezvous, generation, timeout_s)


def test_who_asks_before_and_who_asks_after_learn_the_same(server: RendezvousServer) -> None:
    with ThreadPoolExecutor(3) as pool:
        before = [pool.submit(place(server).ask) for _ in range(3)]
        host = place(server)
        host.host(("10.0.0.7", 1234))
        assert [asking.result(LIMIT_S) for asking in before] == [("10.0.0.7", 1234)] * 3
        assert place(server).ask() == ("10.0.0.7", 1234)


def test_host_of_another_generation_is_nobodys(server: RendezvousServer) -> None:
    """One that was frozen may tell when its generation is long over, and a port may be another server's by then."""
    zombie = place(server, Generation(0, 0))
    zombie.host(("10.0.0.6", 1))
    with pytest.raises(RuntimeError, match=r"nobody hosts the store within 0\.2 s"):
        place(server, timeout_s=0.2).ask()


def test_closing_ends_every_wait(server: RendezvousServer) -> None:
    with ThreadPoolExecutor(2) as pool:
        host = place(server)
        host.host(("10.0.0.7", 1234))
        ends = pool.submit(host.await_end)
        asking = pool.submit(place(server, Generation(0, 2)).ask)
        assert not ends.done()
        server.close()
        ends.result(LIMIT_S)
        with pytest.raises(RuntimeError, match="the rendezvous is closed"):
            asking.result(LIMIT_S)
    with pytest.raises(RuntimeError, match="the rendezvous cannot be reached"):
        place(server)


def test_who_says_what_makes_no_sense_disturbs_nobody(server: RendezvousServer) -> None:
    there = (server.rendezvous.host, server.rendezvous.port)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b"null\n", b"[[], 1]\n", b"x" * 10_000, b"\xff\n"):
        with socket.create_connection(there, LIMIT_S) as stranger:
            stranger.sendall(said)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b""
    host = place(server)
    host.host(("10.0.0.7", 1234))
    assert place(server).ask() == ("10.0.0.7", 1234)


def test_who_left_is_not_waited_for(server: RendezvousServer) -> None:
    with pytest.raises(RuntimeError):
        place(server, timeout_s=0.1).ask()
    host = place(server)
    host.host(("10.0.0.7", 1234))
    assert place(server).ask() == ("10.0.0.7", 1234)


def test_meeting_goes_on_when_no_more_files_can_be_open_for_a_moment() -> None:
    script = """
import resource, socket, threading
from elastic_lm.engine.rendezvous import Place, RendezvousServer
from elastic_lm.protocol import Generation
server = RendezvousServer("127.0.0.1")
there = (server.rendezvous.host, server.rendezvous.port)
host = Place(server.rendezvous, Generation(0, 1), 20)
host.host(("10.0.0.7", 1234))
asking = socket.socket()  # opened before the limit, so that the server's end is what is refused
full = []
try:
    while True:
        full.append(socket.socket())
except OSError:
    pass
asking.connect(there)
asking.sendall(b'["0.1", null]\\n')
asking.settimeout(0.3)
try:
    print(asking.recv(100))
except TimeoutError:
    print("not yet")
full.clear()
asking.settimeout(20)
print(asking.recv(100).decode().strip())
"""
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n{script}"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, timeout=50)
    assert done.stdout.splitlines() == ["not yet", '["10.0.0.7", 1234]'], done.stderr


def test_closed_place_leaves_no_thread() -> None:
    server = RendezvousServer("127.0.0.1")
    (thread,) = [thread for thread in threading.enumerate() if thread.name == f"rendezvous-{server.rendezvous.port}"]
    server.close()
    thread.join(LIMIT_S)
    assert not thread.is_alive()


def test_coordinator_hears_a_member_without_pytorch() -> None:
    """A coordinator that takes over would import it while everybody waits: a second of CPU time."""
    script = """
import pickle, sys
from elastic_lm.engine.probe import environment
from elastic_lm.protocol import ReadyReport, ReturnReport
ready = ReadyReport("w0", "n", 1, "p", environment(1, "cpu"))
sys.stdout.buffer.write(pickle.dumps(ReturnReport(ready, 3, True)))
"""
    report = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    hear = """
import pickle, sys
import elastic_lm.runtime.coordinator, elastic_lm.runtime.plan, elastic_lm.runtime.trainer
print(pickle.load(sys.stdin.buffer).next_step, "torch" in sys.modules)
"""
    heard = subprocess.run([sys.executable, "-c", hear], input=report, capture_output=True, check=True).stdout
    assert heard == b"3 False\n"
