"""The live display: fits its width, says the same without colours or Unicode, and a terminal that goes away ends nothing."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from elastic_lm.monitor.drawing import NARROWEST
from elastic_lm.monitor.live import LiveView, frame, watching
from elastic_lm.monitor.progress import Lines, News, Snapshot

SNAPSHOT = Snapshot(250, 1_000, "training", 2, 2, 4, 1, loss=3.25, tokens_per_s=10_578, mfu=0.41, step_s=0.61,
                    goodput=0.93, elapsed_s=100, eta_s=300)  # fmt: skip
WAITING = Snapshot(0, 1_000, "waiting for workers", 0, 2, 4, 3)


def drawn(snapshot: Snapshot, width: int, **options: object) -> list[str]:
    return [line.plain for line in frame(snapshot, width, **options)]  # type: ignore[arg-type]


def test_frame_shows_the_bar_the_figures_and_the_workers() -> None:
    bar, figures, workers = drawn(SNAPSHOT, 100, losses=[5, 4, 3.25])
    room = bar.index(" ")
    assert bar == "━" * (room // 4) + "─" * (room - room // 4) + " 250/1,000  25%  0:01:40, 0:05:00 left"
    assert figures == "loss 3.2500 · 10,578 tokens/s · 2 workers (2..4) · goodput 93% · MFU 41% · 0.61 s per step"
    assert workers == "●●◐○ training, 1 starting   loss █▄▁"


def test_clocks_go_on_between_two_snapshots() -> None:
    assert drawn(SNAPSHOT, 100, since_s=5)[0].endswith("0:01:45, 0:04:55 left")
    assert drawn(SNAPSHOT, 100, since_s=900)[0].endswith("0:00:00 left")  # never below zero


def test_standstill_is_told_with_its_time() -> None:
    assert drawn(WAITING, 80, since_s=7)[-1] == "◐◐◐○ waiting for workers, 3 starting for 7 s"


@pytest.mark.parametrize(
    "snapshot", [SNAPSHOT, WAITING, dataclasses.replace(SNAPSHOT, max_workers=5_000, world_size=4_711)]
)
@pytest.mark.parametrize("plain", [False, True])
def test_frame_fits_every_width(snapshot: Snapshot, plain: bool) -> None:
    for width in range(NARROWEST, 220):
        lines = drawn(snapshot, width, losses=[3.0, 2.0] * 12, plain=plain)
        assert all(len(line) < width for line in lines), (width, lines)
        assert f"{snapshot.step:,}/1,000" in lines[0]


def test_frame_is_cut_where_the_terminal_became_too_narrow() -> None:
    for width in (1, 9, NARROWEST - 1):
        assert all(len(line) <= width for line in drawn(SNAPSHOT, width))


def test_frame_without_unicode_is_ascii() -> None:
    assert "".join(drawn(SNAPSHOT, 100, losses=[3, 2], plain=True)).isascii()


@pytest.mark.parametrize("losses", [[], [2.5], [2.5, 2.5], [float("nan"), 2.0]])
def test_losses_that_make_no_curve_are_left_out(losses: list[float]) -> None:
    assert "loss" not in drawn(SNAPSHOT, 100, losses=losses)[-1]


def test_run_of_no_steps_is_done() -> None:
    assert "0/0  100%" in drawn(dataclasses.replace(WAITING, total_steps=0), 80)[0]


# -- the terminal ----------------------------------------------------------------------------------------------------


def terminal(file: io.StringIO, width: int = 80) -> Console:
    return Console(file=file, force_terminal=True, width=width, height=20, color_system="standard", highlight=False)


def test_news_scrolls_by_in_its_tone_and_the_frame_is_cleared_at_the_end() -> None:
    file = io.StringIO()
    with LiveView(terminal(file)) as view:
        view.snapshot(SNAPSHOT)
        view.news(News("w1 is lost [its process died]", "bad"))  # brackets are no markup
        view.news(News("on again", "good"))
    text = file.getvalue()
    assert "\x1b[31mw1 is lost [its process died]\x1b[0m" in text
    assert "\x1b[32mon again\x1b[0m" in text
    assert text.rindex("\x1b[2K") > text.rindex("250/1,000")


class Gone(io.StringIO):
    """A terminal that was closed."""

    gone = False

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError("Input/output error")
        return super().write(text)


def test_terminal_that_goes_away_ends_the_display_and_nothing_else() -> None:
    file = Gone()
    standard_output = sys.stdout
    with LiveView(terminal(file)) as view:
        view.snapshot(SNAPSHOT)
        file.gone = True
        view.news(News("lost"))
        view.snapshot(SNAPSHOT)
    assert "250/1,000" in file.getvalue()
    assert sys.stdout is standard_output  # the display had put itself in its place


def test_news_that_the_terminal_cannot_spell_ends_no_display() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    console = Console(file=file, force_terminal=True, width=80, color_system=None, highlight=False)
    with LiveView(console) as view:
        view.news(News("ValueError: größer"))
        view.news(News("on again"))
        view.snapshot(SNAPSHOT)
    written = file.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "ValueError: gr??er" in written and "on again" in written and "250/1,000" in written


def consoles() -> Iterator[tuple[str, Console]]:
    yield "a pipe", Console(file=io.StringIO(), width=80)
    yield "too narrow", terminal(io.StringIO(), NARROWEST - 1)
    yield "dumb", Console(file=io.StringIO(), force_terminal=True, width=80, _environ={"TERM": "dumb"})


@pytest.mark.parametrize("console", [c for _, c in consoles()], ids=[name for name, _ in consoles()])
def test_what_cannot_be_drawn_on_gets_lines(console: Console) -> None:
    told: list[str] = []
    with watching(told.append, 1.0, console) as view:
        assert isinstance(view, Lines)
        view.news(News("hello"))
    assert told == ["hello"]


def test_terminal_gets_the_live_display() -> None:
    with watching(print, 1.0, terminal(io.StringIO())) as view:
        assert isinstance(view, LiveView)
