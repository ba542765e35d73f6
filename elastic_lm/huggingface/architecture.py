"""Which class of transformers computes what a shape of ours computes, and where each of our tensors is in it.

Invariant: one table serves both ways, so that what goes out comes in again. Where their class has a parameter that ours lacks
and that does nothing when it is zero (a bias, the vector of a first sentence), zeros go out, and what comes in has to be zero,
or is added to one of ours that has the same effect.
A shape that no class of theirs computes is refused with the choices that stand in the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from elastic_lm.errors import ConfigError
from elastic_lm.model.spec import LLAMA3_HIGH, LLAMA3_LOW, YARN_FAST, YARN_SLOW, ModelSpec

GELUS = {"gelu": "gelu_pytorch_tanh", "gelu_erf": "gelu"}  # ours -> theirs


@dataclass(frozen=True)
class Place:
    """A tensor of theirs. `ours`: the name of ours, of which it is `rows`; None: zeros of `shape`. `turned`: transposed.

    `into`: where there is none of ours, the one that its first row is added to, row by row, when it comes in.
    """

    theirs: str
    ours: str | None
    rows: tuple[int, int] | None = None
    turned: bool = False
    shape: tuple[int, ...] = ()
    into: str | None = None


@dataclass(frozen=True)
class Architecture:
    """A class of transformers for a shape of ours. `config`: what its config.json says."""

    name: str
    config: dict[str, Any]
    places: tuple[Place, ...] = field(repr=False)


def architecture_of(spec: ModelSpec) -> Architecture:
    """Raises: ConfigError when none fits, with what stands in the way of each."""
    refusals = []
    for name, wanted, make in _KINDS:
        found = {choice: getattr(spec, choice) for choice in wanted}
        if differing := [f"model.{choice}={found[choice]}" for choice in wanted if found[choice] not in wanted[choice]]:
            refusals.append(f"{name} has no {', '.join(differing)}")
        else:
            return make(spec)
    raise ConfigError(f"no model of transformers computes this shape: {'; '.join(refusals)}")


# -- the classes -----------------------------------------------------------------------------------------------------

_PLAIN: dict[str, tuple[Any, ...]] = {
    "attention": ("causal",), "norm_placement": ("pre",), "embedding_norm": (False,), "head_transform": (False,),
}  # fmt: skip
_LLAMA: dict[str, tuple[Any, ...]] = {
    **_PLAIN, "position": ("rotary",), "norm": ("rmsnorm",), "activation": ("swiglu",),
}  # fmt: skip
_LEARNED: dict[str, tuple[Any, ...]] = {
    "position": ("learned",), "norm": ("layernorm",), "activation": tuple(GELUS), "num_kv_heads": (None,), "qk_norm": (False,),
}  # fmt: skip
_BERT: dict[str, tuple[Any, ...]] = {
    **_LEARNED, "attention": ("bidirectional",), "norm_placement": ("post",), "embedding_norm": (True,),
    "head_transform": (True,), "tied": (True,),
}  # fmt: skip


def _llama(spec: ModelSpec) -> Architecture:
    config = {**_decoder(spec), "attention_bias": spec.bias, "mlp_bias": spec.bias}
    return Architecture("LlamaForCausalLM", {"model_type": "llama", **config}, tuple(_decoder_places(spec)))


def _qwen3(spec: ModelSpec) -> Architecture:
    config = {"model_type": "qwen3", **_decoder(spec), "attention_bias": False, "use_sliding_window": False}
    return Architecture("Qwen3ForCausalLM", config, tuple(_decoder_places(spec)))


def _decoder(spec: ModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.width,
        "intermediate_size": spec.hidden_width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads or spec.num_heads,
        "head_dim": spec.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_tokens,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "rope_parameters": _rope_parameters(spec),
        "attention_dropout": spec.dropout,
    }


def _rope_parameters(spec: ModelSpec) -> dict[str, Any]:
    parameters: dict[str, Any] = {"rope_type": spec.rope_scaling or "default", "rope_theta": spec.rope_theta}
    if spec.rope_scaling is not None:
        parameters["factor"] = spec.rope_factor
    if spec.rope_original_tokens is not None:
        parameters["original_max_position_embeddings"] = spec.rope_original_tokens
    if spec.rope_scaling == "llama3":
        parameters |= {"low_freq_factor": float(LLAMA3_LOW), "high_freq_factor": float(LLAMA3_HIGH)}
    if spec.rope_scaling == "yarn":
        parameters |= {"beta_fast": float(YARN_FAST), "beta_slow": float(YARN_SLOW)}
    return parameters


def _decoder_places(spec: ModelSpec) -> Iterator[Place]:
    kinds = ("weight", "bias") if spec.bias else ("weight",)
    yield Place("model.embed_tokens.weight", "embedding.weight")
    for number in range(spec.num_layers):
        theirs, ours = f"model.layers.{number}", f"blocks.{number}"
        yield Place(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield Place(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_forward_norm.weight")
        for kind in kinds:
            for name, rows in _qkv_rows(spec):
                yield Place(f"{theirs}.self_attn.{name}_proj.{kind}", f"{ours}.attention.qkv.{kind}", rows)
            yield Place(f"{theirs}.self_attn.o_proj.{kind}", f"{ours}.attention.residual.{kind}")
            for name, begin in (("gate", 0), ("up", spec.hidden_width)):
                rows = (begin, begin + spec.hidden_width)
                yield Place(f"{theirs}.mlp.{name}_proj.{kind}", f"{ours}.feed_forward.gate_and_up.{kind}", rows)
            yield Place(f"{theirs}.mlp.down_proj.{kind}", f"{ours}.feed_forward.residual.{kind}")
        if spec.qk_norm:
            for name in "qk":
                yield Place(f"{theirs}.self_attn.{name}_norm.weight", f"{ours}.attention.{name}_norm.weight")
    yield Place("model.norm.weight", "norm.weight")
    if not spec.tied:
        yield Place("lm_head.weight", "head.weight")


def _gpt2(spec: ModelSpec) -> Architecture:
    config = {
        "model_type": "gpt2",
        "n_embd": spec.width,
        "n_inner": spec.hidden_width,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_positions": spec.max_tokens,
        "activation_function": GELUS[spec.activation],
        "layer_norm_epsilon": spec.norm_eps,
        "embd_pdrop": spec.dropout,
        "attn_pdrop": spec.dropout,
        "resid_pdrop": spec.dropout,
    }
    return Architecture("GPT2LMHeadModel", config, tuple(_gpt2_places(spec)))


def _gpt2_places(spec: ModelSpec) -> Iterator[Place]:
    yield Place("transformer.wte.weight", "embedding.weight")
    yield Place("transformer.wpe.weight", "positions.weight")
    for number in range(spec.num_layers):
        theirs, ours = f"transformer.h.{number}", f"blocks.{number}"
        yield from _norm(spec, f"{theirs}.ln_1", f"{ours}.attention_norm")
        yield from _linear(spec, f"{theirs}.attn.c_attn", f"{ours}.attention.qkv", 3 * spec.width, turned=True)
        yield from _linear(spec, f"{theirs}.attn.c_proj", f"{ours}.attention.residual", spec.width, turned=True)
        yield from _norm(spec, f"{theirs}.ln_2", f"{ours}.feed_forward_norm")
        yield from _linear(spec, f"{theirs}.mlp.c_fc", f"{ours}.feed_forward.up", spec.hidden_width, turned=True)
        yield from _linear(spec, f"{theirs}.mlp.c_proj", f"{ours}.feed_forward.residual", spec.width, turned=True)
    yield from _norm(spec, "transformer.ln_f", "norm")
    if not spec.tied:
        yield Place("lm_head.weight", "head.weight")


def _bert(spec: ModelSpec) -> Architecture:
    config = {
        "model_type": "bert",
        "hidden_size": spec.width,
        "intermediate_size": spec.hidden_width,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "max_position_embeddings": spec.max_tokens,
        "type_vocab_size": 2,
        "hidden_act": GELUS[spec.activation],
        "layer_norm_eps": spec.norm_eps,
        "hidden_dropout_prob": spec.dropout,
        "attention_probs_dropout_prob": spec.dropout,
    }
    return Architecture("BertForMaskedLM", config, tuple(_bert_places(spec)))


def _bert_places(spec: ModelSpec) -> Iterator[Place]:
    yield Place("bert.embeddings.word_embeddings.weight", "embedding.weight")
    yield Place("bert.embeddings.position_embeddings.weight", "positions.weight")
    yield Place("bert.embeddings.token_type_embeddings.weight", None, shape=(2, spec.width), into="positions.weight")
    yield from _norm(spec, "bert.embeddings.LayerNorm", "embedding_norm")
    for number in range(spec.num_layers):
        theirs, ours = f"bert.encoder.layer.{number}", f"blocks.{number}"
        for name, rows in zip(("query", "key", "value"), (rows for _, rows in _qkv_rows(spec)), strict=True):
            yield from _linear(spec, f"{theirs}.attention.self.{name}", f"{ours}.attention.qkv", spec.width, rows)
        yield from _linear(spec, f"{theirs}.attention.output.dense", f"{ours}.attention.residual", spec.width)
        yield from _norm(spec, f"{theirs}.attention.output.LayerNorm", f"{ours}.attention_norm")
        yield from _linear(spec, f"{theirs}.intermediate.dense", f"{ours}.feed_forward.up", spec.hidden_width)
        yield from _linear(spec, f"{theirs}.output.dense", f"{ours}.feed_forward.residual", spec.width)
        yield from _norm(spec, f"{theirs}.output.LayerNorm", f"{ours}.feed_forward_norm")
    yield from _linear(spec, "cls.predictions.transform.dense", "transform.dense", spec.width)
    yield from _norm(spec, "cls.predictions.transform.LayerNorm", "transform.norm")
    yield Place("cls.predictions.bias", "head.bias" if spec.bias else None, shape=(spec.vocab_size,))


_KINDS = (
    ("Llama", {**_LLAMA, "qk_norm": (False,)}, _llama),
    ("Qwen3", {**_LLAMA, "qk_norm": (True,), "bias": (False,)}, _qwen3),
    ("GPT-2", {**_PLAIN, **_LEARNED}, _gpt2),
    ("BERT", _BERT, _bert),
)


# -- parts -----------------------------------------------------------------------------------------------------------


def _qkv_rows(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    begin = 0
    for name, width in (("q", spec.width), ("k", spec.kv_width), ("v", spec.kv_width)):
        yield name, (begin, begin + width)
        begin += width


def _linear(
    spec: ModelSpec, theirs: str, ours: str, width: int, rows: tuple[int, int] | None = None, *, turned: bool = False
) -> Iterator[Place]:
    """Theirs always has a bias; `width` long."""
    yield Place(f"{theirs}.weight", f"{ours}.weight", rows, turned)
    yield Place(f"{theirs}.bias", f"{ours}.bias" if spec.bias else None, rows if spec.bias else None, shape=(width,))


def _norm(spec: ModelSpec, theirs: str, ours: str) -> Iterator[Place]:
    yield Place(f"{theirs}.weight", f"{ours}.weight")
    yield Place(f"{theirs}.bias", f"{ours}.bias" if spec.bias else None, shape=(spec.width,))
