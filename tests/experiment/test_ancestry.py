"""What a fork's curve has of its ancestors: what lies on its line alone, or a sentence that it is not known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.events.log import EventLog
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment import ancestry
from elastic_lm.experiment.lineage import Lineage, Parent, WentBack
from elastic_lm.experiment.rewinds import with_skip
from elastic_lm.monitor.ancestors import NONE, Ancestors
from elastic_lm.storage import Storage
from tests.experiment.gone_back import decided
from tests.experiment.parents import forked
from tests.monitor.story import at, committed, evaluated, rewound
from tests.solo import Solo, solo_config

OTHER = "no attempt in the one in {url} has the config that was forked: it may be another run's by now."
WITHOUT_A_LOSS = {name: value for name, value in committed(1, 0).fields.items() if name not in ("loss", "step")}


@pytest.fixture
def config(tmp_path: Any) -> RunConfig:
    return solo_config(f"{tmp_path}/tokens", f"file://{tmp_path}", "parent", steps=100)


def begun(config: RunConfig) -> Event:
    return at(0, EventKind.RUN_STARTED, config=config.model_dump(mode="json"), resume_step=None)


def steps(start: int, stop: int, loss: float, **more: Any) -> list[Event]:
    return [committed(1 + step, step, loss=loss, **more) for step in range(start, stop)]


def store(config: RunConfig, *events: Event) -> None:
    log = EventLog(Storage.open(config.run_url).child("events"))
    for event in events:
        log.append(event)
    assert log.close()


def fork_of(config: RunConfig, step: int, run: str = "fork", lineage: Lineage | None = None) -> Lineage:
    parent = Parent(config.run_url, config.name, step, {}, config.identity_fingerprint(), lineage)
    return Lineage(run, parent, "f" * 64)


def losses(found: Ancestors) -> list[tuple[int, float]]:
    return [(point.step, point.fields["loss"]) for point in found.points()]


def test_run_that_is_no_fork_has_none() -> None:
    assert ancestry.of(None) == NONE


def test_parent_counts_up_to_the_fork(config: RunConfig) -> None:
    store(config, begun(config), *steps(0, 3, 2.0), evaluated(9, 2), *steps(3, 6, 2.0), evaluated(9, 5))
    found = ancestry.of(fork_of(config, 4))
    assert losses(found) == [(step, 2.0) for step in range(4)]
    assert [score.step for score in found.stretches[0].scores] == [2]
    assert (found.stretches[0].start, found.stretches[0].stop, found.lacks) == (0, 4, None)
    assert [str(fork) for fork in found.forks] == ["fork was forked here from parent"]


def test_every_generation_counts_from_its_own_fork_on(config: RunConfig) -> None:
    child, grandchild = (config.replace(f"name={name}") for name in ("child", "grandchild"))
    store(config, begun(config), *steps(0, 9, 2.0))
    store(child, begun(child), *steps(4, 9, 3.0))
    first = fork_of(config, 4, "child")
    second = fork_of(child, 6, "grandchild", first)
    found = ancestry.of(fork_of(grandchild, 6, lineage=second))  # forked as it began, with no log of its own
    assert losses(found) == [*((step, 2.0) for step in range(4)), (4, 3.0), (5, 3.0)]
    assert [(each.name, each.start, each.stop) for each in found.stretches] == [("parent", 0, 4), ("child", 4, 6)]
    assert [(fork.run, fork.step) for fork in found.forks] == [("child", 4), ("grandchild", 6), ("fork", 6)]
    assert found.lacks is None


def went_back(config: RunConfig) -> tuple[RunConfig, list[Event]]:
    """(as it is from then on, its whole log): to step 3 from step 8."""
    after = with_skip(config, ((3, 5),))
    return after, [
        begun(config), *steps(0, 8, 2.0), evaluated(9, 6), begun(after), rewound(20, 3), *steps(3, 9, 1.0), evaluated(9, 6),
    ]  # fmt: skip


def test_what_a_parent_gave_up_before_the_fork_counts_nowhere(config: RunConfig) -> None:
    after, events = went_back(config)
    store(config, *events)
    assert losses(ancestry.of(fork_of(after, 7))) == [
        (0, 2.0),
        (1, 2.0),
        (2, 2.0),
        (3, 1.0),
        (4, 1.0),
        (5, 1.0),
        (6, 1.0),
    ]


def test_what_a_parent_gave_up_after_the_fork_is_still_the_forks(config: RunConfig) -> None:
    _, events = went_back(config)
    store(config, *events)
    found = ancestry.of(fork_of(config, 7))
    assert losses(found) == [(step, 2.0) for step in range(7)]
    assert [score.step for score in found.stretches[0].scores] == [6]


@pytest.mark.parametrize(("step", "counts"), [(2, True), (3, True), (4, False)])
def test_attempt_before_a_rewind_counts_where_the_fork_is_from_no_later_step(
    step: int, counts: bool, config: RunConfig
) -> None:
    """The parent has decided it, and was not begun again since."""
    after, events = went_back(config)
    store(config, *events[:10])
    link = fork_of(after, step)
    found = ancestry.of(replace(link, parent=replace(link.parent, rewinds=(WentBack(1, "loss", 3, ((3, 5),)),))))
    assert losses(found) == ([(at_step, 2.0) for at_step in range(step)] if counts else [])
    assert (found.lacks is None) == counts


def test_curve_of_a_fork_of_a_run_that_is_to_go_back_is_whole(small_corpus: str, tmp_path: Path) -> None:
    parent = decided(small_corpus, f"file://{tmp_path}")
    made = forked(parent)
    assert made.config.training.skip == ((2, 6),)
    before = ancestry.of_run(Storage.open(made.url))
    assert (before.lacks, [point.step for point in before.points()]) == (None, [0, 1])
    folder = Storage.open(parent.run_url)
    for path in folder.list(folder_of(4)):  # as who takes the run up does
        folder.delete(path)
    Solo(parent).train(4)
    assert ancestry.of_run(Storage.open(made.url)) == before


def test_step_that_was_trained_again_counts_once(config: RunConfig) -> None:
    store(config, begun(config), *steps(0, 5, 2.0), begun(config), *steps(2, 5, 2.0, attempt=2))
    assert losses(ancestry.of(fork_of(config, 5))) == [(step, 2.0) for step in range(5)]


@pytest.mark.parametrize(
    ("events", "told"),
    [
        ([], "there is none in {url} any more; it was deleted or moved."),
        (
            ["another", *steps(0, 9, 2.0)],
            OTHER,
        ),
        (
            ["ours", at(1, EventKind.STEP_COMMITTED, step=0, **WITHOUT_A_LOSS)],
            "that cannot be understood: KeyError: 'loss'.",
        ),
        ([at(0, EventKind.RUN_STARTED)], "that cannot be understood: KeyError: 'config'."),
        (
            [at(0, EventKind.RUN_STARTED, config={"of": "another version"})],
            OTHER,
        ),
    ],
)
def test_parent_that_is_not_known_is_told(events: Sequence[Any], told: str, config: RunConfig) -> None:
    """And what is behind it is not shown, since that would not be one curve."""
    known = {"ours": begun(config), "another": begun(config.replace("training.seed=9"))}
    if events:
        store(config, *(known.get(event, event) if isinstance(event, str) else event for event in events))
    grandparent = config.replace("name=grandparent")
    store(grandparent, begun(grandparent), *steps(0, 9, 2.0))
    found = ancestry.of(fork_of(config, 4, lineage=fork_of(grandparent, 2, "parent")))
    assert found.stretches == ()
    assert found.lacks == (
        f"The steps before 4 are not shown: they are in the log of parent, and {told.format(url=config.run_url)}"
    )
    assert [fork.step for fork in found.forks] == [2, 4]


def test_generations_up_to_the_one_that_is_not_known_are_shown(config: RunConfig) -> None:
    store(config, begun(config), *steps(2, 9, 2.0))
    found = ancestry.of(fork_of(config, 4, lineage=fork_of(config.replace("name=gone"), 2, "parent")))
    assert losses(found) == [(2, 2.0), (3, 2.0)]
    assert found.lacks is not None and found.lacks.startswith(
        "The steps before 2 are not shown: they are in the log of gone"
    )


@pytest.mark.parametrize("url", ["s3://bucket/runs/parent", "gopher://there/runs/parent"])
def test_store_that_does_not_answer_is_told(url: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(ancestry, "DEADLINE_S", 0.2)
    link = fork_of(config, 4)
    found = ancestry.of(replace(link, parent=replace(link.parent, url=url)))
    assert found.stretches == ()
    assert found.lacks is not None and "and that cannot be read: " in found.lacks


def test_damaged_lineage_is_told_and_costs_nothing_else(config: RunConfig) -> None:
    folder = Storage.open(config.run_url)
    assert ancestry.of_run(folder) == NONE
    folder.write("lineage.json", b"{")
    found = ancestry.of_run(folder)
    assert found.lacks is not None and found.lacks.startswith("Where it is from is not known: ")
    assert (found.forks, found.stretches) == ((), ())
