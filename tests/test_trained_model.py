"""A run's model: the weights of the step that was asked for, and nothing that does not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from elastic_lm.checkpoint import store
from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError, ConfigError, DataError
from elastic_lm.experiment import standing
from elastic_lm.experiment.weights import weights_of
from elastic_lm.run_address import split_step
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.checkpoint.saved import flip, parts_of
from tests.solo import Solo, solo_config, solo_corpus


@pytest.fixture
def trained(small_corpus: str, tmp_path: Path) -> RunConfig:
    """A run with checkpoints of the steps 2, 4 and 6."""
    config = solo_config(small_corpus, f"file://{tmp_path}")
    for step in (2, 4):
        Solo(config).train(until=step)
    Solo(config).train()
    return config


def load(config: RunConfig, step: int | None = None) -> TrainedModel:
    storage = Storage.open(config.run_url)
    return TrainedModel.load(storage, RunConfig.from_yaml(storage.read("config.yaml").decode(), "config"), step)


@pytest.mark.parametrize(("asked", "found"), [(None, 6), (4, 4), (2, 2)])
def test_weights_and_their_digest_are_those_of_the_step(trained: RunConfig, asked: int | None, found: int) -> None:
    model = load(trained, asked)
    kept = store.load(Storage.open(trained.run_url), found)
    assert model.step == found
    assert model.digest == kept.info.meta["digest"]["weights"]
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, kept.tensors[f"parameters/{name}"])
    assert not model.module.training


def test_logits_of_the_next_token_are_the_last_of_all(trained: RunConfig) -> None:
    model, ids = load(trained), [1, 20, 33, 40, 21]
    cache = model.make_cache(len(ids))
    model.next_logits(ids[:3], cache)
    for found_V in (model.next_logits(ids), model.next_logits(ids[3:], cache)):
        assert found_V.shape == (model.vocab_size,) and not found_V.requires_grad
        torch.testing.assert_close(found_V, model.logits(ids)[-1], rtol=1e-5, atol=1e-5)


def test_damaged_checkpoint_is_told_with_the_others(trained: RunConfig) -> None:
    folder = Storage.open(trained.run_url)
    for step, others in ((6, "there are 2, 4"), (4, "there are 2, 6")):
        for part in parts_of(folder, step):
            flip(folder, part)
        with pytest.raises(CheckpointError, match=rf"is damaged.*; name another step \({others}\)"):
            load(trained, None if step == 6 else step)


def test_step_without_a_checkpoint_names_the_nearest(trained: RunConfig) -> None:
    storage = Storage.open(trained.run_url)
    for step, nearest in ((3, "the nearest are 2, 4 and 6"), (9, "the nearest are 2, 4 and 6")):
        with pytest.raises(CheckpointError, match=f"no complete checkpoint of step {step}; {nearest}"):
            load(trained, step)
    storage.delete("checkpoints/step-00000002/manifest.json")
    with pytest.raises(
        CheckpointError, match=r"of step 2 \(unfinished: it has no manifest.*\); the nearest are 4 and 6"
    ):
        load(trained, 2)
    storage.delete("checkpoints/step-00000004/manifest.json")
    with pytest.raises(CheckpointError, match="the only one is of step 6"):
        load(trained, 5)
    storage.delete("checkpoints/step-00000006/manifest.json")
    with pytest.raises(CheckpointError, match="it has no other one either: wait for its first"):
        weights_of(storage, 6)


def test_step_that_is_there_is_found_by_its_own_manifest(trained: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read, manifests = Storage.read, []

    def noted(storage: Storage, path: str) -> bytes:
        if path.endswith("manifest.json"):
            manifests.append(f"{storage.url}/{path}")
        return read(storage, path)

    monkeypatch.setattr(Storage, "read", noted)
    assert standing.step_of(Storage.open(trained.run_url), 2) == 2
    assert [path.split("/")[-2] for path in manifests] == ["step-00000002"]


def test_another_corpus_is_refused(trained: RunConfig, tmp_path: Path) -> None:
    storage = Storage.open(trained.run_url)
    corpus = Storage.open(trained.data.tokens)
    other = Storage.open(f"file://{tmp_path}/other")
    for path in corpus.list():
        other.write(path, corpus.read(path))
    config = RunConfig.from_yaml(storage.read("config.yaml").decode(), "config", [f"data.tokens={other.url}"])
    assert TrainedModel.load(storage, config).step == 6  # the same one elsewhere
    manifest = json.loads(other.read("manifest.json"))
    other.write("manifest.json", json.dumps({**manifest, "counts": {"documents": 1}}).encode())
    with pytest.raises(ConfigError, match="is not the corpus at data.tokens"):
        TrainedModel.load(storage, config)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    config = solo_config(solo_corpus(tmp_path), f"file://{tmp_path}")
    Solo(config).train()
    Storage.open(config.data.tokens).write("tokenizer.json", b"{}")
    with pytest.raises(DataError, match="it is not the one the corpus was made with"):
        load(config)


def test_weights_of_another_shape_are_refused(trained: RunConfig) -> None:
    storage = Storage.open(trained.run_url)
    text = storage.read("config.yaml").decode()
    for change, message in (("model.width=32", "differ in"), ("model.bias=true", "differ in")):
        with pytest.raises(CheckpointError, match=message):
            TrainedModel.load(storage, RunConfig.from_yaml(text, "config", [change]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("my-run", ("my-run", None)),
        ("my-run@1000", ("my-run", 1000)),
        ("run.yaml@1_000", ("run.yaml", 1000)),
        ("s3://bucket/a@b/runs/mine", ("s3://bucket/a@b/runs/mine", None)),
        ("s3://bucket/a@b/runs/mine@1,000", ("s3://bucket/a@b/runs/mine", 1000)),
        ("me@home.yaml", ("me@home.yaml", None)),
    ],
)
def test_run_at_a_step(text: str, expected: tuple[str, int | None]) -> None:
    assert split_step(text) == expected


@pytest.mark.parametrize("text", ["my-run@", "my-run@last", "my-run@-1", "@7", "my-run@1.5", "my-run@²"])
def test_what_is_no_step_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match="is no run at a step; write RUN@STEP"):
        split_step(text)
