"""The tree of attempts in a terminal and as a page: everybody once, below their parents, and nothing of a name is markup."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from elastic_lm.experiment import tree_page
from elastic_lm.experiment.attempt import Attempt, Begun, Ended
from elastic_lm.experiment.plan import Planned
from elastic_lm.experiment.result import ExperimentResult
from elastic_lm.experiment.target import Target
from elastic_lm.experiment.tree import lines, nodes
from tests.conftest import find_chromium

TARGET = Target("held_out", "perplexity", "<=", 30.0)


def made(number: int, parent: int | None = None, score: float | None = None, verdict: str = "done") -> Attempt:
    figures = {"held_out": {"loss": 3.0, "perplexity": score}}
    ended = Ended(number, verdict, f"it was {verdict}", score, 10 * number + 10, 6400, 90.0, figures)
    begun = Begun(number, parent, None if parent is None else 10)
    return Attempt(Planned(number, {"model.dropout": number / 10} if number else {}), f"a-{number:02d}", begun, ended)


def story() -> Sequence[Attempt]:
    return [
        made(0, score=200.0),
        made(1, 0, verdict="poisoned"),
        made(2, 0, score=63.25),
        made(3, 2, score=75.5),
        made(4, None, score=1024.0),
        made(5, 2, score=29.5),
        Attempt(Planned(6, {"model.dropout": 0.5}), "a-06", Begun(6, 0, 10)),
        Attempt(Planned(7, {"model.dropout": 0.7}), "a-07"),
        Attempt(Planned(8, {}), "a-08", same_as=0),
    ]


def test_tree_has_each_attempt_once_below_its_parent() -> None:
    found = nodes(story(), TARGET)
    assert [node.attempt.number for node in found] == [0, 1, 2, 3, 5, 6, 4, 7, 8]
    assert [node.depth for node in found] == [0, 1, 1, 2, 2, 1, 0, 0, 0]
    tones = {node.attempt.number: node.tone for node in found}
    assert tones == {
        0: "plain",
        1: "bad",
        2: "plain",
        3: "plain",
        4: "plain",
        5: "good",
        6: "plain",
        7: "faint",
        8: "faint",
    }
    assert {node.attempt.number: node.tone for node in nodes(story()[:4], TARGET)}[2] == "best"


def test_lines_of_a_terminal() -> None:
    assert [line for line, _ in lines(story(), TARGET)] == [
        "run         perplexity  step  tokens                changes",
        "a-00          200.0000    10   6,400  misses it     the base",
        "├─ a-01                   20   6,400  poisoned      model.dropout=0.1",
        "├─ a-02        63.2500    30   6,400  misses it     model.dropout=0.2",
        "│  ├─ a-03     75.5000    40   6,400  misses it     model.dropout=0.3",
        "│  └─ a-05     29.5000    60   6,400  reaches it    model.dropout=0.5",
        "└─ a-06                               under way     model.dropout=0.5",
        "a-04        1,024.0000    50   6,400  misses it     model.dropout=0.4",
        "a-07                                  not begun     model.dropout=0.7",
        "a-08                                  as attempt 0  nothing changed",
    ]


def test_plain_terminal_gets_ascii_alone() -> None:
    assert all(line.isascii() for line, _ in lines(story(), TARGET, plain=True))


def test_attempt_that_is_done_without_a_finite_score_says_so() -> None:
    assert "not finite" in lines([made(0)], TARGET)[1][0]


def rendered(verdict: str, message: str, attempts: Sequence[Attempt]) -> str:
    num_ended = sum(each.ended is not None for each in attempts)
    told = tuple(attempts), 6400 * num_ended, 90.0 * num_ended / 3600
    return tree_page.render(ExperimentResult("a", TARGET, verdict, message, *told, "experiments/a"))


def page() -> str:
    return rendered("reached", "a-05 reaches it", story())


def test_page_tells_every_attempt_and_its_figures() -> None:
    for attempt in story():
        assert page().count(f">{attempt.run}<") >= 2  # in the tree and in the table
    for told in (
        "a-05 reaches it.",
        "held_out.perplexity &lt;= 30",
        "29.5000",
        "held_out.loss",
        "6.4 k tokens",
        "1:30",  # of each
        "9:00",  # of the six that have ended
    ):
        assert told in page()
    assert page().count('class="edge"') == 5
    assert "{{" not in page()
    assert page() == page()


def test_page_needs_nothing_else_and_runs_nothing_of_a_name() -> None:
    evil = Attempt(
        Planned(1, {"model.args.x": "<script>alert(1)</script>"}), "a-01", ended=Ended(1, "failed", '"><img src=x>')
    )
    found = rendered("exhausted", "<b>none</b>", [made(0), evil])
    assert "<script>alert" not in found and "<img" not in found and "<b>none" not in found
    assert "http" not in found.replace("http-equiv", "")


def test_page_before_the_first_score_has_no_chart() -> None:
    under_way = [Attempt(Planned(0), "a-00", Begun(0))]
    found = rendered("running", "a-00 is under way", under_way)
    assert "<figure" not in found
    assert "under way" in found


PROBE = """<script>
addEventListener("load", () => {
  const svg = document.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 50, bubbles: true }));
  const search = document.getElementById("search");
  search.value = "poisoned";
  search.dispatchEvent(new Event("input"));
  const lines = document.querySelector(".tip").textContent.split("\\n").length;
  const shown = [...document.querySelectorAll("#news tr")].filter(row => !row.hidden).length;
  document.title = `lines=${lines};rows=${shown};wide=${document.documentElement.scrollWidth > innerWidth}`;
});
</script>"""


@pytest.mark.browser
def test_page_lives_in_a_browser(tmp_path: Path) -> None:
    """Scores are told under the pointer, attempts are found, and it is not wider than the window."""
    (tmp_path / "page.html").write_text(page() + PROBE)
    chromium = find_chromium()
    assert chromium is not None
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900",
               f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{tmp_path}/page.html"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] == "lines=3;rows=1;wide=false", done.stderr


def test_lineage_as_deep_as_a_plan_is_long_is_drawn_within_the_page() -> None:
    attempts = [made(number, number - 1 if number else None, score=100.0) for number in range(1_001)]
    found = nodes(attempts, TARGET)
    assert [node.depth for node in found] == list(range(1_001))
    page = rendered("exhausted", "none", attempts[:60])
    places = [float(x) for x in re.findall(r'circle cx="([\d.]+)"', page)]
    assert len(places) == 60 and places == sorted(set(places)) and places[-1] <= tree_page.WIDTH / 2
