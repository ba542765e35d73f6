"""Lineage: a fork knows all its ancestors, and never begins anew or behind the step that it was forked at."""

from __future__ import annotations

import json
from typing import Any

import pytest

from elastic_lm.checkpoint import registry
from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError
from elastic_lm.experiment.lineage import Lineage, Parent, WentBack
from elastic_lm.experiment.rewinds import Rewind, decide
from elastic_lm.experiment.spikes import Spike
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.checkpoint.saved import flip, parts_of
from tests.experiment.conftest import AT, STEPS
from tests.experiment.parents import address_of, contents, forget, forked, trained
from tests.runtime.test_restorable import search
from tests.solo import Solo

# -- what it names -----------------------------------------------------------------------------------------------------


def test_lineage_names_the_state_and_the_ancestors(parent: RunConfig) -> None:
    first = forked(parent, "first", step=AT, overrides=["optimizer.weight_decay=0.2"])
    trained(first.config, 6)
    second = forked(first.config, "second", step=6, skip=((8, 9),))
    lineage = Lineage.load(Storage.open(second.url))
    assert lineage is not None and lineage == second.lineage
    links = [(link.run, link.parent.name, link.parent.step, [str(c) for c in link.changes]) for link in lineage.chain()]
    assert links == [
        ("second", "first", 6, ["training.skip: [] -> [[8, 9]]"]),
        ("first", "parent", AT, ["optimizer.weight_decay: 0.1 -> 0.2"]),
    ]
    assert lineage.skip == ((8, 9),)
    told = {found.step: found.meta for found in registry.found(Storage.open(first.url))}
    assert lineage.parent.digest == told[6]["digest"]
    assert lineage.parent.fingerprint == told[6]["fingerprint"]
    assert lineage.parent.url == first.url


def test_lineage_may_be_as_deep_as_a_plan_is_long() -> None:
    link: Lineage | None = None
    sizes = []
    for number in range(1_000):
        told = Parent(f"file:///runs/r-{number}", f"r-{number}", number, {"state": "a" * 64}, "f" * 64, link)
        link = Lineage(f"r-{number + 1}", told, "f" * 64, skip=((3, 5),))
        sizes.append(len(link.to_json()) if number in (499, 999) else 0)
    assert link is not None and sizes[999] < 2.1 * sizes[499]
    again = Lineage.from_json(link.to_json())
    assert again.to_json() == link.to_json()
    assert [each.run for each in again.chain()] == [f"r-{number}" for number in range(1_000, 0, -1)]


def test_lineage_of_an_earlier_version_is_read() -> None:
    """In which each link held the one before it, and told no rewinds."""
    nested: dict[str, Any] | None = None
    for number in range(3):
        told = {
            "url": "file:///r",
            "name": f"r-{number}",
            "step": number,
            "digest": {},
            "fingerprint": "f",
            "lineage": nested,
        }
        nested = {"run": f"r-{number + 1}", "parent": told, "fingerprint": "f", "changes": [], "skip": [[number, 5]],
                  "time_s": 1.0, "versions": {}, "surgery": None}  # fmt: skip
    found = Lineage.from_json(json.dumps({"format": "elastic-lm lineage", "version": 1, **(nested or {})}).encode())
    assert [(each.run, each.parent.name, each.skip) for each in found.chain()] == [
        ("r-3", "r-2", ((2, 5),)), ("r-2", "r-1", ((1, 5),)), ("r-1", "r-0", ((0, 5),)),
    ]  # fmt: skip
    assert found.parent.rewinds == ()


def test_rewinds_of_the_parent_are_told_and_kept_also_where_the_state_is_older(parent: RunConfig) -> None:
    folder = Storage.open(parent.run_url)
    stored = address_of(parent).stored_config()
    chosen = stored.replace("checkpoint.every_steps=2", "spikes={policy: rewind, rewind_steps: 2, skip_batches: 6}")
    decide(folder, Rewind.of(Spike(8, 10, "loss", "the loss stands out"), chosen, number=1))
    made = forked(parent, step=AT)
    assert made.config.training.skip == ((6, 12),)
    assert made.lineage.parent.rewinds == (WentBack(1, "loss", 6, ((6, 12),)),)
    assert str(made.lineage.parent.rewinds[0]) == "rewind 1: back to step 6, leaving out batches 6:12 (loss)"
    trained(made.config)
    second = forked(made.config, "second", overrides=["training.steps=20"])
    assert [len(link.parent.rewinds) for link in second.lineage.chain()] == [0, 1]  # what its own parent made


def test_manifest_of_the_fork_is_of_its_own_identity(parent: RunConfig) -> None:
    made = forked(parent, step=AT, overrides=["training.seed=7"])
    (found,) = registry.found(Storage.open(made.url))
    assert (
        found.meta["fingerprint"]
        == made.config.identity_fingerprint()
        != address_of(parent).stored_config().identity_fingerprint()
    )
    assert RunConfig(**found.meta["config"]) == made.config == address_of(made.config).stored_config()


def test_damaged_lineage_is_told(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    Storage.open(made.url).write("lineage.json", b"{}")
    with pytest.raises(CheckpointError, match=r"lineage\.json cannot be read"):
        forked(made.config, "second")


# -- a beginning that is lost ------------------------------------------------------------------------------------------


def test_fork_whose_state_is_lost_does_not_begin_anew(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    folder = Storage.open(made.url)
    folder.delete(parts_of(folder, AT)[0])
    told = rf"is a fork of parent at step {AT}, and no checkpoint can be used: .* fork again: elastic-lm fork .*runs/parent@{AT} "
    with pytest.raises(
        CheckpointError, match=rf"{told}--name new, .*after deleting {folder.url}\. Passing over .* is not there"
    ):
        make_plan(made.config)
    forget(made.config, AT)
    with pytest.raises(CheckpointError, match=told):
        make_plan(made.config)
    folder.write("lineage.json", b"{}")
    with pytest.raises(CheckpointError, match=r"lineage\.json cannot be read"):
        make_plan(made.config)


def test_fork_does_not_go_on_from_a_state_that_is_older_than_its_parents(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    folder, kept = Storage.open(made.url), contents(made.url)
    for path in folder.list():
        folder.delete(path)
    trained_anew = Solo(made.config)
    trained_anew.train(until=2)
    folder.write("lineage.json", kept["lineage.json"])
    with pytest.raises(CheckpointError, match=r"the newest checkpoint is of step 2"):
        make_plan(made.config)


def test_fork_that_has_trained_needs_its_beginning_no_more(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    trained(made.config, 6)
    forget(made.config, AT)
    assert make_plan(made.config).resume_step == STEPS
    Storage.open(made.url).write("lineage.json", b"{}")
    assert make_plan(made.config).resume_step == STEPS


def test_search_for_a_state_ends_where_a_fork_has_none(parent: RunConfig) -> None:
    made = forked(parent, step=AT)
    folder = Storage.open(made.url)
    flip(folder, parts_of(folder, AT)[1])
    assert make_plan(made.config).resume_step == AT  # which reads no parts
    verdict, error = search(folder)
    assert verdict == "failed"
    assert f"is a fork of parent at step {AT}, and no checkpoint can be used" in error and "is damaged" in error


def test_fork_that_lost_its_first_state_still_begins_where_it_did(parent: RunConfig) -> None:
    """Whoever takes it over with its workers must not send it back behind that step."""
    made = forked(parent, step=AT)
    for path in Storage.open(made.url).list("checkpoints/"):
        Storage.open(made.url).delete(path)
    plan = make_plan(made.config, may_be_held=True)
    assert plan.problem is not None and (plan.resume_step, plan.begins_at) == (None, AT)
