"""The report: one HTML file per run that needs nothing else, computed from the event log and the results of tasks.

Of a fork, charts over steps begin with what its ancestors have trained, dashed; every figure and every time is the run's own.
Charts are SVG and can be read without a script; with one, values are told under the pointer and news can be searched.
"""

from __future__ import annotations

import datetime
import html
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from elastic_lm.evaluation_file import Figure
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor import task_results
from elastic_lm.monitor.ancestors import NONE, Ancestors
from elastic_lm.monitor.chart import Chart, Line, Mark, duration
from elastic_lm.monitor.frame import framed
from elastic_lm.monitor.history import History, Point
from elastic_lm.monitor.progress import TONES
from elastic_lm.monitor.task_results import TaskResult
from elastic_lm.storage import Storage

FILE = "report.html"
MOST_NEWS = 2_000  # rows of the table; the log has them all
MARKED = {  # kinds of news that the charts over time show
    EventKind.MEMBER_LOST,
    EventKind.MEMBER_REFUSED,
    EventKind.STEP_MISMATCH,
    EventKind.CHECKPOINT_FAILED,
    EventKind.NODE_LOST,
    EventKind.NODE_QUARANTINED,
    EventKind.MEMBER_READY,
    EventKind.MEMBER_RETURNED,
    EventKind.MEMBER_LEFT,
    EventKind.RESIZED,
    EventKind.STRAGGLER,
}
MOST_MARKS = 300
MOST_NAMED = 4  # workers with a line of their own
MOST_WORKERS = 200  # rows of the table
PARTS = (  # of a step, as its record names them
    ("compute_s", "compute", "c1"),
    ("data_wait_s", "wait for data", "c2"),
    ("reduce_wait_s", "wait for the others", "c3"),
    ("optimizer_s", "optimizer", "c4"),
)


def write(name: str, run_storage: Storage, ancestors: Ancestors = NONE) -> str:
    """Render from the run's log and its results of tasks into its folder. `ancestors`: those of a fork.

    Returns: the report's address.    Raises: StorageError.
    """
    page = render(name, read(run_storage.child("events")), task_results.newest(run_storage), ancestors)
    run_storage.write(FILE, page.encode())
    return f"{run_storage.url}/{FILE}"


def render(name: str, events: Iterable[Event], results: Sequence[TaskResult] = (), ancestors: Ancestors = NONE) -> str:
    """The page about the run `name`. `results`: of tasks that its model was asked alone; `ancestors`: those of a fork."""
    history = History.of(events)
    sections = [
        _summary(history),
        *_origin(ancestors),
        *_charts(history, ancestors),
        *_tasks(results),
        _workers(history),
        _lost_time(history),
        _news(history),
        _settings(history),
    ]
    return framed(name, "elastic-lm run", sections)


# -- figures ---------------------------------------------------------------------------------------------------------


def _summary(history: History) -> str:
    last = history.points[-1] if history.points else None
    total = history.config.get("training", {}).get("steps")
    ratio = history.goodput.ratio()
    stall = history.data_stall()
    interruptions = [event.fields["lost_s"] for event in history.interruptions if event.fields["cause"] != "start"]
    cards = [
        ("verdict", history.verdict or "running", history.message or "as of the last event in the log"),
        ("steps", f"{last.step + 1:,}" if last else "0", f"of {total:,}" if total else ""),
        ("loss", f"{last.fields['loss']:.4f}" if last else "–", "nats per token, of the last step"),
        *_held_out_card(history),
        ("tokens", _short(history.num_tokens), f"{history.num_tokens:,} committed, each sample once"),
        ("goodput", f"{ratio:.1%}" if ratio is not None else "–", "of the held worker-seconds became committed tokens"),
        (
            "data stall",
            f"{stall:.1%}" if stall is not None else "–",
            "of step time went by waiting for data, on rank 0",
        ),
        ("workers lost", f"{history.num_lost:,}", "steps lost: 0" if not history.num_mismatches else ""),
        ("interruptions", f"{len(interruptions):,}", f"longest {max(interruptions):.2f} s" if interruptions else ""),
        ("time", duration(history.ended_s - history.began_s), _times(history)),
    ]
    if history.num_mismatches:
        cards.insert(0, ("ALARM", f"{history.num_mismatches}", "steps came out differently when computed again"))
    return '<section class="cards">' + "".join(_card(*card) for card in cards) + "</section>"


def _held_out_card(history: History) -> list[tuple[str, str, str]]:
    if not history.evaluations:
        return []
    last = history.evaluations[max(history.evaluations)]
    return [("held out", f"{last.loss:.4f}", f"nats per token before step {last.step:,}: {last.words()}")]


def _card(name: str, value: str, more: str) -> str:
    alarm = " alarm" if name == "ALARM" else ""
    return (
        f'<div class="card{alarm}"><b>{html.escape(name)}</b><span>{html.escape(value)}</span>'
        f"<small>{html.escape(more)}</small></div>"
    )


def _origin(ancestors: Ancestors) -> list[str]:
    """Where a fork is from, and what is not known of that."""
    told = [f"{fork.run} was forked from {fork.parent} at step {fork.step:,}." for fork in ancestors.forks]
    if ancestors.stretches:
        told.append("What its ancestors have trained is dashed; all figures and times are of this run alone.")
    if ancestors.lacks:
        told.append(ancestors.lacks)
    return [f"<section><h2>Where it is from</h2><p>{html.escape(' '.join(told))}</p></section>"] if told else []


def _charts(history: History, ancestors: Ancestors) -> list[str]:
    before = list(ancestors.points())
    forks = [Mark(float(fork.step), "plain", str(fork)) for fork in ancestors.forks]
    times = [point.time_s for point in history.points]
    marks = _marks(history)
    lasted_s = history.ended_s - history.began_s
    over_time: dict[str, Any] = {"x_label": "time", "ends_at": lasted_s, "clock": True}
    rate_times, rates = history.tokens_per_s()
    sizes = [*history.world_sizes, *((lasted_s, size) for _, size in history.world_sizes[-1:])]
    charts = [
        Chart(
            "Loss and learning rate",
            "step",
            [
                *_over_steps("loss", "loss", history.points, before, "c1"),
                *_over_steps("learning rate", "learning_rate", history.points, before, "c2", right=True),
                *_held_out_lines(history, ancestors),
            ],
            forks,
            format_y=lambda y: f"{y:.3f}",
            format_right=lambda y: f"{y:.4g}",
        ),
        Chart(
            "Tokens per second",
            lines=[Line("tokens/s", rate_times, rates, "c1", filled=True)],
            marks=marks,
            **over_time,
            format_y=_short,
            from_zero=True,
        ),
        Chart(
            "Workers that train",
            lines=[
                Line("workers", [t for t, _ in sizes], [float(n) for _, n in sizes], "c3", stepped=True, filled=True)
            ],
            marks=marks,
            **over_time,
            format_y=lambda y: f"{y:g}",
            from_zero=True,
        ),
        Chart(
            "Where a step's time goes, rank 0",
            lines=[
                Line(told, times, [float(point.fields[part]) for point in history.points], color)
                for part, told, color in PARTS
            ],
            **over_time,
            format_y=lambda y: f"{y:.3g} s",
            from_zero=True,
        ),
        Chart(
            "Step time of every worker",
            lines=_worker_lines(history),
            **over_time,
            format_y=lambda y: f"{y:.3g} s",
            from_zero=True,
        ),
        Chart("Norm of the gradient", "step", [*_over_steps("norm", "grad_norm", history.points, before, "c4")], forks),
    ]
    return [chart.svg() for chart in charts]


def _over_steps(
    name: str, field: str, points: Sequence[Point], before: Sequence[Point], color: str, *, right: bool = False
) -> Iterator[Line]:
    """The run's own line, and that of its ancestors; loss and norm without the steps that were left out."""
    for told, of, kind in ((name, points, color), (f"{name}, before", before, f"{color} before")):
        kept = [point for point in of if field == "learning_rate" or not point.fields.get("refused")]
        yield Line(told, [float(p.step) for p in kept], [float(p.fields[field]) for p in kept], kind, right=right)


def _held_out_lines(history: History, ancestors: Ancestors) -> Iterator[Line]:
    own = [history.evaluations[step] for step in sorted(history.evaluations)]
    before = [score for stretch in ancestors.stretches for score in stretch.scores]
    for name, scores, color in (("held-out loss", own, "c4"), ("held-out loss, before", before, "c4 before")):
        yield Line(name, [float(score.step) for score in scores], [score.loss for score in scores], color)


def _marks(history: History) -> list[Mark]:
    marked = [event for event in history.news if event.kind in MARKED]
    return [Mark(history.since_start(event), TONES[event.kind], event.message) for event in marked[-MOST_MARKS:]]


def _worker_lines(history: History) -> list[Line]:
    """Seconds that each worker computes in a step; of many workers the slowest, the median and the fastest."""
    if len(history.paces) <= MOST_NAMED:
        return [
            Line(member_id, [t for t, _, _ in paces], [s * count for _, s, count in paces], f"c{1 + number % 4}")
            for number, (member_id, paces) in enumerate(history.paces.items())
        ]
    at: dict[float, list[float]] = {}
    for paces in history.paces.values():
        for time_s, seconds, count in paces:
            at.setdefault(time_s, []).append(seconds * count)
    times = sorted(at)
    kinds = (("slowest", max, "c2"), ("median", statistics.median, "c1"), ("fastest", min, "c3"))
    return [Line(name, times, [choose(at[time_s]) for time_s in times], color) for name, choose, color in kinds]


def _workers(history: History) -> str:
    """A row for each worker: the slow ones are seen here."""
    rows = []
    usual = statistics.median([s for paces in history.paces.values() for _, s, _ in paces] or [0.0])
    for member_id, paces in list(history.paces.items())[-MOST_WORKERS:]:
        seconds = statistics.median(s for _, s, _ in paces)
        rows.append(
            f"<tr><td>{html.escape(member_id)}</td><td>{duration(paces[0][0])} – {duration(paces[-1][0])}</td>"
            f"<td>{seconds:.3f} s</td><td>{seconds / usual:.2f}</td><td>{paces[-1][2]}</td></tr>"
        )
    head = "<tr><th>worker</th><th>seen</th><th>per micro-batch, median</th><th>of the usual</th><th>micro-batches</th></tr>"
    body = (
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'
        if rows
        else '<p class="empty">Nothing yet.</p>'
    )
    return f"<section><h2>Workers</h2>{body}</section>"


def _tasks(results: Sequence[TaskResult]) -> list[str]:
    """A row for each figure that `elastic-lm evaluate` has found; no section without any."""
    rows = [
        f"<tr><td>{html.escape(result.task)}</td><td>{result.step:,}</td><td>{html.escape(_words(figure.name))}</td>"
        f"<td>{_value(figure)}</td><td>{_interval(figure)}</td></tr>"
        for result in results
        for figure in result.figures
    ]
    if not rows:
        return []
    head = "<tr><th>task</th><th>step</th><th>figure</th><th>value</th><th>95 % interval</th></tr>"
    return [
        "<section><h2>Evaluations</h2><p>What <code>elastic-lm evaluate</code> found, of each task at its newest step</p>"
        f'<div class="scroll"><table>{head}{"".join(rows)}</table></div></section>'
    ]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _value(figure: Figure) -> str:
    return "not finite" if figure.value is None else f"{figure.value:,.4f}"


def _interval(figure: Figure) -> str:
    return "–" if figure.low is None or figure.high is None else f"{figure.low:,.4f} to {figure.high:,.4f}"


def _lost_time(history: History) -> str:
    lost = sorted(history.goodput.lost_worker_s().items(), key=lambda item: -item[1])
    held = history.goodput.held_worker_s
    rows = [
        f'<tr><th>{html.escape(cause)}</th><td class="bar"><i style="width:{100 * seconds / held:.2f}%"></i></td>'
        f"<td>{seconds:,.1f} s</td><td>{seconds / held:.2%}</td></tr>"
        for cause, seconds in lost
        if held > 0 and seconds >= 0.05
    ]
    body = f"<table>{''.join(rows)}</table>" if rows else '<p class="empty">Nothing yet.</p>'
    told = f"Held worker-seconds that committed nothing, by cause, of {held:,.0f} s held"
    return f"<section><h2>Time lost</h2><p>{told}</p>{body}</section>"


# -- words -----------------------------------------------------------------------------------------------------------


def _news(history: History) -> str:
    rows = [
        f'<tr class="{TONES.get(event.kind, "plain")}"><td>{duration(history.since_start(event))}</td>'
        f"<td>{'' if event.step is None else f'{event.step:,}'}</td><td>{html.escape(event.message)}</td></tr>"
        for event in history.news[-MOST_NEWS:]
    ]
    left_out = len(history.news) - len(rows)
    note = f"<p>The last {len(rows):,}; the event log holds {left_out:,} more.</p>" if left_out else ""
    return (
        '<section><h2>What happened</h2><input id="search" type="search" placeholder="Search" aria-label="Search">'
        f'{note}<div class="scroll"><table id="news"><tr><th>time</th><th>step</th><th></th></tr>'
        f"{''.join(rows)}</table></div></section>"
    )


def _settings(history: History) -> str:
    checkpoints = "".join(f"<li>{html.escape(event.message)}</li>" for event in history.checkpoints[-20:])
    return (
        f"<section><h2>Checkpoints</h2><ul>{checkpoints or '<li>none yet</li>'}</ul></section>"
        f"<section><h2>Configuration</h2><pre>{html.escape(_yaml(history.config))}</pre></section>"
        f"<section><h2>Environment</h2><pre>{html.escape(_yaml(history.environment))}</pre></section>"
    )


def _yaml(values: dict[str, Any], indent: str = "") -> str:
    lines: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{name}:", _yaml(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return "\n".join(lines)


def _times(history: History) -> str:
    if not history.began_s:
        return ""
    began = datetime.datetime.fromtimestamp(history.began_s, datetime.UTC)
    attempts = f", {history.attempts} attempts" if history.attempts > 1 else ""
    return f"since {began:%Y-%m-%d %H:%M} UTC{attempts}"


def _short(number: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"
