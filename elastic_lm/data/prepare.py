"""From raw text to a corpus: find documents, get a tokenizer, encode parts, write shards, and the manifest last.

Invariant: the same input and options give the same bytes, whatever the number of parts, the machine or the number of
interruptions. Parts are pure functions of their content and are kept under its hash until the manifest is written, so an
interrupted preparation goes on where it was. Trade-off: tokens are written twice (parts, then shards), because blocks cut
across parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from elastic_lm.data.corpus import write_corpus
from elastic_lm.data.documents import CHUNK_BYTES, Chunk
from elastic_lm.data.manifest import MAX_BLOCK_BYTES, Manifest
from elastic_lm.data.mixture import Source, is_chosen, passes
from elastic_lm.data.parts import Part, PartResult, encode_part, is_held_out
from elastic_lm.data.progress import Progress, Unseen, View
from elastic_lm.data.sources import cut, find_files
from elastic_lm.data.tokenizer import TextEncoder, check_vocab_size, train
from elastic_lm.errors import ConfigError, DataError, NotFoundError
from elastic_lm.storage import Storage


@dataclass(frozen=True)
class PrepareOptions:
    """`tokenizer`: address of a `tokenizer.json`, or None to train one of `vocab_size`. `held_out`: share of documents.

    `block_tokens` None: chosen from the size of the corpus. `part_bytes`: text per part, the unit of parallel work.
    `tokenizer_bytes`: about how much text a tokenizer is trained on, taken evenly from the whole. `text_column`: where
    the text is in formats with names.
    """

    vocab_size: int = 16_384
    tokenizer: str | None = None
    block_tokens: int | None = None
    held_out: float = 0.005
    part_bytes: int = 32 * 2**20
    tokenizer_bytes: int = 64 * 2**20
    text_column: str = "text"

    def __post_init__(self) -> None:
        if self.tokenizer is None:
            check_vocab_size(self.vocab_size)
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out={self.held_out} is not a share of the documents; use 0 to below 1, e.g. 0.005")
        if self.block_tokens is not None and self.block_tokens < 2:
            raise ConfigError(
                f"block_tokens={self.block_tokens} holds no sample; use a power of two plus one, e.g. 524289"
            )
        if self.block_tokens is not None and self.block_tokens > MAX_BLOCK_BYTES // 4:
            raise ConfigError(
                f"block_tokens={self.block_tokens} is too much to be read at once; use {MAX_BLOCK_BYTES // 4} or less, "
                "e.g. 2097153"
            )
        if self.part_bytes < 1 or self.tokenizer_bytes < 1:
            raise ConfigError(
                f"part_bytes={self.part_bytes} and tokenizer_bytes={self.tokenizer_bytes} must be positive"
            )


Map = Callable[[Callable[[Part], PartResult], Iterable[Part]], Iterable[PartResult]]


def prepare(
    sources: Sequence[str | Source],
    out: Storage,
    options: PrepareOptions,
    map: Map | None = None,
    view: View | None = None,
) -> Manifest:
    """Prepare the corpus into `out`. `map` may run parts anywhere, in any order, if it returns them in order; None: here.

    Raises: ConfigError when nothing is found; DataError with the place of what is no document; StorageError.
    """
    view = view or Unseen()
    wanted = [Source.of(source) for source in sources]
    chunks = _find(wanted, options, view)
    encoder = _encoder(chunks, options, view)
    encode = partial(encode_part, out=out, tokenizer_json=encoder.json, held_out=options.held_out)
    parts = plan(chunks, options.part_bytes)
    watch = _Watch(parts, view)
    running = map(encode, parts) if map else (encode(part, tell=watch.inside) for part in parts)
    results = [watch.finished(result) for result in running]
    return write_corpus(wanted, parts, results, out, encoder, options.block_tokens, view)


def _find(sources: Sequence[Source], options: PrepareOptions, view: View) -> list[Chunk]:
    chunks: list[Chunk] = []
    view.show(Progress("find"))
    for number, file in enumerate(find_files(sources)):
        chunks += cut(file, options.text_column)
        view.show(Progress("find", number + 1))
    return chunks


class _Watch:
    """Shows how much of the parts is encoded."""

    def __init__(self, parts: Sequence[Part], view: View) -> None:
        self._parts, self._view = parts, view
        self._total = sum(part.num_bytes for part in parts)
        self._num_finished = self._done = self._kept = 0
        self._show(0)

    def inside(self, share: float) -> None:
        """So much of the part that is being encoded is done, from 0 to 1."""
        self._show(int(share * self._parts[self._num_finished].num_bytes))

    def finished(self, result: PartResult) -> PartResult:
        """The next part is done."""
        num_bytes = self._parts[self._num_finished].num_bytes
        self._num_finished += 1
        self._done += num_bytes
        self._kept += num_bytes if result.was_there else 0
        self._show(0)
        return result

    def _show(self, ahead: int) -> None:
        self._view.show(Progress("encode", self._done + ahead, self._total, self._kept))


def plan(chunks: Sequence[Chunk], part_bytes: int) -> list[Part]:
    """Neighbouring chunks of one weight in parts of about `part_bytes`."""
    parts: list[Part] = []
    group: list[Chunk] = []
    group_bytes = 0
    for chunk in chunks:
        is_full = group_bytes + chunk.num_bytes > part_bytes
        if group and (is_full or chunk.file.source.weight != group[-1].file.source.weight):
            parts.append(Part(tuple(group)))
            group, group_bytes = [], 0
        group.append(chunk)
        group_bytes += chunk.num_bytes
    return [*parts, Part(tuple(group))] if group else parts


# -- tokenizer -------------------------------------------------------------------------------------------------------


def _encoder(chunks: Sequence[Chunk], options: PrepareOptions, view: View) -> TextEncoder:
    if options.tokenizer is None:
        return train(_training_texts(chunks, options, view), options.vocab_size)
    return _loaded(options.tokenizer)


def _loaded(address: str) -> TextEncoder:
    """The tokenizer there.    Raises: ConfigError when there is none, or one that cannot be used; StorageError."""
    folder, slash, name = address.rpartition("/")
    try:
        data = Storage.open(folder if slash else ".").read(name)
        return TextEncoder(data.decode("utf-8", "replace"))
    except NotFoundError as error:
        raise ConfigError(
            f"{address}: there is no such file; name a tokenizer.json, or leave it out to train one"
        ) from error
    except DataError as error:
        raise ConfigError(f"{address}: {error}") from error


def _training_texts(chunks: Sequence[Chunk], options: PrepareOptions, view: View) -> Iterator[str]:
    """Every n-th chunk's documents as often as they occur, without held-out ones; of one that unpacks its share only."""
    occurring = list(passes(chunks, [chunk.file.source for chunk in chunks]))
    total = sum(_sampled_bytes(chunk, is_whole) for chunk, is_whole in occurring)
    stride = max(1, -(-total // options.tokenizer_bytes))
    chosen = occurring[:: min(stride, max(1, len(occurring) // 2))]
    most_characters = max(CHUNK_BYTES, options.tokenizer_bytes // max(1, len(chosen)))
    done, all_bytes = 0, sum(chunk.num_bytes for chunk, _ in chosen)
    view.show(Progress("tokenizer", done, all_bytes))
    for chunk, is_whole in chosen:
        share = 1.0 if is_whole else chunk.file.source.share
        num_characters = 0
        for document in chunk.documents():
            if chunk.format.unpacks and num_characters >= most_characters:
                break
            if not is_held_out(document.text, options.held_out) and is_chosen(document.text, share):
                num_characters += len(document.text)
                yield document.text
        done += chunk.num_bytes
        view.show(Progress("tokenizer", done, all_bytes))


def _sampled_bytes(chunk: Chunk, is_whole: bool) -> int:
    num_bytes = min(chunk.num_bytes, CHUNK_BYTES) if chunk.format.unpacks else chunk.num_bytes
    return num_bytes if is_whole else int(num_bytes * chunk.file.source.share)
