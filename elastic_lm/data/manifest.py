"""What a prepared corpus consists of: a JSON file that names every block of tokens, with its place and its checksum.

Invariant: a manifest that was read is consistent in itself (sizes add up, paths stay inside the corpus), so readers need
no further checks than each block's checksum. The manifest is written last: a corpus without one is not there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from elastic_lm.data.order import Order
from elastic_lm.errors import DataError, NotFoundError
from elastic_lm.storage import Storage

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1
ITEM_SIZES = {"uint16": 2, "uint32": 4}
SPECIAL_NAMES = ("pad", "cls", "sep", "mask", "end_of_text")
WINDOW_BYTES = 32 * 2**20  # 1 MiB blocks: windows of 32; 4 MiB blocks: the least number that still mixes well, 16
FEWEST_WINDOW_BLOCKS = 16
MAX_BLOCK_BYTES = 2**30  # a block is read whole; what claims more is no corpus of ours


@dataclass(frozen=True)
class Block:
    """`num_tokens` raw little-endian ids: `length` bytes from `offset` of the shard. `checksum`: xxh3-64, hexadecimal."""

    offset: int
    length: int
    num_tokens: int
    checksum: str


@dataclass(frozen=True)
class Shard:
    """One Arrow IPC file (uncompressed, one column); `path` is relative to the corpus."""

    path: str
    num_tokens: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Manifest:
    """A prepared corpus. All blocks hold `block_tokens` tokens but the very last one, the tail. So with the held-out part.

    `special_ids` has the SPECIAL_NAMES. `counts`: what preparation saw, for people.
    """

    dtype: str
    vocab_size: int
    tokenizer_hash: str
    special_ids: dict[str, int]
    block_tokens: int
    shards: tuple[Shard, ...]
    held_out: tuple[Shard, ...] = ()
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check(self)

    @property
    def item_size(self) -> int:
        """Bytes of a token."""
        return ITEM_SIZES[self.dtype]

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @cached_property
    def blocks(self) -> tuple[tuple[str, Block], ...]:
        """(shard path, block) by block id."""
        return tuple((shard.path, block) for shard in self.shards for block in shard.blocks)

    @property
    def hash(self) -> str:
        """sha256 of the content: the corpus's identity, wherever it is stored."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def window_blocks(self) -> int:
        """Blocks per window where nobody chose."""
        block_bytes = self.block_tokens * self.item_size
        return max(1, min(len(self.blocks), max(FEWEST_WINDOW_BLOCKS, WINDOW_BYTES // block_bytes)))

    def held_out_part(self) -> Manifest:
        """The held-out documents as a corpus of their own."""
        return dataclasses.replace(self, shards=self.held_out, held_out=(), counts={})

    def order(
        self,
        *,
        sequence_length: int,
        micro_batches: int,
        micro_batch_size: int,
        seed: int,
        window_blocks: int | None = None,
        skip: tuple[tuple[int, int], ...] = (),
    ) -> Order:
        """The order of a run over this corpus.    Raises: ConfigError when no sample fits into it."""
        tail_tokens = self.num_tokens % self.block_tokens
        return Order(
            num_full_blocks=self.num_tokens // self.block_tokens,
            samples_per_block=(self.block_tokens - 1) // sequence_length,
            tail_samples=max(0, tail_tokens - 1) // sequence_length,
            window_blocks=window_blocks or self.window_blocks,
            seed=seed,
            micro_batches=micro_batches,
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            skip=skip,
        )

    # -- reading and writing -----------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Raises: DataError when the text is no manifest, of another format version, or inconsistent."""
        try:
            fields: dict[str, Any] = json.loads(text)
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(
                    f"the manifest has format version {version}, this release reads {FORMAT_VERSION}; prepare the corpus again"
                )
            fields["shards"] = _shards(fields["shards"])
            fields["held_out"] = _shards(fields["held_out"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(
                f"the manifest is damaged ({type(error).__name__}: {error}); prepare the corpus again"
            ) from error

    def save(self, storage: Storage) -> None:
        """Write it into the corpus's folder."""
        storage.write(FILE_NAME, self.to_json().encode())

    @classmethod
    def load(cls, storage: Storage) -> Manifest:
        """The corpus in this folder.    Raises: DataError when there is none; StorageError."""
        try:
            text = storage.read(FILE_NAME)
        except NotFoundError as error:
            raise DataError(
                f"there is no {FILE_NAME} in {storage.url}; prepare a corpus with `elastic-lm prepare --out {storage.url}`"
            ) from error
        try:
            return cls.from_json(text)
        except DataError as error:
            raise DataError(f"{storage.url}/{FILE_NAME}: {error}") from error


def _shards(values: list[dict[str, Any]]) -> tuple[Shard, ...]:
    return tuple(Shard(v["path"], v["num_tokens"], tuple(Block(**block) for block in v["blocks"])) for v in values)


def _check(manifest: Manifest) -> None:
    """Raises: DataError naming the rule that the manifest breaks."""
    if manifest.dtype not in ITEM_SIZES:
        raise DataError(f"dtype={manifest.dtype!r} is not one of {', '.join(ITEM_SIZES)}")
    vocab_size, block_tokens = manifest.vocab_size, manifest.block_tokens
    if (
        not (_are_counts(vocab_size, block_tokens) and 0 < vocab_size <= 2 ** (8 * manifest.item_size))
        or block_tokens < 2
    ):
        raise DataError(f"vocab_size={vocab_size} or block_tokens={block_tokens} is out of range")
    if block_tokens * manifest.item_size > MAX_BLOCK_BYTES:
        raise DataError(f"block_tokens={block_tokens} makes blocks of more than {MAX_BLOCK_BYTES} bytes")
    _check_special_ids(manifest.special_ids, vocab_size)
    for shards in (manifest.shards, manifest.held_out):
        _check_blocks(manifest, shards)
        for shard in shards:
            if not shard.path or shard.path.startswith("/") or ".." in shard.path.split("/") or "\0" in shard.path:
                raise DataError(f"the path {shard.path!r} leads out of the corpus")
            if shard.num_tokens != sum(block.num_tokens for block in shard.blocks):
                raise DataError(f"{shard.path}: its blocks do not add up to {shard.num_tokens} tokens")


def _check_special_ids(special_ids: dict[str, int], vocab_size: int) -> None:
    known = isinstance(special_ids, dict) and set(SPECIAL_NAMES) <= special_ids.keys()
    if not known or not all(_are_counts(number) and number < vocab_size for number in special_ids.values()):
        raise DataError(
            f"special_ids={special_ids!r} are not ids below {vocab_size} of {', '.join(SPECIAL_NAMES)}, all of them"
        )


def _check_blocks(manifest: Manifest, shards: tuple[Shard, ...]) -> None:
    blocks = [(shard, block) for shard in shards for block in shard.blocks]
    for number, (shard, block) in enumerate(blocks):
        is_tail = number == len(blocks) - 1 and 0 < block.num_tokens < manifest.block_tokens
        if block.num_tokens != manifest.block_tokens and not is_tail:
            raise DataError(
                f"block {number} in {shard.path} has {block.num_tokens} tokens, not {manifest.block_tokens}"
            )
        fits = block.length == block.num_tokens * manifest.item_size
        if not (fits and _are_counts(block.offset, block.length, block.num_tokens)):
            raise DataError(
                f"block {number} in {shard.path}: {block.length!r} bytes at offset {block.offset!r} are no block"
            )
        if not isinstance(block.checksum, str):
            raise DataError(f"block {number} in {shard.path}: its checksum {block.checksum!r} is no text")


def _are_counts(*numbers: Any) -> bool:
    """JSON has one kind of number, and 65.0 would be a place that nothing can be read from."""
    return all(type(number) is int and number >= 0 for number in numbers)
