"""A comparison as one HTML page that needs nothing else: the report's look, with two lines in every chart.

What ancestors have trained is dashed, and where each fork was made is marked. Time is a run's own.

Its frame is the report's (monitor/frame.py), so the two look alike; what is searched there are events, and here fields of the
config.
"""

from __future__ import annotations

import datetime
import html
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from elastic_lm.experiment.comparison import Comparison, Side
from elastic_lm.experiment.evaluations import Measured
from elastic_lm.experiment.lineage import Change, Lineage
from elastic_lm.monitor.chart import Chart, Line, Mark
from elastic_lm.monitor.frame import framed

COLORS = ("c1", "c2")
BOTH = "plain"  # what ancestors have trained for both
NUM_MEANS = 50  # a mean is over one part in so many of a run's steps
FEWEST_TO_SMOOTH = 100  # steps
STYLE = """<style>
.line.raw { opacity: .28; stroke-width: 1; stroke-dasharray: none } .key.raw { display: none }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 16px } .pair section { margin: 0 0 16px }
i.dot { display: inline-block; width: 9px; height: 9px; border-radius: 5px; margin-right: 6px }
i.c1 { background: var(--c1) } i.c2 { background: var(--c2) }
td.value, th.value { width: 34%; overflow-wrap: anywhere } td:first-child { overflow-wrap: anywhere }
#news td:first-child, #news td:nth-child(2) { color: inherit; white-space: normal; width: auto }
#news td.value:nth-child(2) { width: 34% } #news tr.rest td { color: var(--faint) }
.told { font-size: 16px; color: var(--text); margin: 0 }
.chain { margin: 0; padding: 0; list-style: none } .chain li { padding: 2px 0 8px 14px; border-left: 2px solid var(--line) }
.chain small { color: var(--faint); display: block; overflow-wrap: anywhere }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr; gap: 0 } }
</style>"""


def render(comparison: Comparison) -> str:
    """The page."""
    sections = [STYLE, _told(comparison), _figures(comparison), _differences(comparison), *_charts(comparison)]
    sections += [_evaluations(comparison), _lineages(comparison)]
    return framed(" and ".join(comparison.names), "two runs compared", sections)


# -- figures ---------------------------------------------------------------------------------------------------------


def _told(comparison: Comparison) -> str:
    told = comparison.relation or "Neither is from the other."
    lacks = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in comparison.lacks)
    return f'<section><p class="told">{html.escape(told)}</p>{lacks}</section>'


def _figures(comparison: Comparison) -> str:
    rows = [(name, html.escape(a), html.escape(b), "") for name, a, b in comparison.figures]
    return f"<section><h2>What came of it</h2>{_table(comparison, '', rows)}</section>"


def _evaluations(comparison: Comparison) -> str:
    rows = []
    for step, task, metric, a, b in comparison.measured:
        name = f"step {step:,} · {task} · {metric}"
        rows.append((name, _measured(a), _measured(b), ""))
    body = _table(comparison, "", rows) if rows else '<p class="empty">Neither run has any.</p>'
    return f'<section><h2>Evaluations</h2><div class="scroll">{body}</div></section>'


def _measured(measured: Measured | None) -> str:
    return "–" if measured is None else html.escape(str(measured))


def _differences(comparison: Comparison) -> str:
    rows = [
        (change.name, _value(change.before), _value(change.after), _class(change)) for change in comparison.differences
    ]
    number = sum(change.identity for change in comparison.differences)
    told = (
        f"{number} of {len(rows)} change{'s' if number == 1 else ''} bits; the others are faint."
        if rows
        else "None: both were configured alike."
    )
    table = _table(comparison, "news", rows)
    return (
        f"<section><h2>Fields that differ</h2><p>{told}</p>"
        f'<input id="search" type="search" placeholder="Search" aria-label="Search"><div class="scroll">{table}</div></section>'
    )


def _class(change: Change) -> str:
    return "" if change.identity else "rest"


def _value(value: Any) -> str:
    return html.escape("–" if value is None else str(value))


def _table(comparison: Comparison, name: str, rows: Sequence[tuple[str, str, str, str]]) -> str:
    """Rows of (what, a's, b's, class); the values are HTML already."""
    heads = "".join(
        f'<th class="value">{_dot(color)}{html.escape(told)}</th>'
        for told, color in zip(comparison.names, COLORS, strict=True)
    )
    body = "".join(
        f'<tr class="{kind}"><td>{html.escape(what)}</td><td class="value">{a}</td><td class="value">{b}</td></tr>'
        for what, a, b, kind in rows
    )
    return (
        f'<table id="{name}"><tr><th></th>{heads}</tr>{body}</table>'
        if name
        else f"<table><tr><th></th>{heads}</tr>{body}</table>"
    )


def _dot(color: str) -> str:
    return f'<i class="dot {color}"></i>'


# -- charts ------------------------------------------------------------------------------------------------------------


def _charts(comparison: Comparison) -> list[str]:
    marks = list(_marks(comparison))
    of_steps: dict[str, Any] = {"x_label": "step", "marks": marks}
    over = _over(comparison)
    loss: dict[str, Any] = {**of_steps, "format_y": lambda y: f"{y:.3f}"}
    charts = [Chart("Loss", lines=[*_lines(comparison, "loss", over)], **loss)]
    if comparison.common and comparison.common != sorted({*comparison.a.line, *comparison.b.line}):
        charts.append(Chart("Loss of the steps that were trained for each", lines=[*_common(comparison, over)], **loss))
    charts += [
        Chart(
            f"Loss of {comparison.names[1]} less that of {comparison.names[0]}, step by step",
            lines=[*_difference(comparison, over)],
            **of_steps,
            format_y=lambda y: f"{y:+.4f}",
        ),
        Chart("Learning rate", lines=[*_lines(comparison, "learning_rate")], **of_steps, from_zero=True),
        Chart("Norm of the gradient", lines=[*_lines(comparison, "grad_norm", over)], **of_steps, from_zero=True),
        Chart(
            "Tokens per second, by time since each began",
            "time",
            [*_rates(comparison)],
            clock=True,
            from_zero=True,
            format_y=lambda y: f"{y:,.0f}",
        ),
    ]
    return [chart.svg() for chart in charts]


def _sides(comparison: Comparison) -> Iterator[tuple[str, Side, str]]:
    yield from zip(comparison.names, (comparison.a, comparison.b), COLORS, strict=True)


def _over(comparison: Comparison) -> int:
    """Of how many steps a mean is taken, the same for both; 1 where there are few."""
    number = max(len(comparison.a.line), len(comparison.b.line))
    return 1 if number < FEWEST_TO_SMOOTH else max(3, number // NUM_MEANS)


def _lines(comparison: Comparison, field: str, over: int = 1) -> Iterator[Line]:
    """For each run its own line, and that of ancestors that are its alone; then that of both's. Without steps left out."""
    a, b = comparison.a, comparison.b
    both = [step for step in comparison.shared if step in a.before and step in b.before]
    for name, side, color in _sides(comparison):
        yield from _line(name, side.records, list(side.records), field, color, over)
    for name, side, color in _sides(comparison):
        before = sorted(side.before.keys() - set(both))
        yield from _line(f"{name}, before", side.before, before, field, f"{color} before", over)
    yield from _line("both, before", a.before, both, field, f"{BOTH} before", over)


def _common(comparison: Comparison, over: int) -> Iterator[Line]:
    """Losses of the steps that each has trained, whoever of its line did."""
    for name, side, color in _sides(comparison):
        yield from _line(name, side.line, comparison.common, "loss", color, over)


def _line(
    name: str, records: dict[int, dict[str, Any]], steps: Sequence[int], field: str, color: str, over: int
) -> Iterator[Line]:
    applied = [step for step in steps if not records[step].get("refused")]
    if applied:
        yield from _smoothed(name, applied, [float(records[step][field]) for step in applied], color, over)


def _difference(comparison: Comparison, over: int) -> Iterator[Line]:
    a, b = comparison.a.line, comparison.b.line
    steps = [step for step in comparison.common if not a[step].get("refused") and not b[step].get("refused")]
    values = [float(b[step]["loss"]) - float(a[step]["loss"]) for step in steps]
    yield from _smoothed("difference", steps, values, "c4", over)


def _smoothed(name: str, steps: Sequence[int], values: Sequence[float], color: str, over: int) -> Iterator[Line]:
    """The values; or, of a long run, behind their mean."""
    xs = [float(step) for step in steps]
    if over == 1:
        yield Line(name, xs, values, color)
    else:
        yield Line(name, xs, values, f"{color} raw")
        yield Line(f"{name}, mean of {over}", xs, _means(values, over), color)


def _means(values: Sequence[float], over: int) -> list[float]:
    """Of `over` values around each place, fewer at the ends; of those that are finite."""
    finite = [math.isfinite(value) for value in values]
    sums = [0.0, *itertools.accumulate(value if counts else 0.0 for value, counts in zip(values, finite, strict=True))]
    numbers = [0, *itertools.accumulate(finite)]
    ranges = ((max(0, place - over // 2), min(len(values), place + over // 2 + 1)) for place in range(len(values)))
    return [
        (sums[stop] - sums[start]) / (numbers[stop] - numbers[start]) if numbers[stop] > numbers[start] else math.nan
        for start, stop in ranges
    ]


def _rates(comparison: Comparison) -> Iterator[Line]:
    for name, side, color in _sides(comparison):
        times, rates = side.history.tokens_per_s()
        yield Line(name, times, rates, color)


def _marks(comparison: Comparison) -> Iterator[Mark]:
    """Where each was forked, and its ancestors before it; what both have in common once."""
    forks = dict.fromkeys(fork for _, side, _ in _sides(comparison) for fork in side.ancestors.forks)
    for fork in forks:
        yield Mark(float(fork.step), "plain", str(fork))


# -- lineage -----------------------------------------------------------------------------------------------------------


def _lineages(comparison: Comparison) -> str:
    return '<div class="pair">' + "".join(_lineage(*each) for each in _sides(comparison)) + "</div>"


def _lineage(name: str, side: Side, color: str) -> str:
    links = "".join(f"<li>{_link(link)}</li>" for link in (side.lineage.chain() if side.lineage else ()))
    body = f'<ul class="chain">{links}</ul>' if links else "<p>It began at step 0.</p>"
    return (
        f"<section><h2>{_dot(color)}Where {html.escape(name)} is from</h2>{body}"
        f"<p>{html.escape(side.url)}</p></section>"
    )


def _link(link: Lineage) -> str:
    when = datetime.datetime.fromtimestamp(link.time_s, datetime.UTC)
    changes = "; ".join(str(change) for change in link.changes if change.identity) or "nothing changed"
    told = f"{link.run} from {link.parent.name} at step {link.parent.step:,}"
    state = f"{when:%Y-%m-%d %H:%M} UTC, state {link.parent.digest.get('state', '')[:16]}"
    small = (*(str(rewind) for rewind in link.parent.rewinds), changes, state)
    return "".join([html.escape(told), *(f"<small>{html.escape(each)}</small>" for each in small)])
