"""Nodes that are told to go: SIGTERM to `ray start --block`, as Kubernetes and spot machines do, on a cluster of processes."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from elastic_lm import Run
from elastic_lm.config import RunConfig
from elastic_lm.errors import NotFoundError
from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.figures import Figures
from elastic_lm.runtime.cluster import wait_for
from elastic_lm.runtime.jobs import Jobs
from tests.faults.harness import make_config
from tests.faults.oracle import undisturbed
from tests.runtime.head import Head, running_head, running_node

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

RUN_S = 180
STEPS = 60
HELD_AT = 20


@pytest.fixture(scope="module")
def head(forks: None) -> Iterator[Head]:
    with running_head(num_cpus=0) as head:
        yield head


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def train_through(config: RunConfig, head: Head, notice_s: int, gate: Path, until: EventKind) -> list[Event]:
    """Train on two nodes, of which one gets SIGTERM and `notice_s` to go while the run is held at a step.

    It goes on when its log has an event of kind `until`.    Returns: the run's events.
    """
    with ExitStack() as stack:
        notice = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(notice_s)}
        first, _ = (stack.enter_context(running_node(head, 1, **notice)) for _ in range(2))
        jobs = Jobs(head.address)
        jobs.submit(config)
        run = Run.open(config)

        def trains_on_both() -> bool:
            assert not jobs.details(config.name).status.is_terminal(), jobs.log(config.name)
            with suppress(NotFoundError):  # no log yet
                return run.status().step >= HELD_AT
            return False

        def is_told() -> bool:
            return any(event.kind is until for event in run.events())

        try:
            wait_for(trains_on_both, timeout_s=RUN_S, what="two workers train", poll_s=0.1)
        except TimeoutError as error:
            raise AssertionError(f"{error}; the job: {jobs.log(config.name)}") from error
        first.send_signal(signal.SIGTERM)
        wait_for(is_told, timeout_s=RUN_S, what=f"an event {until}", poll_s=0.1)
        gate.touch()
        printed = "".join(jobs.follow(config.name))
        assert jobs.exit_code(config.name) == 0, printed
    return list(run.events())


def assert_undisturbed(config: RunConfig, events: list[Event]) -> None:
    digest, steps = undisturbed(config)
    result = Run.open(config).result
    assert result is not None and result.digest["state"] == digest
    assert [event.step for event in events if event.kind is EventKind.STEP_COMMITTED] == list(range(STEPS))
    assert [event.fields["loss"] for event in events if event.kind is EventKind.STEP_COMMITTED] == [s[1] for s in steps]


def counted(events: list[Event], name: str, cause: str) -> float:
    figures = Figures("run", "0", 1)
    for event in events:
        figures.observe(event)
    return {(n, labels): value for n, labels, value in figures.values()}[(name, (cause,))]


def test_worker_on_a_node_that_is_told_in_time_leaves_between_two_steps(
    head: Head, corpus: str, tmp_path: Path
) -> None:
    gate = tmp_path / "go-on"
    config = make_config(corpus, f"file://{tmp_path}", "told-in-time", steps=STEPS, workers={"min": 2, "max": 2},
                         failpoints=[f"*:data@{HELD_AT}=wait:{gate}"])  # fmt: skip
    events = train_through(config, head, 30, gate, EventKind.NODE_DRAINING)
    assert_undisturbed(config, events)
    kinds = Counter(event.kind for event in events)
    assert kinds[EventKind.MEMBER_LOST] == 0
    (left,) = [event for event in events if event.kind is EventKind.MEMBER_LEFT]
    assert left.fields["cause"] == "preemption"
    assert not [e for e in events if e.kind is EventKind.REFORMED and e.fields["cause"] == "failure"]
    assert counted(events, "members_left_total", "preemption") == 1


def test_worker_that_cannot_leave_in_time_is_lost_as_ever_and_it_does_not_show(
    head: Head, corpus: str, tmp_path: Path
) -> None:
    """Its micro-batch takes longer than the node has."""
    gate = tmp_path / "go-on"
    config = make_config(corpus, f"file://{tmp_path}", "too-late", steps=STEPS, workers={"min": 2, "max": 2},
                         failpoints=[f"*:micro_batch@{HELD_AT}=wait:{gate}"],
                         control={"progress_timeout_s": float(RUN_S)})  # fmt: skip
    events = train_through(config, head, 6, gate, EventKind.MEMBER_LOST)
    assert_undisturbed(config, events)
    lost = [event for event in events if event.kind is EventKind.MEMBER_LOST]
    assert lost and {event.fields["cause"] for event in lost} == {"preemption"}
    assert counted(events, "members_lost_total", "preemption") == len(lost)
    assert counted(events, "members_lost_total", "crash") == 0


@pytest.mark.thorough
def test_head_that_is_told_to_go_leaves_a_checkpoint_of_the_moment(forks: None, corpus: str, tmp_path: Path) -> None:
    """A run does not outlive its head; the next one of its name goes on from there."""
    config = make_config(corpus, f"file://{tmp_path}", "without-head", steps=100_000, workers={"min": 1, "max": 1},
                         checkpoint={"every_steps": 1_000_000})  # fmt: skip
    run = Run.open(config)
    with running_head(0, RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="15") as head, running_node(head, 1):
        Jobs(head.address).submit(config)

        def step() -> int:
            with suppress(NotFoundError):  # no log yet
                return run.status().step
            return 0

        wait_for(lambda: step() >= 20, timeout_s=RUN_S, what="a worker trains", poll_s=0.2)
        told_at = step()
        head.process.send_signal(signal.SIGTERM)
        head.process.wait(60)
    saved = [event.step for event in run.events() if event.kind is EventKind.CHECKPOINT_SAVED]
    assert saved and saved[0] is not None and saved[0] >= told_at
