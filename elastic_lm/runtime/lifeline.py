"""Lifelines: one TCP connection from every member to its coordinator, for heartbeats and for the news of a death.

Invariant: silence and a closed connection are reported, never judged; `control/` decides. Trade-off: a socket of our own
beside Ray's calls. It is there because the kernel closes it the moment a process dies: 1-3 ms, where Ray needs 10-40 ms
for a worker and 1.6-1.8 s for a worker whose node died with it. A heartbeat costs 60 µs of CPU against about 1 ms for a Ray call.
The wire is one JSON object per line. The first line carries the run's secret; a connection without it is closed. The other
way goes a byte now and then: a coordinator that is frozen keeps its connections, and only its silence tells.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import select
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from elastic_lm.protocol import Generation, Heartbeat, Phase, StepRecord

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 1 << 20
RECONNECT_S = 0.02  # well under the coordinator's grace for a lost connection
CONNECT_TIMEOUT_S = 5.0
PULSE_S = 5.0  # between two bytes from the coordinator to everybody
PULSE = b"."
LONGEST_LOOK = 0.25  # of the time after which a member is an orphan


def encode(beat: Heartbeat) -> bytes:
    """One line of JSON."""
    return json.dumps(asdict(beat), separators=(",", ":")).encode() + b"\n"


def decode(data: dict[str, Any]) -> Heartbeat:
    """The inverse of `encode`.    Raises: KeyError, TypeError or ValueError on anything else."""
    data = dict(data)
    records = tuple(
        StepRecord(**{**record, "generation": Generation(**record["generation"])}) for record in data.pop("records")
    )
    generation = data.pop("generation")
    phase = Phase(data.pop("phase"))
    return Heartbeat(
        **data, phase=phase, generation=None if generation is None else Generation(**generation), records=records
    )


class LifelineServer:
    """The coordinator's end. One thread serves every member.

    Callbacks run on that thread and must not block: `on_beat(heartbeat)`, `on_connected(member_id)`, `on_lost(member_id)`.
    """

    def __init__(
        self,
        host: str,
        secret: str,
        *,
        on_beat: Callable[[Heartbeat], None],
        on_connected: Callable[[str], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._secret = secret
        self._on_beat, self._on_connected, self._on_lost = on_beat, on_connected, on_lost
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server((host, 0), backlog=1024)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake_read, self._wake_write = socket.socketpair()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._current: dict[str, _Peer] = {}
        self._next_pulse = 0.0
        self._closing = False
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._serve, name="lifeline-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close every connection. No callback comes afterwards."""
        self._closing = True
        self._wake_write.close()  # the other end becomes readable
        self._thread.join(timeout=5)

    def _serve(self) -> None:
        while not self._closing:
            for key, _ in self._selector.select(PULSE_S):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is not self._wake_read:
                    self._read(key.data)
            self._pulse()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _pulse(self) -> None:
        now = time.monotonic()
        if now < self._next_pulse:
            return
        self._next_pulse = now + PULSE_S
        for peer in self._current.values():
            peer.pulse()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:  # out of file descriptors, or the peer is gone already: the member tries again
            logger.warning("A member could not connect: %s.", error)
            return
        connection.setblocking(False)
        peer = _Peer(connection)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _read(self, peer: _Peer) -> None:
        try:
            lines = peer.receive()
            for line in lines:
                self._handle(peer, json.loads(line))
        except (OSError, EOFError):
            self._drop(peer)
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("Closing a connection that speaks no heartbeat: %s.", error)
            self._drop(peer)

    def _handle(self, peer: _Peer, message: dict[str, Any]) -> None:
        if peer.member_id is not None:
            self._on_beat(decode(message))
            return
        if not hmac.compare_digest(message["secret"], self._secret):
            raise ValueError("wrong secret")
        peer.member_id = message["member_id"]
        earlier = self._current.get(message["member_id"])
        self._current[message["member_id"]] = peer
        if earlier is not None:
            self._drop(earlier)
        peer.pulse()
        self._on_connected(message["member_id"])

    def _drop(self, peer: _Peer) -> None:
        self._selector.unregister(peer.connection)
        peer.connection.close()
        if peer.member_id is not None and self._current.get(peer.member_id) is peer:
            del self._current[peer.member_id]
            self._on_lost(peer.member_id)


class _Peer:
    """One accepted connection and the bytes of its unfinished line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.member_id: str | None = None
        self._buffer = b""

    def pulse(self) -> None:
        with contextlib.suppress(OSError):  # it does not read, or is gone: its own silence or its end will tell
            self.connection.send(PULSE)

    def receive(self) -> list[bytes]:
        """Complete lines that have arrived.    Raises: EOFError when the peer closed, OSError when it was reset."""
        data = self.connection.recv(1 << 16)
        if not data:
            raise EOFError
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        return lines


class Lifeline:
    """The member's end: a thread that does nothing but say every `interval_s` that the member lives.

    `snapshot()` gives the heartbeat to send, `on_connected()` is called before the first one of each connection.
    `on_orphaned()` is called once when no coordinator gave a sign of life for `orphaned_after_s`. A time in which this
    process did not run, because it or its machine was frozen, counts for little: whoever is there could not be heard.
    """

    def __init__(
        self,
        address: tuple[str, int],
        secret: str,
        member_id: str,
        snapshot: Callable[[], Heartbeat],
        *,
        interval_s: float,
        orphaned_after_s: float = 60.0,
        on_orphaned: Callable[[], None] = lambda: None,
        on_connected: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_connected = on_connected
        self._coordinator, self._member_id = (address, secret), member_id
        self._snapshot, self._interval_s = snapshot, interval_s
        self._orphaned_after_s, self._on_orphaned = orphaned_after_s, on_orphaned
        self._wake = threading.Event()
        self._closing = False
        self._heard = True  # since the last look
        self._silent_s, self._looked_at = 0.0, time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lifeline", daemon=True)
        self._thread.start()

    def beat_now(self) -> None:
        """Send the next heartbeat at once, because something worth telling happened."""
        self._wake.set()

    def move(self, address: tuple[str, int], secret: str) -> None:
        """Talk to this coordinator from now on, and no more to the one before."""
        self._coordinator = (address, secret)
        self._heard = True
        self._wake.set()

    def reassure(self) -> None:
        """Somebody who knows says that there will be a coordinator."""
        self._heard = True

    def close(self) -> None:
        self._closing = True
        self._wake.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._closing:
            coordinator = self._coordinator
            try:
                with socket.create_connection(coordinator[0], timeout=CONNECT_TIMEOUT_S) as connection:
                    self._talk(connection, coordinator)
            except OSError:
                pass  # the coordinator is gone or unreachable for the moment: try again until orphaned
            if self._is_orphaned():
                self._on_orphaned()
                return
            time.sleep(RECONNECT_S)

    def _is_orphaned(self) -> bool:
        """Looks come seconds apart at most, so more than `LONGEST_LOOK` between two of them was our own sleep."""
        now = time.monotonic()
        if self._heard:
            self._heard, self._silent_s = False, 0.0
        else:
            self._silent_s += min(now - self._looked_at, LONGEST_LOOK * self._orphaned_after_s)
        self._looked_at = now
        return not self._closing and self._silent_s > self._orphaned_after_s

    def _talk(self, connection: socket.socket, coordinator: tuple[tuple[str, int], str]) -> None:
        """Send heartbeats until closed, moved or orphaned.    Raises: OSError when the connection breaks."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = {"secret": coordinator[1], "member_id": self._member_id}
        connection.sendall(json.dumps(hello).encode() + b"\n")
        self._on_connected()
        while not self._closing and self._coordinator is coordinator and not self._is_orphaned():
            connection.sendall(encode(self._snapshot()))
            self._listen(connection)
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _listen(self, connection: socket.socket) -> None:
        """Whatever has come is a sign of life; nothing is waited for.    Raises: OSError when the connection is closed."""
        if select.select([connection], [], [], 0)[0]:
            if not connection.recv(1 << 10):
                raise ConnectionResetError
            self._heard = True
