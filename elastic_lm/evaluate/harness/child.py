"""The process in which lm-evaluation-harness runs, and the lines of JSON that go to it and come back.

Invariant: it lives no longer than whoever opened it. Left in order, it is killed with all that it started; where our process is
killed, its pipe ends and it ends itself and these. Its own end is noticed also where what it started holds on to the pipe. What
it prints goes to a file that is read only to say why it failed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.harness.environment import environment

DRIVER = Path(__file__).with_name("driver.py")
START_S = 300.0  # to import it and to list 15,000 tasks: about 10 s, and more from a network drive
POLL_S = 1.0  # whether it still lives
READ_BYTES = 2**20
TAIL_BYTES = 20_000  # of what it printed
SHOWN_CHARACTERS = 500


class Child:
    """`python`: what runs it. `threads`: those of the run."""

    def __init__(self, python: str, threads: int) -> None:
        """Raises: ConfigError when there is no such program."""
        self.python = python
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        their_read, our_write = os.pipe()
        our_read, their_write = os.pipe()
        self._written = os.fdopen(our_write, "wb")
        self._read = os.fdopen(our_read, "rb", buffering=0)
        self._begun = bytearray()  # of the lines that were read
        try:
            self._process = subprocess.Popen(
                [python, str(DRIVER), str(their_read), str(their_write)],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(their_read, their_write),
                start_new_session=True,
                env=environment(os.environ, threads),
            )
        except OSError as error:
            self._close()
            raise ConfigError(f"{python} cannot be run: {error.strerror}; name the Python that has lm-eval") from error
        finally:
            os.close(their_read)
            os.close(their_write)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def tell(self, message: Any) -> None:
        """What it no longer reads is found out by whoever waits for an answer."""
        with contextlib.suppress(BrokenPipeError):
            self._written.write(json.dumps(message).encode() + b"\n")
            self._written.flush()

    def first(self) -> Any:
        """Its first message.    Raises: ConfigError when it says nothing within START_S, or ends before."""
        try:
            line = self._line(START_S)
        except TimeoutError:
            raise ConfigError(
                f"{self.python} has not started lm-evaluation-harness within {START_S:.0f} s; try it again"
            ) from None
        if line is None:
            raise ConfigError(
                f"{self.python} does not run lm-evaluation-harness: {self._ending()}; install it there "
                f"({self.python} -m pip install 'lm-eval>=0.4.13'), or name the Python that has it with --harness-python"
            )
        return json.loads(line)

    def next(self) -> Any:
        """Its next message, however long it takes.    Raises: ConfigError when it ends before."""
        line = self._line(math.inf)
        if line is None:
            raise ConfigError(f"lm-evaluation-harness ended in the middle of its work: {self._ending()}; try it again")
        return json.loads(line)

    def _line(self, patience_s: float) -> bytes | None:
        """The next one that is whole; None when it has ended before.    Raises: TimeoutError."""
        deadline, looked_at = time.monotonic() + patience_s, 0
        while (end := self._begun.find(b"\n", looked_at)) < 0:
            looked_at = len(self._begun)
            has_ended = self._process.poll() is not None  # asked before the pipe: what it wrote last is there then
            left_s = deadline - time.monotonic()
            if select.select([self._read], [], [], 0 if has_ended else max(0.0, min(POLL_S, left_s)))[0]:
                read = self._read.read(READ_BYTES)
                if not read:
                    return None
                self._begun += read
            elif has_ended:
                return None
            elif left_s <= 0:
                raise TimeoutError
        line = bytes(self._begun[:end])
        del self._begun[: end + 1]
        return line

    def _ending(self) -> str:
        """The last line that it printed, or its exit code."""
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - TAIL_BYTES))
        printed = self._log.read().decode(errors="replace").replace("\r", "\n").strip()
        return printed.rpartition("\n")[2][:SHOWN_CHARACTERS] or f"it ended with code {code} and said nothing"

    def _close(self) -> None:
        for file in (self._written, self._read, self._log):
            with contextlib.suppress(BrokenPipeError):
                file.close()
