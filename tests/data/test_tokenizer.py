"""Text to ids and back: nothing is lost, nothing stands for what it is not, and training is repeatable."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from elastic_lm.data import tokenizer as tokenizer_module
from elastic_lm.data.tokenizer import SMALLEST_VOCABULARY, SPECIAL_NAMES, TextEncoder, pieces, train
from elastic_lm.errors import ConfigError, DataError
from tests.data.corpora import texts

SPELLED = [f"<|{name}|>" for name in SPECIAL_NAMES]
ENCODER = train(texts(20), 300)
ANY_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(codec="utf-8"), max_size=20),
        st.sampled_from(
            [*SPELLED, "<|", "|>", " ", "\n", "\r\n", "\0", "\ufeff", "e\u0301", "👩‍👩‍👧", "the quick cat"]
        ),
    ),
    max_size=6,
).map("".join)


# -- there and back --------------------------------------------------------------------------------------------------


@given(ANY_TEXT)
@example("")
@example("".join(SPELLED))
@settings(max_examples=150)
def test_text_comes_back_from_its_tokens(text: str) -> None:
    ids = ENCODER.encode(text)
    assert ENCODER.decode(ids) == text
    assert ids[-1] == ENCODER.special_ids["end_of_text"]
    assert set(ids[:-1]).isdisjoint(ENCODER.special_ids.values())  # whatever the text spells
    assert all(0 <= token < ENCODER.vocab_size for token in ids)


@given(ANY_TEXT, st.integers(1, 9))
@settings(max_examples=100)
def test_text_comes_back_from_its_pieces(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer_module, "PIECE_CHARACTERS", size)
        cut = list(pieces(text))
        assert "".join(cut) == text
        assert all(0 < len(piece) <= size for piece in cut)
        assert ENCODER.decode(ENCODER.encode(text)) == text


def test_piece_ends_in_front_of_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 8)
    assert list(pieces("one two three four")) == ["one two", " three", " four"]
    assert list(pieces("abcdefghijk lm")) == ["abcdefgh", "ijk lm"]
    assert list(pieces("12345678")) == ["12345678"]
    assert list(pieces("")) == []


def test_empty_text_is_end_of_text_alone() -> None:
    assert ENCODER.encode("") == [ENCODER.special_ids["end_of_text"]]


# -- vocabulary ------------------------------------------------------------------------------------------------------


def test_special_ids_are_reserved_first_and_distinct() -> None:
    assert ENCODER.special_ids == {name: number for number, name in enumerate(SPECIAL_NAMES)}


def test_vocabulary_is_as_large_as_wanted_if_the_text_gives_as_much() -> None:
    assert ENCODER.vocab_size == 300
    assert train(["x y"], 10_000).vocab_size < 300
    assert train([], SMALLEST_VOCABULARY).vocab_size == SMALLEST_VOCABULARY


def test_smallest_vocabulary_encodes_every_byte() -> None:
    encoder = train([], SMALLEST_VOCABULARY)
    text = "".join(map(chr, range(0x300))) + "𝄞"
    assert encoder.decode(encoder.encode(text)) == text
    assert len(encoder.encode(text)) == len(text.encode()) + 1


def test_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"vocab_size={SMALLEST_VOCABULARY - 1} .* at least {SMALLEST_VOCABULARY}"):
        train(["x"], SMALLEST_VOCABULARY - 1)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_dtype_holds_the_vocabulary(vocab_size: int, dtype: str) -> None:
    words = {f"w{number}": number for number in range(vocab_size - len(SPECIAL_NAMES))}
    encoder = TextEncoder(Tokenizer(models.WordLevel(words, unk_token="w0")).to_str())
    assert (encoder.vocab_size, encoder.dtype) == (vocab_size, dtype)


# -- repeatable ------------------------------------------------------------------------------------------------------


def test_hash_is_that_of_the_json_and_survives_a_round_trip() -> None:
    assert hashlib.sha256(ENCODER.json.encode()).hexdigest() == ENCODER.hash
    again = TextEncoder(ENCODER.json)
    assert (again.json, again.hash, again.special_ids) == (ENCODER.json, ENCODER.hash, ENCODER.special_ids)


def test_training_follows_its_texts_and_nothing_else() -> None:
    assert train(texts(20), 300).json == ENCODER.json
    assert train(texts(20, seed=1), 300).json != ENCODER.json


TRAIN = """
from elastic_lm.data.tokenizer import train
from tests.data.corpora import texts
print(train(texts(20), 300).hash)
"""


@pytest.mark.parametrize("threads", ["1", "7"])
def test_training_is_the_same_in_another_process(threads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", threads)
    monkeypatch.setenv("RAYON_NUM_THREADS", threads)
    told = subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, check=True, text=True, timeout=50).stdout
    assert told.strip() == ENCODER.hash


# -- tokenizers of others --------------------------------------------------------------------------------------------


def word_level(words: list[str], **more: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, **more))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_special_tokens_are_added_behind_a_foreign_vocabulary() -> None:
    encoder = TextEncoder(word_level(["a", "b", "?"], unk_token="?").to_str())
    assert encoder.special_ids == {"pad": 3, "cls": 4, "sep": 5, "mask": 6, "end_of_text": 7}
    assert encoder.encode("b a") == [1, 0, 7]


def test_special_tokens_that_a_tokenizer_has_keep_their_ids() -> None:
    tokenizer = word_level(["a", "?"], unk_token="?")
    tokenizer.add_special_tokens(["<|end_of_text|>", "<|mask|>"])
    assert TextEncoder(tokenizer.to_str()).special_ids == {"end_of_text": 2, "mask": 3, "pad": 4, "cls": 5, "sep": 6}


def test_vocabulary_reaches_to_its_highest_id() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1_000}, unk_token="a"))
    assert TextEncoder(tokenizer.to_str()).vocab_size == 1_001


def test_special_token_that_fell_on_the_id_of_a_word_is_refused() -> None:
    # The library numbers added tokens from the size of the vocabulary, also where that has holes.
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    with pytest.raises(DataError, match=r"<\|cls\|>, id 3, is an ordinary token"):
        TextEncoder(tokenizer.to_str())


def test_truncation_padding_and_templates_of_a_tokenizer_are_off() -> None:
    tokenizer = word_level(["a", "[CLS]", "?"], unk_token="?")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", None, [("[CLS]", 1)])
    assert TextEncoder(tokenizer.to_str()).encode("a a a a a") == [0, 0, 0, 0, 0, 7]


@pytest.mark.parametrize(
    ("normaliser", "keeps"),
    [
        (None, True),
        (normalizers.NFC(), True),
        (normalizers.Lowercase(), False),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), False),
        (normalizers.NFKC(), False),  # an ellipsis becomes three dots
        (normalizers.Replace(Regex(" {2,}"), " "), False),
        (normalizers.Replace("\n", " "), False),
    ],
)
@pytest.mark.parametrize("prefix", [False, True])  # a blank in front is the decoder's, and in no document
def test_tokenizer_that_changes_a_text_is_known(normaliser: Any, keeps: bool, prefix: bool) -> None:
    tokenizer = Tokenizer.from_str(train(["a"], SMALLEST_VOCABULARY).json)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if normaliser is not None:
        tokenizer.normalizer = normaliser
    assert TextEncoder(tokenizer.to_str()).keeps_text is keeps


def test_tokenizer_that_does_not_know_all_words_changes_a_text() -> None:
    for more in ({}, {"unk_token": "[UNK]"}):
        assert not TextEncoder(word_level(["the", "[UNK]"], **more).to_str()).keeps_text


def test_normaliser_of_a_tokenizer_is_kept() -> None:
    tokenizer = word_level(["a", "?"], unk_token="?")
    tokenizer.normalizer = normalizers.Lowercase()
    assert TextEncoder(tokenizer.to_str()).encode("A")[0] == 0


@pytest.mark.parametrize("text", ["", "{}", "not json", "[]", '{"version": "1.0"}', "[" * 10_000])
def test_what_is_no_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        TextEncoder(text)


def test_tokenizer_whose_text_can_spell_a_special_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"<\|pad\|>.*ordinary"):
        TextEncoder(word_level(["a", "<|pad|>"], unk_token="a").to_str())


def test_special_token_for_everything_unknown_is_refused() -> None:
    tokenizer = word_level(["a", "<|mask|>"], unk_token="<|mask|>")
    with pytest.raises(DataError, match="mask"):
        TextEncoder(tokenizer.to_str())


def test_text_that_a_tokenizer_has_no_token_for_is_refused_with_the_text() -> None:
    encoder = TextEncoder(word_level(["a", "b"]).to_str())
    assert encoder.encode("a b")[:2] == [0, 1]
    with pytest.raises(DataError, match=r"cannot encode .*'a zzz'.*every byte"):
        encoder.encode("a zzz")


def test_added_words_of_a_tokenizer_are_no_special_tokens() -> None:
    foreign = Tokenizer.from_str(ENCODER.json)
    foreign.add_tokens(["zebra"])
    encoder = TextEncoder(foreign.to_str())
    assert encoder.vocab_size == ENCODER.vocab_size + 1
    assert ENCODER.vocab_size in encoder.encode("the zebra runs")
    assert encoder.decode(encoder.encode("the zebra runs")) == "the zebra runs"


# -- special tokens of others ----------------------------------------------------------------------------------------


def with_special(model: models.Model, *spelled: str) -> TextEncoder:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(list(spelled))
    return TextEncoder(tokenizer.to_str())


def test_special_tokens_that_are_called_otherwise_are_kept() -> None:
    """As BERT's and GPT-2's: a model that was trained with them knows them."""
    bert = with_special(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "[PAD]", "[CLS]", "[SEP]", "[MASK]")
    assert bert.special_tokens == {
        "pad": "[PAD]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]", "end_of_text": "[SEP]",
    }  # fmt: skip
    assert bert.special_ids["end_of_text"] == bert.special_ids["sep"] and bert.vocab_size == 6
    assert set(bert.encode("a [MASK] [SEP]")[:-1]) <= {0, 1}
    gpt2 = with_special(models.BPE({"a": 0}, []), "<|endoftext|>")
    assert gpt2.special_tokens["end_of_text"] == "<|endoftext|>" and gpt2.special_tokens["mask"] == "<|mask|>"
    assert TextEncoder(gpt2.json).special_ids == gpt2.special_ids


def test_special_token_that_text_may_come_to_is_not_taken() -> None:
    """A piece of a unigram model's, and what stands for the unknown."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), ("a", -2.0), ("<", -3.0), ("/", -3.0), ("s", -3.0), (">", -3.0)]
    t5 = with_special(models.Unigram(pieces, 0), "</s>")
    unknown = with_special(models.BPE({"a": 0, "<|endoftext|>": 1}, [], unk_token="<|endoftext|>"), "<|endoftext|>")
    for encoder in (t5, unknown):
        assert encoder.special_tokens["end_of_text"] == "<|end_of_text|>"
        assert encoder.special_ids["end_of_text"] not in encoder.encode("a </s> <|endoftext|> é")[:-1]
