"""Storage is away while a run trains: it pauses, goes on, and ends with the bits of one that was left alone."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_lm.events.types import EventKind
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from elastic_lm.storage import Storage
from tests.faults import proxy as p
from tests.faults.harness import Fault, HostedRun, Injector, Run, assert_same_bits
from tests.faults.proxy import FaultyProxy

pytestmark = [pytest.mark.ray, pytest.mark.s3]

STEPS = 90
HELD_AT = 25  # so that storage is in trouble long before everything is trained
WITHOUT_HASTE = {"reader_timeout_s": 10.0}  # where it counts who was replaced


def test_storm_in_which_everything_fails_does_not_show(
    start: Callable[..., Run], proxy: FaultyProxy, on_s3: str, tmp_path: Path
) -> None:
    """One window is read ahead, so that tokens run out as well; behind a checkpoint, for who has none does not come to one."""
    begun = tmp_path / "begun"
    run = start(
        steps=STEPS,
        held_at=23,
        failpoints=[f"*:data@15=wait:{begun}"],
        tokens=f"{on_s3}/tokens",
        storage=on_s3,
        data={"window_blocks": 2, "prefetch_windows": 1, **WITHOUT_HASTE},
        checkpoint={"every_steps": 10},
    )
    run.await_logged(EventKind.CHECKPOINT_SAVED, 1)  # so that the next one begins
    what = {
        "events": "^PUT .*/events/",
        "checkpoints": "^PUT .*/checkpoints/",
        "anything else": "^(?!GET .*/shards/)",
    }
    rules = {name: proxy.inject(p.status(503), on=line) for name, line in what.items()}
    begun.touch()
    wait_for(lambda: rules["checkpoints"].hits, timeout_s=60, what="a checkpoint that is refused")
    rules["tokens"] = proxy.inject(p.status(503), on="^GET .*/shards/")
    run.let_go_on()
    for name in ("tokens", "events", "checkpoints"):
        wait_for(lambda name=name: len(rules[name].hits) >= 3, timeout_s=60, what=f"{name} refused again and again")
    proxy.calm()
    assert_same_bits(run, run.result())
    assert run.count(EventKind.MEMBER_LOST) == run.count(EventKind.READER_REPLACED) == 0


def test_storage_that_stays_away_ends_the_run_by_name(
    start: Callable[..., Run], proxy: FaultyProxy, on_s3: str
) -> None:
    """Where its events go all is well, so that the log tells of it."""
    run = start(
        steps=STEPS,
        held_at=HELD_AT,
        tokens=f"{on_s3}/tokens",
        data={"window_blocks": 2, "prefetch_windows": 1, "storage_timeout_s": 4.0},
    )
    run.await_step(HELD_AT)
    proxy.inject(p.status(503), on="^GET .*/shards/")
    result = run.result()
    assert result.verdict == "unavailable"
    assert f"no tokens of {on_s3}/tokens for" in result.message and "data.storage_timeout_s=4" in result.message
    assert len(run.steps()) == result.last_step < STEPS
    assert result.checkpoint is not None and result.checkpoint.endswith(f"step-{result.last_step:08d}")
    proxy.calm()
    again = start(steps=STEPS, tokens=f"{on_s3}/tokens", name=run.config.name, data={"window_blocks": 2})
    assert_same_bits(again, again.result())


def test_shard_that_is_refused_ends_the_run_at_once(start: Callable[..., Run], proxy: FaultyProxy, on_s3: str) -> None:
    run = start(
        steps=STEPS, held_at=HELD_AT, tokens=f"{on_s3}/tokens", data={"window_blocks": 2, "prefetch_windows": 1}
    )
    run.await_step(HELD_AT)
    refused = proxy.inject(p.status(403), on="^GET .*/shards/")
    result = run.result()
    assert result.verdict == "data_error"
    assert f"{on_s3}/tokens/shards/" in result.message and "access denied (AccessDenied)" in result.message
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in result.message
    assert len(refused.hits) <= 20


@pytest.mark.thorough
def test_checkpoint_that_storage_does_not_give_is_waited_for(
    start: Callable[..., Run], cluster: LocalCluster, proxy: FaultyProxy, on_s3: str
) -> None:
    """Every worker is lost while storage is away: the same error again and again is no bug, and the wait is no hang."""
    run = start(
        steps=STEPS,
        held_at=HELD_AT,
        storage=on_s3,
        workers={"min": 2, "max": 2},
        checkpoint={"every_steps": 10},
        control={"backoff_base_s": 0.2, "progress_timeout_s": 8.0},
    )
    run.await_logged(EventKind.CHECKPOINT_SAVED, 1)
    away = proxy.inject(p.status(400), on="^(GET|HEAD) .*/checkpoints/", seconds=20.0)
    Injector(cluster, run).inject([Fault("kill_all", at_step=20)])
    assert_same_bits(run, run.result())
    assert len(away.hits) > 5
    assert run.count(EventKind.MEMBER_LOST) == 2


def test_successor_waits_for_storage_and_then_goes_on_from_memory(
    start: Callable[..., HostedRun], proxy: FaultyProxy, on_s3: str
) -> None:
    """The coordinator is killed while storage is away: the run does not end for it, and no step is trained again."""
    run = start(steps=STEPS, storage=on_s3, kind=HostedRun, workers={"min": 2, "max": 2})
    run.await_step(20)
    run.await_logged(EventKind.MEMBER_STARTED, 2)
    os.kill(run.coordinator_pid(), signal.SIGKILL)
    away = proxy.inject(p.status(400), on="(/runs/|prefix=runs)")
    run.await_status(lambda _: len(away.hits) > 5, "a successor that asked, and asked again")
    assert len(away.hits) > 5
    proxy.calm()
    assert_same_bits(run, run.result())
    assert run.count(EventKind.MEMBER_STARTED) == 2 and run.count(EventKind.MEMBER_LOST) == 0


def copied(folder: Path, to: str) -> list[str]:
    """What a person does with what was kept: `aws s3 cp --recursive`."""
    here, there = Storage.open(str(folder)), Storage.open(to)
    for path in here.list():
        there.write(path, here.read(path))
    return here.list()


@pytest.mark.thorough
def test_run_whose_storage_takes_nothing_any_more_goes_on_from_what_was_kept(
    start: Callable[..., Run], proxy: FaultyProxy, on_s3: str, tmp_path: Path
) -> None:
    fallback = tmp_path / "fallback"
    checkpoint = {"every_steps": 10, "fallback": str(fallback)}
    run = start(steps=STEPS, storage=on_s3, checkpoint=checkpoint, held_at=45)
    run.await_step(20)
    proxy.inject(p.status(400), on="^PUT .*/runs/")
    run.await_step(45)
    run.command("stop", reason="enough")
    result = run.result()
    step, kept = result.last_step, fallback / "runs" / run.config.name
    assert result.verdict == "failed" and step is not None
    assert f"the checkpoint of step {step} could not be written in 3 tries: StorageError" in result.message
    assert f"in {kept}: copy what is in there to {run.config.run_url} before" in result.message
    assert result.checkpoint is None or f"{step:08d}" not in result.checkpoint

    proxy.calm()
    names = copied(kept, run.config.run_url)
    assert {name.split("/")[0] for name in names} == {"checkpoints", "events"}
    again = start(steps=STEPS, storage=on_s3, name=run.config.name, checkpoint=checkpoint)
    assert_same_bits(again, again.result())
    starts = [event for event in again.events() if event.kind is EventKind.RUN_STARTED]
    assert [event.fields["resume_step"] for event in starts] == [None, step]


@pytest.mark.thorough
def test_last_state_that_nowhere_has_room_is_told(
    start: Callable[..., Run], proxy: FaultyProxy, on_s3: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    run = start(steps=STEPS, storage=on_s3, checkpoint={"fallback": str(tmp_path / "file")})
    run.await_step(20)
    refused = proxy.inject(p.status(400), on="^PUT .*/checkpoints/")
    result = run.result()
    assert result.verdict == "failed" and len(refused.hits) >= 3
    assert re.search(
        rf"state of step {STEPS} could not be kept in .* either: .* is a file, not a folder", result.message
    )
