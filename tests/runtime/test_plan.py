"""A plan is made before anything starts, or it is said why not: corpus, checkpoint, identity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from elastic_lm.checkpoint import store
from elastic_lm.config import RunConfig
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.errors import CheckpointError, ConfigError, DataError
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.data.corpora import small_corpus, texts, write_lines


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run over a small corpus. Nothing may start while it is planned."""
    monkeypatch.setattr(ray, "remote", lambda *args, **kwargs: pytest.fail("an actor was made"))
    small_corpus(tmp_path)
    return RunConfig(
        name="planned",
        storage=str(tmp_path),
        data={"tokens": str(tmp_path / "tokens")},
        model={"preset": "tiny"},
        batch={"micro_batches": 2, "micro_batch_size": 2, "sequence_length": 16},
        training={"steps": 10},
        schedule={"total_steps": 100},
    )


def save(config: RunConfig, step: int, meta: dict[str, Any] | None = None) -> None:
    """A checkpoint as a worker of this run writes it."""
    settled = make_plan(config).config
    identity = {"fingerprint": settled.identity_fingerprint(), "config": settled.model_dump(mode="json")}
    store.save(Storage.open(config.run_url), step, {"parameters/x": torch.zeros(2)}, {**identity, **(meta or {})})


def test_plan_settles_what_was_left_to_the_corpus(config: RunConfig) -> None:
    plan = make_plan(config)
    manifest = Manifest.load(Storage.open(config.data.tokens))
    assert plan.config == config.settled(manifest=manifest.hash, window_blocks=manifest.window_blocks)
    assert plan.spec.model.vocab_size == manifest.vocab_size
    assert plan.order.window_blocks == plan.config.data.window_blocks
    assert (plan.order.seed, plan.order.micro_batches, plan.order.sequence_length) == (0, 2, 16)
    assert plan.run_storage.url == config.run_url
    assert plan.resume_step is None
    assert make_plan(plan.config).config == plan.config  # a successor plans the same


def test_plan_resumes_at_the_newest_complete_checkpoint(config: RunConfig) -> None:
    save(config, 3)
    save(config, 7)
    Storage.open(config.run_url).write("checkpoints/step-00000009/part-00000-0.safetensors", b"its writer died")
    plan = make_plan(config)
    assert plan.resume_step == 7
    (skipped,) = plan.skipped
    assert "step-00000009: it has no manifest, so its writer did not finish" in skipped


@pytest.mark.parametrize(
    "override",
    ["training.steps=500", "workers.max=2", "checkpoint.keep=5", "data.readers=3", "metrics.port=0"],
)
def test_operational_change_resumes(override: str, config: RunConfig) -> None:
    save(config, 3)
    assert make_plan(config.replace(override)).resume_step == 3


def test_moved_corpus_resumes(config: RunConfig, tmp_path: Path) -> None:
    save(config, 3)
    (tmp_path / "tokens").rename(tmp_path / "elsewhere")
    assert make_plan(config.replace(f"data.tokens={tmp_path}/elsewhere")).resume_step == 3


def test_other_identity_is_refused_with_every_difference(config: RunConfig) -> None:
    save(config, 3)
    with pytest.raises(CheckpointError) as caught:
        make_plan(config.replace("optimizer.learning_rate=0.5", "training.seed=9"))
    assert str(caught.value) == (
        f"run planned in {config.storage} has a checkpoint of step 3 that was trained with other settings: "
        "optimizer.learning_rate: 0.0003 -> 0.5; training.seed: 0 -> 9. Set them back to resume it. Other settings make "
        f"another run: one that goes on from here with them (elastic-lm fork {config.run_url} --name planned-2 --set ...), or "
        "one that begins at step 0 (--set name=planned-2)"
    )


def test_other_corpus_at_the_same_place_is_refused(config: RunConfig, tmp_path: Path) -> None:
    save(config, 3)
    small_corpus(tmp_path, num_documents=90)
    with pytest.raises(CheckpointError, match=r"other settings: data\.manifest: '[0-9a-f]+' -> '[0-9a-f]+'"):
        make_plan(config)


@pytest.mark.parametrize(
    "began", [None, "text", {"of": "a later version"}], ids=["no config", "no mapping", "unknown fields"]
)
def test_checkpoint_whose_config_cannot_be_read_is_refused_all_the_same(began: Any, config: RunConfig) -> None:
    save(config, 3, {"fingerprint": "0" * 64, "config": began})
    with pytest.raises(CheckpointError, match="its fingerprint differs"):
        make_plan(config)


HERE = {"torch": "2.13.0", "threads": "1"}


@pytest.mark.parametrize(
    ("then", "told"),
    [
        (HERE, []),
        ({**HERE, "torch": "2.12.0"}, ["torch 2.12.0 -> 2.13.0"]),
        ({"torch": "2.13.0", "gpu": "H100"}, ["gpu H100 -> None", "threads None -> 1"]),
        ({"torch": 2, "threads": 1}, ["torch 2 -> 2.13.0"]),
        (None, []),  # of a version that did not say
        ("a laptop", []),
    ],
)
def test_change_of_environment_is_known(then: Any, told: list[str], config: RunConfig) -> None:
    save(config, 3, {} if then is None else {"environment": then})
    assert make_plan(config).environment_changes(HERE) == told


def test_environment_has_no_say_where_no_bits_are_promised(config: RunConfig) -> None:
    config = config.replace("reduction.kind=fast")
    save(config, 3, {"environment": {"torch": "2.12.0"}})
    assert make_plan(config).environment_changes(HERE) == []


def test_new_run_has_no_environment_yet(config: RunConfig) -> None:
    assert make_plan(config).environment_changes(HERE) == []


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["data.tokens=/nowhere"], DataError, "elastic-lm prepare"),
        (["data.manifest=0123456789abcdef"], ConfigError, "is not the corpus at data.tokens"),
        (["model.vocab_size=10"], ConfigError, "smaller than the corpus's vocabulary"),
        (["batch.sequence_length=1000"], ConfigError, "use a smaller batch.sequence_length"),
    ],
)
def test_what_does_not_fit_the_corpus_is_refused(
    overrides: list[str], error: type[Exception], words: str, config: RunConfig
) -> None:
    with pytest.raises(error, match=words):
        make_plan(config.replace(*overrides))


# -- held-out text -----------------------------------------------------------------------------------------------------


def test_evaluation_is_planned_over_the_held_out_part(config: RunConfig) -> None:
    assert make_plan(config).control_spec().num_held_out_batches == 0
    plan = make_plan(config.replace("evaluation.every=5", "evaluation.samples=3"))
    assert plan.held_out is not None and plan.held_out.num_samples == 3
    spec = plan.control_spec()
    assert (spec.evaluate_every, spec.num_held_out_batches) == (5, 2)
    assert plan.config.identity_fingerprint() == make_plan(config).config.identity_fingerprint()


def test_evaluation_on_a_corpus_that_holds_nothing_out_is_refused(config: RunConfig, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "more.jsonl", texts(60))
    out = Storage.open(f"{tmp_path}/all")
    prepare([source], out, PrepareOptions(vocab_size=300, block_tokens=65, held_out=0))
    everything = config.replace(f"data.tokens={out.url}")
    make_plan(everything)
    with pytest.raises(ConfigError, match="holds 0 tokens out.*evaluation.every.*--held-out"):
        make_plan(everything.replace("evaluation.every=5"))
