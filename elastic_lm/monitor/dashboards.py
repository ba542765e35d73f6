"""The dashboard for Grafana, in its JSON: what panels.py shows, in the words of Grafana's SDK, which is imported here alone.

The classic format, which every Grafana takes from a file. `python -m elastic_lm.monitor.dashboards` prints it, `make cluster`
writes cluster/grafana/elastic-lm.json, and a test fails when that file is out of date.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable, Iterator
from typing import Any

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as kinds
from grafana_foundation_sdk.models import dashboard as models

from elastic_lm.monitor.metrics import PREFIX
from elastic_lm.monitor.panels import MARKS, ROWS, Mark, Panel, Query

UID = "elastic-lm"
GRID_WIDTH = 24
SOURCE = kinds.DataSourceRef(type_val="prometheus", uid="${datasource}")
LAST = ["lastNotNull"]
NEUTRAL = ((0.0, "blue"),)  # without limits Grafana would color a number red from 80 on
MARK_STEP = "15s"  # how finely Prometheus is asked for marks: the scrape interval


def dashboard_json() -> str:
    """The file."""
    return json.dumps(build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def build() -> models.Dashboard:
    """The dashboard of one run, with a choice of the Prometheus and of the run."""
    board = (
        dashboard.Dashboard("elastic-lm: a run")
        .uid(UID)
        .description("One training run: progress, learning, speed, workers, goodput and checkpoints.")
        .tags(["elastic-lm"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(_choice_of_run())
        .annotations([_annotation(mark) for mark in MARKS])
    )
    top, ids = 0, itertools.count(1)
    for row in ROWS:
        heading = dashboard.Row(row.title).id(next(ids)).grid_pos(models.GridPos(h=1, w=GRID_WIDTH, x=0, y=top))
        board.with_row(heading)
        for panel, x, y in _places(row.panels, row.height, top + 1):
            place = models.GridPos(h=row.height, w=panel.width, x=x, y=y)
            board.with_panel(_panel(panel).id(next(ids)).grid_pos(place))
            top = y + row.height
    built = board.build()
    for variable in built.templating.list_val or ():
        # Of variables that are intervals, which ours are not, yet the SDK gives them to all: Grafana's schema refuses them.
        variable.auto = variable.auto_min = variable.auto_count = None
    return built


def _places(panels: tuple[Panel, ...], height: int, top: int) -> Iterator[tuple[Panel, int, int]]:
    """(panel, x, y): from left to right, and below where the width is used up."""
    x, y = 0, top
    for panel in panels:
        if x + panel.width > GRID_WIDTH:
            x, y = 0, y + height
        yield panel, x, y
        x += panel.width


def _choice_of_run() -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable("run")
        .label("Run")
        .datasource(SOURCE)
        .query(f"label_values({PREFIX}run_info, run)")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
    )


def _annotation(mark: Mark) -> dashboard.AnnotationQuery:
    return (
        dashboard.AnnotationQuery()
        .name(mark.name)
        .datasource(SOURCE)
        .enable(True)
        .icon_color(mark.color)
        .expr(mark.expression)
        .step(MARK_STEP)
        .title_format(mark.name)
        .text_format(mark.text)
    )


# -- panels ----------------------------------------------------------------------------------------------------------


def _panel(panel: Panel) -> Any:
    make: dict[str, Callable[[Panel], Any]] = {"timeseries": _graph, "stat": _number, "bargauge": _bars}
    made = make[panel.kind](panel)
    made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    made.thresholds(_thresholds(panel.limits or NEUTRAL))
    if panel.highest is not None:
        made.min(0).max(panel.highest)
    for letter, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        made.with_target(_target(query, letter, instant=panel.kind != "timeseries"))
    return made


def _graph(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .fill_opacity(60 if panel.stacked else 10)
        .show_points(kinds.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(kinds.LegendDisplayMode.LIST)
            .placement(kinds.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(LAST)
        )
        .tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.NONE))
    )
    if panel.stacked:
        made.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    if panel.limits:
        made.thresholds_style(common.GraphThresholdsStyleConfig().mode(kinds.GraphThresholdsStyleMode.DASHED))
    return made


def _number(panel: Panel) -> stat.Panel:
    made = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(LAST)).graph_mode(kinds.BigValueGraphMode.NONE)
    if panel.words:
        words = {given: models.ValueMappingResult(text=word) for given, word in panel.words}
        made.mappings([models.ValueMap(options=words)])
    return made


def _bars(panel: Panel) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .reduce_options(common.ReduceDataOptions().calcs(LAST))
        .orientation(kinds.VizOrientation.HORIZONTAL)
        .display_mode(kinds.BarGaugeDisplayMode.BASIC)
        .min(0)
    )


def _thresholds(limits: tuple[tuple[float, str], ...]) -> dashboard.ThresholdsConfig:
    """The first color holds from below everything on."""
    steps = [
        models.Threshold(value=None if number == 0 else start, color=color)
        for number, (start, color) in enumerate(limits)
    ]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _target(query: Query, letter: str, *, instant: bool) -> prometheus.Dataquery:
    made = prometheus.Dataquery().datasource(SOURCE).expr(query.expression).legend_format(query.legend).ref_id(letter)
    return made.instant() if instant else made.range()


if __name__ == "__main__":
    print(dashboard_json(), end="")
