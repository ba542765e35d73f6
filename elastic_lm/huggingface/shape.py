"""From the config.json of a folder to the shape of ours that computes the same: architecture.py's table, read the other way.

Invariant: the shape that is found, written out again, says what the folder says wherever the folder says anything. So whatever
would be computed otherwise (another activation, a scale of its own) is refused by its name, and never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_lm.errors import ConfigError
from elastic_lm.huggingface.architecture import GELUS, architecture_of
from elastic_lm.model.spec import LLAMA3_HIGH, LLAMA3_LOW, YARN_FAST, YARN_SLOW, ModelSpec

# Choices of training, and what is compared in parts.
_OURS_ALONE = {
    "attention_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "type_vocab_size", "rope_theta", "rope_parameters",
}  # fmt: skip
_SAME_NAME = {"gelu_new": GELUS["gelu"], "swish": "silu"}
_ACTIVATIONS = {name: ours for ours, name in GELUS.items()}
_ROPE_COMPUTED = {
    "yarn": {"beta_fast": YARN_FAST, "beta_slow": YARN_SLOW},
    "llama3": {"low_freq_factor": LLAMA3_LOW, "high_freq_factor": LLAMA3_HIGH},
}
_ROPE_TYPES = {"default": None, "linear": "linear", "yarn": "yarn", "llama3": "llama3"}


@dataclass(frozen=True)
class Shape:
    """`fields`: of ModelConfig, all but dropout. `spec`: the same with the folder's vocabulary of `spec.vocab_size` rows.

    `may_lack_bias`: its class has biases always, and they may all be zero.
    """

    fields: dict[str, Any]
    spec: ModelSpec
    may_lack_bias: bool


def shape_of(config: Mapping[str, Any]) -> Shape:
    """What a config.json describes.    Raises: ConfigError naming what we do not compute."""
    kind = _KINDS[_name_of(config)]
    said = {**kind.defaults, **{key: value for key, value in config.items() if value is not None}}
    try:
        fields = {**kind.constant, **kind.read(said)}
    except KeyError as error:
        raise ConfigError(
            f"its config.json lacks {error.args[0]}; write the folder again with save_pretrained"
        ) from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"its config.json is damaged: {error}; write the folder again with save_pretrained") from None
    vocab_size = said.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ConfigError(
            f"its config.json says vocab_size={vocab_size}, which is no number of tokens; write the folder again"
        )
    spec = ModelSpec(**fields, vocab_size=vocab_size)
    _check(said, spec, kind)
    return Shape(fields, spec, kind.may_lack_bias)


def _name_of(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    known = f"known are {', '.join(_KINDS)}"
    if not isinstance(names, list) or len(names) != 1:
        raise ConfigError(f"its config.json names no class of models in `architectures`; {known}")
    if names[0] not in _KINDS:
        raise ConfigError(f"it holds a {names[0]}, which we do not compute; {known}")
    return str(names[0])


def _check(said: Mapping[str, Any], spec: ModelSpec, kind: _Kind) -> None:
    """Raises: ConfigError with all that the folder says and we would not compute."""
    written = {name: value for name, value in architecture_of(spec).config.items() if name not in _OURS_ALONE}
    written |= kind.computed
    differing = [
        f"{name}={said[name]!r}, and we compute {value!r} alone"
        for name, value in written.items()
        if name in said and _SAME_NAME.get(_hashable(said[name]), said[name]) != value
    ]
    if differing:
        raise ConfigError(f"its config.json says {'; '.join(differing)}; choose another model")


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str) else None


# -- the classes -----------------------------------------------------------------------------------------------------


def _llama(said: Mapping[str, Any]) -> dict[str, Any]:
    attention, mlp = bool(said["attention_bias"]), bool(said["mlp_bias"])
    if attention != mlp:
        raise ConfigError(
            f"its config.json says attention_bias={attention} and mlp_bias={mlp}, and ours has biases everywhere or nowhere; "
            "choose another model"
        )
    return {**_decoder(said), "bias": attention}


def _decoder(said: Mapping[str, Any]) -> dict[str, Any]:
    num_heads = _count(said, "num_attention_heads")
    num_kv_heads = _count(said, "num_key_value_heads") if "num_key_value_heads" in said else num_heads
    return {
        "num_layers": _count(said, "num_hidden_layers"),
        "num_heads": num_heads,
        "width": _count(said, "hidden_size"),
        "hidden": _count(said, "intermediate_size"),
        "max_tokens": _count(said, "max_position_embeddings"),
        "num_kv_heads": None if num_kv_heads == num_heads else num_kv_heads,
        "tied": bool(said["tie_word_embeddings"]),
        "norm_eps": _eps(said, "rms_norm_eps"),
        **_rope(said),
    }


def _rope(said: Mapping[str, Any]) -> dict[str, Any]:
    """From `rope_parameters`, or from `rope_theta` and `rope_scaling` as earlier versions wrote them."""
    older, newer = said.get("rope_scaling") or {}, said.get("rope_parameters") or {}
    if older and newer and {**newer, **older} != newer:
        raise ConfigError(
            f"its config.json says rope_scaling={older} and rope_parameters={newer}; remove the one that is out of date"
        )
    rope = {
        "rope_theta": said.get("rope_theta", 10_000.0),
        **older,
        **newer,
    }
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    if kind not in _ROPE_TYPES:
        raise ConfigError(
            f"its config.json says rope_type={kind!r}, and we compute {', '.join(_ROPE_TYPES)} alone; choose another model"
        )
    found: dict[str, Any] = {"rope_theta": float(rope.pop("rope_theta")), "rope_scaling": _ROPE_TYPES[kind]}
    if kind != "default":
        found["rope_factor"] = float(rope.pop("factor"))
    if kind in ("yarn", "llama3"):
        original = rope.pop("original_max_position_embeddings", None)
        original = said.get("original_max_position_embeddings") or original or said["max_position_embeddings"]
        found["rope_original_tokens"] = int(original)
    if kind == "default":  # of no effect there
        rope = {
            name: value for name, value in rope.items() if name not in ("factor", "original_max_position_embeddings")
        }
    computed = {"partial_rotary_factor": 1, "truncate": True, **_ROPE_COMPUTED.get(kind, {})}
    for name, value in rope.items():
        if value is not None and value != computed.get(name):
            raise ConfigError(
                f"its config.json says {name}={value!r} of rotary positions, and we compute {computed.get(name)} alone; choose "
                "another model"
            )
    return found


def _gpt2(said: Mapping[str, Any]) -> dict[str, Any]:
    width = _count(said, "n_embd")
    return {
        "num_layers": _count(said, "n_layer"),
        "num_heads": _count(said, "n_head"),
        "width": width,
        "hidden": _count(said, "n_inner") if "n_inner" in said else 4 * width,
        "max_tokens": _count(said, "n_positions"),
        "activation": _gelu(said, "activation_function"),
        "norm_eps": _eps(said, "layer_norm_epsilon"),
        "tied": bool(said["tie_word_embeddings"]),
    }


def _bert(said: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": _count(said, "num_hidden_layers"),
        "num_heads": _count(said, "num_attention_heads"),
        "width": _count(said, "hidden_size"),
        "hidden": _count(said, "intermediate_size"),
        "max_tokens": _count(said, "max_position_embeddings"),
        "activation": _gelu(said, "hidden_act"),
        "norm_eps": _eps(said, "layer_norm_eps"),
    }


def _gelu(said: Mapping[str, Any], name: str) -> str:
    """Another one is left to the comparison of what is said with what is computed."""
    return _ACTIVATIONS.get(_SAME_NAME.get(said[name], said[name]), "gelu")


def _eps(said: Mapping[str, Any], name: str) -> float:
    return float(said[name])


def _count(said: Mapping[str, Any], name: str) -> int:
    value = said[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is no count")
    return value


@dataclass(frozen=True)
class _Kind:
    """`defaults`: what its class takes where config.json says nothing. `computed`: the only values that we compute."""

    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    constant: dict[str, Any]
    defaults: dict[str, Any]
    computed: dict[str, Any]
    may_lack_bias: bool = False


_OURS = {
    "norm_placement": "pre",
    "attention": "causal",
    "qk_norm": False,
    "embedding_norm": False,
    "head_transform": False,
}
_ROTARY = {**_OURS, "position": "rotary", "norm": "rmsnorm", "activation": "swiglu"}
_LEARNED = {**_OURS, "position": "learned", "norm": "layernorm", "bias": True}

_KINDS = {
    "LlamaForCausalLM": _Kind(
        _llama,
        _ROTARY,
        {"attention_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False},
        {},
    ),
    "Qwen3ForCausalLM": _Kind(
        _decoder,
        {**_ROTARY, "qk_norm": True, "bias": False},
        {"attention_bias": False, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "head_dim": 128,
         "num_key_value_heads": 32},
        {"use_sliding_window": False},
    ),
    "GPT2LMHeadModel": _Kind(
        _gpt2,
        _LEARNED,
        {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        may_lack_bias=True,
    ),
    "BertForMaskedLM": _Kind(
        _bert,
        {**_LEARNED, "attention": "bidirectional", "norm_placement": "post", "embedding_norm": True, "head_transform": True,
         "tied": True},
        {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "tie_word_embeddings": True},
        {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True},
        may_lack_bias=True,
    ),
}  # fmt: skip
