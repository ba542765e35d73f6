"""The display in a notebook: one output that is replaced, few lines of it, and nothing that a notebook does ends a run.

Jupyter itself is not here; the fixture makes this process look like a kernel of it (tests/notebook.py).
"""

from __future__ import annotations

import builtins
import re
from html import unescape

import pytest

from elastic_lm.monitor.live import watching
from elastic_lm.monitor.notebook import KEPT_NEWS, NotebookView
from elastic_lm.monitor.progress import Lines, News, Snapshot
from tests.notebook import Notebook

SNAPSHOT = Snapshot(250, 1_000, "training", 2, 2, 4, 1, loss=3.25, tokens_per_s=10_578, mfu=0.41, step_s=0.61,
                    goodput=0.93, elapsed_s=100, eta_s=300)  # fmt: skip


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_cell_shows_the_newest_news_and_the_figures(notebook: Notebook) -> None:
    with NotebookView(notebook.display, Clock()) as view:
        view.news(News("0:00:01  w0 is ready"))
        view.snapshot(SNAPSHOT)
    lines = notebook.text.splitlines()
    assert lines[0] == "0:00:01  w0 is ready"
    assert lines[1].endswith(" 250/1,000  25%  0:01:40, 0:05:00 left")
    assert lines[2].startswith("loss 3.2500 · 10,578 tokens/s") and lines[3].startswith("●●◐○ training")


def test_long_run_leaves_one_output_of_few_lines_that_is_sent_once_a_second(notebook: Notebook) -> None:
    clock = Clock()
    with NotebookView(notebook.display, clock) as view:
        for number in range(5_000):  # ten pieces a second, as of a run that has much trouble
            clock.now = number / 10
            view.news(News(f"news {number}"))
            view.snapshot(SNAPSHOT)
    assert len(notebook.outputs) == 1
    assert len(notebook.text.splitlines()) == KEPT_NEWS + 3
    assert notebook.num_sent <= 502
    assert "news 4999\n" in notebook.text  # the end is shown whenever it comes


def test_page_says_what_the_text_says_and_words_are_no_markup(notebook: Notebook) -> None:
    with NotebookView(notebook.display, Clock()) as view:
        view.news(News("w1 is lost <script>[its process died]", "bad"))
        view.snapshot(SNAPSHOT)
    page = notebook.outputs[0]._repr_html_()
    assert "<script" not in page
    assert unescape(re.sub(r"<[^>]+>", "", page)).rstrip() == notebook.text
    assert re.search(r'<span style="color: #d64545[^"]*">w1 is lost', page)  # in red


def test_line_longer_than_the_cell_is_whole(notebook: Notebook) -> None:
    with NotebookView(notebook.display) as view:
        view.news(News("a long story " * 30))
    assert notebook.text == ("a long story " * 30)


def test_standstill_goes_on_to_be_told(notebook: Notebook) -> None:
    clock = Clock()
    waiting = Snapshot(0, 1_000, "waiting for workers", 0, 2, 4, 3)
    with NotebookView(notebook.display, clock) as view:
        for second in range(8):
            clock.now = second
            view.snapshot(waiting)
    assert notebook.text.endswith("waiting for workers, 3 starting for 7 s")


def test_notebook_that_goes_away_ends_the_display_and_nothing_else(notebook: Notebook) -> None:
    clock = Clock()
    with NotebookView(notebook.display, clock) as view:
        view.news(News("hello"))
        notebook.broken = True
        for second in range(1, 4):
            clock.now = 2 * second
            view.snapshot(SNAPSHOT)
    assert notebook.num_sent == 1


def test_kernel_of_a_notebook_gets_the_notebooks_display(
    notebook: Notebook, capsys: pytest.CaptureFixture[str]
) -> None:
    with watching(print, 1.0) as view:
        assert isinstance(view, NotebookView)
        view.news(News("hello"))
    assert notebook.text == "hello"
    assert capsys.readouterr().out == ""  # not printed as well


def test_shell_in_a_terminal_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("TerminalInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    with watching(print, 1.0) as view:
        assert isinstance(view, Lines)  # pytest's output is no terminal
