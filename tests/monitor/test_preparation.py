"""The display of a preparation: figures that fit, lines now and then, and a terminal that goes away ends nothing."""

from __future__ import annotations

import io
import sys
import threading

import pytest
from rich.console import Console

from elastic_lm.data.progress import Progress
from elastic_lm.monitor import bar as bars
from elastic_lm.monitor.bar import Bar, frame
from elastic_lm.monitor.drawing import NARROWEST
from elastic_lm.monitor.preparation import Lines, Pace, bar, size, watching
from tests.monitor.test_live import Gone, terminal

ENCODING = Pace(Progress("encode", 1_230_000_000, 4_920_000_000), 40, 41e6)
PACES = [
    ENCODING,
    Pace(Progress("find", 12_345), 3, 4e3),
    Pace(Progress("tokenizer", 5, 10), 4),
    Pace(Progress("tokenizer", 10, 10), 99, 0.1),
    Pace(Progress("encode", 0, 10**15), 0),
    Pace(Progress("encode", 10**15, 10**15), 10**6, 1e9),
    Pace(Progress("shards", 10**12, 2 * 10**12), 200, 1e7),
]


def test_frame_shows_the_stage_how_much_is_done_and_what_is_left() -> None:
    line = frame(ENCODING, 100).plain
    room = line.index(" ")
    assert (
        line
        == "━" * (room // 4)
        + "─" * (room - room // 4)
        + " encoding 1.2 GB of 4.9 GB, 25%, 0:00:40, 0:01:30 left, 41.0 MB/s"
    )


@pytest.mark.parametrize("pace", PACES, ids=lambda pace: pace.title)
@pytest.mark.parametrize("plain", [False, True])
def test_frame_fits_every_width(pace: Pace, plain: bool) -> None:
    for width in range(1, 220):
        line = frame(pace, width, plain=plain)
        assert len(line) <= width
        assert line.plain.isascii() or not plain
        if width >= NARROWEST:
            assert pace.title in line.plain and len(line) < width


def test_narrow_frame_leaves_out_the_bar_first_and_then_the_least_wanted_figures() -> None:
    assert frame(ENCODING, 55).plain == "encoding 1.2 GB of 4.9 GB, 25%, 0:00:40, 0:01:30 left"
    assert frame(ENCODING, 34).plain == "encoding 1.2 GB of 4.9 GB, 25%"


@pytest.mark.parametrize(
    ("pace", "expected"),
    [
        (Pace(Progress("encode", 0, 100), 61), "0 B of 100 B, 0%, 0:01:01"),
        (Pace(Progress("encode", 50, 100), 61, 5), "50 B of 100 B, 50%, 0:01:01, 0:00:10 left, 5 B/s"),
        (Pace(Progress("encode", 100, 100), 61, 5), "100 B of 100 B, 100%, 0:01:01, 5 B/s"),
        (Pace(Progress("encode", 0, 0), 61), "0 B of 0 B, 100%, 0:01:01"),  # a corpus of empty files
        (Pace(Progress("find", 7), 61, 5), "7, 0:01:01"),
        (Pace(Progress("shards", 5, 10), 61, 0.5), "5/10 tokens, 50%, 0:01:01, 0:00:10 left"),
    ],
    ids=str,
)
def test_figures_are_those_that_are_known(pace: Pace, expected: str) -> None:
    assert ", ".join(pace.parts()) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 kB"), (99_940, "99.9 kB"), (123_456, "123 kB"), (10**7, "10.0 MB"),
     (5 * 10**9, "5.0 GB"), (10**12, "1.0 TB"), (1.5 * 10**16, "15,000.0 TB")],
)  # fmt: skip
def test_bytes_are_told_in_three_digits(num_bytes: float, expected: str) -> None:
    assert size(num_bytes) == expected


# -- lines -----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def lines_of(story: list[tuple[int, Progress]]) -> list[str]:
    """What is told of progress at these seconds."""
    clock, told = Clock(), []
    view = Lines(told.append, clock)
    for second, progress in story:
        clock.now_s = 100.0 + second
        view.show(progress)
    return told


def test_lines_come_every_few_seconds_and_no_more() -> None:
    story = [(second, Progress("encode", 10 * second, 200)) for second in range(13)]
    assert lines_of([(0, Progress("find", 1)), *story]) == [
        "encoding 50 B of 200 B, 25%, 0:00:05, 0:00:15 left, 10 B/s",
        "encoding 100 B of 200 B, 50%, 0:00:10, 0:00:10 left, 10 B/s",
    ]


def test_rate_is_of_what_is_done_now_from_when_it_got_somewhere() -> None:
    story = [
        (0, Progress("encode", 0, 100)),
        (60, Progress("encode", 40, 100, kept=40)),  # found from an earlier preparation: it took no time now
        (80, Progress("encode", 50, 100, kept=40)),  # the first that is new: before it, its text was read
        (90, Progress("encode", 60, 100, kept=40)),
    ]
    assert lines_of(story) == [
        "encoding 40 B of 100 B, 40%, 0:01:00",
        "encoding 50 B of 100 B, 50%, 0:01:20",
        "encoding 60 B of 100 B, 60%, 0:01:30, 0:00:40 left, 1 B/s",
    ]


def test_short_preparation_tells_no_lines() -> None:
    told: list[str] = []
    view = Lines(told.append, Clock())
    view.show(Progress("find", 1))
    view.show(Progress("encode", 1, 1))
    assert told == []


# -- the bar ---------------------------------------------------------------------------------------------------------


def test_bar_draws_each_stage_and_is_cleared_at_the_end() -> None:
    file = io.StringIO()
    with bar(terminal(file), Clock()) as view:
        view.show(Progress("find", 3))
        view.show(Progress("encode", 1, 2))
        view.show(Progress("encode", 2, 2))  # at the same instant: not drawn
    text = file.getvalue()
    assert "finding files 3" in text and "1 B of 2 B" in text and "2 B of 2 B" not in text
    assert text.rindex("\x1b[2K") > text.rindex("1 B of 2 B")


class Awaiting(io.StringIO):
    """Says when something was written."""

    def __init__(self, awaited: str) -> None:
        super().__init__()
        self._awaited = awaited
        self.written = threading.Event()

    def write(self, text: str) -> int:
        if self._awaited in text:
            self.written.set()
        return super().write(text)


def test_bar_is_drawn_again_while_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "TICK_S", 0.01)
    clock, file = Clock(), Awaiting("0:00:11")
    with bar(terminal(file), clock) as view:
        view.show(Progress("encode", 0, 10**6))
        clock.now_s += 11
        assert file.written.wait(10)


def test_terminal_that_goes_away_ends_the_bar_and_nothing_else() -> None:
    file, standard_output = Gone(), sys.stdout
    with bar(terminal(file)) as view:
        view.show(Progress("find", 3))
        file.gone = True
        view.show(Progress("encode", 1, 2))
        view.show(Progress("shards", 1, 2))
    assert "finding files 3" in file.getvalue()
    assert sys.stdout is standard_output


def breaks_off() -> None:
    with bar(terminal(io.StringIO())) as view:
        view.show(Progress("find", 3))
        raise KeyboardInterrupt


def test_error_inside_leaves_the_terminal_as_it_was() -> None:
    standard_output = sys.stdout
    with pytest.raises(KeyboardInterrupt):
        breaks_off()
    assert sys.stdout is standard_output
    assert not [thread for thread in threading.enumerate() if thread.name == "bar"]


@pytest.mark.parametrize(
    "console",
    [Console(file=io.StringIO(), width=80), terminal(io.StringIO(), NARROWEST - 1),
     Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "dumb"})],
    ids=["a pipe", "too narrow", "dumb"],
)  # fmt: skip
def test_what_cannot_be_drawn_on_gets_lines(console: Console) -> None:
    with watching(print, console) as view:
        assert isinstance(view, Lines)


def test_terminal_gets_the_bar() -> None:
    with watching(print, terminal(io.StringIO())) as view:
        assert isinstance(view, Bar)
