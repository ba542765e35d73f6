"""Charts: drawn at all sizes, thinned without losing a peak, safe with any text."""

from __future__ import annotations

import html
import json
import math
import re
from xml.etree import ElementTree

import pytest

from elastic_lm.monitor.chart import MOST_POINTS, Chart, Line, Mark, duration


def parsed(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(chart.svg())  # raises when a tag is not closed or a character not escaped


def told(chart: Chart) -> list[dict[str, list[str]]]:
    """What the page's script knows."""
    found: list[dict[str, list[str]]] = json.loads(parsed(chart).attrib["data-chart"])
    return found


def ticks(chart: Chart) -> list[str]:
    return [text.text or "" for text in parsed(chart).iter("text")]


def heights(chart: Chart) -> list[float]:
    """Of the first line's points, from above."""
    path = next(p for p in parsed(chart).iter("path") if p.attrib["class"].startswith("line"))
    return [float(pair.split(",")[1]) for pair in re.split("[ML]", path.attrib["d"])[1:]]


def line(ys: list[float], **fields: bool) -> Line:
    return Line("loss", [float(x) for x in range(len(ys))], ys, "c1", **fields)


def test_higher_values_are_drawn_higher() -> None:
    first, second, third = heights(Chart("t", "step", [line([1.0, 3.0, 2.0])]))
    assert second < third < first
    assert third == pytest.approx((first + second) / 2, abs=0.2)  # pixels are told to a tenth


def test_values_under_the_pointer_are_told_with_their_place() -> None:
    (loss,) = told(Chart("t", "step", [line([1.5, 2.5])], format_y=lambda y: f"{y:.1f}"))
    assert loss["told"] == ["0: 1.5", "1: 2.5"]


@pytest.mark.parametrize("count", [MOST_POINTS, MOST_POINTS + 1, 100_000])
def test_long_series_keep_their_peaks_and_their_last_point(count: int) -> None:
    ys = [1.0] * count
    ys[count // 3], ys[count // 2] = 9.0, -9.0
    (loss,) = told(Chart("t", "step", [line(ys)], format_y=lambda y: f"{y:g}"))
    assert len(loss["told"]) <= MOST_POINTS + 1
    assert f"{count // 3:,}: 9" in loss["told"]
    assert f"{count // 2:,}: -9" in loss["told"]
    assert loss["told"][-1] == f"{count - 1:,}: 1"


@pytest.mark.parametrize("ys", [[2.0], [0.0], [0.0, 0.0], [-1e-30, 1e-30], [1e30, 2e30], [math.nan, 1.0], [math.inf]])
def test_odd_values_are_drawn_without_an_error(ys: list[float]) -> None:
    assert "nan" not in Chart("t", "step", [line(ys)], from_zero=True).svg().partition("<svg")[2]


def test_chart_without_a_point_says_so() -> None:
    assert "Nothing yet" in Chart("t", "step", [line([])]).svg()


def test_right_axis_has_ticks_of_its_own_and_begins_at_zero() -> None:
    rate = Line("rate", [0.0, 1.0], [0.5, 1.0], "c2", right=True)
    chart = Chart("t", "step", [line([100.0, 200.0]), rate], format_right=lambda y: f"{y:.1f} r")
    assert "0.0 r" in ticks(chart)
    assert {"120", "200"} <= set(ticks(chart))


def test_time_has_ticks_at_round_minutes() -> None:
    chart = Chart("t", "time", [line([1.0, 2.0])], ends_at=600.0, clock=True)
    assert ticks(chart)[:6] == ["0:00", "2:00", "4:00", "6:00", "8:00", "10:00"]


def test_stepped_line_holds_its_value() -> None:
    assert re.search(r'd="M[\d.,]+H[\d.]+V[\d.]+"', Chart("t", "step", [line([1.0, 2.0], stepped=True)]).svg())


def test_marks_outside_the_axis_are_left_out_and_text_is_escaped() -> None:
    marks = [Mark(0.5, "bad", 'w0 <lost> & "gone"'), Mark(7.0, "bad", "later")]
    chart = Chart("<b>", "step", [line([1.0, 2.0])], marks)
    assert [title.text for title in parsed(chart).iter("title")] == ['w0 <lost> & "gone"']
    assert html.escape("<b>") in chart.svg()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3_599, "59:59"), (3_600, "1:00:00"), (-1, "0:00")]
)
def test_duration_is_told_as_a_clock_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
