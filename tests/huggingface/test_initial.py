"""A run begins from a folder that transformers wrote: the same logits, and a refusal for whatever would not give them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from elastic_lm.config import RunConfig
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.engine.build import build, fill
from elastic_lm.engine.step import Replica
from elastic_lm.errors import CheckpointError, ConfigError, DataError
from elastic_lm.experiment.weights import weights_of
from elastic_lm.experiments import Experiment
from elastic_lm.huggingface import initial
from elastic_lm.huggingface.architecture import architecture_of
from elastic_lm.huggingface.shape import shape_of
from elastic_lm.runtime.plan import make_plan
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.experiment.parents import forked
from tests.huggingface.test_logits import LENGTH, ROUNDING, SHAPES, VOCAB, make, tokens, write
from tests.solo import Solo, solo_config, without_ray
from tests.test_cli import run

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
DECODER = {"vocab_size": VOCAB, "max_position_embeddings": LENGTH, **LAYERS}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 6}
GPT2_SHAPE = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "llama, grouped, tied, with biases": lambda: LlamaForCausalLM(
        LlamaConfig(**DECODER, num_key_value_heads=2, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    ),
    "llama, its own eps": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, rms_norm_eps=0.1)),
    "llama, yarn": lambda: LlamaForCausalLM(LlamaConfig(**DECODER, rope_parameters=YARN)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE)),
    "gpt2, exact gelu": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SHAPE, activation_function="gelu")),
    "bert": lambda: BertForMaskedLM(BertConfig(**DECODER)),
}


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """With biases and norms that say something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text())
    return found


def ours(path: Path) -> nn.Module:
    """The model in a folder, as a run builds it."""
    spec = shape_of(config_of(path)).spec
    model = build(spec).eval()
    fill(model, initial.read(Storage.open(str(path)), spec)[0])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_folder_of_transformers_has_the_same_logits_here(name: str, tmp_path: Path) -> None:
    theirs = shaken(MODELS[name]())
    theirs.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = theirs(tokens()).logits
        torch.testing.assert_close(ours(tmp_path / "model")(tokens()), expected, rtol=ROUNDING, atol=ROUNDING)
    assert expected.std() > 0.5


@pytest.mark.parametrize("name", SHAPES)
def test_what_goes_out_comes_in_again(name: str, tmp_path: Path) -> None:
    model = make(SHAPES[name][1])
    write(model, tmp_path / "model")
    shape = shape_of(config_of(tmp_path / "model"))
    spec = model.spec if model.spec.bias else shape.spec  # theirs have biases, which are zero
    found, _ = initial.read(Storage.open(str(tmp_path / "model")), model.spec)
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert architecture_of(shape.spec).config == architecture_of(spec).config
    torch.testing.assert_close(ours(tmp_path / "model")(tokens()), model(tokens()), rtol=ROUNDING, atol=ROUNDING)


def test_several_files_and_other_numbers_are_read_as_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = shaken(MODELS["llama"]()).bfloat16()
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    spec = shape_of(config_of(tmp_path / "one")).spec
    one, digest = initial.read(Storage.open(str(tmp_path / "one")), spec)
    parts = []
    many, other = initial.read(Storage.open(str(tmp_path / "many")), spec, on_part=lambda: parts.append(1))
    assert digest != other and len(parts) == len(list((tmp_path / "many").glob("*.safetensors")))
    monkeypatch.setattr(initial, "PART_BYTES", 1000)
    parts.clear()
    again, same = initial.read(Storage.open(str(tmp_path / "one")), spec, on_part=lambda: parts.append(1))
    assert same == digest and len(parts) == -(-(tmp_path / "one" / "model.safetensors").stat().st_size // 1000)
    assert all(torch.equal(tensor, one[name]) for name, tensor in again.items())
    for name, tensor in one.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, many[name])


def test_vocabulary_may_grow(tmp_path: Path) -> None:
    """Rows that the folder lacks are the seed's."""
    write(make({"tied": False}), tmp_path / "model")
    spec = shape_of(config_of(tmp_path / "model")).spec
    larger = make({"tied": False, "vocab_size": VOCAB + 3})
    before = larger.embedding.weight[VOCAB:].clone()
    fill(larger, initial.read(Storage.open(str(tmp_path / "model")), larger.spec)[0])
    found = dict(make({"tied": False}).named_parameters())
    assert spec.vocab_size == VOCAB and torch.equal(larger.embedding.weight[VOCAB:], before)
    assert torch.equal(larger.embedding.weight[:VOCAB], found["embedding.weight"])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"architectures": ["MambaForCausalLM"]}, "it holds a MambaForCausalLM, which we do not compute; known are"),
        ("llama", {"architectures": None}, "names no class of models"),
        ("llama", {"hidden_act": "relu"}, "hidden_act='relu', and we compute 'silu' alone"),
        ("llama", {"head_dim": 16}, "head_dim=16, and we compute 8 alone"),
        ("llama", {"attention_bias": True}, "biases everywhere or nowhere"),
        ("llama", {"num_hidden_layers": None}, "its config.json lacks num_hidden_layers"),
        ("llama", {"num_hidden_layers": "2"}, "is no count"),
        ("llama", {"vocab_size": -1}, "vocab_size=-1, which is no number of tokens"),
        ("llama", {"num_attention_heads": 5}, "model.width=32 is not a multiple of model.num_heads=5"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type='dynamic'"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast=16 of rotary positions, and we compute 32 alone"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "remove the one that is out of date"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
    ],
)  # fmt: skip
def test_folder_that_we_do_not_compute_is_refused_by_its_name(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    MODELS[kind]().save_pretrained(tmp_path / "model")
    said = {name: value for name, value in (config_of(tmp_path / "model") | changes).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        shape_of(said)
    assert message in str(caught.value)


def without(*names: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        kept = {name: tensor for name, tensor in tensors.items() if name not in names}
        safetensors.torch.save_file(kept, path / "model.safetensors")

    return change


def having(**more: torch.Tensor) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        safetensors.torch.save_file({**tensors, **more}, path / "model.safetensors")

    return change


QUERIES = "model.layers.0.self_attn.q_proj.weight"
SWAPPED = {
    QUERIES: torch.ones(31, 32),
    QUERIES.replace("q_proj", "k_proj"): torch.ones(33, 32),
}  # together as many rows
NORM, BIAS = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(NORM), f"it has no tensor {NORM}"),
        (having(**SWAPPED), f"its tensor {QUERIES} is [31, 32], and its config.json means 32 rows"),
        (having(**{BIAS: torch.ones(32)}), f"its tensor {BIAS} has no place in our model"),
        (having(**{NORM: torch.ones(31)}), "its tensor for norm.weight is [31], and its config.json means [32]"),
        (having(**{NORM: torch.tensor(1.0)}), "its tensors for norm.weight do not fit"),
        (having(**{"model.embed_tokens.weight": torch.ones(VOCAB + 1, 32)}), f"is [{VOCAB + 1}, 32], and its config"),
        (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index.json"),
        (lambda path: (path / "model.safetensors").write_bytes(b"no"), "model.safetensors is damaged"),
    ],
    ids=["missing", "cut elsewhere", "unknown", "shape", "scalar", "too many rows", "no weights", "damaged"],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_their_name(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(make({"tied": False}), tmp_path / "model")
    spec = shape_of(config_of(tmp_path / "model")).spec
    change(tmp_path / "model")
    with pytest.raises(ConfigError) as caught:
        initial.read(Storage.open(str(tmp_path / "model")), spec)
    assert message in str(caught.value)


def test_head_that_is_not_the_embedding_is_no_tied_one(tmp_path: Path) -> None:
    """transformers takes it as it is, whatever config.json says."""
    write(make({}), tmp_path / "model")
    spec = shape_of(config_of(tmp_path / "model")).spec
    embedding = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    having(**{"lm_head.weight": embedding.clone()})(tmp_path / "model")
    initial.read(Storage.open(str(tmp_path / "model")), spec)
    having(**{"lm_head.weight": embedding + 1})(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"its tensor lm_head\.weight is not the embedding's"):
        initial.read(Storage.open(str(tmp_path / "model")), spec)


def test_fewer_rows_than_config_json_says_are_missed(tmp_path: Path) -> None:
    write(make({}), tmp_path / "model")
    spec = shape_of(config_of(tmp_path / "model")).spec
    having(**{"model.embed_tokens.weight": torch.ones(VOCAB - 1, 32)})(tmp_path / "model")
    with pytest.raises(
        ConfigError, match=rf"embedding\.weight is \[{VOCAB - 1}, 32\], and its config.json means \[{VOCAB}, 32\]"
    ):
        initial.read(Storage.open(str(tmp_path / "model")), spec, num_rows=VOCAB)


def test_original_length_beside_the_rope_parameters_counts(tmp_path: Path) -> None:
    MODELS["llama, yarn"]().save_pretrained(tmp_path / "model")
    said = config_of(tmp_path / "model")
    assert shape_of(said).spec.rope_original_tokens == 6
    assert shape_of(said | {"original_max_position_embeddings": 5}).spec.rope_original_tokens == 5


def test_index_that_is_damaged_is_told(tmp_path: Path) -> None:
    shaken(MODELS["llama"]()).save_pretrained(tmp_path / "model", max_shard_size="10KB")
    spec = shape_of(config_of(tmp_path / "model")).spec
    for text, message in (
        ("{", "is damaged"),
        ('{"weight_map": {"a": "../x"}}', "names files that are no safetensors"),
    ):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            initial.read(Storage.open(str(tmp_path / "model")), spec)


def test_model_without_its_head_is_missed_by_name(tmp_path: Path) -> None:
    """A folder of BertModel has the encoder alone, and calls its tensors without their prefix."""
    BertModel(BertConfig(**DECODER)).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="it holds a BertModel"):
        shape_of(config_of(tmp_path / "model"))
    said = config_of(tmp_path / "model") | {"architectures": ["BertForMaskedLM"]}
    with pytest.raises(ConfigError, match=r"it has no tensor cls\.predictions\.transform\.dense\.weight"):
        initial.read(Storage.open(str(tmp_path / "model")), shape_of(said).spec)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parent(small_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Solo, Path]:
    """A run of a few steps, and the folder that it was exported to."""
    folder = tmp_path_factory.mktemp("parent")
    shape = {"num_layers": 1, "num_heads": 2, "width": 16, "norm_eps": 1e-6}
    config = solo_config(small_corpus, f"file://{folder}", model=shape)
    solo = Solo(config)
    assert solo.train().verdict == "done"
    told = run("export", config.run_url, "--format", "hf", "--out", str(folder / "model"))
    assert told.exit_code == 0, told.output
    return solo, folder / "model"


def child_config(tokens: str, storage: Path, folder: Path, **model: Any) -> RunConfig:
    return solo_config(tokens, f"file://{storage}", "child", model={"init": f"hf:{folder}", **model})


def copied(folder: Path, to: Path, *changes: Callable[[Path], None]) -> Path:
    shutil.copytree(folder, to)
    for change in changes:
        change(to)
    return to


def test_run_begins_with_the_weights_of_another(parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path) -> None:
    solo, folder = parent
    begun = Solo(child_config(small_corpus, tmp_path, folder))
    model = begun.plan.config.model
    assert (model.num_layers, model.width, model.norm_eps, model.max_tokens) == (1, 16, 1e-6, 32)
    assert begun.plan.spec.model.num_parameters == solo.plan.spec.model.num_parameters  # type: ignore[union-attr]
    assert begun.plan.init is not None
    replica = Replica(begun.plan.spec)
    replica.initialise(initial.read(begun.plan.init[0], begun.plan.spec.model, begun.plan.init[1])[0])  # type: ignore[arg-type]
    _, weights = weights_of(Storage.open(solo.plan.config.run_url))
    for name, parameter in replica.model.named_parameters():
        assert torch.equal(parameter, weights[name])
    moved = child_config(small_corpus, tmp_path, copied(folder, tmp_path / "moved")).replace("name=moved")
    fresh = child_config(small_corpus, tmp_path, folder).replace("name=fresh", "model.init=null", *_shape_of(begun))
    digests = [done(Solo(config)) for config in (moved, fresh)]
    mine = done(begun)
    assert mine == digests[0] != digests[1]


def _shape_of(solo: Solo) -> list[str]:
    return [f"model.{name}={getattr(solo.plan.config.model, name)}" for name in ("num_layers", "num_heads", "width")]


def done(solo: Solo) -> dict[str, str]:
    result = solo.train()
    assert result.verdict == "done"
    return result.digest


def test_run_that_goes_on_needs_the_folder_no_more(
    parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path
) -> None:
    folder = copied(parent[1], tmp_path / "model")
    config = child_config(small_corpus, tmp_path, folder)
    expected = done(Solo(config.replace("name=undisturbed")))
    assert Solo(config).train(until=3).verdict == "stopped"
    shutil.rmtree(folder)
    assert make_plan(config).resume_step == 3
    assert done(Solo(config)) == expected


def test_other_weights_are_another_run(parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path) -> None:
    config = child_config(small_corpus, tmp_path, parent[1])
    Solo(config).train(until=3)
    other = copied(parent[1], tmp_path / "other", having(**{NORM: torch.ones(16)}))
    with pytest.raises(CheckpointError, match=r"model\.init_hash: '.*' -> '.*'"):
        make_plan(child_config(small_corpus, tmp_path, other))


def test_weights_that_were_changed_since_the_run_was_planned_are_not_begun_from(
    parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path
) -> None:
    folder = copied(parent[1], tmp_path / "model")
    config = child_config(small_corpus, tmp_path, folder)
    planned = Solo(config)
    having(**{NORM: torch.ones(16)})(folder)
    with pytest.raises(AssertionError, match=r"have the sha256 .* instead of .*: they are not those"):
        planned.train()
    with pytest.raises(DataError, match="not those that the run was planned with"):
        make_plan(config.replace("name=second", f"model.init_hash={planned.plan.config.model.init_hash}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 32}, "model.width=32 is not what the folder of model.init="),
        ({"model.preset": "tiny"}, "is not what the folder of model.init="),
        ({"model.vocab_size": 10}, "model.vocab_size=10 is less than the 300 rows"),
        ({"batch.sequence_length": 64}, "model.max_tokens=32"),
        ({"objective.name": "masked"}, "set model.attention: bidirectional"),
        ({"model.init": "hf:/nowhere"}, "/nowhere has no config.json; name a folder that transformers wrote"),
    ],
)
def test_config_that_the_folder_contradicts_is_refused(
    changes: dict[str, Any], message: str, parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path
) -> None:
    config = child_config(small_corpus, tmp_path, parent[1])
    with pytest.raises(ConfigError) as caught:
        make_plan(config.replace(*(f"{name}={value}" for name, value in changes.items())))
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_context_may_be_stretched(parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path) -> None:
    config = child_config(
        small_corpus, tmp_path, parent[1], max_tokens=64, rope_scaling="yarn", rope_factor=2.0, rope_original_tokens=32
    ).replace("batch.sequence_length=64")
    assert done(Solo(config)) == done(Solo(config.replace("name=again")))


def test_corpus_of_another_tokenizer_is_refused_with_the_command_that_makes_one(
    parent: tuple[Solo, Path], tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "text.jsonl", texts(100, seed=3))
    tokens = Storage.open(f"file://{tmp_path}/tokens")
    prepare([source], tokens, PrepareOptions(vocab_size=280, block_tokens=257))
    config = child_config(tokens.url, tmp_path, parent[1])
    with pytest.raises(
        ConfigError, match="another tokenizer; make one with this: elastic-lm prepare --tokenizer"
    ) as caught:
        make_plan(config)
    tokenizer = str(caught.value).rpartition(" ")[2]
    made = run("prepare", source, "--tokenizer", tokenizer, "--out", f"{tmp_path}/suitable")
    assert made.exit_code == 0, made.output
    assert make_plan(config.replace(f"data.tokens=file://{tmp_path}/suitable")).config.model.vocab_size == 300


def test_tokenizer_that_cuts_text_in_another_way_is_refused(
    parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path
) -> None:
    """The same tokens with the same ids."""

    def lowercasing(path: Path) -> None:
        told = json.loads((path / "tokenizer.json").read_text())
        (path / "tokenizer.json").write_text(json.dumps({**told, "normalizer": {"type": "Lowercase"}}))

    folder = copied(parent[1], tmp_path / "model", lowercasing)
    with pytest.raises(ConfigError, match=r"cuts text in another way \(normalizer\) than that of the corpus"):
        make_plan(child_config(small_corpus, tmp_path, folder))


def test_corpus_that_was_put_in_anothers_place_is_looked_at_again(
    parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path
) -> None:
    """Before there is a checkpoint; a coordinator's own config names the corpus."""
    config = Solo(child_config(small_corpus, tmp_path, parent[1])).plan.config
    assert make_plan(config).init
    source = write_lines(tmp_path / "text.jsonl", texts(100, seed=3))
    tokens = Storage.open(f"file://{tmp_path}/tokens")
    prepare([source], tokens, PrepareOptions(vocab_size=280, block_tokens=257))
    with pytest.raises(ConfigError, match="another tokenizer"):
        make_plan(config.replace(f"data.tokens={tokens.url}", "data.manifest=null"))


def test_commands_know_the_shape(parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"name: child\nstorage: file://{tmp_path}\ndata: {{tokens: '{small_corpus}'}}\n"
        f"model: {{init: 'hf:{parent[1]}'}}\nbatch: {{micro_batches: 2, micro_batch_size: 1, sequence_length: 32}}\n"
        "training: {steps: 6}\n"
    )
    for command in (["config", "show"], ["config", "validate"], ["estimate"], ["train", "--dry-run"]):
        told = run(*command, str(file))
        assert told.exit_code == 0, (command, told.output)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"init": "/folder"}, "is no hf:FOLDER; write hf:/folder or hf:s3://bucket/prefix"),
        ({"init": "hf:http://x/y"}, "http"),
        ({"preset": "tiny", "init_hash": "0" * 64}, "model.init_hash=000000000000 has no effect without model.init"),
        ({"factory": "a.b:c", "init": "hf:/folder"}, "model.init has no effect"),
    ],
)
def test_init_that_makes_no_sense_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        solo_config("file:///nowhere", "file:///nowhere", model=model)
    assert message in str(caught.value)


@pytest.mark.parametrize("is_there", [True, False], ids=["folder", "no folder"])
def test_fork_of_another_shape_is_compared_with_what_it_was_forked_as(
    is_there: bool, parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path
) -> None:
    folder = copied(parent[1], tmp_path / "model")
    config = child_config(small_corpus, tmp_path, folder)
    Solo(config).train(until=3)
    made = forked(config, "deeper", step=3, overrides=["model.num_layers=3", "model.qk_norm=true"])
    if not is_there:
        shutil.rmtree(folder)
    assert make_plan(made.config).resume_step == 3
    (tmp_path / "whole.yaml").write_text(made.config.to_yaml())
    mine = config.replace("name=deeper", "model.num_layers=3", "model.qk_norm=true")  # as a person writes it
    (tmp_path / "mine.yaml").write_text(mine.to_yaml())
    for file in ("whole.yaml", "mine.yaml"):
        told = run("estimate", str(tmp_path / file), "--json")
        assert told.exit_code == 0, told.stderr
        spec = make_plan(made.config).spec.model
        assert json.loads(told.stdout)["num_parameters"] == spec.num_parameters  # type: ignore[union-attr]
        assert run("config", "validate", str(tmp_path / file)).exit_code == 0
        shown = run("config", "show", str(tmp_path / file), "--json")
        assert shown.exit_code == 0 and '"num_layers": 3' in shown.stdout, shown.stderr
    # Another run would begin from the folder, which has another shape.
    told = run("estimate", str(tmp_path / "whole.yaml"), "--set", "name=fresh")
    assert told.exit_code == 2
    assert ("is not what the folder of model.init" if is_there else "has no config.json") in told.stderr


def test_fork_of_another_shape_is_no_base_of_an_experiment(
    parent: tuple[Solo, Path], small_corpus: str, tmp_path: Path
) -> None:
    """Its first attempt would begin at step 0, where there are no weights of that shape; one of the folder's shape is a base."""
    config = child_config(small_corpus, tmp_path, parent[1])
    Solo(config).train(until=3)
    made = forked(config, "deeper", step=3, overrides=["model.num_layers=3"])
    plan = {"name": "x", "target": "loss <= 1", "changes": [{"optimizer.learning_rate": 1e-3}]}
    (tmp_path / "plan.yaml").write_text(json.dumps({**plan, "base": f"{made.url}/config.yaml"}))
    told = r"num_layers=3 is not what .*, num_layers=1; .* begins at step 0 .* is no base; have attempts that are forks change"
    with pytest.raises(ConfigError, match=told):
        Experiment.open(tmp_path / "plan.yaml")
    (tmp_path / "plan.yaml").write_text(json.dumps({**plan, "base": f"{config.run_url}/config.yaml"}))
    with pytest.raises(ConfigError, match="the corpus holds 0 tokens out"):  # what is looked at next
        Experiment.open(tmp_path / "plan.yaml")


def test_attempts_may_be_forks_of_another_shape_than_the_folder_that_the_base_begins_from(
    held_out_corpus: str, tmp_path: Path
) -> None:
    shape = {"num_layers": 1, "num_heads": 2, "width": 16}
    origin = Solo(solo_config(held_out_corpus, f"file://{tmp_path}", "origin", model=shape))
    done(origin)
    folder = str(tmp_path / "model")
    assert run("export", origin.plan.config.run_url, "--format", "hf", "--out", folder).exit_code == 0
    base = solo_config(held_out_corpus, f"file://{tmp_path}", "base", model={"init": f"hf:{folder}"})
    (tmp_path / "base.yaml").write_text(base.to_yaml())
    plan = {"name": "deeper", "base": "base.yaml", "target": "loss <= 1", "parent": "base", "steps": 4}
    (tmp_path / "plan.yaml").write_text(json.dumps({**plan, "changes": [{"model.num_layers": 3}]}))
    with without_ray():
        result = Experiment.open(tmp_path / "plan.yaml").run()
    assert [(attempt.state, attempt.parent) for attempt in result.attempts] == [("done", None), ("done", 0)]
    assert RunConfig.load(str(tmp_path / "runs/deeper-01/config.yaml")).model.num_layers == 3
