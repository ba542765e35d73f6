"""An experiment as one HTML page that needs nothing else: what came of it, the tree of its attempts, and their scores.

Its frame is the report's (monitor/frame.py), so all pages look alike. The same attempts and costs give the same page.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from elastic_lm.experiment.attempt import Attempt
from elastic_lm.experiment.result import BUDGET, EXHAUSTED, REACHED, ExperimentResult
from elastic_lm.experiment.target import Target
from elastic_lm.experiment.tree import Node, nodes, state_of
from elastic_lm.monitor.chart import Chart, Line, duration
from elastic_lm.monitor.frame import framed

WIDTH = 960
ROW, INDENT, LEFT, RADIUS = 46, 30, 16, 6  # of the tree, in pixels; a deep one has a smaller indent
DEEPEST = 420  # the farthest that an attempt stands to the right, so that there is room for what is told of it
MOST_CHARACTERS = 92  # of what an attempt has changed, in one line
STYLE = """<style>
.told { font-size: 16px; color: var(--text); margin: 0 } .told.good { color: var(--good) } .told.bad { color: var(--bad) }
.tree text { font-size: 14px; fill: var(--text); font-variant-numeric: tabular-nums } .tree .name { font-weight: 600 }
.tree .faint { fill: var(--faint); font-size: 12.5px } .tree .score { font-weight: 600; text-anchor: end }
.tree .edge { fill: none; stroke: var(--plain); stroke-width: 1.5 }
.tree circle { fill: var(--c1); stroke: var(--card); stroke-width: 2 }
.tree .good circle { fill: var(--good) } .tree .bad circle { fill: var(--bad) }
.tree .faint circle { fill: var(--card); stroke: var(--plain); stroke-width: 1.5 }
.tree .good .score { fill: var(--good) } .tree .bad .score { fill: var(--bad) } .tree .state { text-anchor: end }
.tree .best rect { fill: var(--c1); opacity: .08 } .tree .good rect { fill: var(--good); opacity: .1 } .tree rect { fill: none }
#news td:first-child { color: inherit } #news td.number, #news th.number { text-align: right }
#news td:nth-child(2) { color: inherit; white-space: normal; width: auto; overflow-wrap: anywhere }
</style>"""


def render(result: ExperimentResult) -> str:
    """The page of an experiment that has come to this, or is `running`."""
    tone = {REACHED: "good", EXHAUSTED: "bad", BUDGET: "bad"}.get(result.verdict, "")
    sections = [
        STYLE,
        f'<section><p class="told {tone}">{html.escape(result.message)}.</p></section>',
        _cards(result),
        _tree(result),
        _chart(result),
        _table(result),
    ]
    return framed(result.name, f"experiment: {result.target}", sections)


# -- figures ---------------------------------------------------------------------------------------------------------


def _cards(result: ExperimentResult) -> str:
    found = result.best
    num_ended = sum(each.ended is not None for each in result.attempts)
    cards = [
        ("Verdict", result.verdict, ""),
        (
            f"Best {_figure(result.target)}",
            "–" if found is None else f"{found.score:,.4g}",
            "" if found is None else found.run,
        ),
        ("Attempts", f"{num_ended}", f"of {len(result.attempts)} in the plan"),
        ("Tokens", _short(result.tokens), f"{result.tokens:,}"),
        ("Trained for", duration(result.hours * 3600), "by the runs' logs"),
    ]
    told = "".join(
        f'<div class="card"><b>{html.escape(title)}</b><span>{html.escape(value)}</span><small>{html.escape(more)}</small></div>'
        for title, value, more in cards
    )
    return f'<section class="cards">{told}</section>'


def _figure(target: Target) -> str:
    return target.figure.replace("_", " ")


def _short(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:,.3g} {unit}"
    return f"{number:,.0f}"


# -- the tree ----------------------------------------------------------------------------------------------------------


def _tree(result: ExperimentResult) -> str:
    found = nodes(result.attempts, result.target)
    rows = {node.attempt.number: row for row, node in enumerate(found)}
    indent = min(INDENT, DEEPEST / max([1, *(node.depth for node in found)]))
    edges = (_edge(node, rows, indent) for node in found if node.depth)
    drawn = [*edges, *(_row(node, row, result.target, indent) for row, node in enumerate(found))]
    return (
        f'<section><h2>Lineage</h2><svg class="tree" '
        f'viewBox="0 0 {WIDTH} {ROW * len(found)}" role="img" aria-label="Lineage of the attempts">{"".join(drawn)}</svg>'
        "</section>"
    )


def _at(depth: int, row: int, indent: float) -> tuple[float, int]:
    return round(LEFT + indent * depth, 1), ROW * row + ROW // 2


def _edge(node: Node, rows: dict[int, int], indent: float) -> str:
    """Down from the parent and round a corner."""
    parent = node.attempt.parent
    assert parent is not None
    x, y = _at(node.depth - 1, rows[parent], indent)
    to_x, to_y = _at(node.depth, rows[node.attempt.number], indent)
    corner = min(10, to_x - x)
    return f'<path class="edge" d="M{x:g},{y}V{to_y - 10}Q{x:g},{to_y} {x + corner:g},{to_y}H{to_x:g}"/>'


def _row(node: Node, row: int, target: Target, indent: float) -> str:
    attempt = node.attempt
    x, y = _at(node.depth, row, indent)
    score = "" if attempt.score is None else target.shown(attempt.score)
    state = state_of(attempt, target)
    detail = _detail(attempt, state if score else "")
    return (
        f'<g class="{node.tone}"><rect x="0" y="{y - ROW // 2 + 2}" width="{WIDTH}" height="{ROW - 4}" rx="6"/>'
        f'<circle cx="{x:g}" cy="{y}" r="{RADIUS}"/>'
        f'<text class="name" x="{x + 16:g}" y="{y - 3}">{html.escape(attempt.run)}</text>'
        f'<text class="faint" x="{x + 16:g}" y="{y + 14}">{html.escape(_told(attempt))}</text>'
        f'<text class="score" x="{WIDTH - 12}" y="{y - 3}">{score or html.escape(state)}</text>'
        f'<text class="faint state" x="{WIDTH - 12}" y="{y + 14}">{html.escape(detail)}</text></g>'
    )


def _told(attempt: Attempt) -> str:
    begun, told = attempt.begun, attempt.planned.told
    if begun is not None and begun.parent_step is not None:
        told = f"from step {begun.parent_step:,}: {told}"
    return told if len(told) <= MOST_CHARACTERS else f"{told[: MOST_CHARACTERS - 1]}…"


def _detail(attempt: Attempt, state: str) -> str:
    ended = attempt.ended
    parts = [state] if state else []
    if ended is not None and ended.step is not None:
        parts.append(f"step {ended.step:,}")
    if ended is not None and ended.tokens:
        parts.append(f"{_short(ended.tokens)} tokens")
    return " · ".join(parts)


# -- scores ------------------------------------------------------------------------------------------------------------


def _chart(result: ExperimentResult) -> str:
    target = result.target
    scored = [(float(each.number), each.score) for each in result.attempts if each.score is not None]
    if not scored:
        return ""
    so_far, leader = [], None
    for number, score in scored:
        leader = score if leader is None or target.order(score) < target.order(leader) else leader
        so_far.append((number, leader))
    ends = [0.0, float(max(len(result.attempts) - 1, 1))]
    lines = [
        Line(_figure(target), *_columns(scored), "c1"),
        Line("best so far", *_columns(so_far), "c3", stepped=True),
        Line("target", ends, [target.bound, target.bound], "c2"),
    ]
    return Chart(
        f"{_figure(target).capitalize()} of {target.task}, attempt by attempt", "attempt", lines, ends_at=ends[1]
    ).svg()


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# -- everything in figures ---------------------------------------------------------------------------------------------


def _table(result: ExperimentResult) -> str:
    names = list(dict.fromkeys(name for each in result.attempts for name in _figures(each)))
    first = f"{result.target.task}.{result.target.figure}"
    names.sort(key=lambda name: name != first)
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in ("step", "tokens", "time", *names))
    body = "".join(_table_row(each, names) for each in result.attempts)
    return (
        '<section><h2>All figures</h2><input id="search" type="search" placeholder="Search" aria-label="Search">'
        f'<div class="scroll"><table id="news"><tr><th>run</th><th>changes</th><th>verdict</th>{head}</tr>{body}</table></div>'
        "</section>"
    )


def _table_row(attempt: Attempt, names: Sequence[str]) -> str:
    ended, figures = attempt.ended, _figures(attempt)
    values = ["", "", ""]
    if ended is not None:
        values = ["" if ended.step is None else f"{ended.step:,}", f"{ended.tokens:,}", duration(ended.seconds)]
    values += ["" if figures.get(name) is None else f"{figures[name]:,.4g}" for name in names]
    numbers = "".join(f'<td class="number">{value}</td>' for value in values)
    message = f' title="{html.escape(ended.message)}"' if ended is not None else ""
    words = "".join(f"<td>{html.escape(text)}</td>" for text in (attempt.run, attempt.planned.told))
    return f"<tr>{words}<td{message}>{html.escape(attempt.state)}</td>{numbers}</tr>"


def _figures(attempt: Attempt) -> dict[str, float | None]:
    """By TASK.FIGURE."""
    tasks = {} if attempt.ended is None else attempt.ended.figures
    return {f"{task}.{name}": value for task, figures in tasks.items() for name, value in figures.items()}
