"""Bad corpora: refused with a sentence that names the place, or handled in one documented way, the same each time.

What each kind of file becomes is the table here; how documents are cut and found is in test_documents.py, how damage in
a prepared corpus is found in test_manifest.py and test_windows.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data import documents as documents_module
from elastic_lm.data import plain
from elastic_lm.data.documents import Chunk, File
from elastic_lm.data.manifest import Block, Manifest
from elastic_lm.data.mixture import Source
from elastic_lm.data.parts import Part, is_held_out
from elastic_lm.data.plain import Text
from elastic_lm.data.prepare import PrepareOptions, plan, prepare
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.data.windows import read_block
from elastic_lm.errors import AccessDeniedError, ConfigError, DataError, ElasticLMError
from elastic_lm.storage import Storage
from tests.data.corpora import find_chunks, identity, small_corpus, texts

OPTIONS = PrepareOptions(vocab_size=261, block_tokens=65, held_out=0.0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty folder for text."""
    folder = tmp_path / "in"
    folder.mkdir()
    return folder


def prepared(source: Path | Sequence[Path], options: PrepareOptions = OPTIONS) -> tuple[list[str], dict[str, int]]:
    """The documents that come out of the corpus again, and what was counted."""
    sources = [source] if isinstance(source, Path) else list(source)
    out = Storage.open(str(sources[0].parent / "out"))
    manifest = prepare([str(path) for path in sources], out, options)
    encoder = TextEncoder(out.read("tokenizer.json").decode())
    ids = [int(token) for block in range(len(manifest.blocks)) for token in read_block(out, manifest, block)]
    found, start = [], 0
    for at, token in enumerate(ids):
        if token == encoder.special_ids["end_of_text"]:
            found.append(encoder.decode(ids[start:at]))
            start = at + 1
    return found, manifest.counts


def refusal(source: Path | str, kind: type[ElasticLMError] = DataError) -> str:
    """What is said when the source is refused. Nothing that counts may have been written."""
    out = Storage.open(str(Path(source).parent / "out"))
    with pytest.raises(kind) as refused:
        prepare([str(source)], out, OPTIONS)
    assert not out.exists("manifest.json")
    return str(refused.value)


# -- nothing to train on ---------------------------------------------------------------------------------------------


def test_empty_folder_is_refused(source: Path) -> None:
    assert f"{source}: no such file, or nothing in it ends in .jsonl" in refusal(source, ConfigError)


def test_missing_source_is_refused(source: Path) -> None:
    assert f"{source}/nothing.txt: no such file" in refusal(source / "nothing.txt", ConfigError)


@pytest.mark.parametrize(
    "files",
    [
        {"a.txt": b""},
        {"a.jsonl": b""},
        {"a.jsonl": b"\n\n \n"},
        {"a.txt": b" \t\r\n", "b.txt": b"\xef\xbb\xbf", "c.jsonl": b'{"text": ""}\n{"text": "\\u3000"}\n'},
    ],
    ids=str,
)
def test_corpus_of_empty_documents_is_refused(source: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (source / name).write_bytes(content)
    assert "hold no text to train on" in refusal(source)


def test_corpus_that_is_held_out_as_a_whole_is_refused(source: Path) -> None:
    (source / "a.txt").write_text("alone")
    share = 1 - 1e-9
    assert is_held_out("alone", share)
    with pytest.raises(DataError, match="train on: 1 held out; add documents, or lower held_out"):
        prepared(source, dataclasses.replace(OPTIONS, held_out=share))


def test_corpus_without_one_sample_is_refused_when_it_is_to_be_trained_on(source: Path) -> None:
    (source / "a.txt").write_text("short")
    manifest = prepare([str(source)], Storage.open(str(source.parent / "out")), OPTIONS)
    with pytest.raises(ConfigError, match="no block of the corpus holds a sample of 64"):
        manifest.order(sequence_length=64, micro_batches=1, micro_batch_size=1, seed=0)


def test_empty_documents_are_counted_and_left_out(source: Path) -> None:
    (source / "a.txt").write_bytes(b"")
    (source / "b.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": " \\n"}\n{"text": "two"}')
    found, counts = prepared(source)
    assert found == ["one", "two"]
    assert (counts["documents"], counts["empty_documents"]) == (2, 3)


# -- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected", "num_replaced"),
    [
        (b"\xef\xbb\xbfwith a mark", "with a mark", 0),
        (b"\xef\xbb\xbf\xef\xbb\xbftwo marks", "\ufefftwo marks", 0),  # only the first is one
        (b"nul \0 inside", "nul \0 inside", 0),
        (b"caf\xe9", "caf\ufffd", 1),  # Latin-1
        ("né".encode("utf-16"), "\ufffd\ufffdn\0\ufffd\0", 1),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd", 1),  # half of a surrogate pair
        (b"\xc0\xaf", "\ufffd\ufffd", 1),  # an overlong slash
        (b"cut \xe2\x82", "cut \ufffd", 1),
        ("𝄞 \U0010ffff \ufdd0".encode(), "𝄞 \U0010ffff \ufdd0", 0),
        (b"\r\nwindows\r\n", "\r\nwindows\r\n", 0),
    ],
)
def test_text_in_an_odd_encoding_becomes_this(source: Path, content: bytes, expected: str, num_replaced: int) -> None:
    (source / "a.txt").write_bytes(content)
    found, counts = prepared(source)
    assert found == [expected]
    assert counts["replaced_documents"] == num_replaced


@pytest.mark.parametrize(
    ("line", "expected", "num_replaced"),
    [
        (b'\xef\xbb\xbf{"text": "marked"}', "marked", 0),
        (b'{"text": "\\ufeffmarked"}', "marked", 0),
        (b'{"text": "nul \\u0000 inside"}', "nul \0 inside", 0),
        (b'{"text": "caf\xe9"}', "caf\ufffd", 1),
        (b'{"text": "\\ud83d\\ude00"}', "😀", 0),
        (b'{"text": "\\ude00 alone"}', "\ufffd\ufffd\ufffd alone", 1),
        (b'{"text": "first", "text": "last"}', "last", 0),
        (b'{"text": "x", "n": NaN}', "x", 0),
    ],
)
def test_line_in_an_odd_encoding_becomes_this(source: Path, line: bytes, expected: str, num_replaced: int) -> None:
    (source / "a.jsonl").write_bytes(line + b"\n")
    found, counts = prepared(source)
    assert found == [expected]
    assert counts["replaced_documents"] == num_replaced


@pytest.mark.parametrize(
    "line",
    [
        b"just text",
        b'{"text": "unfinished',
        b'{"text": "a"} {"text": "b"}',
        b'{"text": "raw \0 nul"}',
        b"\0",
        b'{"text": "\\x41"}',
        b"'text'",
        b'{"text": "x", "n": ' + b"9" * 5_000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda line: ascii(line[:20]),
)
def test_line_that_is_no_json_is_refused_with_its_place(source: Path, line: bytes) -> None:
    (source / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    said = refusal(source)
    assert f"{source}/a.jsonl, byte 0 plus 2 lines: not JSON" in said
    assert "fix or remove the line" in said
    assert len(said) < 500


@pytest.mark.parametrize(
    "line", [b"{}", b'{"Text": "x"}', b'{"text": null}', b'{"text": ["x"]}', b'"text"', b"null", b"3", b'["text"]']
)
def test_line_without_a_text_is_refused_with_its_place(source: Path, line: bytes) -> None:
    (source / "a.jsonl").write_bytes(line)
    assert f'{source}/a.jsonl, byte 0 plus 0 lines: not an object with a string "text"' in refusal(source)


def test_place_of_a_line_is_told_from_its_chunk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "CHUNK_BYTES", 100)
    (source / "a.jsonl").write_bytes(b'{"text": "0123456789"}\n' * 10 + b"bad\n")
    assert "a.jsonl, byte 200 plus 1 lines" in refusal(source)  # the line that begins at byte 207 is its first


# -- giants ----------------------------------------------------------------------------------------------------------


def test_text_file_beyond_the_largest_document_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "LARGEST_DOCUMENT_BYTES", 100)
    (source / "a.txt").write_bytes(b"x" * 101)
    assert f"{source}/a.txt: one document of 101 bytes exceeds 100; split it" in refusal(source)
    (source / "a.txt").write_bytes(b"x" * 100)
    assert prepared(source)[0] == ["x" * 100]


def test_line_beyond_the_largest_document_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "LARGEST_DOCUMENT_BYTES", 1_000)
    monkeypatch.setattr(documents_module, "CHUNK_BYTES", 100)
    monkeypatch.setattr(plain, "READ_AHEAD_BYTES", 50)
    (source / "a.jsonl").write_text('{"text": "short"}\n' * 10 + json.dumps({"text": "x" * 2_000}) + "\n")
    assert f"{source}/a.jsonl, byte 100: a line exceeds 1000 bytes; split the document" in refusal(source)


def test_giant_line_among_short_ones_is_read_whole(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "CHUNK_BYTES", 1_000)
    giant = "giant " * 4_000
    lines = [json.dumps({"text": text}) for text in ("before", giant, "after")]
    (source / "a.jsonl").write_text("\n".join(lines))
    assert prepared(source)[0] == ["before", giant, "after"]


def text_chunk(storage: Storage, path: str, size: int) -> Chunk:
    return Chunk(File(storage, path, size, Source(path)), Text(), 0, size, size)


def test_many_small_files_are_planned_in_linear_time() -> None:
    # With a sum over the part for every file this took minutes; the time limit of every test is what fails.
    storage = Storage.open("file:///nowhere")
    chunks = [text_chunk(storage, f"{number}.txt", number % 3) for number in range(120_000)]
    parts = plan(chunks, part_bytes=10**9)
    assert [chunk for part in parts for chunk in part.chunks] == chunks
    assert len(parts) == 1


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 60))
def test_parts_are_neighbours_and_no_larger_than_wanted(sizes: list[int], part_bytes: int) -> None:
    storage = Storage.open("file:///nowhere")
    chunks = [text_chunk(storage, f"{number}.txt", size) for number, size in enumerate(sizes)]
    parts = plan(chunks, part_bytes)
    assert [chunk for part in parts for chunk in part.chunks] == chunks
    bytes_of = [sum(chunk.num_bytes for chunk in part.chunks) for part in parts]
    for part, size in zip(parts, bytes_of, strict=True):
        assert size <= part_bytes or len(part.chunks) == 1
    for size, after in zip(bytes_of, parts[1:], strict=False):
        assert size + after.chunks[0].num_bytes > part_bytes


# -- names, links and what is no file --------------------------------------------------------------------------------


def test_odd_names_change_nothing_about_the_corpus(tmp_path: Path) -> None:
    corpora = []
    for number, names in enumerate((["1.txt", "2.txt"], ["a b\n\t.txt", os.fsdecode(b"\xe9 \xf0\x9f\x98\x80.txt")])):
        folder = tmp_path / str(number) / "in"
        folder.mkdir(parents=True)
        for name, text in zip(names, ("first", "second"), strict=True):
            (folder / name).write_text(text)
        out = Storage.open(str(folder.parent / "out"))
        prepare([str(folder)], out, OPTIONS)
        corpora.append(identity(out))
    assert corpora[0] == corpora[1]


@pytest.mark.parametrize("name", ["new\nline.jsonl", "é ü.jsonl", os.fsdecode(b"\xe9.jsonl")], ids=ascii)
def test_refusal_names_a_file_with_an_odd_name(source: Path, name: str) -> None:
    (source / name).write_text("not json")
    assert f"{source}/{name}, byte 0 plus 0 lines" in refusal(source)


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(path.parent, os.O_RDONLY)  # the path may be too long for a socket's address
        try:
            server.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("missing.txt"),
        lambda path: (path.symlink_to("b.txt"), path.with_name("b.txt").symlink_to("a.txt")),
        make_pipe,  # opening one waits for a writer
        make_socket,
    ],
    ids=["link to itself", "link to nothing", "links to each other", "pipe", "socket"],
)
def test_what_cannot_be_read_as_a_file_is_refused(source: Path, make: Callable[[Path], object]) -> None:
    (source / "0.txt").write_text("fine")
    make(source / "a.txt")
    assert f"{source}/a.txt is no file that can be read" in refusal(source)


def test_pipe_that_is_named_is_refused(source: Path) -> None:
    make_pipe(source / "a.txt")
    assert f"{source}/a.txt is no file that can be read" in refusal(source / "a.txt")


@pytest.mark.parametrize("target", ["../secret.txt", "/etc/hostname"])
def test_link_out_of_its_folder_is_refused(source: Path, target: str) -> None:
    (source.parent / "secret.txt").write_text("secret")
    (source / "a.txt").symlink_to(target)
    assert f"{source}/a.txt is a link that leads out of its folder" in refusal(source)


def test_loop_of_folders_ends(source: Path) -> None:
    (source / "deep").mkdir()
    (source / "deep" / "back").symlink_to(source)
    (source / "deep" / "a.txt").write_text("once")
    assert prepared(source)[0] == ["once"]


class _Denied(Storage):
    def read_range(self, path: str, offset: int, length: int) -> bytes:
        raise AccessDeniedError(f"read_range {self.url}/{path}: access denied; check the credentials and the rights")


def test_file_that_may_not_be_read_is_refused_with_its_name() -> None:
    # Who runs the tests may be allowed to read everything, so storage says no.
    chunk = text_chunk(_Denied("s3://bucket/texts"), "a.txt", 5)
    with pytest.raises(AccessDeniedError, match=r"s3://bucket/texts/a\.txt: access denied"):
        list(chunk.documents())


def test_file_that_shrank_meanwhile_is_refused_with_its_name(source: Path) -> None:
    (source / "a.txt").write_text("long enough")
    (chunk,) = find_chunks([str(source)])
    (source / "a.txt").write_text("short")
    with pytest.raises(ElasticLMError, match=rf"{source}/a\.txt: .*got 5 of 11 bytes"):
        list(chunk.documents())


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_text_without_a_token_is_refused_with_its_place(source: Path) -> None:
    from tokenizers import Tokenizer, models

    (source.parent / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0})).to_str())
    (source / "a.txt").write_text("a")
    (source / "b.txt").write_text("zzz")
    options = dataclasses.replace(OPTIONS, tokenizer=str(source.parent / "tokenizer.json"))
    with pytest.raises(DataError, match=rf"{source}/b\.txt, byte 0: the tokenizer cannot encode .*'zzz'"):
        prepared(source, options)


def test_missing_tokenizer_is_named(source: Path) -> None:
    (source / "a.txt").write_text("a")
    with pytest.raises(ElasticLMError, match=r"nowhere/tokenizer\.json"):
        prepared(source, dataclasses.replace(OPTIONS, tokenizer=str(source / "nowhere" / "tokenizer.json")))


# -- a prepared corpus that does not fit its manifest ----------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Storage, Manifest]:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def with_first_block(manifest: Manifest, **changes: object) -> Manifest:
    """The manifest with another first block; everything else is kept."""
    first = manifest.shards[0]
    block = dataclasses.replace(first.blocks[0], **changes)  # type: ignore[arg-type]
    shards = (dataclasses.replace(first, blocks=(block, *first.blocks[1:])), *manifest.shards[1:])
    return dataclasses.replace(manifest, shards=shards)


def test_block_at_another_offset_is_refused(corpus: tuple[Storage, Manifest]) -> None:
    storage, manifest = corpus
    offset = manifest.blocks[0][1].offset + 2
    with pytest.raises(DataError, match=rf"{manifest.blocks[0][0]}, offset {offset}, .*checksum"):
        read_block(storage, with_first_block(manifest, offset=offset), 0)


def test_block_beyond_its_shard_is_refused(corpus: tuple[Storage, Manifest]) -> None:
    storage, manifest = corpus
    with pytest.raises(DataError, match="offset 1000000, .*the shard ends before"):
        read_block(storage, with_first_block(manifest, offset=10**6), 0)


@pytest.mark.parametrize("checksum", ["", "0" * 16, "not a checksum"])
def test_block_with_another_checksum_is_refused(corpus: tuple[Storage, Manifest], checksum: str) -> None:
    storage, manifest = corpus
    with pytest.raises(DataError, match="checksum .*, read twice"):
        read_block(storage, with_first_block(manifest, checksum=checksum), 0)


def test_manifest_of_another_corpus_is_refused(tmp_path: Path, corpus: tuple[Storage, Manifest]) -> None:
    (tmp_path / "a").mkdir()
    other = small_corpus(tmp_path / "a", num_documents=61)[1]
    with pytest.raises(DataError, match="no such object"):
        read_block(corpus[0], other, 0)


def test_ids_of_another_dtype_are_refused(corpus: tuple[Storage, Manifest]) -> None:
    """The bytes are those the checksum promises, and read two at a time they are no ids of this vocabulary."""
    storage, manifest = corpus
    path, block = manifest.blocks[0]
    length = block.length // 4 * 4
    raw = storage.read_range(path, block.offset, length)
    wide = Block(block.offset, length, length // 4, xxhash.xxh3_64_hexdigest(raw))
    shard = dataclasses.replace(manifest.shards[0], num_tokens=length // 4, blocks=(wide,))
    claimed = dataclasses.replace(manifest, dtype="uint32", block_tokens=length // 4, shards=(shard,), held_out=())
    with pytest.raises(DataError, match=rf"{path}, offset {block.offset}.*token id \d+ is not below the vocabulary"):
        read_block(storage, claimed, 0)


def test_highest_id_of_the_vocabulary_is_allowed(corpus: tuple[Storage, Manifest]) -> None:
    storage, manifest = corpus
    highest = max(int(read_block(storage, manifest, number).max()) for number in range(len(manifest.blocks)))
    allowed = dataclasses.replace(manifest, vocab_size=highest + 1)
    assert all(read_block(storage, allowed, number).dtype == np.uint16 for number in range(len(manifest.blocks)))
    holder = next(n for n in range(len(manifest.blocks)) if read_block(storage, manifest, n).max() == highest)
    with pytest.raises(DataError, match=f"token id {highest} is not below the vocabulary size {highest}"):
        read_block(storage, dataclasses.replace(manifest, vocab_size=highest), holder)


# -- the same bytes, whatever the way --------------------------------------------------------------------------------


@given(
    chunk_bytes=st.sampled_from([100, 700, 10**6]),
    part_bytes=st.integers(1, 3_000),
    shuffle=st.integers(0, 2**32),
    held_out=st.sampled_from([0.0, 0.3]),
)
@settings(max_examples=6)
def test_corpus_does_not_depend_on_parts_or_on_the_order_of_work(
    tmp_path_factory: pytest.TempPathFactory, chunk_bytes: int, part_bytes: int, shuffle: int, held_out: float
) -> None:
    """Parts of any size, finished in any order, from files that were made in any order."""
    base = tmp_path_factory.mktemp("same")
    draw = random.Random(shuffle)

    def corpus(name: str, numbers: list[int], options: PrepareOptions) -> dict[str, bytes]:
        for number in numbers:
            path = base / name / f"{number % 3}" / f"{number}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(5, seed=number)))
        out = Storage.open(str(base / f"out-{name}"))

        def at_random(encode: Callable[[Part], object], parts: Sequence[Part]) -> list[object]:
            order = draw.sample(range(len(parts)), len(parts))
            done = {number: encode(parts[number]) for number in order}
            return [done[number] for number in range(len(parts))]

        prepare([str(base / name)], out, options, at_random)  # type: ignore[arg-type]
        return identity(out)

    numbers = list(range(6))
    options = dataclasses.replace(OPTIONS, held_out=held_out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "CHUNK_BYTES", chunk_bytes)
        expected = corpus("a", numbers, options)
        other = dataclasses.replace(options, part_bytes=part_bytes)
        assert corpus("b", draw.sample(numbers, len(numbers)), other) == expected
