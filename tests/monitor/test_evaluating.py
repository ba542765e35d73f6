"""The display of an evaluation: figures that are known, a bar while it computes, and nothing in between."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from elastic_lm.evaluate.progress import Progress
from elastic_lm.monitor.bar import frame
from elastic_lm.monitor.drawing import NARROWEST
from elastic_lm.monitor.evaluating import Display, Pace, Paces
from tests.monitor.test_live import terminal
from tests.monitor.test_preparation import Clock

HALF = Progress("held_out", 6, 12, 96_000)


@pytest.mark.parametrize(
    ("pace", "expected"),
    [
        (Pace(Progress("held_out", 0, 12, 0), 61), "0/12 pieces, 0:01:01"),
        (Pace(HALF, 61, 0.5, 8000.4), "6/12 pieces, 0:01:01, 0:00:12 left, 8,000 tokens/s"),
        (Pace(Progress("mine", 12, 12, 9), 61, 0.5, 9), "12/12 pieces, 0:01:01, 9 tokens/s"),
        (Pace(Progress("mmlu", 0, None, 0, "preparing", "requests"), 61), "0:01:01"),
        (Pace(Progress("mmlu", 1_024, 4_096, 9, unit="requests"), 61), "1,024/4,096 requests, 0:01:01"),
    ],
    ids=["nothing yet", "half", "all", "nobody knows how many", "requests"],
)
def test_figures_are_those_that_are_known(pace: Pace, expected: str) -> None:
    assert ", ".join(pace.parts()) == expected
    assert f"{pace.progress.doing} {pace.progress.stage} {expected}" in frame(pace, 120).plain
    for width in range(1, 100):
        assert len(frame(pace, width)) <= width


def test_rate_is_of_what_came_after_the_first_piece() -> None:
    """Before it the model was loaded."""
    clock = Clock()
    paces = Paces(clock)
    clock.now_s += 30
    assert paces.pace(Progress("held_out", 1, 12, 1_000)) == Pace(Progress("held_out", 1, 12, 1_000), 30)
    clock.now_s += 4
    assert paces.pace(Progress("mine", 3, 12, 9_000)) == Pace(Progress("mine", 3, 12, 9_000), 34, 0.5, 2000)


def test_rate_is_of_the_count_that_goes_on() -> None:
    """Of the harness each task counts its own requests."""
    clock = Clock()
    paces = Paces(clock)
    for done in (1, 9):
        paces.pace(Progress("first", done, 9, 90 * done, unit="requests"))
        clock.now_s += 1
    nobody_knows = Progress("second", 0, None, 0, "preparing", "requests")
    assert paces.pace(nobody_knows) == Pace(nobody_knows, 2)
    paces.pace(Progress("second", 2, 9, 10, unit="requests"))
    clock.now_s += 2
    now = Progress("second", 3, 9, 30, unit="requests")
    assert paces.pace(now) == Pace(now, 4, 0.5, 10)


def test_bar_is_there_while_a_result_is_awaited_and_gone_when_it_is_told() -> None:
    file, standard_output = io.StringIO(), sys.stdout
    console = Console(file=file, force_terminal=True, width=100, stderr=True)
    display = Display(console, Clock())
    drawn: list[str] = []

    def computed() -> Iterator[str]:
        assert "starting the evaluation 0:00:00" in file.getvalue()
        for number, name in enumerate(("held_out", "mine"), start=1):
            display.show(Progress(name, number, 2, 100 * number))
            assert sys.stdout is standard_output  # what a scorer prints goes where it went
            yield name

    for name in display.waiting_for(computed()):
        text = file.getvalue()
        assert text.rindex("\x1b[2K") > text.rindex(f"evaluating {name}")  # it is cleared
        drawn.append(name)
    assert drawn == ["held_out", "mine"]
    assert "1/2 pieces" in file.getvalue()


def test_error_while_it_computes_leaves_the_terminal_as_it_was() -> None:
    display, standard_error = Display(terminal(io.StringIO())), sys.stderr

    def fails() -> Iterator[str]:
        display.show(HALF)
        raise ValueError("a bug")
        yield

    with pytest.raises(ValueError, match="a bug"):
        list(display.waiting_for(fails()))
    assert sys.stderr is standard_error


@pytest.mark.parametrize(
    "console",
    [Console(file=io.StringIO(), width=80), terminal(io.StringIO(), NARROWEST - 1)],
    ids=["a pipe", "too narrow"],
)
def test_what_cannot_be_drawn_on_stays_empty(console: Console) -> None:
    display = Display(console)
    display.show(HALF)
    assert list(display.waiting_for(iter("ab"))) == ["a", "b"]
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]
