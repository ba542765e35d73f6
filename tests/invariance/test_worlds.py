"""The same bits whatever the world: sizes 1 to 5, readers 1 to 3, and a run that is stopped and resumed at another size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.passages import encoder_of
from elastic_lm.events.types import EventKind
from elastic_lm.huggingface.architecture import architecture_of
from elastic_lm.huggingface.folder import write
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.storage import Storage
from tests.faults.harness import Fault, Injector, Run, assert_same_bits

pytestmark = pytest.mark.ray


def thorough(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.thorough)


@pytest.mark.parametrize("world_size", [1, thorough(2), 3, thorough(4), 5])
def test_world_size_does_not_show(world_size: int, start: Callable[..., Run]) -> None:
    run = start(steps=30, workers={"min": world_size, "max": world_size})
    assert_same_bits(run, run.result())
    assert {event.fields["world_size"] for event in run.committed()} == {world_size}


@pytest.mark.parametrize("readers", [thorough(1), 3])
def test_number_of_readers_does_not_show(readers: int, start: Callable[..., Run]) -> None:
    run = start(steps=60, data={"readers": readers, "prefetch_windows": readers})
    assert_same_bits(run, run.result())


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"precision": "fp16"}, "model": {"preset": "tiny", "document_masking": True}},
        {"model": {"preset": "tiny", "dropout": 0.2}, "optimizer": {"kind": "muon"}},
        {
            "model": {"preset": "tiny", "position": "learned", "norm": "layernorm", "activation": "gelu", "tied": True},
            "training": {"precision": "bf16"},
        },
        {"model": {"preset": "bert-tiny", "dropout": 0.1}, "objective": {"name": "masked"}},
        thorough({"model": {"preset": "tiny", "dropout": 0.1}, "training": {"compile": True}}),
    ],
    ids=["fp16, documents apart", "dropout, muon", "gpt2 parts, bf16", "masked", "compiled"],
)
def test_kind_of_model_keeps_the_promise(changes: dict, start: Callable[..., Run]) -> None:
    run = start(steps=20, workers={"min": 3, "max": 3}, **changes)
    assert_same_bits(run, run.result())


def test_run_that_begins_from_a_folder_keeps_the_promise(
    start: Callable[..., Run], cluster: LocalCluster, corpus: str, tmp_path: Path
) -> None:
    """All workers are lost before there is a checkpoint: the folder is read again."""
    write_folder(tmp_path / "model", corpus)
    run = start(steps=30, model={"init": f"hf:{tmp_path}/model"})
    Injector(cluster, run).inject([Fault("kill_all", at_step=5)])
    result = run.result()
    assert_same_bits(run, result)
    assert run.count(EventKind.MEMBER_LOST) >= 2 and run.count(EventKind.CHECKPOINT_SAVED) == 1  # the last one


def write_folder(folder: Path, corpus: str) -> None:
    """As `export --format hf` writes it, of a model that no run here begins with."""
    tokens = Storage.open(corpus)
    manifest = Manifest.load(tokens)
    encoder = encoder_of(tokens, manifest)
    torch.manual_seed(7)
    model = GPT(ModelSpec(manifest.vocab_size, num_layers=1, num_heads=2, width=32, max_tokens=64, norm_eps=1e-6))
    write(
        str(folder), architecture_of(model.spec), dict(model.named_parameters()), tied=True, vocab_size=manifest.vocab_size,
        max_tokens=64, tokenizer_json=encoder.json, special_ids=encoder.special_ids, special_tokens=encoder.special_tokens,
    )  # fmt: skip


def test_resumed_at_another_size_it_ends_with_the_same_bits(start: Callable[..., Run]) -> None:
    first = start(steps=120, name="resumed", workers={"min": 3, "max": 3}, held_at=20)
    first.await_step(20)
    first.stop("to be resumed")
    stopped = first.result()
    assert stopped.verdict == "stopped" and stopped.last_step < 120
    second = start(steps=120, name="resumed", workers={"min": 1, "max": 1})
    assert_same_bits(second, second.result())


def test_fast_sums_lose_no_step_either(start: Callable[..., Run]) -> None:
    run = start(steps=150, reduction={"kind": "fast"})
    run.await_step(20)
    run.kill_a_worker()
    assert run.result().verdict == "done"
    assert [event.step for event in run.committed()] == list(range(150))
