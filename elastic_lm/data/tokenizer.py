"""Text to token ids: a byte-level BPE tokenizer, trained on the corpus or loaded from a `tokenizer.json`.

Invariant: pad, cls, sep, mask and end-of-text ids are always reserved, so that one corpus serves every objective, and
text can never produce them: a document that spells `<|end_of_text|>` is encoded letter by letter. A tokenizer that has such
tokens under another name, as BERT's `[MASK]`, keeps them: models that were trained with it know what they mean.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from elastic_lm.data.manifest import SPECIAL_NAMES
from elastic_lm.errors import ConfigError, DataError

# Of the special tokens in other tokenizers. One that has none of these gets ours.
OTHER_SPELLINGS = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "end_of_text": ("<|endoftext|>", "</s>", "[SEP]"),
}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_NAMES)
LARGEST_VOCABULARY = (
    2**22
)  # ten times those of today; the library takes 45 bytes for each entry before it looks at the text
ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # as byte fallback spells what no other token is for
PROBE = "Café  Über\n\n\tdef f(x):\n    return 'naïve…'  # 50 %\n"  # what normalisers change
PIECE_CHARACTERS = 2**18  # longer documents are encoded in pieces: the library takes about 100 bytes a character


class TextEncoder:
    """A tokenizer that is ready to encode documents. `json` is all there is to it; `hash` is that text's sha256.

    `vocabulary`: the id of each token, as the tokenizer spells it. `special_tokens`: the spelling of each of SPECIAL_NAMES.
    """

    def __init__(self, text: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"this is no tokenizer.json: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self.special_tokens = {name: self._spelled(name) for name in SPECIAL_NAMES}
        missing = [text for text in self.special_tokens.values() if self._tokenizer.token_to_id(text) is None]
        self._tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in missing])
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.json: str = self._tokenizer.to_str()
        self.hash = hashlib.sha256(self.json.encode()).hexdigest()
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(self.vocabulary.values())
        self.special_ids = {name: self.vocabulary[text] for name, text in self.special_tokens.items()}
        self._check_special_ids(Counter(self.vocabulary.values()))

    @property
    def dtype(self) -> str:
        return "uint16" if self.vocab_size <= 2**16 else "uint32"

    def encode(self, text: str) -> list[int]:
        """Ids of the document, end-of-text last."""
        ids: list[int] = []
        for piece in pieces(text):
            ids.extend(self._ids(piece))
        ids.append(self.special_ids["end_of_text"])
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text again, special tokens left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def bytes_by_token(self, vocab_size: int) -> NDArray[np.int64]:
        """`num_bytes` of each id in range(vocab_size): int64 [vocab_size]."""
        return np.array([self.num_bytes(token) for token in range(vocab_size)], dtype=np.int64)

    def num_bytes(self, token: int) -> int:
        """UTF-8 bytes of text that the token stands for, within other text; none of a special one."""
        if token in self.special_ids.values():
            return 0
        spelled = self._tokenizer.id_to_token(token) or ""
        if token in self._added:
            return len(spelled.encode())
        if "ByteLevel" in self._decoders:
            return len(spelled)  # one character for each byte
        if "ByteFallback" in self._decoders and ONE_BYTE.fullmatch(spelled):
            return 1
        # Between two others: white space at an end is often the decoder's choice, not the token's.
        return len(self.decode([token, token, token]).encode()) - len(self.decode([token, token]).encode())

    @cached_property
    def keeps_text(self) -> bool:
        """Whether a text with accents, capitals and all kinds of white space comes back as it was, but for blanks at its ends."""
        try:
            return self.decode(self.encode(PROBE)).strip() == PROBE.strip()
        except DataError:
            return False

    @cached_property
    def _added(self) -> set[int]:
        return set(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _decoders(self) -> set[str]:
        """Types of those that turn tokens into text, one after the other."""
        decoder = json.loads(self.json).get("decoder") or {}
        return {part["type"] for part in decoder.get("decoders", [decoder]) if "type" in part}

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the library raises plain Exception
            raise DataError(
                f"the tokenizer cannot encode a text that begins {text[:40]!r} ({error}); use one that knows every byte, "
                "or has a token for what is unknown"
            ) from error

    def _spelled(self, name: str) -> str:
        known = self._tokenizer.get_added_tokens_decoder().values()
        special = {token.content for token in known if token.special}
        if self._tokenizer.token_to_id(_ours(name)) is not None:
            return _ours(name)
        others = (text for text in OTHER_SPELLINGS[name] if text in special and not self._is_text(text))
        return next(others, _ours(name))

    def _is_text(self, special: str) -> bool:
        """Whether a document may come to this token: as its spelling is a piece of text, too, or stands for what is unknown."""
        number = self._tokenizer.token_to_id(special)
        model = json.loads(self._tokenizer.to_str())["model"]
        if number in (model.get("unk_id"), self._tokenizer.token_to_id(model.get("unk_token") or "")):
            return True
        with contextlib.suppress(DataError):
            return number in self._ids(special)
        return False

    def _check_special_ids(self, num_owners: Counter[int]) -> None:
        """Raises: DataError when a special id stands for something else, too, so that text could produce it."""
        for name, number in self.special_ids.items():
            if num_owners[number] > 1 or self._is_ordinary(name):
                raise DataError(
                    f"the tokenizer's {self.special_tokens[name]}, id {number}, is an ordinary token, too, which text could "
                    "produce; rename it there, or use another tokenizer"
                )

    def _is_ordinary(self, name: str) -> bool:
        """Whether the model behind the tokenizer gives the special id for a text: its spelling, or what it does not know."""
        found = set()
        for text in self.special_tokens.values():
            with contextlib.suppress(DataError):
                found.update(self._ids(text))
        return self.special_ids[name] in found


def train(texts: Iterable[str], vocab_size: int) -> TextEncoder:
    """A tokenizer with at most `vocab_size` entries, determined by the texts and their order."""
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_ours(name) for name in SPECIAL_NAMES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer=trainer)
    return TextEncoder(tokenizer.to_str())


def check_vocab_size(vocab_size: int) -> None:
    """Raises: ConfigError when no tokenizer of this size can be trained."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocab_size={vocab_size} cannot hold 256 bytes and {len(SPECIAL_NAMES)} special tokens; "
            f"use at least {SMALLEST_VOCABULARY}"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise ConfigError(f"vocab_size={vocab_size} is more than can be trained; use at most {LARGEST_VOCABULARY}")


def pieces(text: str) -> Iterator[str]:
    """The text cut in front of the last white space within every PIECE_CHARACTERS; hard where there is none."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        window = text[start : start + PIECE_CHARACTERS]
        cut = max(window.rfind("\n"), window.rfind(" "))
        # White space belongs to the word behind it in byte-level BPE, so the cut is in front of it.
        stop = start + (cut if cut > 0 else PIECE_CHARACTERS)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _ours(name: str) -> str:
    return f"<|{name}|>"
