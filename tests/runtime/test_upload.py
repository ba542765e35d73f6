"""An upload stores a share of the state as it was, whatever becomes of the state, and carries what went wrong.

One that is given up ends after the parts that are on their way, and nobody waits for it."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from elastic_lm.checkpoint import registry, store
from elastic_lm.checkpoint.layout import Manifest
from elastic_lm.engine.state import ReplicaState
from elastic_lm.errors import CheckpointError, ElasticLMError
from elastic_lm.runtime.upload import Upload, Uploads
from elastic_lm.storage import Storage

WAIT_S = 20


def a_state(step: int, width: int = 16) -> ReplicaState:
    state = ReplicaState(nn.Sequential(nn.Linear(8, width), nn.Linear(width, 4)))
    with state.writing(step), torch.no_grad():
        for number, flat in enumerate(state.flats()):
            flat.copy_(torch.arange(len(flat)) + number)
    return state


def test_shares_are_the_state_at_the_time_of_the_copy(folder_url: str) -> None:
    storage, state = Storage.open(folder_url), a_state(7)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    uploads = [Upload(storage, 7, state, share=share, num_shares=3) for share in range(3)]
    with state.writing(8), torch.no_grad():
        state.weights.zero_()  # the next optimizer step
    parts = tuple(part for upload in uploads for part in upload.result())
    registry.publish(storage, Manifest(7, parts))
    loaded = store.load(storage, 7).tensors
    assert loaded.keys() == before.keys()
    assert all(torch.equal(loaded[name], before[name]) for name in before)


def test_state_at_another_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot save step 8: this state is at 7"):
        Upload(Storage.open(str(tmp_path)), 8, a_state(7), share=0, num_shares=1)


def test_torn_state_is_refused(tmp_path: Path) -> None:
    state = a_state(7)
    with pytest.raises(KeyError), state.writing(8):
        raise KeyError
    with pytest.raises(RuntimeError, match="torn=True"):
        Upload(Storage.open(str(tmp_path)), 7, state, share=0, num_shares=1)


def test_refusal_of_storage_comes_out_of_the_result(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    upload = Upload(Storage.open(str(tmp_path)), 7, a_state(7), share=0, num_shares=1)
    with pytest.raises(ElasticLMError):
        upload.result()


class Stalling(Storage):
    """A store that tells of every part that is to be created, and goes on when its gate is opened."""

    def __init__(self, url: str, asked: queue.Queue[str], gate: threading.Event) -> None:
        super().__init__(url)
        self.asked, self.gate = asked, gate

    def child(self, path: str) -> Storage:
        return Stalling(super().child(path).url, self.asked, self.gate)

    def create(self, path: str, data: bytes) -> None:
        self.asked.put(path)
        assert self.gate.wait(10 * WAIT_S)
        super().create(path, data)


@pytest.fixture
def stalled(tmp_path: Path) -> Iterator[Stalling]:
    store = Stalling(str(tmp_path / "run"), queue.Queue(), threading.Event())
    yield store
    store.gate.set()


def copies(size: int) -> int:
    """How many copies of the state's largest tensors are in memory."""
    gc.collect()
    storages = [object.untyped_storage() for object in gc.get_objects() if type(object) is torch.Tensor]
    return len({storage.data_ptr() for storage in storages if storage.size() == 4 * size})


def join_uploads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("save-"):
            thread.join(WAIT_S)


def test_new_upload_cancels_the_one_before_and_waits_for_nothing(stalled: Stalling) -> None:
    uploads = Uploads(stalled, part_bytes=64)
    uploads.begin((0, 1), 7, a_state(7), share=0, num_shares=1)
    for _ in range(store.AT_ONCE):
        stalled.asked.get(timeout=WAIT_S)  # the first parts are on their way, and stay there
    told: queue.Queue[BaseException] = queue.Queue()
    waiting = threading.Thread(target=lambda: told.put(pytest.raises(CheckpointError, uploads.result, (0, 1)).value))
    waiting.start()
    uploads.begin((0, 2), 8, a_state(8), share=0, num_shares=1)
    answer = str(told.get(timeout=WAIT_S))  # the one or the other, as the thread began to wait before or after
    assert answer in ("the upload of step 7 was given up", "attempt (0, 1) at a checkpoint is not under way here")
    stalled.gate.set()
    registry.publish(stalled, Manifest(8, uploads.result((0, 2))))
    assert len(store.load(stalled, 8).tensors) == 12
    join_uploads()
    assert len([path for path in stalled.list() if "step-00000007" in path]) <= store.AT_ONCE


def test_cancelled_upload_lets_go_of_its_copy_though_the_store_hangs(stalled: Stalling) -> None:
    state = a_state(7, width=977)
    before = copies(size=8 * 977)
    uploads = Uploads(stalled, part_bytes=64)
    uploads.begin((0, 1), 7, state, share=0, num_shares=1)
    for _ in range(store.AT_ONCE):
        stalled.asked.get(timeout=WAIT_S)
    assert copies(size=8 * 977) == before + 3  # weights and both moments
    uploads.cancel((0, 1))
    assert copies(size=8 * 977) <= before + 1  # of which one may be on its way


def test_upload_that_is_not_the_newest_is_told_as_given_up(stalled: Stalling) -> None:
    stalled.gate.set()
    uploads = Uploads(stalled)
    uploads.begin((0, 2), 7, a_state(7), share=0, num_shares=1)
    uploads.cancel((0, 1))  # of an attempt before; the message is late
    assert uploads.result((0, 2))
    for number in (1, 3):
        with pytest.raises(CheckpointError, match=rf"attempt \(0, {number}\) .*is not under way"):
            uploads.result((0, number))


def test_upload_that_has_ended_cannot_be_cancelled(stalled: Stalling) -> None:
    stalled.gate.set()
    uploads = Uploads(stalled)
    uploads.begin((0, 1), 7, a_state(7), share=0, num_shares=1)
    parts = uploads.result((0, 1))
    uploads.cancel((0, 1))
    assert uploads.result((0, 1)) == parts


def test_coordinator_that_was_superseded_begins_and_cancels_nothing(stalled: Stalling) -> None:
    stalled.gate.set()
    uploads = Uploads(stalled)
    uploads.begin((2, 1), 8, a_state(8), share=0, num_shares=1)
    with pytest.raises(CheckpointError, match="is over"):
        uploads.begin((1, 7), 8, a_state(8), share=0, num_shares=1)
    uploads.cancel((1, 7))
    assert uploads.result((2, 1))


def test_successor_ends_the_uploads_of_the_coordinator_before(stalled: Stalling) -> None:
    uploads = Uploads(stalled)
    uploads.begin((1, 7), 8, a_state(8), share=0, num_shares=1)
    uploads.cancel((2, 0))
    with pytest.raises(CheckpointError, match="was given up"):
        uploads.result((1, 7))
