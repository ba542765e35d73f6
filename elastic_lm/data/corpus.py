"""A corpus out of finished parts: shards, the index of documents, the summary, and the manifest last.

Invariant: what is written depends on the parts' documents and their order, never on how they were cut; nothing is removed
before the manifest stands. Memory is bounded by a shard, whatever the size of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from elastic_lm.data import document_index
from elastic_lm.data.document_index import IndexFile, IndexWriter
from elastic_lm.data.manifest import Manifest, Shard
from elastic_lm.data.mixture import Source, passes
from elastic_lm.data.parts import STREAMS, Part, PartResult
from elastic_lm.data.progress import Progress, View
from elastic_lm.data.shards import ShardWriter, block_tokens_for
from elastic_lm.data.summary import Figures, Summary, Tally
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.errors import DataError
from elastic_lm.storage import Storage

TOKENIZER_FILE = "tokenizer.json"

Stream = Sequence[tuple[Part, PartResult, str]]  # parts in the order of their tokens, and which of their streams


def write_corpus(
    sources: Sequence[Source],
    parts: Sequence[Part],
    results: Sequence[PartResult],
    out: Storage,
    encoder: TextEncoder,
    block_tokens: int | None,
    view: View,
) -> Manifest:
    """Cut the parts' tokens into blocks and shards, write what describes them, and remove the parts.

    Raises: DataError when there is nothing to train on; StorageError.
    """
    finished = list(zip(parts, results, strict=True))
    summary = _summary(sources, finished, out)
    if summary.total.tokens == 0:
        raise DataError(
            f"the sources hold no text to train on: {_whereabouts(summary.total)}; add documents, or lower held_out"
        )
    manifest = Manifest(
        dtype=encoder.dtype,
        vocab_size=encoder.vocab_size,
        tokenizer_hash=encoder.hash,
        special_ids=encoder.special_ids,
        block_tokens=block_tokens or block_tokens_for(summary.total.tokens, encoder.dtype),
        shards=(),
        counts=summary.total.counts,
    )
    order = passes(finished, [part.source for part in parts])
    train: Stream = [(*part, "train" if is_whole else "extra") for part, is_whole in order]
    held_out: Stream = [(*part, "held_out") for part in finished]
    counter = _Counter(view, summary.total.tokens + summary.total.held_out_tokens)
    manifest = replace(
        manifest,
        shards=_write_shards(manifest, out, "train", train, counter),
        held_out=_write_shards(manifest, out, "held_out", held_out, counter),
    )
    out.write(TOKENIZER_FILE, encoder.json.encode())
    document_index.save(out, manifest, _write_index(out, "train", train), _write_index(out, "held_out", held_out))
    summary.save(out, manifest)
    manifest.save(out)
    for path in out.list("parts/"):
        out.delete(path)
    return manifest


def _summary(sources: Sequence[Source], finished: Iterable[tuple[Part, PartResult]], out: Storage) -> Summary:
    tally = Tally(sources)
    for part, result in finished:
        for records in result.records(out):
            tally.add(part, records)
    return tally.summary()


def _whereabouts(total: Figures) -> str:
    """What became of documents none of which is trained on."""
    left_out = total.read_documents - total.held_out_documents
    parts = (
        (total.empty_documents, "empty"),
        (total.held_out_documents, "held out"),
        (left_out, "left out by a weight"),
    )
    return ", ".join(f"{number:,} {words}" for number, words in parts if number) or "no documents"


class _Counter:
    """Shows tokens as they are written."""

    def __init__(self, view: View, total: int) -> None:
        self._view, self._total, self._done = view, total, 0
        self.add(0)

    def add(self, num_tokens: int) -> None:
        self._done += num_tokens
        self._view.show(Progress("shards", self._done, self._total))


def _write_shards(manifest: Manifest, out: Storage, kind: str, stream: Stream, counter: _Counter) -> tuple[Shard, ...]:
    writer = ShardWriter(out, kind, manifest.dtype, manifest.block_tokens)
    for _, result, name in stream:
        for tokens in result.tokens(out, name, manifest.dtype):
            writer.add(tokens)
            counter.add(len(tokens))
    return writer.close()


def _write_index(out: Storage, kind: str, stream: Stream) -> tuple[IndexFile, ...]:
    writer = IndexWriter(out, kind)
    for part, result, name in stream:
        for records in result.records(out):
            writer.add(part, records[records["fate"] & STREAMS[name] > 0])
    return writer.close()
