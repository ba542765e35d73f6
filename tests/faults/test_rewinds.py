"""Loss spikes: a bad stretch of text is found, gone back from and left out, whoever dies meanwhile; and always the same bits.

The oracle is the run that has left the same batches out from its beginning.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import Manifest as CheckpointManifest
from elastic_lm.checkpoint.registry import CheckpointInfo
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.events.types import EventKind
from elastic_lm.experiment import ancestry
from elastic_lm.experiment.fork import Request, fork
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.monitor.history import History
from elastic_lm.run import Run as RunFolder
from elastic_lm.run_address import RunAddress
from elastic_lm.runtime import publisher
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from elastic_lm.runtime.publisher import Publisher
from elastic_lm.storage import Storage
from tests.data.corpora import with_noise
from tests.faults.harness import WAIT_S, HostedRun, Run, make_config, processes_titled
from tests.faults.oracle import undisturbed

pytestmark = pytest.mark.ray

STEPS, BAD = 110, range(60, 66)  # batches
CHANGES: dict[str, Any] = {
    "optimizer": {"learning_rate": 1e-2},
    "batch": {"micro_batches": 4, "micro_batch_size": 2, "sequence_length": 32},
    "checkpoint": {"every_steps": 10, "keep": 3},
    "spikes": {"policy": "rewind", "window_steps": 30, "rewind_steps": 8, "skip_batches": 24},
    "workers": {"min": 2, "max": 2},
}


@pytest.fixture(scope="module")
def noisy(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The corpus with noise in the place of the text of a few batches."""
    config = make_config(corpus, "file:///nowhere", "any", steps=STEPS, **CHANGES)
    return with_noise(corpus, tmp_path_factory.mktemp("noisy"), config, BAD)


def final_steps(run: Run) -> tuple[Any, ...]:
    """What the log says of every step, in order, without those that were given up."""
    points = History.of(run.events()).points
    names = ("step", "loss", "num_targets", "grad_norm", "sample_hash", "learning_rate")
    return tuple(tuple(point.fields[name] for name in names) for point in points)


def assert_rewound(run: Run, digest: str, num_rewinds: int = 1) -> RunConfig:
    """As one that has left these batches out from the beginning.    Returns: its config then."""
    stored = RunAddress.at(run.config.run_url).stored_config()
    expected, steps = undisturbed(stored)
    assert final_steps(run) == steps
    assert digest == expected
    made = Rewinds.load(Storage.open(run.config.run_url))
    assert len(made) == num_rewinds == run.count(EventKind.REWOUND)
    assert stored.training.skip == made.made[-1].after
    assert not run.count(EventKind.STEP_MISMATCH)
    return stored


def test_bad_stretch_is_found_and_left_out(
    cluster: LocalCluster, start: Callable[..., Run], noisy: str, corpus: str
) -> None:
    data = {"reader_timeout_s": 10.0}
    run = start(steps=STEPS, tokens=noisy, evaluation={"every": 20, "samples": 8}, data=data, **CHANGES)

    def all_readers() -> list[int]:
        found = processes_titled(cluster, "ray::Reader")
        return found if len(found) == run.config.data.readers else []

    readers = wait_for(all_readers, timeout_s=WAIT_S, what="all readers")
    run.await_status(lambda status: status["num_rewinds"] and status["step"] >= 70, "steps behind the rewind")
    assert processes_titled(cluster, "ray::Reader") == readers
    result = run.result()
    assert (result.verdict, result.last_step) == ("done", STEPS)
    stored = assert_rewound(run, result.digest["state"])
    without_noise = run.config.replace(f"data.tokens={corpus}")
    (rewind,) = Rewinds.load(Storage.open(run.config.run_url))
    assert rewind.first_step in (60, 61) and rewind.cause == "loss"
    assert stored.training.skip == ((rewind.to_step, rewind.to_step + 24),)
    assert rewind.to_step == rewind.first_step - 8
    # In the end as good as if the noise had never been there, but for the chance of other batches: four standard errors.
    clean, mine = ([step[1] for step in steps[-30:]] for steps in (undisturbed(without_noise)[1], final_steps(run)))
    error = math.sqrt((statistics.variance(clean) + statistics.variance(mine)) / 30)
    assert abs(statistics.mean(mine) - statistics.mean(clean)) < 4 * error
    # By the same workers.
    assert run.count(EventKind.MEMBER_STARTED) == run.count(EventKind.MEMBER_RETURNED) == 2
    # What is told of it afterwards.
    (told,) = [event for event in run.events() if event.kind is EventKind.REWOUND]
    assert (told.step, told.fields["left_out"]) == (rewind.to_step, [[rewind.to_step, rewind.to_step + 24]])
    assert told.fields["num_steps"] >= rewind.last_step + 1 - rewind.to_step
    folder = RunFolder.open(run.config.run_url)
    assert folder.metrics()["step"].to_pylist() == list(range(STEPS))
    saved = [event.step for event in run.events() if event.kind is EventKind.CHECKPOINT_SAVED and event.attempt > 1]
    assert [found.step for found in registry.found(folder.address.folder())] == saved[-3:]


def test_run_with_no_state_to_go_back_to_ends_where_it_is(start: Callable[..., Run], noisy: str) -> None:
    """Its policy was another one while it trained, and its old checkpoints are gone: what it has learned is not given up."""
    changes = {**CHANGES, "schedule": {"warmup_steps": 5, "total_steps": STEPS}}
    careless = {
        **changes,
        "spikes": {**CHANGES["spikes"], "policy": "ignore"},
        "checkpoint": {"every_steps": 10, "keep": 1},
    }
    assert start(steps=58, tokens=noisy, name="no-way-back", **careless).result().last_step == 58
    run = start(steps=STEPS, tokens=noisy, name="no-way-back", **changes)
    result = run.result()
    assert result.verdict == "spiked"
    assert "The run cannot go back: there is no checkpoint of step 5" in result.message
    folder = Storage.open(run.config.run_url)
    assert not Rewinds.load(folder)
    newest = registry.newest_complete(folder)
    assert newest is not None and newest.step == result.last_step >= 58
    notes = [event.message for event in run.events() if event.kind is EventKind.NOTE]
    assert any(
        "No checkpoint is old enough to go back to: a spike that begins before step 66 ends" in note for note in notes
    )
    last = run.events()[-1]
    assert (last.kind, last.fields["verdict"]) == (EventKind.RUN_FINISHED, "spiked")
    # Whoever lets it train through gets what the careless policy comes to.
    again = start(steps=STEPS, tokens=noisy, name="no-way-back", **careless)
    done = again.result()
    assert done.verdict == "done"
    assert done.digest["state"] == undisturbed(again.config)[0]


@pytest.mark.parametrize(
    "failpoints",
    [
        pytest.param(["c1:coordinator.rewind@*=kill"], marks=pytest.mark.thorough),
        ["c1:coordinator.rewound@*=kill"],
        pytest.param(["c1:coordinator.rewind@*=freeze"], marks=pytest.mark.thorough),
        pytest.param(["c1:coordinator.rewound@*=freeze"], marks=pytest.mark.thorough),
    ],
    ids="+".join,
)
def test_coordinator_that_dies_on_the_way_back_changes_nothing(
    failpoints: list[str], start: Callable[..., Run], noisy: str
) -> None:
    run = start(steps=80, tokens=noisy, kind=HostedRun, failpoints=failpoints, **CHANGES)
    assert isinstance(run, HostedRun)
    if failpoints[0].endswith("freeze"):
        run.await_frozen(1)
    result = run.result()
    assert (result.verdict, result.last_step) == ("done", 80)
    assert_rewound(run, result.digest["state"])
    assert run.count(EventKind.MEMBER_STARTED) == 2


@pytest.mark.thorough
def test_coordinator_that_dies_behind_the_rewind_leaves_the_workers_what_they_hold_by_then(
    start: Callable[..., Run], noisy: str
) -> None:
    run = start(steps=300, tokens=noisy, kind=HostedRun, **CHANGES)
    assert isinstance(run, HostedRun)
    run.await_logged(EventKind.MEMBER_RETURNED, 2)
    run.await_status(lambda status: status["num_rewinds"] and status["step"] >= 62, "steps behind the rewind")
    os.kill(run.coordinator_pid(), signal.SIGKILL)
    result = run.result()
    assert (result.verdict, result.last_step) == ("done", 300)
    assert_rewound(run, result.digest["state"])
    returned = [event.fields["whole"] for event in run.events() if event.kind is EventKind.MEMBER_RETURNED]
    assert returned == [False, False, True, True]
    assert run.count(EventKind.MEMBER_STARTED) == 2


@pytest.mark.thorough
def test_worker_that_is_frozen_while_the_run_goes_back_commits_nothing_when_it_thaws(
    start: Callable[..., Run], noisy: str
) -> None:
    run = start(steps=90, tokens=noisy, **CHANGES)
    status = run.await_step(56)
    pid = next(member["pid"] for member in status["members"].values() if member["pid"])
    os.kill(pid, signal.SIGSTOP)

    def thaw() -> None:
        with contextlib.suppress(ProcessLookupError):  # it was given up, and ended
            os.kill(pid, signal.SIGCONT)

    thawing = threading.Timer(3.0, thaw)
    thawing.start()
    result = run.result()
    thawing.join()
    assert (result.verdict, result.last_step) == ("done", 90)
    assert_rewound(run, result.digest["state"])


@pytest.mark.thorough
def test_everybody_dies_after_the_rewind(start: Callable[..., Run], noisy: str) -> None:
    run = start(steps=80, tokens=noisy, kind=HostedRun, **CHANGES)
    run.await_status(lambda status: run.count(EventKind.REWOUND), "a rewind")
    status = run.await_status(lambda status: status["world_size"] == 2 and status["step"] >= 56, "somebody who trains")
    for pid in [status["coordinator"]["pid"], *(member["pid"] for member in status["members"].values())]:
        if pid:
            os.kill(pid, signal.SIGKILL)
    result = run.result()
    assert (result.verdict, result.last_step) == ("done", 80)
    assert_rewound(run, result.digest["state"])


@pytest.mark.thorough
def test_spike_stops_a_run_that_is_not_to_go_back(start: Callable[..., Run], noisy: str) -> None:
    short = {**CHANGES, "spikes": {**CHANGES["spikes"], "policy": "stop"}}
    run = start(steps=80, tokens=noisy, **short)
    result = run.result()
    assert result.verdict == "spiked"
    assert "the loss stands out in steps 6" in result.message
    assert f"elastic-lm fork {run.config.run_url}@STEP --name {run.config.name}-2 --skip 5" in result.message
    assert run.count(EventKind.REWOUND) == 0


def test_run_that_a_spike_has_ended_is_not_trained_on_by_a_successor_until_that_is_accepted(
    start: Callable[..., Run], noisy: str
) -> None:
    changes = {**CHANGES, "spikes": {**CHANGES["spikes"], "policy": "stop"}}
    failpoints = ["c1:coordinator.finished@*=kill"]
    run = start(steps=80, tokens=noisy, kind=HostedRun, name="ended", failpoints=failpoints, **changes)
    assert isinstance(run, HostedRun)
    result = run.result()
    assert (result.verdict, run.num_coordinators) == ("spiked", 2)
    ends = [event for event in run.events() if event.kind is EventKind.RUN_FINISHED]
    assert [(end.fields["verdict"], end.step) for end in ends] == [("spiked", result.last_step)] * 2
    found = re.search(r"resume it with --set spikes\.accept_until=(\d+)$", result.message)
    assert found is not None and 62 <= int(found[1]) <= result.last_step < 80
    trained = run.steps()
    again = start(steps=80, tokens=noisy, name="ended", **changes)  # as a job's retry does
    assert (again.result().verdict, again.result().last_step) == ("spiked", result.last_step)
    assert again.steps() == trained
    changes["spikes"]["accept_until"] = int(found[1])
    accepting = start(steps=80, tokens=noisy, name="ended", **changes)
    done = accepting.result()
    assert (done.verdict, done.last_step) == ("done", 80)
    assert done.digest["state"] == undisturbed(accepting.config)[0]


def test_gradient_that_is_not_finite_is_gone_back_from(start: Callable[..., Run], corpus: str, noisy: str) -> None:
    changes = {**CHANGES, "spikes": {**CHANGES["spikes"], "policy": "ignore"}}
    changes["objective"] = {"name": "tests.faults.objectives:infinite_on_noise"}
    run = start(steps=80, tokens=noisy, training={"on_nonfinite": "rewind"}, **changes)
    result = run.result()
    assert (result.verdict, result.last_step) == ("done", 80)
    assert_rewound(run, result.digest["state"])
    (rewind,) = Rewinds.load(Storage.open(run.config.run_url))
    assert (rewind.cause, rewind.first_step, rewind.to_step) == ("poisoned", 60, 52)


@pytest.mark.thorough
def test_fork_of_a_run_that_went_back_goes_on_as_it_did(start: Callable[..., Run], noisy: str, tmp_path: Path) -> None:
    run = start(steps=80, tokens=noisy, **{**CHANGES, "checkpoint": {"every_steps": 10, "keep": 10}})
    result = run.result()
    assert_rewound(run, result.digest["state"])
    made = fork(Request(RunAddress.at(run.config.run_url), f"{run.config.name}-fork", step=40))
    assert made.config.training.skip == RunAddress.at(run.config.run_url).stored_config().training.skip
    later = fork(Request(RunAddress.at(run.config.run_url), f"{run.config.name}-later", step=70))
    for lineage, step in ((made.lineage, 40), (later.lineage, 70)):  # before what was gone back from, and behind it
        before = ancestry.of(lineage)
        assert [point.fields["loss"] for point in before.points()] == [told[1] for told in final_steps(run)[:step]]
        assert before.lacks is None
    skip = made.config.training.skip
    forked = start(steps=80, tokens=noisy, name=made.config.name, **{**CHANGES, "training": {"skip": skip}})
    again = forked.result()
    assert again.digest == result.digest
    assert forked.count(EventKind.REWOUND) == 0
    assert Manifest.load(Storage.open(noisy)).hash == made.config.data.manifest


@pytest.mark.thorough
def test_run_goes_back_unseen_when_its_mailbox_is_lost(start: Callable[..., Run], noisy: str) -> None:
    run = start(steps=80, tokens=noisy, **CHANGES)
    run.await_step(10)
    ray.kill(run.mailbox)
    result = run.result()
    assert (result.verdict, result.last_step) == ("done", 80)
    assert_rewound(run, result.digest["state"])


def is_saved(run: Run, step: int) -> bool:
    return any(event.kind is EventKind.CHECKPOINT_SAVED and event.step == step for event in run.events())


@pytest.mark.thorough
def test_checkpoint_that_is_stored_after_the_rewind_is_in_nobodys_way(
    start: Callable[..., Run], noisy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its manifest hangs on its way, longer than the attempt that has written it waits."""
    publish, may_go_on, told = registry.publish, threading.Event(), []

    def hanging(storage: Storage, manifest: CheckpointManifest, **more: Any) -> CheckpointInfo:
        if manifest.step == 60 and not told:
            told.append(manifest.meta["config"]["training"]["skip"])
            may_go_on.wait(100)
        return publish(storage, manifest, **more)

    monkeypatch.setattr(publisher.registry, "publish", hanging)
    monkeypatch.setattr(Publisher.close, "__defaults__", (0.5,))
    before_is_stored = tmp_path / "stored"
    run = start(steps=90, tokens=noisy, failpoints=[f"*:data@55=wait:{before_is_stored}"], **CHANGES)
    run.await_status(lambda _: is_saved(run, 50), "a checkpoint of step 50")  # or that of step 60 is left out
    before_is_stored.touch()
    run.await_status(lambda _: run.count(EventKind.REWOUND), "a rewind")
    may_go_on.set()
    result = run.result()
    assert told == [[]]
    assert (result.verdict, result.last_step) == ("done", 90)
    stored = assert_rewound(run, result.digest["state"])
    saved = [event.step for event in run.events() if event.kind is EventKind.CHECKPOINT_SAVED and event.attempt > 1]
    assert saved[-1] == 90 and len(saved) >= 2
    whole = [found for found in registry.found(Storage.open(run.config.run_url)) if found.state == "complete"]
    assert all(found.meta["config"]["training"]["skip"] == [[*stored.training.skip[0]]] for found in whole)


@pytest.mark.thorough
def test_skip_leaves_out_the_noise_and_nothing_else(start: Callable[..., Run], noisy: str) -> None:
    """Twice three steps that stand out: two rewinds, with six batches left out in the end."""
    run = start(steps=80, tokens=noisy, **{**CHANGES, "spikes": {**CHANGES["spikes"], "policy": "skip"}})
    result = run.result()
    assert (result.verdict, result.last_step) == ("done", 80)
    stored = assert_rewound(run, result.digest["state"], num_rewinds=2)
    assert stored.training.skip == ((BAD.start, BAD.stop),)
