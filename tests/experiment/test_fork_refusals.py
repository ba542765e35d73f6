"""What no fork can be made of is refused with its remedy, before anything is written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.checkpoint.layout import folder_of
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.errors import CheckpointError, CheckpointVersionError, ConfigError, DataError, ElasticLMError
from elastic_lm.experiment import changes
from elastic_lm.experiment.fork import Request, fork
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from tests.checkpoint.saved import change_version, flip, parts_of
from tests.experiment.conftest import AT, STEPS
from tests.experiment.parents import address_of, contents, forked, trained
from tests.solo import Solo, solo_config


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ({"overrides": ["model.width=32"]}, r"cannot take model\.width: 16 -> 32: .* \[48, 16\] is stored, and \[96, 32\]"),
        ({"overrides": ["model.num_layers=2", "optimizer.kind=muon"]}, r"optimizer\.kind.*exp_avg_sq/.* none is wanted"),
        ({"overrides": ["model.num_layers=2", "training.precision=fp16"]}, r"num_layers.*loss_scale none is stored"),
        ({"overrides": ["model.activation=gelu"]}, r"cannot take model\.activation: 'swiglu' -> 'gelu': blocks\.0\.feed_forward"),
        ({"overrides": ["optimizer.kind=muon"]}, r"optimizer\.kind.*exp_avg_sq/.* none is wanted"),
        ({"overrides": ["training.precision=fp16"]}, r"loss_scale none is stored"),
        ({"overrides": ["model.vocab_size=512"]}, r"model\.vocab_size: 300 -> 512: .*embedding"),
        ({"overrides": ["model.num_heads=2"]}, r"model\.num_heads: 1 -> 2: .* would mean something else"),
        ({"overrides": ["model.norm=layernorm"]}, r"model\.norm: 'rmsnorm' -> 'layernorm': .* would mean something else"),
        ({"overrides": ["model.norm=layernorm", "model.bias=true"]}, r"cannot take model\.norm: .* would mean something else"),
        ({"overrides": ["model.init=hf:/nowhere", "model.init_hash=" + "f" * 64]}, "begins from its parent's state"),
        ({"overrides": ["optimizer.lr=1"]}, r"optimizer\.lr is not a field"),
        ({"overrides": ["name=other"]}, "--name and --storage"),
        ({"overrides": ["training.steps=4"]}, "nothing would be trained"),
        ({"overrides": ["batch.micro_batches=0"]}, r"micro_batches=0"),
        ({"skip": ((3, 6),)}, r"--skip 3:6 begins before batch 4"),
        ({"skip": ((6, 6),)}, "--skip 6:6 is no range"),
        ({"skip": ((1000, 1010),)}, "--skip 1000:1010 begins behind batch 9, the last that is trained, in step 9"),
        ({"skip": ((10, 11),)}, "--skip 10:11 begins behind batch 9"),
        ({"skip": ((5, 7), (12, 13))}, "--skip 12:13 begins behind batch 11"),  # skipping moves the last one
        ({"overrides": ["training.skip=[[5, 7], [100, 200]]"]}, r"training\.skip=\[\.\.\., \[100, 200\], .* behind batch 11"),
        ({"step": 5}, "no checkpoint of step 5; the nearest are 4 and 10"),
        ({"step": 3}, "no checkpoint of step 3; the nearest are 4 and 10$"),
        ({"step": 10}, "10 steps and training.steps=10.*add steps"),
        ({"name": "parent"}, "holds a run already; choose another --name"),
        ({"name": "no/name"}, "name='no/name'"),
        ({"name": ""}, "name='' is no run's name; choose"),  # the folder of all runs
        ({"name": "parent/events"}, "name='parent/events' is no run's name; choose"),
        ({"storage": "gs://bucket"}, "gs://"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(request_: dict[str, Any], reason: str, parent: RunConfig) -> None:
    before = contents(parent.storage)
    with pytest.raises(ElasticLMError, match=reason):
        forked(parent, **{"step": AT, "name": "new", **request_})
    assert contents(parent.storage) == before


def test_place_of_the_first_weights_is_not_changed_either(parent: RunConfig) -> None:
    """The hash is the same, and so is the run's identity."""
    begun = address_of(parent).stored_config().replace("model.init=hf:/there", f"model.init_hash={'f' * 64}")
    changed = changes.changed(begun, ["model.init=hf:/elsewhere"], name="new", storage=parent.storage)
    found = changes.changes(begun, changed)
    assert [(change.name, change.identity) for change in found] == [("model.init", False)]
    with pytest.raises(
        ConfigError, match=r"model\.init: 'hf:.*/there' -> 'hf:.*/elsewhere': a fork begins from its parent's"
    ):
        changes.check_beginning(found)


# -- where it goes -----------------------------------------------------------------------------------------------------


def test_run_that_was_moved_says_where_its_fork_goes(parent: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "runs/parent").rename(tmp_path / "elsewhere")
    address = Run.open(tmp_path / "elsewhere").address
    with pytest.raises(ConfigError, match="say --storage URL"):
        fork(Request(address, "new", AT))
    assert fork(Request(address, "new", AT, str(tmp_path))).url == f"file://{tmp_path}/runs/new"


@pytest.mark.s3
def test_place_and_what_it_needs_are_changed_at_once(parent: RunConfig, tmp_path: Path, s3_url: str) -> None:
    """A run in object storage says where its trackers write files."""
    files = address_of(parent).stored_config().replace("tracking.tensorboard=true")
    Storage.open(parent.run_url).write("config.yaml", files.to_yaml().encode())
    with pytest.raises(ConfigError, match=r"set tracking\.folder"):
        forked(parent, step=AT, storage=s3_url)
    made = forked(parent, step=AT, storage=s3_url, overrides=[f"tracking.folder={tmp_path}/files"])
    assert made.config.tracking.folder == f"{tmp_path}/files"


@pytest.mark.parametrize("path", ["config.yaml", "events/000000000000.jsonl", "owner/00000001.json", "notes.txt",
                                  f"{folder_of(7)}/manifest.json"])  # fmt: skip
def test_folder_that_is_somebodys_is_left_alone(path: str, parent: RunConfig) -> None:
    folder = Storage.open(f"{parent.storage}/runs/new")
    folder.write(path, b"mine")
    with pytest.raises(ConfigError, match=re.escape("holds a run already")):
        forked(parent, step=AT)
    assert contents(folder.url) == {path: b"mine"}


# -- the parent's checkpoints ------------------------------------------------------------------------------------------


def test_parent_without_a_checkpoint_is_told_when_it_gets_one(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}")
    with pytest.raises(ConfigError, match="there is no run at"):
        forked(config)
    Solo(config).die()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint yet; it gets one every checkpoint\.every_steps"):
        forked(config)
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        forked(config, step=3)


def test_checkpoint_of_another_version_is_refused_by_name(parent: RunConfig) -> None:
    change_version(Storage.open(parent.run_url), STEPS, 3)
    for step in (None, STEPS):
        with pytest.raises(CheckpointVersionError, match="version 3 of the format.*fork with the version"):
            forked(parent, step=step)
    assert forked(parent, step=AT).lineage.parent.step == AT


def test_checkpoint_that_is_damaged_makes_no_run(parent: RunConfig) -> None:
    folder = Storage.open(parent.run_url)
    flip(folder, parts_of(folder, AT)[1])
    told = rf"checkpoint {folder.url}/{folder_of(AT)} of run parent cannot be forked: part .* is damaged: .*; fork another step"
    with pytest.raises(CheckpointError, match=rf"{told}: RUN@STEP \(there is {STEPS}\)"):
        forked(parent, step=AT)
    with pytest.raises(ElasticLMError):
        _ = Run.open(f"{parent.storage}/runs/new").address.config()
    folder.delete(f"{folder_of(STEPS)}/manifest.json")
    with pytest.raises(CheckpointError, match="unfinished"):
        forked(parent, step=STEPS)


# -- the corpus --------------------------------------------------------------------------------------------------------


def test_corpus_of_another_vocabulary_is_refused_and_a_moved_one_is_none(
    parent: RunConfig, small_corpus: str, tmp_path: Path
) -> None:
    tokens = Storage.open(small_corpus)
    moved = Storage.open(f"{tmp_path}/moved")
    for path in tokens.list():
        moved.write(path, tokens.read(path))
    made = forked(parent, "moved", step=AT, overrides=[f"data.tokens={moved.url}"])
    assert [change.name for change in made.lineage.changes] == ["data.tokens"]
    other = json.loads(moved.read("manifest.json"))
    moved.write("manifest.json", json.dumps({**other, "tokenizer_hash": "f" * 64}).encode())
    with pytest.raises(ConfigError, match="was made with another tokenizer"):
        forked(parent, "other", step=AT, overrides=[f"data.tokens={moved.url}"])


def copied(corpus: str, tmp_path: Path) -> Storage:
    """The same corpus at a place of its own."""
    tokens, place = Storage.open(corpus), Storage.open(f"file://{tmp_path}/tokens")
    for path in tokens.list():
        place.write(path, tokens.read(path))
    return place


def parent_with_a_corpus_of_its_own(small_corpus: str, tmp_path: Path) -> tuple[RunConfig, Storage]:
    """A run that has trained, and where its corpus is."""
    place = copied(small_corpus, tmp_path)
    parent = solo_config(place.url, f"file://{tmp_path}", "parent", steps=STEPS)
    trained(parent, AT)
    return parent, place


def test_corpus_that_is_not_there_any_more_is_told_before_anything_is_written(
    small_corpus: str, tmp_path: Path
) -> None:
    parent, place = parent_with_a_corpus_of_its_own(small_corpus, tmp_path)
    manifest = json.loads(place.read("manifest.json"))
    before = contents(f"{tmp_path}/runs")
    place.write("manifest.json", json.dumps({**manifest, "counts": {}}).encode())
    remedy = "; or fork to where the corpus is now: --set data.tokens=URL"
    with pytest.raises(ConfigError, match=f"is not the corpus at data.tokens=.*{remedy}"):
        forked(parent, step=AT)
    place.delete("manifest.json")
    with pytest.raises(DataError, match=rf"there is no manifest\.json in {place.url}.*{remedy}"):
        forked(parent, step=AT)
    assert contents(f"{tmp_path}/runs") == before
    assert forked(parent, step=AT, overrides=[f"data.tokens={small_corpus}"]).config.data.tokens == small_corpus


def test_corpus_that_took_the_place_of_the_parents_is_not_compared_with_itself(
    small_corpus: str, tmp_path: Path
) -> None:
    parent, place = parent_with_a_corpus_of_its_own(small_corpus, tmp_path)
    kept = Manifest.load(place).hash
    with pytest.raises(ConfigError, match="is not the corpus at data.tokens"):
        forked(parent, step=AT, overrides=["data.manifest=" + "f" * 64])
    other = json.loads(place.read("manifest.json"))
    place.write("manifest.json", json.dumps({**other, "tokenizer_hash": "f" * 64}).encode())
    told = f"it cannot be known whether .*is not the parent's any more: .*the parent's has {kept}"
    for overrides in (["data.manifest=null"], [f"data.manifest={Manifest.load(place).hash}"]):
        with pytest.raises(ConfigError, match=told):
            forked(parent, step=AT, overrides=overrides)
    # The parent's, where it is now.
    assert forked(parent, step=AT, overrides=[f"data.tokens={small_corpus}"]).config.data.manifest == kept
