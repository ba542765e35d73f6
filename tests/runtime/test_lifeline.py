"""Heartbeats arrive, a death is told at once, strangers are shut out, nothing stays behind."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from elastic_lm.protocol import Generation, Heartbeat, Phase
from elastic_lm.runtime import lifeline as lifeline_module
from elastic_lm.runtime.lifeline import Lifeline, LifelineServer, decode, encode
from tests.runtime.test_ledger import record

SECRET = "a secret"
WAIT_S = 30.0


@pytest.fixture
def server():
    told: queue.Queue = queue.Queue()
    server = LifelineServer(
        "127.0.0.1",
        SECRET,
        on_beat=lambda beat: told.put(("beat", beat)),
        on_connected=lambda member: told.put(("connected", member)),
        on_lost=lambda member: told.put(("lost", member)),
    )
    server.told = told
    yield server
    server.close()


def next_of(server, kind):
    """The next message of this kind, past the others."""
    while True:
        found, value = server.told.get(timeout=WAIT_S)
        if found == kind:
            return value


def beat(progress=0):
    return Heartbeat("w0", Generation(1, 2), Phase.COMPUTE, 7, progress, 0.25, (record(6),))


def test_heartbeat_survives_the_wire():
    assert decode(json.loads(encode(beat()))) == beat()
    waiting = Heartbeat("w1", None, Phase.STARTING, 0, 0)
    assert decode(json.loads(encode(waiting))) == waiting


def test_beats_arrive_by_themselves_and_at_once_on_news(server):
    lifeline = Lifeline(server.address, SECRET, "w0", beat, interval_s=30)
    assert next_of(server, "connected") == "w0"
    assert next_of(server, "beat") == beat()
    lifeline.beat_now()
    assert next_of(server, "beat") == beat()
    lifeline.close()
    assert next_of(server, "lost") == "w0"


def test_killed_process_is_lost_within_the_blink_of_an_eye(server):
    script = f"""
        import threading
        from elastic_lm.protocol import Heartbeat, Phase
        from elastic_lm.runtime.lifeline import Lifeline
        Lifeline({server.address!r}, {SECRET!r}, "w3", lambda: Heartbeat("w3", None, Phase.WAITING, 0, 0), interval_s=30)
        threading.Event().wait()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    assert next_of(server, "connected") == "w3"
    os.kill(process.pid, signal.SIGKILL)
    assert next_of(server, "lost") == "w3"
    process.wait()


def test_cut_connection_is_restored(server):
    ours: list[socket.socket] = []
    connect = socket.create_connection

    def remember(*args, **kwargs):
        ours.append(connect(*args, **kwargs))
        return ours[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "create_connection", remember)
        lifeline = Lifeline(server.address, SECRET, "w0", beat, interval_s=0.01)
        assert next_of(server, "connected") == "w0"
        ours[0].shutdown(socket.SHUT_RDWR)
        assert next_of(server, "lost") == "w0"
        assert next_of(server, "connected") == "w0"
        lifeline.close()


@pytest.mark.parametrize(
    "line",
    [
        b'{"secret": "wrong", "member_id": "w0"}\n',
        b'{"member_id": "w0"}\n',  # no secret at all
        b"GET / HTTP/1.1\r\n\r\n",  # a port scanner
        b"[1, 2]\n",
        b"\xff\xfe\n",
    ],
)
def test_stranger_is_shut_out_and_members_go_on(server, line):
    with socket.create_connection(server.address) as stranger:
        stranger.sendall(line)
        stranger.settimeout(WAIT_S)
        assert stranger.recv(1) == b""
    lifeline = Lifeline(server.address, SECRET, "w0", beat, interval_s=30)
    assert server.told.get(timeout=WAIT_S) == ("connected", "w0")
    lifeline.close()


def test_member_without_a_coordinator_is_told_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    orphaned = threading.Event()
    Lifeline(address, SECRET, "w0", beat, interval_s=0.01, orphaned_after_s=0.1, on_orphaned=orphaned.set)
    assert orphaned.wait(WAIT_S)


def test_many_members_leave_no_thread_behind(server):
    before = threading.active_count()
    connections = [socket.create_connection(server.address) for _ in range(200)]
    for number, connection in enumerate(connections):
        connection.sendall(json.dumps({"secret": SECRET, "member_id": f"w{number}"}).encode() + b"\n")
    assert {next_of(server, "connected") for _ in connections} == {f"w{n}" for n in range(200)}
    assert threading.active_count() <= before  # one of an earlier test may have ended meanwhile
    for connection in connections:
        connection.close()
    assert {next_of(server, "lost") for _ in connections} == {f"w{n}" for n in range(200)}


def test_close_ends_the_thread_and_the_port():
    server = LifelineServer("127.0.0.1", SECRET, on_beat=print, on_connected=print, on_lost=print)
    names = {thread.name for thread in threading.enumerate()}
    assert "lifeline-server" in names
    server.close()
    assert "lifeline-server" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(OSError):
        socket.create_connection(server.address, timeout=1)
    server.close()  # its thread has ended already, as a busy one may have by the time it is woken


def test_frozen_process_keeps_its_connection_and_falls_silent(server):
    script = f"""
        import threading
        from elastic_lm.protocol import Heartbeat, Phase
        from elastic_lm.runtime.lifeline import Lifeline
        Lifeline({server.address!r}, {SECRET!r}, "w4", lambda: Heartbeat("w4", None, Phase.WAITING, 0, 0), interval_s=0.02)
        threading.Event().wait()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    next_of(server, "beat")
    os.kill(process.pid, signal.SIGSTOP)
    deadline = time.monotonic() + WAIT_S
    try:
        while time.monotonic() < deadline:  # until a quiet stretch of ten intervals
            try:
                kind, _ = server.told.get(timeout=0.2)
            except queue.Empty:
                break
            assert kind == "beat"
        else:
            pytest.fail("a frozen process went on beating")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert next_of(server, "lost") == "w4"


def test_coordinator_that_is_silent_on_an_open_connection_leaves_an_orphan():
    with socket.create_server(("127.0.0.1", 0)) as frozen:  # the kernel takes connections and bytes for it
        orphaned = threading.Event()
        lifeline = Lifeline(
            frozen.getsockname(), SECRET, "w0", beat, interval_s=0.01, orphaned_after_s=0.3, on_orphaned=orphaned.set
        )
        assert orphaned.wait(WAIT_S)
        lifeline.close()


def test_living_coordinator_leaves_no_orphan(server, monkeypatch):
    monkeypatch.setattr(lifeline_module, "PULSE_S", 0.05)
    orphaned = threading.Event()
    lifeline = Lifeline(
        server.address, SECRET, "w0", beat, interval_s=0.01, orphaned_after_s=0.5, on_orphaned=orphaned.set
    )
    assert not orphaned.wait(1.5)
    lifeline.close()


def test_frozen_member_whose_coordinator_lives_is_no_orphan_when_it_thaws(server, monkeypatch):
    monkeypatch.setattr(lifeline_module, "PULSE_S", 0.1)
    script = f"""
        import os, threading
        from elastic_lm.protocol import Heartbeat, Phase
        from elastic_lm.runtime.lifeline import Lifeline
        Lifeline({server.address!r}, {SECRET!r}, "w5", lambda: Heartbeat("w5", None, Phase.WAITING, 0, 0), interval_s=0.02,
                 orphaned_after_s=2.0, on_orphaned=lambda: os._exit(1))
        threading.Event().wait()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    next_of(server, "beat")
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=3.0)
        os.kill(process.pid, signal.SIGCONT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1.0)
        while not server.told.empty():
            assert server.told.get()[0] != "lost"
    finally:
        process.kill()
        process.wait()


def test_member_moves_to_another_coordinator(server):
    told: queue.Queue = queue.Queue()
    later = LifelineServer(
        "127.0.0.1", "another", on_beat=told.put, on_connected=lambda member: None, on_lost=lambda member: None
    )
    lifeline = Lifeline(server.address, SECRET, "w0", beat, interval_s=30)
    assert next_of(server, "beat") == beat()
    lifeline.move(later.address, "another")
    assert next_of(server, "lost") == "w0"
    assert told.get(timeout=WAIT_S) == beat()
    lifeline.close()
    later.close()
