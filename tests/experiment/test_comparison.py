"""Two runs side by side: how they are related, where they part, what differs; as words, for programs, and as a page."""

from __future__ import annotations

import html
import json
import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.experiment import comparison_page
from elastic_lm.experiment.comparison import Comparison, Side
from elastic_lm.experiment.evaluations import Measured
from elastic_lm.experiment.portrait import Portrait
from elastic_lm.monitor.ancestors import Ancestors, Fork
from elastic_lm.monitor.chart import duration
from elastic_lm.storage import Storage
from tests.conftest import find_chromium
from tests.experiment.parents import address_of, forked, trained
from tests.monitor.test_report import Balance
from tests.solo import Solo, solo_config

AT, STEPS = 4, 10


@pytest.fixture(scope="module")
def parent(small_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = solo_config(small_corpus, f"file://{tmp_path_factory.mktemp('compared')}", "parent", steps=STEPS)
    trained(config, AT, 6)
    return config


@pytest.fixture(scope="module")
def child(parent: RunConfig) -> RunConfig:
    made = forked(
        parent, "child", step=AT, overrides=["optimizer.learning_rate=1e-3", "checkpoint.keep=5"], skip=((8, 9),)
    )
    Solo(made.config).train(until=8)
    Solo(made.config).train()
    folder = Storage.open(made.url)
    told = {"task": "held_out", "step": 10, "metrics": {"loss": {"value": 2.5, "low": 2.4, "high": 2.6}}}
    folder.write("evaluations/step-00000010/held_out.json", json.dumps(told).encode())
    return made.config


@pytest.fixture(scope="module")
def grandchild(child: RunConfig) -> RunConfig:
    made = forked(child, "grandchild", step=8)
    Solo(made.config).train()
    return made.config


def compared(a: RunConfig, b: RunConfig) -> Comparison:
    return Comparison.of(address_of(a), address_of(b))


def test_fork_and_parent_part_where_they_were_forked(parent: RunConfig, child: RunConfig) -> None:
    found = compared(parent, child)
    assert found.relation == (
        "child is a fork of parent at step 4. Steps 0 to 3 were trained once for both, by parent. The 6 steps that were trained "
        "for each (4 to 9) differ from the first on."
    )
    assert [(change.name, change.identity) for change in found.differences] == [
        ("optimizer.learning_rate", True), ("training.skip", True), ("checkpoint.keep", False),
    ]  # fmt: skip
    figures = {name: (a, b) for name, a, b in found.figures}
    assert figures["steps"] == ("10 of 10", "10 of 10")
    assert figures["from"] == ("–", "parent at step 4")
    assert figures["state"] == ("done", "done")


def test_runs_that_part_later_are_told_where(parent: RunConfig) -> None:
    made = forked(parent, "later", step=AT, skip=((7, 8),))
    Solo(made.config).train()
    assert compared(parent, made.config).relation == (
        "later is a fork of parent at step 4. Steps 0 to 3 were trained once for both, by parent. Of 6 steps that were trained "
        "for each (4 to 9) the first 3 came out the same, bit for bit; they part at step 7."
    )


def test_runs_with_the_same_bits_are_told_so(child: RunConfig, grandchild: RunConfig) -> None:
    found = compared(child, grandchild)
    assert found.differences == ()
    assert found.relation == (
        "grandchild is a fork of child at step 8. Steps 0 to 7 were trained once for both, by parent and child. All 2 steps that "
        "were trained for each (8 to 9) came out the same, bit for bit."
    )


def test_kinship_is_found_over_generations_and_by_a_common_parent(
    parent: RunConfig, child: RunConfig, grandchild: RunConfig
) -> None:
    assert "grandchild is a fork, 2 generations on, of parent at step 4." in compared(grandchild, parent).relation
    other = forked(parent, "other", step=AT)
    told = "Both are from parent, at step 4. Steps 0 to 3 were trained once for both, by parent."
    assert compared(grandchild, other.config).relation == told
    Solo(other.config).train(until=6)
    found = compared(grandchild, other.config)  # whose steps 4 to 7 are in child's log
    assert (found.shared, found.common, found.first_difference) == ([0, 1, 2, 3], [4, 5], 4)


def test_figures_are_of_the_run_alone(parent: RunConfig, grandchild: RunConfig) -> None:
    found = compared(parent, grandchild)
    assert list(found.b.line) == list(range(STEPS)) and list(found.b.records) == [8, 9]
    figures = {name: (a, b) for name, a, b in found.figures}
    batch = parent.batch.tokens
    assert figures["tokens"] == (f"{10 * batch:,}", f"{2 * batch:,}")
    assert figures["tokens with ancestors"] == ("–", f"{10 * batch:,}")
    own = [found.b.records[step]["loss"] for step in (8, 9)]
    assert figures["lowest loss"][1] == f"{min(own):.4f}"
    assert figures["mean loss"][1] == f"{sum(own) / 2:.4f}, last 2 steps"
    seconds = found.b.history.ended_s - found.b.history.began_s
    assert figures["time"][1] == duration(seconds)


def test_what_the_parent_gave_up_after_the_fork_was_not_trained_for_both(parent: RunConfig, child: RunConfig) -> None:
    found = compared(parent, child)
    other = {"loss": 1.0, "step_s": 9.0}
    now = with_records(found.a, s2=other, s3=other)  # it went back to step 2
    assert (Comparison(now, found.b).shared, Comparison(now, found.b).first_difference) == ([0, 1], 2)
    again = with_records(found.a, s2={"step_s": 9.0}, s3={"step_s": 9.0})  # or came to the same a second time
    assert (Comparison(again, found.b).shared, Comparison(again, found.b).first_difference) == ([0, 1], 4)


def test_fork_without_its_parent_is_compared_by_what_it_has(parent: RunConfig, grandchild: RunConfig) -> None:
    found = compared(parent, grandchild)
    gone = replace(
        found.b, ancestors=replace(found.b.ancestors, stretches=(), lacks="The steps before 8 are not shown.")
    )
    alone = Comparison(found.a, gone)
    assert alone.lacks == ["grandchild: The steps before 8 are not shown."]
    assert (alone.shared, alone.common) == ([], [8, 9])
    assert {name: b for name, _, b in alone.figures}["tokens with ancestors"] == "unknown"
    rendered = comparison_page.render(alone)
    assert "grandchild: The steps before 8 are not shown." in rendered and "before" not in keys(rendered)


def test_comparison_tells_programs_the_same(parent: RunConfig, child: RunConfig) -> None:
    told = json.loads(json.dumps(compared(parent, child).as_json()))
    assert (told["steps_in_common"], told["first_difference"]) == (6, 4)
    assert told["differences"][0] == {"name": "optimizer.learning_rate", "a": 3e-4, "b": 1e-3, "identity": True}
    assert told["evaluations"] == [
        {"step": 10, "task": "held_out", "task_hash": "", "metric": "loss", "a": None, "b": 2.5}
    ]


def test_figures_of_other_tasks_do_not_stand_beside_each_other(parent: RunConfig, child: RunConfig) -> None:
    found = compared(parent, child)
    few, all_ = "f" * 64, "a" * 64
    a = replace(found.a, measured=(Measured(10, "held_out", "loss", 2.0, task_hash=few), Measured(10, "own", "x", 1.0)))
    of_b = Measured(10, "held_out", "loss", 3.0, task_hash=all_), Measured(10, "held_out", "loss", 4.0, task_hash=few)
    told = Comparison(a, replace(found.b, measured=(*of_b, Measured(10, "own", "x", 2.0))))
    assert [(task, a and a.value, b and b.value) for _, task, _, a, b in told.measured] == [
        ("held_out (aaaaaaaa)", None, 3.0), ("held_out (ffffffff)", 2.0, 4.0), ("own", 1.0, 2.0),
    ]  # fmt: skip


def test_portrait_has_all_that_is_known_of_a_run(grandchild: RunConfig, child: RunConfig, parent: RunConfig) -> None:
    portrait = Portrait.of(address_of(grandchild))
    assert (portrait.listed.state, portrait.message) == ("done", "run_finished happened.")
    assert portrait.lineage is not None and [link.run for link in portrait.lineage.chain()] == ["grandchild", "child"]
    assert [found.step for found in portrait.checkpoints] == [8, 10]
    curve = [(each.name, each.start, each.stop, len(each.losses)) for each in portrait.curve]
    assert curve == [("parent", 0, 4, 4), ("child", 4, 8, 4), ("grandchild", 8, 10, 2)]
    assert Portrait.of(address_of(parent)).curve == ()
    told = json.loads(json.dumps(portrait.as_json()))
    first = portrait.curve[0].losses[0]
    assert told["curve"][0] == {"run": "parent", "url": f"{parent.run_url}", "start": 0, "stop": 4, "first_loss": first,
                                "last_loss": portrait.curve[0].losses[-1], "tokens": 4 * parent.batch.tokens}  # fmt: skip
    assert told["curve_lacks"] is None
    assert [link["parent"]["name"] for link in told["lineage"]["ancestors"]] == ["parent"]
    assert told["identity"]["optimizer.learning_rate"] == 1e-3
    assert json.loads(json.dumps(Portrait.of(address_of(child)).as_json()))["evaluations"][0]["value"] == 2.5


def with_records(side: Side, **changed: dict[str, object]) -> Side:
    """The same run with other fields in some steps: `s4` is step 4."""
    points = [replace(p, fields={**p.fields, **changed.get(f"s{p.step}", {})}) for p in side.history.points]
    return replace(side, history=replace(side.history, points=points))


def test_steps_that_were_left_out_do_not_count(parent: RunConfig) -> None:
    side = compared(parent, parent).a
    plain = side.figures()
    left_out = with_records(side, s4={"refused": 3, "loss": math.nan}, s6={"refused": 1, "loss": -99.0})
    kept = [fields["loss"] for step, fields in side.records.items() if step not in (4, 6)]
    figures = left_out.figures()
    assert figures["lowest loss"] == f"{min(kept):.4f}"
    assert figures["mean loss"] == f"{sum(kept) / len(kept):.4f}, last 8 steps"
    assert (figures["left out"], figures["steps"]) == ("2 steps", plain["steps"])
    last = with_records(side, s9={"refused": 3, "loss": math.nan}).figures()
    assert last["loss"] == f"{side.records[8]['loss']:.4f}"
    found = Comparison(left_out, replace(side, url="file:///another"))
    lines = [*comparison_page._lines(found, "loss"), *comparison_page._difference(found, 1)]
    assert [len(line.xs) for line in lines] == [8, 10, 8]
    nothing = with_records(side, **{f"s{step}": {"refused": 1} for step in range(STEPS)})
    assert "loss" not in nothing.figures() and comparison_page.render(Comparison(nothing, side))


def test_what_is_no_number_in_both_is_the_same(parent: RunConfig) -> None:
    side = compared(parent, parent).a
    odd = {"refused": 1, "loss": math.nan}
    assert (
        Comparison(
            with_records(side, s4=dict(odd)), with_records(side, s4={**odd, "loss": float("nan")})
        ).first_difference
        is None
    )
    assert Comparison(with_records(side, s4=odd), side).first_difference == 4


def test_one_value_that_is_not_finite_spoils_the_means_around_it_no_more_than_it_must() -> None:
    assert comparison_page._means([1.0, 2.0, math.nan, 4.0, math.inf, 6.0], 3) == [1.5, 1.5, 3.0, 4.0, 5.0, 6.0]
    assert all(map(math.isnan, comparison_page._means([math.nan] * 3, 3)))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_page_shows_both_runs(parent: RunConfig, child: RunConfig) -> None:
    rendered = comparison_page.render(compared(parent, child))
    text = html.unescape(re.sub(r"<[^>]+>", " ", rendered))
    for told in ("parent and child", "two runs compared", "a fork of parent at step 4", "optimizer.learning_rate", "0.001",
                 "step 10 · held_out · loss", "2.5 [2.4, 2.6]", "It began at step 0",
                 "child was forked here"):  # fmt: skip
        assert told in text, told
    assert rendered.count("<figure") == 6
    balance = Balance()
    balance.feed(rendered)
    assert (balance.wrong, balance.open) == ([], [])
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", rendered)
    assert "{{" not in rendered


def keys(rendered: str) -> dict[str, list[str]]:
    """(kind, name) of each line in the legends, by the title of the chart."""
    charts = re.findall(r"<figcaption>([^<]*) <small>(.*?)</small>", rendered)
    return {html.unescape(title): re.findall(r'class="key ([^"]*)">([^<]*)<', legend) for title, legend in charts}


def test_what_ancestors_have_trained_is_dashed_and_what_both_have_is_drawn_once(
    parent: RunConfig, child: RunConfig, grandchild: RunConfig
) -> None:
    loss = keys(comparison_page.render(compared(parent, grandchild)))["Loss"]
    assert loss == [("c1", "parent"), ("c2", "grandchild"), ("c2 before", "grandchild, before")]
    other = forked(parent, "another", step=6)
    Solo(other.config).train()
    rendered = comparison_page.render(compared(grandchild, other.config))
    dashed = [("c1 before", "grandchild, before"), ("c2 before", "another, before"), ("plain before", "both, before")]
    told = keys(rendered)
    assert told["Loss"] == [("c1", "grandchild"), ("c2", "another"), *dashed] == told["Learning rate"]
    lines = {line.name: list(line.xs) for line in comparison_page._lines(compared(grandchild, other.config), "loss")}
    assert lines["both, before"] == [0, 1, 2, 3]
    assert (lines["grandchild, before"], lines["another, before"]) == ([4, 5, 6, 7], [4, 5])
    assert told["Loss of the steps that were trained for each"] == [("c1", "grandchild"), ("c2", "another")]
    marks = re.findall(r"<title>(.*? was forked .*?)</title>", rendered)
    assert list(dict.fromkeys(marks)) == [
        "child was forked here from parent",
        "grandchild was forked here from child",
        "another was forked here from parent",
    ]


def test_names_cannot_become_markup(parent: RunConfig, child: RunConfig) -> None:
    found = compared(parent, child)
    evil = "<script>alert(1)</script>"
    fork = Fork(evil, evil, 4)
    stretch = replace(found.b.ancestors.stretches[0], name=evil)
    from_evil = replace(found.b, ancestors=Ancestors((fork,), (stretch,), evil))
    rendered = comparison_page.render(Comparison(replace(found.a, name=evil, url=evil), from_evil))
    assert evil not in rendered and html.escape(evil) in rendered


def test_runs_that_have_not_begun_have_a_page(parent: RunConfig) -> None:
    one, two = forked(parent, "one", step=AT), forked(parent, "two", step=AT)
    assert (
        comparison_page.render(compared(one.config, two.config)).count("Nothing yet") == 2
    )  # the difference, and tokens per second


def test_long_runs_are_smoothed_and_make_a_small_page(parent: RunConfig) -> None:
    found = compared(parent, parent)
    point = found.a.history.points[-1]
    found.a.history.points[:] = [replace(point, step=step, time_s=float(step)) for step in range(50_000)]
    rendered = comparison_page.render(Comparison(replace(found.a), found.b))
    assert "mean of 1000" in rendered
    assert 'class="key c1 raw"' in rendered
    assert len(rendered) < 1_500_000


PROBE = """<script>
addEventListener("load", () => {
  const svg = document.querySelector("figure.chart svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20 }));
  const search = document.getElementById("search"); search.value = "learning";
  search.dispatchEvent(new Event("input"));
  const lines = document.querySelector(".tip").textContent.split("\\n").length;
  const shown = [...document.querySelectorAll("#news tr")].filter(row => !row.hidden).length;
  document.title = `lines=${lines};rows=${shown};wide=${document.documentElement.scrollWidth > innerWidth}`;
});
</script>"""


@pytest.mark.browser
def test_page_lives_in_a_browser(parent: RunConfig, child: RunConfig, tmp_path: Path) -> None:
    """Both values are told under the pointer, fields are found, and it is not wider than the window."""
    file = tmp_path / "comparison.html"
    file.write_text(comparison_page.render(compared(parent, child)) + PROBE)
    chromium = find_chromium()
    assert chromium is not None
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900",
               f"--user-data-dir={tmp_path}/profile", "--dump-dom", f"file://{file}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None and title[1] == "lines=2;rows=1;wide=false", done.stderr
