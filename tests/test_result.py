"""The result in words: everything that is known and nothing else, in a terminal, in a debugger and in a notebook."""

from __future__ import annotations

import re
from html import unescape

from elastic_lm.result import RunResult

METRICS = {
    "loss": 2.5, "tokens_per_s": 12_345.6, "goodput": 0.987,
    "lost_worker_s": {"starting": 3.21, "failure": 0.04},
}  # fmt: skip
WHOLE = RunResult(
    "done", "all steps", 100, METRICS, "s3://b/step-100", {"weights": "w" * 4, "state": "s" * 4}, "s3://b/report.html",
    "s3://b/metrics/steps.parquet",
)  # fmt: skip
LOST = RunResult("failed", "no cluster", metrics={"loss": None, "tokens_per_s": None, "goodput": None})


def test_text_has_a_row_for_everything_that_is_known() -> None:
    assert str(WHOLE).splitlines() == [
        "   verdict  done: all steps",
        "     steps  100",
        "      loss  2.500000",
        "  tokens/s  12,346",
        "   goodput  98.7%",
        "      lost  starting 3.2 worker-s",  # what is less than a twentieth of a second is left out
        "checkpoint  s3://b/step-100",
        "    report  s3://b/report.html",
        "     table  s3://b/metrics/steps.parquet",
        "     state  sha256 ssss",
        "   weights  sha256 wwww",
    ]


def test_text_leaves_out_what_is_not_known() -> None:
    assert str(LOST).splitlines() == ["   verdict  failed: no cluster"]
    stopped = RunResult("stopped", "SIGINT", 0, {"loss": 0.0, "goodput": 0.0})  # zero is a figure
    assert "steps  0" in str(stopped)
    assert "loss  0.000000" in str(stopped) and "goodput  0.0%" in str(stopped)


def test_repr_says_what_matters_most_in_one_line() -> None:
    assert repr(WHOLE) == (
        "RunResult(verdict='done', message='all steps', last_step=100, loss=2.5, checkpoint='s3://b/step-100')"
    )
    assert repr(LOST) == "RunResult(verdict='failed', message='no cluster')"


def test_notebook_gets_the_same_rows_as_a_table() -> None:
    cells = re.findall(r"<t[hd] [^>]*>(.*?)</t[hd]>", WHOLE._repr_html_())
    assert [unescape(cell) for cell in cells] == [word for row in WHOLE.rows() for word in row]


def test_words_of_others_are_no_markup() -> None:
    page = RunResult("failed", "ValueError: <script>alert('x')</script> & more")._repr_html_()
    assert "<script" not in page and "&lt;script&gt;" in page and "&amp; more" in page
