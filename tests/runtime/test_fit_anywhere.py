"""`fit` where people call it: on a terminal, in a notebook, in an event loop, off the main thread, and interrupted there.

Everything is real but the cluster: one worker of the real engine trains in this process, and words reach it through the real
mailbox. tests/runtime/test_fit.py goes through Ray.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_lm import Run, RunConfig, RunResult, fit
from elastic_lm.monitor.progress import News, Snapshot
from elastic_lm.runtime.mailbox import Command
from tests.notebook import Notebook
from tests.solo import LocalMailbox, solo_config, without_ray

ENDLESS = 1_000_000
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def config(small_corpus: str, tmp_path: Path) -> RunConfig:
    return solo_config(small_corpus, f"file://{tmp_path}", metrics={"port": None, "interval_s": 0.01})


@pytest.fixture
def endless(config: RunConfig) -> RunConfig:
    return config.replace(f"training.steps={ENDLESS}")


@pytest.fixture(autouse=True)
def mailboxes() -> Iterator[list[LocalMailbox]]:
    before = [signal.getsignal(number) for number in SIGNALS]
    with without_ray() as made:
        yield made
    assert all(mailbox.killed for mailbox in made)
    assert [signal.getsignal(number) for number in SIGNALS] == before


class Interrupting:
    """A view that sends this process a signal as soon as steps are seen."""

    tick_s = 1.0

    def __init__(self, number: signal.Signals = signal.SIGINT) -> None:
        self._number = number
        self.sent = False

    def news(self, news: News) -> None:
        """Not looked at."""

    def snapshot(self, snapshot: Snapshot) -> None:
        if snapshot.step >= 3 and not self.sent:
            self.sent = True
            signal.raise_signal(self._number)


def assert_stopped(result: RunResult, config: RunConfig, reason: str) -> None:
    assert (result.verdict, result.message) == ("stopped", reason)
    assert result.last_step is not None and 3 <= result.last_step < ENDLESS
    assert result.checkpoint == f"{config.run_url}/checkpoints/step-{result.last_step:08d}"
    assert result.report is not None and result.table is not None
    assert Run.open(config).result == result


# -- in an event loop, as a notebook's kernel is ---------------------------------------------------------------------


def test_fit_trains_where_an_event_loop_runs(config: RunConfig) -> None:
    async def cell() -> RunResult:
        before = signal.getsignal(signal.SIGINT)  # asyncio's own
        result = fit(config, quiet=True)
        assert signal.getsignal(signal.SIGINT) is before
        await asyncio.sleep(0)  # the loop goes on
        return result

    result = asyncio.run(cell())
    assert result.ok and result == Run.open(config).result


def test_interrupt_in_an_event_loop_saves_and_returns_the_result(endless: RunConfig) -> None:
    async def cell() -> RunResult:
        result = fit(endless, view=Interrupting())
        await asyncio.sleep(0)  # nobody cancels the cell
        return result

    assert_stopped(asyncio.run(cell()), endless, "SIGINT received")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_first_signal_saves_and_returns_the_result(number: signal.Signals, endless: RunConfig) -> None:
    assert_stopped(fit(endless, view=Interrupting(number)), endless, f"{number.name} received")


def test_second_interrupt_ends_it_at_once(endless: RunConfig, mailboxes: list[LocalMailbox]) -> None:
    done = threading.Event()

    def hangs(config: RunConfig, mailbox: Any, token: str, folder: str) -> RunResult:
        os.kill(os.getpid(), signal.SIGINT)
        mailbox.take.remote().result(10)  # the first one has been taken
        os.kill(os.getpid(), signal.SIGINT)
        done.wait(30)
        return RunResult("done", "too late")

    try:
        with without_ray(hangs) as made, pytest.raises(KeyboardInterrupt):
            fit(endless, quiet=True)
        mailboxes += made
    finally:
        done.set()


def test_what_cannot_begin_raises_in_an_event_loop_too(config: RunConfig) -> None:
    from elastic_lm.errors import DataError

    async def cell() -> None:
        fit(config.replace("data.tokens=/nowhere"))

    with pytest.raises(DataError):
        asyncio.run(cell())


# -- off the main thread ---------------------------------------------------------------------------------------------


def test_fit_in_another_thread_leaves_signals_alone(config: RunConfig) -> None:
    seen: list[Any] = []

    class Watching(Interrupting):
        def snapshot(self, snapshot: Snapshot) -> None:
            seen.append(signal.getsignal(signal.SIGINT))

    async def cell() -> None:
        own = signal.getsignal(signal.SIGINT)  # asyncio's
        assert (await asyncio.to_thread(fit, config, view=Watching())).ok
        assert seen and all(handler is own for handler in seen)

    asyncio.run(cell())


def test_run_in_another_thread_is_stopped_by_a_word(endless: RunConfig, mailboxes: list[LocalMailbox]) -> None:
    class Asking(Interrupting):
        def snapshot(self, snapshot: Snapshot) -> None:
            if snapshot.step >= 3 and not self.sent:
                self.sent = True
                mailboxes[0].post.remote(Command("stop", {"reason": "asked by a person"}))

    async def cell() -> RunResult:
        return await asyncio.to_thread(fit, endless, view=Asking())

    assert_stopped(asyncio.run(cell()), endless, "asked by a person")


# -- how it is shown -------------------------------------------------------------------------------------------------


def test_notebook_shows_one_output(config: RunConfig, notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    result = asyncio.run(_in_a_loop(config))
    assert result.ok
    assert len(notebook.outputs) == 1
    assert "Using this process." in notebook.text and "6/6  100%" in notebook.text
    assert capsys.readouterr().out == ""


async def _in_a_loop(config: RunConfig, **how: Any) -> RunResult:
    return fit(config, **how)


def test_pipe_gets_lines(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(config).ok
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Using this process."
    assert any("step 6/6" in line for line in lines)


def test_listener_gets_the_lines_in_the_place_of_the_terminal(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    assert fit(config, on_line=lines.append).ok
    assert lines[0] == "Using this process." and any("step 6/6" in line for line in lines)
    assert capsys.readouterr().out == ""


def test_quiet_shows_nothing(config: RunConfig, notebook: Notebook, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit(config, quiet=True).ok
    assert notebook.outputs == []
    assert capfd.readouterr() == ("", "")


def test_output_that_nobody_takes_ends_no_run(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert fit(config).ok
