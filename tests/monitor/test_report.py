"""The report: whole, self-contained, safe, small for a long run, and alive in a browser."""

from __future__ import annotations

import html
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from elastic_lm.evaluation_file import Figure
from elastic_lm.events.log import EventLog
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor import report
from elastic_lm.monitor.ancestors import Ancestors, Fork, Stretch
from elastic_lm.monitor.held_out import HeldOutScore
from elastic_lm.monitor.history import History
from elastic_lm.monitor.task_results import TaskResult
from elastic_lm.storage import Storage
from tests.conftest import find_chromium
from tests.monitor.story import TASK_RESULTS, at, committed, evaluated, lost, ready, reformed, started
from tests.monitor.test_history import begun, finished, granted

VOID = {"meta", "input", "line", "circle", "br"}


def a_run(num_steps: int = 20) -> list[Event]:
    return [
        begun(),
        started(0.5, "w0"),
        ready(1, "w0"),
        granted(1, 1),
        *(committed(2 + step, step) for step in range(num_steps)),
        lost(3, "w1", cause="silent <1 s>"),
        reformed(4, "failure", 0.25),
        at(5, EventKind.CHECKPOINT_SAVED, step=4, seconds=0.5),
        finished(num_steps + 3, "done"),
    ]


class Balance(HTMLParser):
    """Notes tags that are closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Closes itself."""

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_page_tells_the_run() -> None:
    page = report.render("my-run", [*a_run(), paces(4, w0=(0.5, 8))])
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for told in ("my-run", "done", "2.5000", "longest 0.25 s", "member_lost happened.", "micro_batches: 8", "0:03"):
        assert told in text
    assert page.count("<svg") == 6


def test_fork_begins_with_what_its_ancestors_have_trained() -> None:
    before = History.of([begun(), *(committed(2 + step, step) for step in range(4))])
    score = HeldOutScore(2, 2.5, None, None, None)
    stretch = Stretch("its <parent>", "file:///parent", 0, 4, tuple(before.points), (score,))
    ancestors = Ancestors((Fork("my-run", "its <parent>", 4),), (stretch,))
    own = [
        begun(),
        granted(1, 1),
        *(committed(2 + step, step) for step in range(4, 9)),
        evaluated(11, 8),
        finished(12, "done"),
    ]
    page = report.render("my-run", own, ancestors=ancestors)
    legends = dict(re.findall(r"<figcaption>([^<]*) <small>(.*?)</small>", page))
    assert re.findall(r'key ([^"]*)">(.*?)<', legends["Loss and learning rate"]) == [
        ("c1", "loss"), ("c1 before", "loss, before"), ("c2", "learning rate"), ("c2 before", "learning rate, before"),
        ("c4", "held-out loss"), ("c4 before", "held-out loss, before"),
    ]  # fmt: skip
    assert "norm, before" in legends["Norm of the gradient"]
    assert page.count("<title>my-run was forked here from its &lt;parent&gt;</title>") == 2
    assert "my-run was forked from its &lt;parent&gt; at step 4." in page
    assert "2,000 committed" in page  # its own five steps
    alone = report.render(
        "my-run", own, ancestors=Ancestors(ancestors.forks, (), "The steps before 4 are not shown: why.")
    )
    assert "The steps before 4 are not shown: why." in alone and ", before" not in alone
    assert "Where it is from" not in report.render("my-run", a_run())


def paces(elapsed_s: float, **of: tuple[float, int]) -> Event:
    return at(elapsed_s, EventKind.WORKER_PACES, paces={member_id: list(pace) for member_id, pace in of.items()})


def test_workers_have_a_row_and_a_line_each() -> None:
    page = report.render("my-run", [*a_run(), paces(3, w0=(0.5, 6), w1=(0.5, 6)), paces(5, w0=(0.5, 8), w2=(1.5, 4))])
    rows = re.findall(r"<tr><td>(w\d)</td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td><td>(\d+)</td></tr>", page)
    assert rows == [
        ("w0", "0:03 – 0:05", "0.500 s", "1.00", "8"),
        ("w1", "0:03 – 0:03", "0.500 s", "1.00", "6"),
        ("w2", "0:05 – 0:05", "1.500 s", "3.00", "4"),
    ]
    (chart,) = re.findall(r"<figcaption>Step time of every worker.*?</figcaption>", page)
    assert re.findall(r"key c\d\">(.*?)<", chart) == ["w0", "w1", "w2"]


def test_many_workers_are_drawn_as_the_slowest_the_median_and_the_fastest() -> None:
    many = paces(3, **{f"w{number}": (0.1 * (number + 1), 2) for number in range(101)})
    page = html.unescape(report.render("my-run", [*a_run(), many]))
    for told in ("0:03: 20.2 s", "0:03: 10.2 s", "0:03: 0.2 s"):
        assert told in page


def test_data_stall_is_the_share_of_step_time_that_waited() -> None:
    page = report.render("my-run", [begun(), committed(1, 0, step_s=1.0), committed(2, 1, step_s=3.0, data_wait_s=1.0)])
    assert re.search(r"<b>data stall</b><span>25.0%</span>", page)


def test_page_is_well_formed_and_asks_nobody_for_anything() -> None:
    page = report.render("my-run", a_run())
    balance = Balance()
    balance.feed(page)
    assert balance.wrong == []
    assert balance.open == []
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page)


def test_results_of_tasks_have_a_section_with_their_intervals() -> None:
    page = report.render("my-run", a_run(), TASK_RESULTS)
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr><td>(?:capitals|held_out).*?</tr>", page)]
    assert rows == [
        ["capitals", "2", "accuracy", "0.5000", "0.2500", "to", "0.7500"],
        ["capitals", "2", "accuracy", "per", "byte", "0.2500", "–"],
        ["held_out", "4", "loss", "2.5000", "2.2500", "to", "2.7500"],
    ]
    balance = Balance()
    balance.feed(page)
    assert (balance.wrong, balance.open) == ([], [])
    assert "<h2>Evaluations</h2>" not in report.render("my-run", a_run())
    lost = report.render("my-run", a_run(), [TaskResult("pairs", 9, (Figure("share_more", None, None, None),))])
    assert "<td>not finite</td><td>–</td>" in lost
    evil = "<script>alert(1)</script>"
    assert evil not in report.render("my-run", a_run(), [TaskResult(evil, 1, (Figure(evil, 1, None, None),))])


def test_text_of_the_run_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    events = [*a_run(), Event(EventKind.NOTE, evil, time_s=1e9 + 9, elapsed_s=9)]
    page = report.render(evil, events)
    assert evil not in page
    assert html.escape(evil) in page


@pytest.mark.parametrize("events", [[], [begun()], a_run(1)], ids=["nothing", "just begun", "one step"])
def test_run_that_has_hardly_begun_has_a_page(events: list[Event]) -> None:
    assert "Nothing yet" in report.render("new", events)


def test_alarm_is_the_first_thing_on_the_page() -> None:
    page = report.render("odd", [*a_run(), at(30, EventKind.STEP_MISMATCH, logged={}, told={})])
    assert page.index("ALARM") < page.index("verdict")


def test_long_run_makes_a_small_page() -> None:
    losses = (committed(0.5 * step, step) for step in range(100_000))
    faults = (lost(50.0 * number, "w1") for number in range(1_000))
    assert len(report.render("long", [begun(), *losses, *faults])) < 2_000_000  # the limit is 5 MB


def test_written_report_is_beside_the_log(tmp_path: Path) -> None:
    storage = Storage.open(f"file://{tmp_path}/runs/mine")
    log = EventLog(storage.child("events"))
    for event in a_run():
        log.append(event)
    log.close()
    storage.write(
        "evaluations/step-00000004/held_out.json", b'{"metrics": {"loss": {"value": 2.5, "low": 2.25, "high": 2.75}}}'
    )
    assert report.write("mine", storage) == f"file://{tmp_path}/runs/mine/report.html"
    assert storage.read("report.html").decode() == report.render("mine", a_run(), TASK_RESULTS[1:])


PROBE = """<script>
addEventListener("load", () => {
  const svg = document.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  const search = document.getElementById("search"); search.value = "member_lost";
  search.dispatchEvent(new Event("input"));
  const tip = document.querySelector(".tip");
  const shown = [...document.querySelectorAll("#news tr")].filter(row => !row.hidden).length;
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = `tip=${tip.textContent.split("\\n")[0]};rows=${shown};wide=${wide}`;
});
</script>"""


@pytest.mark.browser
def test_page_lives_in_a_browser(tmp_path: Path) -> None:
    """It draws, tells the value under the pointer, finds news, and is not wider than the window."""
    file = tmp_path / "report.html"
    file.write_text(report.render("my-run", a_run()) + PROBE)
    chromium = find_chromium()
    assert chromium is not None
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900",
               f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{file}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr
    assert re.fullmatch(r"tip=loss  \d+: 2\.500;rows=1;wide=false", title[1]), title[1]
