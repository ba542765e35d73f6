"""A run's newest checkpoint becomes a folder that transformers loads: by the command, with the run's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from elastic_lm.checkpoint import store
from elastic_lm.model.transformer import GPT
from elastic_lm.storage import Storage
from tests.solo import Solo, solo_config
from tests.test_cli import run

BERT = {"model": {"preset": "bert-tiny"}, "objective": {"name": "masked"}}


@pytest.mark.parametrize(
    ("changes", "kind"), [({}, AutoModelForCausalLM), (BERT, AutoModelForMaskedLM)], ids=["causal", "masked"]
)
def test_run_is_exported_with_the_weights_of_its_newest_checkpoint(
    changes: dict[str, Any], kind: Any, small_corpus: str, tmp_path: Path
) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", **changes)
    solo = Solo(config)
    assert solo.train().verdict == "done"
    told = run("export", config.run_url, "--format", "hf", "--out", str(tmp_path / "model"))
    assert told.exit_code == 0, told.output
    assert told.stdout == f"Wrote the model of step 6 to {tmp_path}/model: transformers loads it by that name.\n"
    ours = GPT(solo.plan.spec.model).eval()  # type: ignore[arg-type]
    tensors = store.load(Storage.open(config.run_url), 6).tensors
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(tensors[f"parameters/{name}"])
    tokens_BT = torch.arange(5, 37)[None]
    with torch.no_grad():
        theirs = kind.from_pretrained(tmp_path / "model").eval()(tokens_BT).logits
        torch.testing.assert_close(ours(tokens_BT), theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "onnx", "--out", "x"], "--format 'onnx' is unknown; write --format hf"),
        (["--format", "hf"], "name it with --out FOLDER"),
        (["--format", "hf", "--out", "x", "--to", "wandb"], "without --to"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], message: str) -> None:
    told = run("export", "/nowhere/runs/r", *arguments)
    assert told.exit_code == 2 and message in told.output


def test_run_without_a_checkpoint_is_told(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}")
    solo = Solo(config)
    told = run("export", config.run_url, "--format", "hf", "--out", str(tmp_path / "model"))
    assert told.exit_code != 0 and "has no complete checkpoint yet" in told.output
    assert not (tmp_path / "model").exists()
    del solo


def test_parts_without_wanted_tensors_are_not_read(tmp_path: Path) -> None:
    class Counting(Storage):
        read_names: list[str] = []

        def child(self, path: str) -> Storage:
            return Counting(super().child(path).url)

        def read(self, path: str) -> bytes:
            Counting.read_names.append(path)
            return super().read(path)

    tensors = {f"{kind}/{n}": torch.full((4,), float(n)) for kind in ("exp_avg", "parameters") for n in range(3)}
    store.save(Storage.open(f"file://{tmp_path}"), 3, tensors, {}, part_bytes=16)
    loaded = store.load(Counting(f"file://{tmp_path}"), 3, prefix="parameters/").tensors
    assert loaded.keys() == {f"parameters/{n}" for n in range(3)}
    assert all(torch.equal(loaded[f"parameters/{n}"], tensors[f"parameters/{n}"]) for n in range(3))
    assert len(Counting.read_names) == 1 + 3  # the manifest, and the parts that hold them


def test_checkpoint_that_a_run_deletes_meanwhile_is_no_error(
    small_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}")
    Solo(config).train()
    storage, load = Storage.open(config.run_url), store.load

    def pruned(storage: Storage, step: int, **more: Any) -> Any:
        monkeypatch.setattr(store, "load", load)
        newer = load(storage, step)
        store.save(storage, step + 1, newer.tensors, newer.info.meta)
        for name in storage.list(f"checkpoints/step-{step:08d}/"):
            storage.delete(name)
        return load(storage, step, **more)

    monkeypatch.setattr(store, "load", pruned)
    told = run("export", config.run_url, "--format", "hf", "--out", str(tmp_path / "model"))
    assert told.exit_code == 0 and "the model of step 7" in told.stdout
    assert storage.exists("checkpoints/step-00000007/manifest.json")
