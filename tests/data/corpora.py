"""Small corpora for tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from elastic_lm.data.documents import Chunk
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.mixture import Source
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.sources import cut, find_files
from elastic_lm.storage import Storage

WORDS = ["the", "a", "cat", "dog", "runs", "sleeps", "over", "under", "quick", "lazy", "river", "and", "then", "slowly"]


def texts(num_documents: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(num_documents)]


def write_lines(path: Path, documents: list[str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


def small_corpus(folder: Path, *, num_documents: int = 60, block_tokens: int = 65) -> tuple[Storage, Manifest]:
    """About 15 tokens a document in blocks of `block_tokens`."""
    out = Storage.open(str(folder / "tokens"))
    source = write_lines(folder / "text.jsonl", texts(num_documents))
    return out, prepare([source], out, PrepareOptions(vocab_size=300, block_tokens=block_tokens, held_out=0.1))


def find_chunks(sources: Sequence[str | Source], text_column: str = "text") -> list[Chunk]:
    """All chunks of the sources, in order."""
    return [chunk for file in find_files(sources) for chunk in cut(file, text_column)]


def contents(storage: Storage) -> dict[str, bytes]:
    """All that a corpus consists of."""
    return {path: storage.read(path) for path in storage.list()}


def identity(storage: Storage) -> dict[str, bytes]:
    """All that does not say where the text was read from: what is the same for the same documents."""
    return {path: data for path, data in contents(storage).items() if not path.startswith(("documents", "summary"))}
