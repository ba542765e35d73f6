"""Text from a run's newest checkpoint: drawn by the rules, the same for the same seed, and refused where it makes no sense."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic_lm.config import RunConfig
from elastic_lm.data.tokenizer import train
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate import continuations
from elastic_lm.generation import MASK, Generator, NotFiniteError, Sampling
from elastic_lm.model.cache import Cache
from elastic_lm.model.spec import ModelSpec
from elastic_lm.model.transformer import GPT
from elastic_lm.run import Run
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel
from tests.evaluate import models
from tests.evaluate.models import Neighbours, bigrams
from tests.solo import Solo, solo_config
from tests.test_cli import run

MASKED: dict[str, Any] = {"model": {"preset": "bert-tiny"}, "objective": {"name": "masked"}}
LOGITS_V = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()


def draws(sampling: Sampling, number: int = 2000) -> Counter[int]:
    generator = torch.Generator().manual_seed(0)
    return Counter(sampling.draw(LOGITS_V, generator) for _ in range(number))


# -- drawing ---------------------------------------------------------------------------------------------------------


def test_temperature_of_one_draws_by_the_probabilities() -> None:
    found = draws(Sampling(temperature=1.0))
    for token, logit in enumerate(LOGITS_V.tolist()):
        share = math.exp(logit)
        assert found[token] / 2000 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 2000))


def test_temperature_sharpens() -> None:
    """At 1/2 probabilities are squared: 0.25, 0.01, 0.0625, 0.0225 of 0.345."""
    assert draws(Sampling(temperature=0.5))[0] / 2000 == pytest.approx(0.25 / 0.345, abs=0.05)


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 1e-310, 5e-324])
def test_any_temperature_however_small_draws(temperature: float) -> None:
    """Quotients by the smallest ones overflow, and a logit may be -inf. Equal ones are drawn alike, as at any temperature."""
    assert set(draws(Sampling(temperature=temperature))) == {0}
    generator, logits_V = torch.Generator().manual_seed(0), torch.tensor([-math.inf, 7.0, 3.0, 7.0])
    assert {Sampling(temperature=temperature).draw(logits_V, generator) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize(
    ("choices", "left"),
    [
        ({"temperature": 0.0}, {0}),
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 2}),
        ({"top_k": 9}, {0, 1, 2, 3}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.6}, {0, 2}),
        ({"top_p": 0.8, "top_k": 3}, {0, 2, 3}),
        ({"top_p": 0.95, "top_k": 2}, {0, 2}),
    ],
)
def test_what_is_left_to_draw_from(choices: dict[str, Any], left: set[int]) -> None:
    assert set(draws(Sampling(**{"temperature": 1.0, **choices}))) == left


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 is not a number from 0"),
        ({"temperature": math.nan}, "temperature=nan is not a number from 0"),
        ({"top_k": 0}, "top_k=0 is no number of tokens to draw from"),
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 is not in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is no length"),
        ({"seed": -1}, "seed=-1 is not in"),
    ],
)
def test_choices_that_make_no_sense_are_refused(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**choices)


# -- a run's text ----------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(small_corpus: str, tmp_path: Path) -> str:
    """The address of a run with a checkpoint."""
    config = solo_config(small_corpus, f"file://{tmp_path}")
    assert Solo(config).train().verdict == "done"
    return config.run_url


def test_text_of_another_checkpoint_than_the_newest(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}")
    Solo(config).train(until=2)
    early = run("generate", config.run_url, "a", "--temperature", "1", "--max-new-tokens", "30").stdout
    Solo(config).train()
    texts = {
        name: run("generate", config.run_url + name, "a", "--temperature", "1", "--max-new-tokens", "30").stdout
        for name in ("", "@2", "@6")
    }
    assert texts["@2"] == early and texts["@6"] == texts[""] != early
    told = run("generate", f"{config.run_url}@5", "a")
    assert told.exit_code == 2 and "step 5" in told.stderr


def test_same_seed_same_text_and_another_seed_another(trained: str) -> None:
    texts = ["".join(Run.open(trained).generate("a", seed=seed, temperature=1.0)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    told = run("generate", trained, "a", "--seed", "1", "--temperature", "1.0")
    assert told.exit_code == 0, told.output
    assert told.stdout.strip("\n") and "\x1b" not in told.stdout


class Endless(TrainedModel):
    """Never comes to the end of a text."""

    def next_logits(self, ids: Sequence[int], cache: Cache | None = None) -> Tensor:
        logits_V = super().next_logits(ids, cache)
        logits_V[self.special_ids["end_of_text"]] = -math.inf
        return logits_V


def endless(model: TrainedModel) -> TrainedModel:
    return Endless(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)})


class Read(nn.Module):
    """The model within one that has no cache, as one of a factory; `told`: how many tokens each pass was of."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module, self.told = module, list[int]()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        self.told.append(tokens_BT.shape[1])
        logits_BTV: Tensor = self._module(tokens_BT)
        return logits_BTV


def whole(model: TrainedModel) -> TrainedModel:
    """The same weights, by passes over the whole context."""
    return dataclasses.replace(model, module=Read(model.module))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of a model of ours was of."""
    told, features = [], GPT.features

    def counted(self: GPT, tokens_BT: Tensor, *more: Any) -> Tensor:
        told.append(tokens_BT.shape[1])
        return features(self, tokens_BT, *more)

    monkeypatch.setattr(GPT, "features", counted)
    return told


SHAPES: dict[str, dict[str, Any]] = {
    "rotary": {"model": {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "width": 32}},
    "learned": {"model": {"num_layers": 2, "num_heads": 2, "width": 32, "position": "learned", "bias": True}},
    "documents": {"model": {"num_layers": 2, "num_heads": 2, "width": 32, "document_masking": True}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_text_with_a_cache_is_that_of_whole_passes(small_corpus: str, tmp_path: Path, shape: str) -> None:
    """Most probable and drawn; from a prompt of any length, into a context that is full and beyond it."""
    fast = {"optimizer": {"learning_rate": 1e-2}, "schedule": {"warmup_steps": 5}}
    config = solo_config(small_corpus, f"file://{tmp_path}", steps=60, **SHAPES[shape], **fast)
    assert Solo(config).train().verdict == "done"
    model = endless(model_of(config.run_url))
    assert model.make_cache(1) is not None and whole(model).make_cache(1) is None
    for prompt in ("", "the cat", "a cat runs " * 3, "a cat runs " * 30):
        for temperature in (0.0, 1.0):
            sampling = Sampling(temperature=temperature, max_new_tokens=40)
            texts = ["".join(Generator(each).generate(prompt, sampling)) for each in (model, whole(model))]
            assert texts[0] == texts[1] and len(texts[0]) >= 40


def words(model: TrainedModel, num_tokens: int) -> str:
    return model.encoder.decode(model.encoder.encode("a cat runs over a dog and the river, slowly " * 5)[:num_tokens])


def test_token_is_read_once_until_the_context_is_full(trained: str, told: list[int]) -> None:
    """A context of 32 tokens: the one that begins a document, a prompt of 9, and 22 new ones. Then the oldest go out of sight."""
    model = endless(model_of(trained))
    for num_new, expected in (
        (1, [10]),
        (23, [10] + [1] * 22),
        (26, [10] + [1] * 22 + [32] * 3),
    ):
        told.clear()
        "".join(Generator(model).generate(words(model, 9), Sampling(max_new_tokens=num_new)))
        assert told == expected
    told.clear()
    "".join(Generator(model).generate(words(model, 40), Sampling(max_new_tokens=2)))
    assert told == [32, 32]


def test_model_without_a_cache_takes_whole_passes(trained: str) -> None:
    model = whole(endless(model_of(trained)))
    "".join(Generator(model).generate(words(model, 28), Sampling(max_new_tokens=5)))
    assert isinstance(model.module, Read) and model.module.told == [29, 30, 31, 32, 32]


def test_model_that_is_made_of_ours_takes_whole_passes(told: list[int]) -> None:
    class Mine(GPT):
        def forward(self, tokens_BT: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(self.features(tokens_BT))

    model = models.trained(Mine(ModelSpec(400, num_layers=1, num_heads=1, width=16, max_tokens=16)).eval())
    "".join(Generator(endless(model)).generate("", Sampling(max_new_tokens=3)))
    assert told == [1, 2, 3]


def test_model_that_sees_both_sides_takes_whole_passes(told: list[int]) -> None:
    """With an objective of the user's own, a text may be asked of it, too: new tokens change what is kept of those before."""
    spec = ModelSpec(400, num_layers=1, num_heads=1, width=16, max_tokens=16, attention="bidirectional")
    model = models.trained(GPT(spec).eval(), "mine:loss")
    "".join(Generator(endless(model)).generate("", Sampling(max_new_tokens=3)))
    assert told == [1, 2, 3]


def test_texts_do_not_depend_on_the_size_of_pieces(trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = model_of(trained), []
    for size in (1, 4, 5):
        monkeypatch.setattr(continuations, "PIECE_PROMPTS", size)
        prompts = ["a", "the cat", "", "a cat runs " * 9, "it"]
        pieces = continuations.continuations(prompts, Sampling(temperature=1.0, max_new_tokens=30), None)
        found.append([written for piece in pieces for written in piece.answer(model)])
    assert found[0] == found[1] == found[2] and len(found[0]) == 5


def test_copies_of_a_prompt_are_drawn_independently(trained: str) -> None:
    model = model_of(trained)

    def texts(seed: int, temperature: float) -> list[str]:
        sampling = Sampling(temperature=temperature, max_new_tokens=30, seed=seed)
        pieces = continuations.continuations(["the cat"] * 6, sampling, None)
        return [written.text for piece in pieces for written in piece.answer(model)]

    assert len({*texts(0, 1.0), *texts(1, 1.0)}) == 12
    assert texts(0, 1.0) == texts(0, 1.0)
    assert len({*texts(0, 0.0), *texts(1, 0.0)}) == 1


def test_first_token_is_what_the_weights_say(trained: str) -> None:
    model = model_of(trained)
    ids = [model.special_ids["end_of_text"], *model.encoder.encode("ab")[:-1]]
    logits_V = model.module(torch.tensor([ids]))[0, -1]
    never = [number for name, number in model.special_ids.items() if name != "end_of_text"]
    logits_V[never] = -math.inf
    found = "".join(Generator(model).generate("ab", Sampling(temperature=0.0, max_new_tokens=1)))
    assert found == model.encoder.decode([int(logits_V[: model.vocab_size].argmax())])


def model_of(address: str) -> TrainedModel:
    opened = Run.open(address).address
    return TrainedModel.load(opened.folder(), opened.stored_config())


class Script(nn.Module):
    """Says what it is told to."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__()
        self._ids = iter(ids)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        logits_BTV = torch.zeros(*tokens_BT.shape, 400)
        logits_BTV[0, -1, next(self._ids)] = 100
        return logits_BTV


def scripted(text: str) -> Generator:
    """Says this text."""
    encoder = train(["abc é 漢字 "], 300)
    module = Script(encoder.encode(text))  # the end of the text is its last token
    return Generator(TrainedModel(encoder, encoder.special_ids, "causal", 64, 400, module, 1, ""))


def test_a_character_of_several_tokens_comes_whole() -> None:
    text = "naïve ☃ 💡!"
    pieces = list(scripted(text).generate("", Sampling(temperature=0.0)))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) and len(pieces) > 3


def test_run_without_a_checkpoint_is_told(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}")
    solo = Solo(config)
    solo.die()
    told = run("generate", config.run_url, "a")
    assert told.exit_code != 0 and "has no complete checkpoint yet; wait for its first one" in told.output


def test_wrong_choice_on_the_command_line_is_told(trained: str) -> None:
    told = run("generate", trained, "a", "--top-p", "2")
    assert told.exit_code == 2 and "top_p=2.0 is not in (0, 1]" in told.output


# -- masks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(small_corpus: str, tmp_path: Path) -> RunConfig:
    config = solo_config(small_corpus, f"file://{tmp_path}", **MASKED)
    assert Solo(config).train().verdict == "done"
    return config


def test_masks_are_filled_with_the_most_probable_token_and_the_rest_stays(masked: RunConfig) -> None:
    told = run("generate", masked.run_url, "ab <|mask|> cd<|mask|>")
    assert told.exit_code == 0, told.output
    model = model_of(masked.run_url)
    mask, encode = model.special_ids["mask"], model.encoder.encode
    ids = [*encode("ab ")[:-1], mask, *encode(" cd")[:-1], mask]
    logits_TV = model.module(torch.tensor([[model.special_ids["end_of_text"], *ids]]))[0, 1:]
    logits_TV[:, list(model.special_ids.values())] = -math.inf
    best = logits_TV[:, : model.vocab_size].argmax(-1).tolist()
    expected = model.encoder.decode([b if i == mask else i for i, b in zip(ids, best, strict=True)])
    assert told.stdout.rstrip("\n") == expected.rstrip("\n")
    assert expected.startswith("ab ") and " cd" in expected and "mask" not in expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("nothing", "the prompt hides nothing; put <|mask|>"),
        ("<|mask|>" * 32, "has 32 tokens, and the model's context is 32"),
    ],
)
def test_prompt_that_cannot_be_filled_in_is_refused(masked: RunConfig, prompt: str, message: str) -> None:
    told = run("generate", masked.run_url, prompt)
    assert told.exit_code == 2 and message in " ".join(told.output.split())


def test_storage_is_only_read(trained: str) -> None:
    before = sorted(path for path in Storage.open(trained).list(""))
    "".join(Run.open(trained).generate("a", max_new_tokens=2))
    assert sorted(path for path in Storage.open(trained).list("")) == before


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_weights_that_are_not_finite_are_told(temperature: float) -> None:
    model = bigrams({("a", "b"): 1.0, ("b", "c"): math.nan})
    pieces = Generator(model).generate("a", Sampling(temperature=temperature))
    assert next(pieces) == "b"
    with pytest.raises(
        NotFiniteError, match="the weights of step 1 give no text: .* not finite; take another checkpoint"
    ):
        next(pieces)


def test_weights_that_are_not_finite_are_told_where_a_cache_comes_to_them(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", **SHAPES["learned"])
    assert Solo(config).train().verdict == "done"
    model, found = endless(model_of(config.run_url)), list[str]()
    expected = "".join(Generator(model).generate("", Sampling(temperature=0.0, max_new_tokens=6)))
    with torch.no_grad():
        model.module.get_parameter("positions.weight")[6] = math.nan
    with pytest.raises(NotFiniteError, match="the weights of step 6 give no text"):
        found.extend(Generator(model).generate("", Sampling(temperature=0.0)))
    assert "".join(found) == expected != ""


def test_mask_of_weights_that_are_not_finite_is_told() -> None:
    model = models.trained(Neighbours(), "masked")
    assert "".join(Generator(model).generate(f"a{MASK}", Sampling())).startswith("a")
    model.module.left_VV.fill_(math.nan)
    with pytest.raises(NotFiniteError):
        list(Generator(model).generate(f"a{MASK}", Sampling()))
