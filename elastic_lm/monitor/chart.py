"""Charts as SVG: lines over one axis, marks where something happened. No library, no script needed to see them.

A long series is thinned so that its shape stays: of each part the lowest and the highest point are kept.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 960, 260
LEFT, RIGHT, TOP, BOTTOM = 64, 64, 14, 34
MOST_POINTS = 1_500  # more than pixels would show
NUM_TICKS = 6
# Seconds between two ticks.
CLOCK = [1, 2, 5, 10, 15, 30, *(60 * m for m in (1, 2, 5, 10, 15, 30)), *(3600 * h for h in (1, 2, 4, 6, 12)),
         *(86_400 * 2**power for power in range(16))]  # fmt: skip

Format = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """One series. `color`: a class of the page's style sheet. `stepped`: a value holds until the next one."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: str
    stepped: bool = False
    right: bool = False  # read on the right axis
    filled: bool = False


@dataclass(frozen=True)
class Mark:
    """Something that happened at `x`."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Chart:
    """Lines over one horizontal axis; those with `right` have an axis of their own, from zero.

    `ends_at`: the axis goes from 0 to it, for charts that are read below each other. `clock`: x is seconds.
    """

    title: str
    x_label: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    format_y: Format = field(default=lambda y: f"{y:,.4g}")
    format_right: Format = field(default=lambda y: f"{y:,.4g}")
    from_zero: bool = False
    ends_at: float | None = None
    clock: bool = False

    def svg(self) -> str:
        """The chart, with the points that a page's script needs to tell values under the pointer."""
        lines = [_thinned(line) for line in self.lines if line.xs]
        if not lines:
            return (
                f'<figure><figcaption>{html.escape(self.title)}</figcaption><p class="empty">Nothing yet.</p></figure>'
            )
        ends = [x for line in lines for x in (line.xs[0], line.xs[-1])] if self.ends_at is None else [0.0, self.ends_at]
        x_axis = _Axis.over(ends, LEFT, WIDTH - RIGHT, tight=True)
        left = _axis_of([line for line in lines if not line.right], from_zero=self.from_zero)
        right = _axis_of([line for line in lines if line.right], from_zero=True)
        parts = [*self._grid(x_axis, left, right)]
        parts += [_mark(mark, x_axis) for mark in self.marks if x_axis.low <= mark.x <= x_axis.high]
        for line in lines:
            axis = right if line.right else left
            assert axis is not None
            parts += _path(line, x_axis, axis)
        legend = "".join(f'<span class="key {line.color}">{html.escape(line.name)}</span>' for line in lines)
        return (
            f'<figure class="chart" data-chart="{html.escape(self._data(lines, x_axis))}">'
            f"<figcaption>{html.escape(self.title)} <small>{legend}</small></figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(self.title)}">'
            f'{"".join(parts)}<line class="pointer" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
            '<output class="tip"></output></figure>'
        )

    def _grid(self, x_axis: _Axis, left: _Axis | None, right: _Axis | None) -> list[str]:
        parts = []
        for x in x_axis.ticks(clock=self.clock):
            at = x_axis.at(x)
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{self._told(x)}</text>'
            )
        for axis, form, at, anchor in (
            (left, self.format_y, LEFT - 8, "end"),
            (right, self.format_right, WIDTH - RIGHT + 8, "start"),
        ):
            for y in axis.ticks() if axis else ():
                assert axis is not None
                height = axis.at(y)
                if axis is left or left is None:
                    parts.append(
                        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
                    )
                parts.append(
                    f'<text class="tick" x="{at}" y="{height + 4:.1f}" text-anchor="{anchor}">{form(y)}</text>'
                )
        label = html.escape(self.x_label)
        parts.append(f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{label}</text>')
        return parts

    def _told(self, x: float) -> str:
        return duration(x) if self.clock else f"{x:,.0f}"

    def _data(self, lines: list[Line], x_axis: _Axis) -> str:
        told = [
            {
                "name": line.name,
                "x": [round(x_axis.at(x), 1) for x in line.xs],
                "told": [f"{self._told(x)}: {(self.format_right if line.right else self.format_y)(y)}"
                         for x, y in zip(line.xs, line.ys, strict=True)],
            }
            for line in lines
        ]  # fmt: skip
        return json.dumps(told, separators=(",", ":"))


@dataclass(frozen=True)
class _Axis:
    """Values [low, high] onto pixels [start, stop]."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float, *, tight: bool = False) -> _Axis:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        if low == high:
            low, high = low - 0.5, high + 0.5
        margin = 0.0 if tight else 0.06 * (high - low)
        return cls(low if low == 0 else low - margin, high + margin, start, stop)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, *, clock: bool = False) -> list[float]:
        """Round values, a few."""
        rough = (self.high - self.low) / NUM_TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        size = next(power * step for step in (1, 2, 2.5, 5, 10, 20) if power * step >= rough)
        if clock:
            size = next((size for size in CLOCK if size >= rough), size)
        first = math.ceil(self.low / size - 1e-9)
        return [number * size for number in range(first, math.floor(self.high / size + 1e-9) + 1)]


def _axis_of(lines: list[Line], *, from_zero: bool) -> _Axis | None:
    if not lines:
        return None
    values = [y for line in lines for y in line.ys]
    return _Axis.over([*values, 0.0] if from_zero else values, HEIGHT - BOTTOM, TOP)


def duration(seconds: float) -> str:
    """Minutes and seconds, and hours when there are any."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _thinned(line: Line) -> Line:
    """At most about `MOST_POINTS` points, the lowest and highest of each part among them, and the last."""
    count = len(line.xs)
    if count <= MOST_POINTS:
        return line
    size = math.ceil(2 * count / MOST_POINTS)
    kept: list[int] = []
    for start in range(0, count, size):
        part = range(start, min(count, start + size))
        kept += sorted({min(part, key=lambda i: line.ys[i]), max(part, key=lambda i: line.ys[i])})
    if kept[-1] != count - 1:
        kept.append(count - 1)
    xs, ys = [line.xs[i] for i in kept], [line.ys[i] for i in kept]
    return Line(line.name, xs, ys, line.color, line.stepped, line.right, line.filled)


def _path(line: Line, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    points = [
        (x_axis.at(x), y_axis.at(y))
        for x, y in zip(line.xs, line.ys, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not points:
        return []
    steps = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for x, y in points[1:]:
        steps.append(f"H{x:.1f}V{y:.1f}" if line.stepped else f"L{x:.1f},{y:.1f}")
    drawn = [f'<path class="line {line.color}" d="{"".join(steps)}"/>']
    if line.filled:
        floor = HEIGHT - BOTTOM
        area = f"{''.join(steps)}V{floor}H{points[0][0]:.1f}Z"
        drawn.insert(0, f'<path class="area {line.color}" d="{area}"/>')
    if len(points) == 1:
        drawn.append(f'<circle class="dot {line.color}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3"/>')
    return drawn


def _mark(mark: Mark, x_axis: _Axis) -> str:
    at = x_axis.at(mark.x)
    return (
        f'<g class="mark {mark.kind}"><line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<circle cx="{at:.1f}" cy="{TOP}" r="4"/><title>{html.escape(mark.text)}</title></g>'
    )
