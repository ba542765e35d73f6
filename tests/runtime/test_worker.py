"""A worker between two coordinators, without Ray: what it keeps, and by which order of batches it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.data.order import Order
from elastic_lm.errors import CheckpointError
from elastic_lm.protocol import Generation, Lease, LeaseEnd, ReturnReport
from elastic_lm.runtime.worker import Summons, Worker, WorkerBoot
from elastic_lm.storage import Storage
from tests.engine.members import LENGTH, SIZE, M, SyntheticTokens, tiny_spec

ORDER = Order(4, 8, 0, 1, seed=7, micro_batches=M, micro_batch_size=SIZE, sequence_length=LENGTH)
OTHER = replace(ORDER, skip=((2, 3),))
NOBODY = ("127.0.0.1", 1)


def summons(owner_epoch: int, order: Order) -> Summons:
    return Summons(owner_epoch, order, NOBODY, "", (), None)


def lease(owner_epoch: int, stop: int, *, number: int = 1, start: int = 0) -> Lease:
    return Lease(Generation(owner_epoch, number), ("w0",), None, start, stop, (tuple(range(M)),))


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    """Of epoch 1, warm. Its tokens say by which order they are."""

    def tokens(self: Any, step: int, micro_batch: int, cancelled: Any = None) -> Any:
        return SyntheticTokens().tokens(step + 100 * len(self.order.skip), micro_batch)

    monkeypatch.setattr("elastic_lm.runtime.window_client.WindowClient.tokens", tokens)
    monkeypatch.setattr(Worker, "locate", lambda self: ("a node", 4_000))
    boot = WorkerBoot(
        member_id="w0",
        summons=summons(1, ORDER),
        orphaned_after_s=1e9,
        spec=tiny_spec(),
        corpus="file:///corpus",
        reader_timeout_s=1.0,
        storage_timeout_s=1.0,
        run_storage=Storage.open(f"file://{tmp_path}"),
        heartbeat_interval_s=1.0,
        form_timeout_s=1.0,
    )
    worker = Worker(boot)
    worker.warm_up()
    yield worker
    worker._lifeline.close()


def failing(*arguments: Any, **more: Any) -> None:
    raise MemoryError


def held(report: ReturnReport) -> tuple[bool, int, list[int]]:
    return report.whole, report.next_step, [record.step for record in report.records]


def trained(worker: Worker) -> str:
    """Digest of four steps of epoch 1."""
    assert worker.run_lease(lease(1, 4)).end is LeaseEnd.COMPLETED
    return worker.digests()["state"]


def test_successor_of_the_same_order_finds_everything(worker: Worker) -> None:
    digest = trained(worker)
    worker.adopt(summons(2, ORDER))
    assert held(worker.come_back(summons(2, ORDER), 1)) == (True, 4, [1, 2, 3])
    assert worker.digests()["state"] == digest
    assert [told.step for told in worker._pulse.beat().records] == [0, 1, 2, 3]


def test_run_that_has_gone_back_finds_a_new_worker(worker: Worker) -> None:
    trained(worker)
    worker.adopt(summons(2, OTHER))
    assert not worker._pulse.beat().records
    assert held(worker.come_back(summons(2, OTHER), 0)) == (False, 0, [])
    assert worker.run_lease(lease(2, 4)).end is LeaseEnd.COMPLETED
    by_the_other = worker.digests()["state"]
    assert [told.step for told in worker._pulse.beat().records] == [0, 1, 2, 3]
    assert held(worker.come_back(summons(3, OTHER), 0)) == (True, 4, [0, 1, 2, 3])
    assert worker.digests()["state"] == by_the_other
    assert held(worker.come_back(summons(4, ORDER), 0)) == (False, 0, [])
    assert worker.run_lease(lease(4, 4)).end is LeaseEnd.COMPLETED
    assert worker.digests()["state"] != by_the_other


def test_call_to_adopt_may_be_lost(worker: Worker) -> None:
    trained(worker)
    assert held(worker.come_back(summons(2, OTHER), 0)) == (False, 0, [])
    assert not worker._pulse.beat().records
    assert worker.run_lease(lease(1, 8, number=2, start=4)).end is LeaseEnd.FENCED


def test_worker_that_fails_to_begin_anew_holds_nothing_for_whoever_comes_next(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(worker)
    for place in (
        "elastic_lm.runtime.window_client.WindowClient.__init__",
        "elastic_lm.engine.lease.Member.start_over",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, failing)
            with pytest.raises(MemoryError):
                worker.come_back(summons(2, OTHER), 0)
        assert worker.run_lease(lease(1, 8, number=2, start=4)).end is LeaseEnd.FENCED
    assert held(worker.come_back(summons(3, OTHER), 0)) == (False, 0, [])


def test_snapshot_that_was_given_up_before_it_began_is_not_taken(worker: Worker) -> None:
    trained(worker)
    worker.adopt(summons(2, OTHER))
    with pytest.raises(CheckpointError, match="given up before it began"):
        worker.snapshot((1, 7), 4, 0, 1)


def test_call_of_an_earlier_coordinator_that_comes_late_changes_nothing(worker: Worker) -> None:
    trained(worker)
    worker.come_back(summons(3, OTHER), 0)
    assert worker.run_lease(lease(3, 4)).end is LeaseEnd.COMPLETED
    worker.adopt(summons(2, ORDER))
    assert held(worker.come_back(summons(2, ORDER), 0)) == (True, 4, [0, 1, 2, 3])
    report = worker.run_lease(lease(3, 6, number=2, start=4))
    assert (report.end, report.next_step) == (LeaseEnd.COMPLETED, 6)


def test_lease_of_a_coordinator_that_it_has_not_heard_of_is_not_begun(worker: Worker) -> None:
    """Who knows by which order that is to be trained?"""
    trained(worker)
    report = worker.run_lease(lease(2, 8, start=4))
    assert (report.end, report.next_step, report.whole) == (LeaseEnd.FENCED, 4, True)
