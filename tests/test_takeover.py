"""A whole owner, frozen in the middle of its work: when it thaws after another took over, nothing of it counts any more."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace

import pytest

from elastic_lm.checkpoint import registry
from elastic_lm.events.log import EventLog, last, read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.ownership import Ownership
from elastic_lm.storage import Storage

pytestmark = pytest.mark.slow

RENEW_S, EXPIRY_S = 0.1, 2.0

OWNER = textwrap.dedent(f"""
    import sys
    import torch
    from elastic_lm.checkpoint import registry, store
    from elastic_lm.checkpoint.layout import Manifest
    from elastic_lm.errors import SupersededError
    from elastic_lm.events.log import EventLog
    from elastic_lm.events.types import Event, EventKind
    from elastic_lm.ownership import Ownership
    from elastic_lm.storage import Storage

    run = Storage.open(sys.argv[1])
    owner = Ownership.acquire(run, "r", job_token="a", renew_s={RENEW_S}, expiry_s={EXPIRY_S})
    note = lambda step: Event(EventKind.NOTE, f"step {{step}}", step=step)
    told = []
    log = EventLog(run.child("events"), owner_epoch=owner.epoch, opening=lambda newest: note(0), on_stored=told.extend)

    def work(step):
        log.append(note(step))
        log.flush()
        parts = store.save_share(run, step, {{"parameters/x": torch.full((2,), float(step))}})
        registry.publish(run, Manifest(step, parts, owner_epoch=owner.epoch), check=owner.check)

    work(1)
    print("worked", flush=True)
    sys.stdin.readline()
    try:
        work(2)
    except SupersededError as error:
        print("superseded:", error)
    print("stored:", [event.step for event in told])
    log.close()
    owner.release()
""")


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def run(request: pytest.FixtureRequest, folder_url: str) -> Storage:
    return Storage.open(folder_url if request.param == "file" else f"{request.getfixturevalue('s3_url')}/runs/r")


@pytest.fixture
def frozen(run: Storage) -> Iterator[subprocess.Popen[str]]:
    """An owner that has stored an event and a checkpoint and hears nothing more."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, run.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "worked\n"
    process.send_signal(signal.SIGSTOP)
    yield process
    process.kill()
    process.communicate()


def test_thawed_owner_publishes_neither_an_event_nor_a_checkpoint(run: Storage, frozen: subprocess.Popen[str]) -> None:
    events = run.child("events")
    after = max(event.owner_epoch for event in last(events, 1))
    owner = Ownership.acquire(run, "r", job_token="b", after=after, renew_s=RENEW_S, expiry_s=EXPIRY_S)
    begun = Event(EventKind.NOTE, "taken over", step=100)
    log = EventLog(events, owner_epoch=owner.epoch, opening=lambda newest: begun)
    frozen.send_signal(signal.SIGCONT)
    told, _ = frozen.communicate("go on\n", timeout=50)
    assert "superseded: run r was taken over by owner 2, process" in told
    assert "stored: [1]" in told
    owner.check()  # what the thawed one did at its end, giving back its claim, is nothing to this one
    log.append(replace(begun, step=101))
    assert log.close()
    owner.release()
    assert [event.step for event in read(events)] == [0, 1, 100, 101]
    assert [found.step for found in registry.found(run) if found.state == "complete"] == [1]
