"""An upload stores a share of the state as it was, whatever becomes of the state; and carries what went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from elastic_lm.checkpoint import registry, store
from elastic_lm.checkpoint.layout import Manifest
from elastic_lm.engine.state import ReplicaState
from elastic_lm.errors import ElasticLMError
from elastic_lm.runtime.upload import Upload
from elastic_lm.storage import Storage


def a_state(step: int) -> ReplicaState:
    state = ReplicaState(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)))
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
