"""Where the members of a generation learn who hosts the key-value store through which they form their group.

The first of them hosts it: nobody can form without that one anyway. The coordinator has this meeting place only, which needs
no PyTorch, so that a coordinator that takes over begins a second of CPU time sooner. Invariant: closing the place ends
everybody's forming at once, for whoever hosts the store lets go of it when its connection to here ends. One that is frozen
does not; then the others' helper threads end with the time-out of forming, and nobody waits for them. Nor for one that is
just connecting to the store: c10d tries again up to two and a half times as long.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator

from elastic_lm.protocol import Generation, Rendezvous

Address = tuple[str, int]

BACKLOG = 1024
LONGEST_LINE_BYTES = 4096
FULL_S = 0.01


class RendezvousServer:
    """The coordinator's end, for one generation."""

    def __init__(self, host: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family, backlog=BACKLOG)
        self.rendezvous = Rendezvous(host, listener.getsockname()[1])
        self._closing, closed = socket.socketpair()
        selector = selectors.DefaultSelector()  # here: where no more files can be open, it is the caller who is told
        name = f"rendezvous-{self.rendezvous.port}"
        threading.Thread(target=_serve, args=(listener, closed, selector), name=name, daemon=True).start()

    def close(self) -> None:
        """Members that are still forming fail at once; a formed group lives on."""
        self._closing.close()


class Place:
    """A member's connection to the meeting place. Everything here blocks, up to `timeout_s`.

    Raises: RuntimeError when the place is closed, or time is up.
    """

    def __init__(self, rendezvous: Rendezvous, generation: Generation, timeout_s: float) -> None:
        self._generation, self._timeout_s = generation, timeout_s
        with _as_runtime_error("the rendezvous cannot be reached"):
            self._socket = socket.create_connection((rendezvous.host, rendezvous.port), timeout_s)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def host(self, address: Address) -> None:
        """Tell everybody who asks, now and later, that the store is there."""
        self._say(address)

    def ask(self) -> Address:
        """Where the store is, as soon as somebody has told."""
        with _as_runtime_error("the rendezvous is closed"), self._socket:
            self._say(None)
            try:
                line = self._socket.makefile("rb").readline(LONGEST_LINE_BYTES)
            except TimeoutError:
                raise RuntimeError(f"nobody hosts the store within {self._timeout_s:g} s") from None
        if not line.endswith(b"\n"):
            raise RuntimeError("the rendezvous is closed")
        host, port = json.loads(line)
        return host, port

    def await_end(self) -> None:
        """Until the place is closed, or whoever kept it is gone. Without a limit."""
        with contextlib.suppress(OSError), self._socket:
            self._socket.settimeout(None)
            self._socket.recv(1)

    def _say(self, address: Address | None) -> None:
        with _as_runtime_error("the rendezvous is closed"):
            self._socket.sendall(json.dumps([str(self._generation), address]).encode() + b"\n")


@contextlib.contextmanager
def _as_runtime_error(what: str) -> Iterator[None]:
    """As c10d says that forming failed."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"{what}: {error}") from None  # its frames hold what was half formed


def _serve(listener: socket.socket, closed: socket.socket, selector: selectors.BaseSelector) -> None:
    """Until `closed` ends. Nobody here is waited for."""
    hall = _Hall()
    listener.setblocking(False)
    with selector, listener, closed:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(closed, selectors.EVENT_READ)
        connections: set[socket.socket] = set()
        try:
            while True:
                for key, _ in selector.select():
                    speaker = key.fileobj
                    assert isinstance(speaker, socket.socket)
                    if speaker is closed:
                        return
                    if speaker is listener:
                        try:
                            connection, _ = listener.accept()
                        except OSError:  # who knocked has gone again, or no more files can be open at the moment
                            time.sleep(FULL_S)
                            continue
                        connection.setblocking(False)
                        connections.add(connection)
                        selector.register(connection, selectors.EVENT_READ, bytearray())
                    elif not hall.hear(speaker, key.data):
                        selector.unregister(speaker)
                        connections.discard(speaker)
                        speaker.close()
        finally:
            for connection in connections:
                connection.close()


class _Hall:
    """Who hosts the store of which generation, and who has asked in vain so far."""

    def __init__(self) -> None:
        self._addresses: dict[str, bytes] = {}
        self._waiting: dict[str, list[socket.socket]] = defaultdict(list)

    def hear(self, connection: socket.socket, said: bytearray) -> bool:
        """Read what there is to read; `said` is what came before.    Returns: whether the connection goes on."""
        try:
            data = connection.recv(LONGEST_LINE_BYTES)
        except OSError:
            return False
        said += data
        if not data or len(said) > LONGEST_LINE_BYTES:
            return False
        if not said.endswith(b"\n"):
            return True
        try:
            generation, address = json.loads(said)
            hash(generation)
        except (ValueError, TypeError, RecursionError):
            return False
        if address is not None:
            self._addresses[generation] = json.dumps(address).encode() + b"\n"
        else:
            self._waiting[generation].append(connection)
        if generation in self._addresses:
            for asking in self._waiting.pop(generation, []):
                with contextlib.suppress(OSError):  # it is gone, or is closed by now
                    asking.send(self._addresses[generation])
        return True
