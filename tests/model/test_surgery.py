"""Another shape for a trained model: what computes the same afterwards, what is kept to the bit, what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import asdict
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_lm.errors import ConfigError
from elastic_lm.model import surgery
from elastic_lm.model.account import Account
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.surgery import Surgery
from elastic_lm.model.transformer import GPT, INIT_STD

VOCAB, WIDTH, LENGTH, LAYERS, HEADS, HIDDEN = 11, 16, 8, 2, 4, 24
SEED = 5
ROUNDING = 1e-6  # of logits of about 10: products of other shapes add up in another order


def spec(**changes: Any) -> ModelSpec:
    shape: dict[str, Any] = {"vocab_size": VOCAB, "num_layers": LAYERS, "num_heads": HEADS, "width": WIDTH}
    return ModelSpec(**{**shape, "max_tokens": LENGTH, "hidden": HIDDEN, **changes})


def trained(of: ModelSpec) -> GPT:
    """No parameter of it is what a new model has."""
    model = GPT(of)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.3, 0.5, generator=generator)
    return model.eval()


def operated(model: GPT, after: ModelSpec, seed: int = SEED) -> tuple[GPT, Surgery]:
    found = Surgery.between(model.spec, after)
    old, new = dict(model.named_parameters()), GPT(after)
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            beginning = found.beginnings[name]
            source = None if beginning.source is None else old[beginning.source].detach()
            parameter.copy_(beginning.weight(source, seed))
    return new.eval(), found


def logits(model: GPT) -> Tensor:
    tokens = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens)


BASES = [
    {"tied": tied, "attention": attention, "norm_placement": placement, **more}
    for tied, attention, placement, more in product(
        [True, False],
        ["causal", "bidirectional"],
        ["pre", "sandwich"],
        [{}, {"norm": "layernorm", "bias": True, "activation": "gelu", "position": "learned"}],
    )
]


# -- the same function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES, ids=str)
def test_new_blocks_change_no_bit_of_any_logit(base: dict[str, Any]) -> None:
    old = trained(spec(**base))
    new, found = operated(old, spec(**base, num_layers=LAYERS + 3))
    assert torch.equal(logits(new), logits(old))
    assert found.account.differs == ()


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"hidden": HIDDEN + 9}),
        ({"activation": "gelu", "bias": True}, {"hidden": 2 * HIDDEN}),
        ({"norm": "layernorm"}, {"bias": True}),
        ({"head_transform": True, "tied": False}, {"bias": True}),
        ({}, {"tied": False}),
        ({"position": "learned"}, {"max_tokens": 2 * LENGTH}),
        ({"position": "learned"}, {"max_tokens": LENGTH + 1}),
        ({"num_kv_heads": 1}, {"num_kv_heads": 2}),
        ({"num_kv_heads": 2, "bias": True, "qk_norm": True}, {"num_kv_heads": None}),  # as many as of queries
        ({"norm_placement": "post"}, {"hidden": 2 * HIDDEN}),
        ({"bias": True}, {"hidden": 2 * HIDDEN, "num_layers": 4, "tied": False, "max_tokens": 99}),  # at once
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_what_is_added_to_a_model_that_computes_the_same(
    base: dict[str, Any], change: dict[str, Any], attention: str
) -> None:
    old = trained(spec(**base, attention=attention))
    new, found = operated(old, spec(**{**base, **change}, attention=attention))
    assert sum(p.numel() for p in new.parameters()) >= sum(p.numel() for p in old.parameters())
    torch.testing.assert_close(logits(new), logits(old), rtol=ROUNDING, atol=ROUNDING * 10)
    assert found.account.differs == ()
    assert found.account.effect == "The model computes what its parent's does, up to rounding."


def test_new_parts_are_trained() -> None:
    """They put out zero, and yet their gradients are not all zero: else they would do so for ever."""
    for placement in ("pre", "sandwich"):
        base = {"norm_placement": placement}
        new, _ = operated(trained(spec(**base)), spec(**base, num_layers=3, hidden=2 * HIDDEN))
        new.train()(torch.zeros(1, LENGTH, dtype=torch.long)).square().sum().backward()
        end = "attention_out_norm.weight" if placement == "sandwich" else "attention.residual.weight"
        gradients = {name: parameter.grad for name, parameter in new.named_parameters()}
        assert gradients[f"blocks.2.{end}"].abs().max() > 0
        assert gradients["blocks.0.feed_forward.residual.weight"][:, HIDDEN:].abs().max() > 0


# -- another function, and it is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change", "told"),
    [
        ({}, {"qk_norm": True}, "the norms of queries and keys begin"),
        ({"qk_norm": True}, {"qk_norm": False}, "the norms of queries and keys end"),
        ({}, {"embedding_norm": True}, "the norm behind the embedding begins"),
        ({}, {"head_transform": True}, "the layer before the head begins"),
        ({"head_transform": True}, {"head_transform": False}, "the layer before the head ends"),
        ({}, {"norm_placement": "sandwich"}, "the norms behind attention and feed-forward begin"),
        ({"norm_placement": "sandwich"}, {"norm_placement": "pre"}, "the norms behind attention and feed-forward end"),
        ({"bias": True}, {"bias": False}, "biases end"),
        ({}, {"num_layers": 1}, "blocks [1:2] end"),
        ({"norm_placement": "post"}, {"num_layers": 4}, "blocks [2:4] normalise what they let through"),
        ({"activation": "gelu"}, {"activation": "gelu_erf", "num_layers": 3}, "model.activation changes"),
        ({}, {"document_separator": 9, "num_layers": 3}, "model.document_masking changes"),
    ],
)  # fmt: skip
def test_what_computes_something_else_says_why(base: dict[str, Any], change: dict[str, Any], told: str) -> None:
    old = trained(spec(**base))
    new, found = operated(old, spec(**{**base, **change}))
    assert not torch.allclose(logits(new), logits(old), rtol=10 * ROUNDING, atol=10 * ROUNDING)
    assert found.account.differs == (told,)
    assert told in found.account.effect


def test_new_norm_is_the_one_of_its_formula_with_a_gain_of_one() -> None:
    old = trained(spec(position="learned"))
    new, _ = operated(old, spec(position="learned", embedding_norm=True))
    tokens = torch.arange(LENGTH)[None]
    with torch.no_grad():
        x_BTD = old.positions(old.embedding(tokens))
        x_BTD = x_BTD / (x_BTD.square().mean(-1, keepdim=True) + old.spec.norm_eps).sqrt()
        for block in old.blocks:
            x_BTD = block(x_BTD, None)
        torch.testing.assert_close(new(tokens), old.head(old.norm(x_BTD)), rtol=1e-5, atol=1e-5)


def test_model_of_fewer_blocks_is_the_first_ones() -> None:
    old = trained(spec())
    new, _ = operated(old, spec(num_layers=1))
    del old.blocks[1:]
    assert torch.equal(logits(new), logits(old))


def test_shorter_context_computes_the_same_within_it() -> None:
    old = trained(spec(position="learned", max_tokens=2 * LENGTH))
    new, found = operated(old, spec(position="learned", max_tokens=LENGTH))
    assert torch.equal(logits(new), logits(old))
    (fate,) = found.account.fates
    assert (fate.kind, fate.begins) == ("cut", f"its first {LENGTH} rows")
    assert found.account.effect == f"The model computes what its parent's does, up to rounding, within {LENGTH} tokens."


def test_new_block_behind_sums_that_are_normalised_is_two_norms() -> None:
    old = trained(spec(norm_placement="post"))
    new, _ = operated(old, spec(norm_placement="post", num_layers=3))
    x_BTD = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.RMSNorm(WIDTH, eps=old.spec.norm_eps)
    with torch.no_grad():
        torch.testing.assert_close(new.blocks[2](x_BTD, new.positions(LENGTH)), norm(norm(x_BTD)))


# -- bits --------------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_kept_to_the_bit() -> None:
    old = trained(spec(bias=True, num_kv_heads=2, position="learned"))
    after = spec(bias=True, num_kv_heads=4, position="learned", hidden=40, max_tokens=12, num_layers=3, qk_norm=True)
    new, found = operated(old, after)
    was, now = dict(old.named_parameters()), dict(new.named_parameters())
    matched = [name for name, beginning in found.beginnings.items() if beginning.kind is None]
    assert len(matched) == found.account.matched == 12
    assert all(torch.equal(was[name], now[name]) for name in matched)
    assert torch.equal(now["positions.weight"][:LENGTH], was["positions.weight"])
    gate_and_up = "blocks.1.feed_forward.gate_and_up.weight"
    for part in range(2):
        assert torch.equal(now[gate_and_up][40 * part :][:HIDDEN], was[gate_and_up][HIDDEN * part :][:HIDDEN])
    assert torch.equal(
        now["blocks.0.feed_forward.residual.weight"][:, :HIDDEN], was["blocks.0.feed_forward.residual.weight"]
    )
    assert torch.equal(now["blocks.0.attention.qkv.bias"][:WIDTH], was["blocks.0.attention.qkv.bias"][:WIDTH])


def test_moments_are_kept_where_values_are_and_zero_where_they_are_new() -> None:
    found = Surgery.between(spec(), spec(hidden=40, num_layers=3, tied=False)).beginnings
    ones = torch.ones(2 * HIDDEN, WIDTH)
    moment = found["blocks.0.feed_forward.gate_and_up.weight"].moment(ones)
    is_kept = torch.tensor([row % 40 < HIDDEN for row in range(80)])
    assert torch.equal(moment, is_kept[:, None].expand(80, WIDTH).float())
    assert found["blocks.0.feed_forward.residual.weight"].moment(torch.ones(WIDTH, HIDDEN)).sum() == WIDTH * HIDDEN
    assert not found["blocks.2.attention.qkv.weight"].moment(None).any()
    assert not found["blocks.2.attention_norm.weight"].moment(None).any()  # a gain of one has no momentum
    assert found["head.weight"].moment(torch.ones(VOCAB, WIDTH)).all()  # a copy goes on as what it is a copy of


def test_values_that_are_drawn_are_these_on_every_machine() -> None:
    """Worked out here without torch: nothing but SHAKE-256, sums of integers and one product."""
    values = surgery.drawn("a", (2, 3), 0.5, seed=7).flatten().tolist()
    stream = hashlib.shake_256(b"surgery 7 a 0").digest(2 * 12 * 6)
    sums = [sum(struct.unpack_from("<12h", stream, 24 * i)) + 6 for i in range(6)]
    assert values == [total * 0.5 / 2**16 for total in sums]
    assert values[0] == -0.13486480712890625


def test_values_that_are_drawn_have_these_bits() -> None:
    """More than one chunk, and a standard deviation that is no power of two: each product is rounded, once."""
    values = surgery.drawn("a", (surgery.CHUNK + 3,), 0.02 / math.sqrt(6), 7)
    little_endian = values.numpy().astype("<f4").tobytes()
    assert hashlib.sha256(little_endian).hexdigest() == (
        "472dcb9e57977c5d633387baa10d8d29936f407f3fb876fb9e9b09e6cacb1923"
    )


def test_stream_is_read_as_little_endian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surgery, "sys", SimpleNamespace(byteorder="big"))
    stream = hashlib.shake_256(b"surgery 7 a 0").digest(2 * 12)
    total = sum(struct.unpack(">12h", stream)) + 6  # each number is turned round before it is read
    assert surgery.drawn("a", (1,), 0.5, seed=7).item() == total * 0.5 / 2**16


def test_values_that_are_drawn_are_those_of_a_new_model() -> None:
    std = surgery.drawn("a", (300, 1000), 0.02, seed=1)
    assert abs(float(std.double().mean())) < 4 * 0.02 / 300_000**0.5
    assert float(std.double().std()) == pytest.approx(0.02, rel=0.01)
    for n in (1, 2, 3):  # 0.32, 0.044 and 0.0020; of a normal distribution 0.32, 0.046 and 0.0027
        below = sum((-1) ** k * math.comb(12, k) * (6 - n - k) ** 12 for k in range(6 - n)) / math.factorial(12)
        beyond = (std.abs() > 0.02 * n).double().mean().item()
        assert beyond == pytest.approx(2 * below, abs=4 * (2 * below / 300_000) ** 0.5)
    fresh = dict(GPT(spec(num_layers=4, width=64)).named_parameters())
    new, found = operated(trained(spec(width=64)), spec(num_layers=4, width=64))
    for name, beginning in found.beginnings.items():
        if beginning.is_drawn:
            ratio = float(dict(new.named_parameters())[name].detach().std() / fresh[name].detach().std())
            assert ratio == pytest.approx(1, rel=0.1), name


def test_seed_and_name_decide_what_is_drawn_and_nothing_else_does() -> None:
    old = trained(spec())
    drawn = []
    for seed, layers in ((1, 3), (1, 4), (2, 3)):
        torch.manual_seed(len(drawn))
        state = torch.get_rng_state()
        beginnings = Surgery.between(old.spec, spec(num_layers=layers, norm_placement="pre")).beginnings
        drawn.append(beginnings["blocks.2.attention.qkv.weight"].weight(None, seed))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert float(drawn[0].std()) == pytest.approx(INIT_STD, rel=0.1)


# -- the account -------------------------------------------------------------------------------------------------------


def test_account_tells_every_parameter_once() -> None:
    before = spec(position="learned", norm="layernorm", bias=True)
    after = spec(position="learned", norm="layernorm", num_layers=4, qk_norm=True, max_tokens=4)
    found = Surgery.between(before, after)
    account = found.account
    was, now = surgery.shapes(before), surgery.shapes(after)
    dropped = [fate.name for fate in account.fates if fate.kind == "dropped"]
    assert set(dropped) == was.keys() - now.keys()
    assert account.matched + len(account.fates) == len({*was, *now})
    assert Account.from_body(json.loads(json.dumps(asdict(account)))) == account
    first, *rows = account.table()
    assert first == "Parameters: 14 matched, 1 cut, 20 added, 13 dropped."
    assert [" ".join(row.split()) for row in rows[:4]] == [
        "cut positions.weight [8, 16] -> [4, 16] its first 4 rows",
        "added blocks.[0:4].attention.q_norm.weight [4] one",
        "added blocks.[0:4].attention.k_norm.weight [4] one",
        "added blocks.[2:4].attention_norm.weight [16] one",
    ]
    assert "  dropped  blocks.[0:2].attention.qkv.bias " in "\n".join(rows)


def test_shape_that_stays_is_no_surgery() -> None:
    for before in (spec(), spec(bias=True, tied=False, norm_placement="post")):
        account = Surgery.between(before, before).account
        assert account == Account(len(surgery.shapes(before)), ())
    assert Surgery.between(spec(), spec(max_tokens=99)).account.fates == ()  # rotary positions have no tensor


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "change", "told"),
    [
        ({}, {"num_heads": 2}, r"^model\.num_heads: 4 -> 2: blocks\.0\.attention\.qkv\.weight would be cut into other heads"),
        ({}, {"position": "learned"}, r"model\.position: .*qkv\.weight has learned to find positions"),
        ({}, {"norm": "layernorm"}, r"model\.norm: .*attention_norm\.weight .* would mean something else; keep it"),
        ({"norm_placement": "post"}, {"norm_placement": "pre"}, "change between pre and sandwich"),
        ({}, {"norm_placement": "post"}, r"blocks\.0\.attention_norm\.weight would stand elsewhere"),
        ({}, {"width": 32}, r"blocks\.0\.attention\.qkv\.weight \[48, 16\] is stored, and \[96, 32\] is wanted"),
        ({"tied": False}, {"tied": True}, r"head\.weight and embedding\.weight were trained apart.*leave it untied"),
        ({}, {"vocab_size": 64}, r"embedding\.weight \[11, 16\] is stored, and \[64, 16\] is wanted, and rows that no token"),
        ({}, {"activation": "gelu"}, r"blocks\.0\.feed_forward has other matrices with a gate"),
        ({"vocab_size": 64}, {"vocab_size": 11}, r"\[64, 16\] is stored, and \[11, 16\] is wanted, and the rows that went"),
        ({"hidden": None}, {"hidden": 20}, r"^model\.hidden: 48 -> 20: "),
        ({"hidden": 64}, {"hidden": None}, r"^model\.hidden: 64 -> 48: "),
        ({}, {"hidden": 20}, r"residual\.weight \[16, 24\] is stored, and \[16, 20\] .*use 24 or more"),
        ({}, {"num_kv_heads": 2}, r"^model\.num_kv_heads: 4 -> 2: "),
        ({}, {"num_kv_heads": 2}, r"qkv\.weight can be repeated, and not be made fewer; use a multiple of 4"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused_with_the_tensor(
    base: dict[str, Any], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        Surgery.between(spec(**base), spec(**{**base, **change}))
    assert "or begin a new run" in str(refused.value)


def test_heads_of_keys_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="can be repeated, all of them equally often; use a multiple of 2"):
        Surgery.between(spec(num_heads=6, width=48, num_kv_heads=2), spec(num_heads=6, width=48, num_kv_heads=3))


def test_every_pair_of_choices_is_either_done_or_refused() -> None:
    """No change of shape ends in anything but a whole model or a ConfigError."""
    fields = {
        "norm_placement": ["pre", "post", "sandwich"], "bias": [True, False], "tied": [True, False], "hidden": [24, 32],
        "num_layers": [1, 3], "activation": ["swiglu", "gelu"], "head_transform": [True, False], "num_kv_heads": [1, 4],
    }  # fmt: skip
    specs = [spec(**dict(zip(fields, choice, strict=True))) for choice in product(*fields.values())]
    generator = torch.Generator().manual_seed(3)
    done = 0
    for _ in range(150):
        before, after = (specs[int(torch.randint(len(specs), (), generator=generator))] for _ in range(2))
        try:
            found = Surgery.between(before, after)
        except ConfigError:
            continue
        was = surgery.shapes(before)
        for beginning in found.beginnings.values():
            source = None if beginning.source is None else torch.zeros(was[beginning.source])
            assert beginning.weight(source, 0).shape == beginning.shape
        done += 1
    assert done > 5
