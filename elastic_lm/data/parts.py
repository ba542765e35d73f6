"""Parts: documents that one task encodes, and what it leaves in storage until the shards are written.

Invariant: what a part leaves is a pure function of its documents, the tokenizer, the weight and the share that is held out,
and is kept under the hash of these: a part that was encoded once is found again, whatever became of the process. Memory is
bounded by the largest document, not by the part. Trade-off: documents that do not fit into memory together are read
twice, once for the hash and once to be encoded, which costs a few per cent of encoding them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from elastic_lm.data.documents import Chunk, Document
from elastic_lm.data.mixture import Source, is_chosen
from elastic_lm.data.pieces import PieceWriter, read_pieces
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.data.windows import Tokens
from elastic_lm.errors import DataError
from elastic_lm.storage import Storage

PARTS_VERSION = "2"  # change it when the same content is to be encoded differently
KEPT_BYTES = 64 * 2**20  # of text: two parts of the usual size
DOCUMENT_BYTES = 256  # what a document takes in memory beside its text, about
DONE = "done.json"

# What became of a document, as bits. The first are names of streams of tokens, too.
TRAIN, HELD_OUT, EXTRA, EMPTY, REPLACED = 1, 2, 4, 8, 16
STREAMS = {
    "train": TRAIN,  # in every pass with all documents of the source
    "held_out": HELD_OUT,  # once, whatever the weight
    "extra": EXTRA,  # in the pass with the chosen ones
}

# `chunk`: its number in the part. `num_bytes`: of the text as UTF-8. A document that is in no stream has no tokens.
Records = NDArray[np.void]
RECORD = np.dtype(
    [("chunk", "<u4"), ("fate", "u1"), ("place", "<i8"), ("num_bytes", "<i8"), ("num_tokens", "<i8")]
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What one task encodes: neighbouring chunks of one weight."""

    chunks: tuple[Chunk, ...]

    @property
    def source(self) -> Source:
        """That of its first chunk: another one of its chunks may be another source's, of the same weight."""
        return self.chunks[0].file.source

    @property
    def num_bytes(self) -> int:
        return sum(chunk.num_bytes for chunk in self.chunks)


@dataclass(frozen=True)
class PartResult:
    """A finished part: its folder's name, how many tokens each stream of it holds, and how many documents were seen.

    `was_there`: an earlier preparation had finished it.
    """

    name: str
    num_tokens: dict[str, int]
    num_documents: int
    was_there: bool = False

    def tokens(self, out: Storage, stream: str, dtype: str) -> Iterator[Tokens]:
        """Tokens of a stream, in pieces."""
        return read_pieces(out.child(f"parts/{self.name}"), stream, dtype, self.num_tokens[stream])

    def records(self, out: Storage) -> Iterator[Records]:
        """A record for each document, in pieces."""
        return read_pieces(out.child(f"parts/{self.name}"), "documents", RECORD, self.num_documents)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document is kept from training: by its own hash, so copies of it are always on the same side."""
    return xxhash.xxh3_64_intdigest(text.encode()) < share * 2**64


def encode_part(
    part: Part,
    *,
    out: Storage,
    tokenizer_json: str,
    held_out: float,
    tell: Callable[[float], None] = lambda share: None,
) -> PartResult:
    """Encode a part into `out`, or find it there. Safe to run twice, also at once. `tell`: told the share that is encoded.

    Raises: DataError with the place of what is no document, or cannot be encoded; StorageError.
    """
    has_passes, share = part.source.num_passes > 0, part.source.share
    content = _Content(part, (PARTS_VERSION, tokenizer_json, repr(held_out), f"{has_passes} {share!r}"))
    folder = out.child(f"parts/{content.name}")
    if folder.exists(DONE):
        return replace(PartResult(**json.loads(folder.read(DONE))), was_there=True)
    encoder = TextEncoder(tokenizer_json)
    streams = {name: PieceWriter(folder, name, encoder.dtype) for name in STREAMS}
    records = PieceWriter(folder, "documents", RECORD)
    num_bytes = 0
    for number, document in content:
        fate = _fate(document, held_out, has_passes, share)
        wanted = fate & (TRAIN | HELD_OUT | EXTRA)
        tokens = _encoded(encoder, document, part.chunks[number]) if wanted else np.empty(0)
        for name, bit in STREAMS.items():
            if fate & bit:
                streams[name].add(tokens)
        size = len(document.text.encode())
        records.add(np.array([(number, fate, document.place, size, len(tokens))], dtype=RECORD))
        num_bytes += size
        tell(num_bytes / max(1, content.num_bytes))
    num_tokens = {name: stream.close() for name, stream in streams.items()}
    result = PartResult(content.name, num_tokens, records.close())
    folder.write(DONE, json.dumps(asdict(result)).encode())
    return result


def _fate(document: Document, held_out: float, has_passes: bool, share: float) -> int:
    fate = REPLACED if document.replaced else 0
    if not document.text.strip():
        return fate | EMPTY
    if is_held_out(document.text, held_out):
        return fate | HELD_OUT
    return fate | (TRAIN if has_passes else 0) | (EXTRA if share and is_chosen(document.text, share) else 0)


def _encoded(encoder: TextEncoder, document: Document, chunk: Chunk) -> Tokens:
    try:
        return np.array(encoder.encode(document.text), dtype=encoder.dtype)
    except DataError as error:
        raise DataError(f"{chunk.at(document.place)}: {error}") from error


class _Content:
    """The documents of a part with the numbers of their chunks; `name` is the hash of all that its tokens depend on.

    `num_bytes`: of their text as UTF-8.
    They are kept as long as they fit into KEPT_BYTES, else read anew, and then their hash is checked once more.
    """

    def __init__(self, part: Part, words: tuple[str, ...]) -> None:
        self._part, self._words = part, words
        self._kept: list[tuple[int, Document]] | None = []
        self.num_bytes = 0
        digest = self._digest()
        for count, (number, document) in enumerate(self._documents()):
            self.num_bytes += _update(digest, number, document)
            if self.num_bytes + count * DOCUMENT_BYTES > KEPT_BYTES:
                self._kept = None
            elif self._kept is not None:
                self._kept.append((number, document))
        self.name = digest.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, Document]]:
        if self._kept is not None:
            yield from self._kept
            return
        digest = self._digest()
        for number, document in self._documents():
            _update(digest, number, document)
            yield number, document
        if digest.hexdigest() != self.name:
            first, last = self._part.chunks[0], self._part.chunks[-1]
            raise DataError(
                f"{first.at(first.start)} to {last.at(last.stop)}: the files were changed while they were read; leave them "
                "as they are and prepare again"
            )

    def _documents(self) -> Iterator[tuple[int, Document]]:
        return ((number, document) for number, chunk in enumerate(self._part.chunks) for document in chunk.documents())

    def _digest(self) -> Any:
        digest = xxhash.xxh3_128()
        for word in self._words:
            digest.update(word.encode() + b"\0")
        return digest


def _update(digest: Any, number: int, document: Document) -> int:
    """Returns: the document's bytes as UTF-8."""
    data = document.text.encode()
    digest.update(f"{number} {document.place} {document.replaced:d} {len(data)}\0".encode())
    digest.update(data)
    return len(data)
