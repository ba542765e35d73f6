"""Expressions of the metrics of one run, `$run`, in the language of Prometheus, with Grafana's variables in them.

A metric carries no name of its run; `elastic_lm_run_info`, which comes from the same endpoint, does. Every expression keeps of a
metric what an endpoint tells while it tells that it is the chosen run's, and takes the largest of it. So runs on one Prometheus
are told apart, also when they had the same port one after another; a run that went on elsewhere is one line; and one that is
scraped twice is counted once. Trade-off: two runs of the same name in different storages, at one time, are mixed up.
"""

from __future__ import annotations

from elastic_lm.monitor.metrics import PREFIX, by_name

OF_RUN = f'and on (job, instance) {PREFIX}run_info{{run="$run"}}'
WINDOW = "$__rate_interval"  # Grafana's: four scrapes or one point of the graph, whichever is longer


def value(name: str, by: str = "", **labels: str) -> str:
    """The metric now, for each value of the label `by`."""
    return _largest(_selected(name, **labels), by)


def rate(name: str, by: str = "") -> str:
    """What a counter adds each second."""
    return _largest(f"rate({_selected(name)}[{WINDOW}])", by)


def mean(name: str) -> str:
    """A gauge's mean over the window."""
    return _largest(f"avg_over_time({_selected(name)}[{WINDOW}])", "")


def counted(name: str, by: str, *, without: tuple[str, ...] = ()) -> str:
    """By label, what a counter added in the window, where it added anything; nothing of the values `without`."""
    others = f'{{{by}!~"{"|".join(without)}"}}' if without else ""
    return f"{_largest(f'increase({_selected(name)}{others}[{WINDOW}])', by)} > 0"


def _selected(name: str, **labels: str) -> str:
    assert name in by_name(), f"{name} is no metric"
    equal = ", ".join(f'{label}="{wanted}"' for label, wanted in labels.items())
    return PREFIX + name + (f"{{{equal}}}" if equal else "")


def _largest(expression: str, by: str) -> str:
    return f"max{f' by ({by}) ' if by else ''}({expression} {OF_RUN})"
