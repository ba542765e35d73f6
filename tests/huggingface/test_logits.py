"""transformers computes the same logits as we do, from the folder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from elastic_lm.errors import ConfigError
from elastic_lm.huggingface import folder
from elastic_lm.huggingface.architecture import architecture_of
from elastic_lm.model.cache import Cache
from elastic_lm.model.presets import PRESETS
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT

SPECIAL = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "end_of_text": 4}
VOCAB, LENGTH = 61, 12
# Of fp32 sums in another order, on logits around 1: measured 2e-6 at most over all of these.
ROUNDING = 2e-5

BERT = PRESETS["bert-tiny"].shape
GPT2 = PRESETS["10m"].shape
SMALL = {"num_layers": 2, "num_heads": 4, "width": 32}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, untied, grouped": ("LlamaForCausalLM", {"tied": False, "num_kv_heads": 2}),
    "llama with biases": ("LlamaForCausalLM", {"bias": True, "hidden": 48}),
    "qwen3": ("Qwen3ForCausalLM", {"qk_norm": True, "num_kv_heads": 1}),
    "llama, long base": ("LlamaForCausalLM", {"rope_theta": 500_000.0}),
    "llama, linear": ("LlamaForCausalLM", {"rope_scaling": "linear", "rope_factor": 4.0}),
    "llama, as 3.1": ("LlamaForCausalLM", {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_tokens": 8}),
    "qwen3, yarn": (
        "Qwen3ForCausalLM",
        {"qk_norm": True, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_tokens": 64},
    ),
    "gpt2": ("GPT2LMHeadModel", {**GPT2, **SMALL}),
    "gpt2 without biases, untied": ("GPT2LMHeadModel", {**GPT2, **SMALL, "bias": False, "tied": False, "hidden": 40}),
    "bert": ("BertForMaskedLM", {**BERT, **SMALL}),
    "bert without biases": ("BertForMaskedLM", {**BERT, **SMALL, "bias": False}),
}


def make(changes: dict[str, Any]) -> GPT:
    torch.manual_seed(0)
    model = GPT(ModelSpec(**{"vocab_size": VOCAB, "max_tokens": LENGTH, **SMALL, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that each has its say
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write(model: GPT, out: Path | str, tokenizer: str = "{}") -> None:
    folder.write(
        str(out), architecture_of(model.spec), dict(model.named_parameters()), tied=model.spec.tied, vocab_size=VOCAB,
        max_tokens=LENGTH, tokenizer_json=tokenizer, special_ids=SPECIAL,
        special_tokens={name: f"<|{name}|>" for name in SPECIAL},
    )  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_same(name: str, tmp_path: Path) -> None:
    architecture, changes = SHAPES[name]
    model = make(changes)
    write(model, tmp_path / "model")
    kind = AutoModelForMaskedLM if architecture.startswith("Bert") else AutoModelForCausalLM
    theirs, told = kind.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert type(theirs).__name__ == architecture
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        expected = theirs.eval()(tokens()).logits
        torch.testing.assert_close(model(tokens()), expected, rtol=ROUNDING, atol=ROUNDING)
        assert expected.std() > 0.5  # it says something


@pytest.mark.parametrize("name", [name for name, (theirs, _) in SHAPES.items() if not theirs.startswith("Bert")])
def test_most_probable_texts_are_the_same_with_their_cache_and_ours(name: str, tmp_path: Path) -> None:
    model, prompt_BT = make(SHAPES[name][1]), tokens()[:, :4]
    write(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    expected = theirs.generate(
        prompt_BT, attention_mask=torch.ones_like(prompt_BT), max_length=LENGTH, do_sample=False, use_cache=True,
        eos_token_id=None,
    )  # fmt: skip
    found, new_BT, cache = [prompt_BT], prompt_BT, Cache(model.spec, LENGTH)
    with torch.no_grad():
        while sum(part_BT.shape[1] for part_BT in found) < LENGTH:
            new_BT = model(new_BT, cache=cache)[:, -1:].argmax(-1)
            found.append(new_BT)
    assert torch.equal(torch.cat(found, 1), expected) and expected.shape[1] == LENGTH


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "sinusoidal"}, "Llama has no model.position=sinusoidal"),
        ({"norm_placement": "sandwich"}, "Llama has no model.norm_placement=sandwich"),
        ({"qk_norm": True, "bias": True}, "Qwen3 has no model.bias=True"),
        ({**GPT2, **SMALL, "attention": "bidirectional"}, "GPT-2 has no model.attention=bidirectional"),
        ({**BERT, **SMALL, "tied": False}, "BERT has no model.tied=False"),
    ],
)
def test_shape_that_transformers_does_not_have_is_refused_by_what_stands_in_the_way(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match="no model of transformers computes this shape") as caught:
        architecture_of(make(changes).spec)
    assert message in str(caught.value)


def test_every_preset_has_a_model_there() -> None:
    found = {
        name: architecture_of(ModelSpec(100, max_tokens=8, **preset.shape)).name for name, preset in PRESETS.items()
    }
    assert set(found.values()) == {"LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"}


def test_every_parameter_goes_out_once() -> None:
    for _, changes in SHAPES.values():
        model = make(changes)
        rows: dict[str, int] = {}
        for place in architecture_of(model.spec).places:
            if place.ours is not None:
                begin, end = place.rows or (0, dict(model.named_parameters())[place.ours].shape[0])
                rows[place.ours] = rows.get(place.ours, 0) + end - begin
        assert rows == {name: parameter.shape[0] for name, parameter in model.named_parameters()}


def test_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        write(make({}), tmp_path / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]


def test_folder_that_cannot_be_written_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: "):
        write(make({}), tmp_path / "file" / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_folder_of_another_kind_is_refused_and_one_with_its_scheme_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="s3://bucket/model is no folder of this machine"):
        write(make({}), "s3://bucket/model")
    assert list(tmp_path.iterdir()) == []
    write(make({}), f"file://{tmp_path}/model")
    assert (tmp_path / "model" / "config.json").exists()


def test_config_says_what_ends_a_text(tmp_path: Path) -> None:
    write(make({}), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["vocab_size"]) == (4, 0, VOCAB)


def test_tokenizer_is_the_corpus_own(tmp_path: Path) -> None:
    from elastic_lm.data.tokenizer import train

    encoder = train(["to be or not to be, that is the question"] * 3, 300)
    write(make({}), tmp_path / "model", encoder.json)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "not to be, <|mask|> that"
    assert theirs.eos_token == "<|end_of_text|>" and theirs.mask_token_id == encoder.special_ids["mask"]
    assert theirs("not to be, that")["input_ids"] == encoder.encode("not to be, that")[:-1]
    assert encoder.special_ids["mask"] in theirs(text)["input_ids"]
