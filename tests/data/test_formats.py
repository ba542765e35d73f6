"""Formats: the same documents make the same corpus in every format, and a damaged file is told with its name."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data import compressed, documents, parquet, plain
from elastic_lm.data.documents import Chunk, Document
from elastic_lm.data.formats import format_of
from elastic_lm.data.mixture import Source
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.errors import ConfigError, DataError, StorageError
from elastic_lm.storage import Storage
from tests.data.corpora import find_chunks, texts

OPTIONS = PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.2)
folders = itertools.count()


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def lines(documents: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, column: text}) + "\n" for n, text in enumerate(documents)).encode()


def write_table(path: Path, documents: list[Any], *, kind: Any = None, row_group_size: int = 7, **options: Any) -> Path:
    column = pa.array(documents, kind or pa.string())
    table = pa.table({"id": pa.array(range(len(documents))), "text": column, "note": ["x" * 50] * len(documents)})
    pq.write_table(table, path, row_group_size=row_group_size, **options)
    return path


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# What writes documents into a file, by its suffix.
WRITERS: dict[str, Callable[[Path, list[str]], object]] = {
    ".jsonl": lambda path, texts: path.write_bytes(lines(texts)),
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(lines(texts))),
    ".jsonl.zst": lambda path, texts: path.write_bytes(zstd(lines(texts))),
    ".parquet": lambda path, texts: write_table(path, [as_bytes(text) for text in texts], kind=pa.binary()),
}


def found(*sources: str | Path, column: str = "text") -> list[Document]:
    return [d for chunk in find_chunks([str(s) for s in sources], column) for d in chunk.documents()]


def found_texts(*sources: str | Path, column: str = "text") -> list[str]:
    return [document.text for document in found(*sources, column=column)]


def refusal(source: Path, column: str = "text") -> str:
    with pytest.raises(DataError) as refused:
        found(source, column=column)
    return str(refused.value)


# -- one corpus, whatever the format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("part_bytes", [1, 10**9])
def test_same_documents_make_the_same_corpus_in_every_format(tmp_path: Path, part_bytes: int) -> None:
    options = dataclasses.replace(OPTIONS, part_bytes=part_bytes)
    hashes = set()
    for suffix, write in WRITERS.items():
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        for number in range(3):
            write(folder / f"{number}{suffix}", ["", *texts(40, seed=number)])
        manifest = prepare([str(folder)], Storage.open(f"{folder}/out"), options)
        assert manifest.counts["empty_documents"] == 3
        hashes.add(manifest.hash)
    assert len(hashes) == 1


# Everything that a string of JSON can hold, and each half of a surrogate pair.
ODD_TEXTS = st.lists(
    st.text(st.characters() | st.sampled_from("\ud800\udfff\0\n\r\u2028\ufeff\x85"), max_size=20), max_size=8
)


@given(
    texts=ODD_TEXTS,
    row_group_size=st.integers(1, 5),
    chunk_bytes=st.integers(1, 300),
    part_bytes=st.sampled_from([1, 10**9]),
)
@settings(max_examples=25)
def test_odd_documents_make_the_same_corpus_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], row_group_size: int, chunk_bytes: int, part_bytes: int
) -> None:
    base = tmp_path_factory.mktemp("odd")
    texts = [*texts, "something to train on"]
    options = dataclasses.replace(OPTIONS, held_out=0.0, vocab_size=261, part_bytes=part_bytes)
    manifests = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "CHUNK_BYTES", chunk_bytes)
        for suffix, write in WRITERS.items():
            source = base / f"a{suffix}"
            if suffix == ".parquet":
                write_table(source, list(map(as_bytes, texts)), kind=pa.binary(), row_group_size=row_group_size)
            else:
                write(source, texts)
            manifests.add(prepare([str(source)], Storage.open(f"{base}/out{suffix}"), options).to_json())
    assert len(manifests) == 1


def test_recompressed_file_gives_the_same_corpus(tmp_path: Path) -> None:
    hashes = set()
    data = lines(texts(40))
    half = len(data) // 2
    for number, packed in enumerate(
        [
            gzip.compress(data, 1),
            gzip.compress(data, 9),
            gzip.compress(data[:half]) + gzip.compress(data[half:]),  # as `cat a.gz b.gz` and pigz make
            gzip.compress(data) + b"\0" * 512,  # padding of tapes
        ]
    ):
        source = write_bytes(tmp_path / f"{number}.jsonl.gz", packed)
        hashes.add(prepare([str(source)], Storage.open(f"{tmp_path}/{number}"), OPTIONS).hash)
    for number, packed in enumerate([zstd(data), zstd(data[:half]) + zstd(data[half:])]):
        source = write_bytes(tmp_path / f"{number}.jsonl.zst", packed)
        hashes.add(prepare([str(source)], Storage.open(f"{tmp_path}/z{number}"), OPTIONS).hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("content", [b"", b"one", b"\xef\xbb\xbftwo\n", b"caf\xe9", b"a\r\n\0b" * 1_000])
def test_compressed_text_is_the_document_that_it_is_unpacked(tmp_path: Path, suffix: str, content: bytes) -> None:
    packed = write_bytes(tmp_path / f"a.md{suffix}", gzip.compress(content) if suffix == ".gz" else zstd(content))
    assert found(packed) == found(write_bytes(tmp_path / "a.md", content))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_places_count_bytes_of_the_unpacked_lines(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", texts(20))
    assert found(tmp_path / f"a{suffix}") == found(write_bytes(tmp_path / "a.jsonl", lines(texts(20))))


def test_places_count_rows_of_a_table(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", texts(20))
    assert [document.place for document in found(path)] == list(range(20))
    chunk = find_chunks([str(path)])[0]
    assert chunk.at(3) == f"file://{path}, row 3"


def test_formats_are_told_by_the_suffix_alone() -> None:
    assert format_of("a.txt", "t") == format_of("b/c.java", "t") == plain.Text()
    assert format_of("a.jsonl", "t") == plain.Lines("t")
    assert format_of("a.jsonl.gz", "t") == compressed.Compressed(plain.Lines("t"), "gzip")
    assert format_of("a.txt.zst", "t") == compressed.Compressed(plain.Text(), "zstd")
    assert format_of("a.parquet", "t") == parquet.Parquet("t")
    for unknown in ("a", "a.gz", "a.tar.gz", "a.txt.gz.gz", "a.parquet.gz", "a.parquet.zst", "a.TXT", "a.zip", "txt"):
        assert format_of(unknown, "t") is None


@pytest.mark.parametrize("name", ["a.tar.gz", "a.gz", "a.parquet.zst"])
def test_unknown_suffix_inside_a_compressed_one_is_refused_with_the_known(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    with pytest.raises(ConfigError, match=r"unknown suffix; known: \.jsonl \.txt .*\.gz or \.zst.*\.parquet"):
        find_chunks([str(tmp_path / name)])


# -- damage ----------------------------------------------------------------------------------------------------------


def damaged(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "another format", b"hello, this is text and nothing else"
    yield "one byte", data[:1]
    yield "half", data[: len(data) // 2]
    yield "last byte missing", data[:-1]
    yield "more behind it", data + b"more"


GZIP = gzip.compress(lines(texts(2_000)))
FLIPPED = GZIP[:5_000] + bytes([GZIP[5_000] ^ 1]) + GZIP[5_001:]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *(pytest.param("a.jsonl.gz", data, id=f"gzip, {what}") for what, data in damaged(GZIP)),
        *(pytest.param("a.jsonl.zst", d, id=f"zstd, {what}") for what, d in damaged(zstd(lines(texts(2_000))))),
        pytest.param("a.jsonl.gz", FLIPPED, id="gzip, flipped bit"),
        pytest.param("a.jsonl.gz", GZIP + GZIP[:5], id="gzip, second member truncated"),
        pytest.param("a.txt.gz", GZIP[:-1], id="gzip, text"),
    ],
)
def test_damaged_compressed_file_is_refused_with_its_name(tmp_path: Path, name: str, data: bytes) -> None:
    said = refusal(write_bytes(tmp_path / name, data))
    assert said.startswith(f"file://{tmp_path}/{name}")
    assert "remove" in said


@pytest.mark.parametrize("place", ["footer's length", "footer", "magic", "truncated", "empty", "page"])
def test_damaged_table_is_refused_with_its_name(tmp_path: Path, place: str) -> None:
    path = write_table(tmp_path / "a.parquet", texts(50), write_page_checksum=True, compression="none")
    data = bytearray(path.read_bytes())
    if place == "truncated":
        data = data[:-100]
    elif place == "empty":
        data = bytearray()
    else:
        data[{"footer's length": -5, "footer": -60, "magic": -1, "page": data.index(b"quick")}[place]] ^= 0x7F
    path.write_bytes(data)
    said = refusal(path)
    assert said.startswith(f"file://{path}: a damaged Parquet file, or one that cannot be read here (")
    assert said.endswith("copy or make it again, or remove it")
    assert "\n" not in said


def test_line_that_is_no_document_in_a_compressed_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write_bytes(tmp_path / "a.jsonl.gz", gzip.compress(lines(texts(3)) + b"\nnot json\n"))
    assert f"{path}, byte 0 plus 4 lines: not JSON" in refusal(path)


class Failing(Storage):
    def read_range(self, path: str, offset: int, length: int) -> bytes:
        raise StorageError(f"read_range {self.url}/{path}: gave up")


@pytest.mark.parametrize("suffix", WRITERS)
def test_storage_that_fails_is_no_damage(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", texts(5))
    (chunk,) = find_chunks([str(tmp_path)])
    file = dataclasses.replace(chunk.file, storage=Failing(str(tmp_path)))
    with pytest.raises(StorageError, match="gave up"):
        list(dataclasses.replace(chunk, file=file).documents())


# -- memory, and what is read ----------------------------------------------------------------------------------------


class Counting(Storage):
    """Counts the bytes that are read."""

    num_read = 0

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self.num_read += length
        return super().read_range(path, offset, length)


def counted(path: Path, column: str = "text") -> tuple[Counting, list[Chunk]]:
    storage = Counting(str(path.parent))
    file = documents.File(storage, path.name, path.stat().st_size, Source(str(path)))
    format = format_of(path.name, column)
    assert format is not None
    return storage, format.cut(file)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_document_that_unpacks_beyond_the_largest_is_refused_before_it_is_whole(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "LARGEST_DOCUMENT_BYTES", 10**6)
    monkeypatch.setattr(plain, "READ_AHEAD_BYTES", 10_000)
    pack = gzip.compress if suffix == ".gz" else zstd
    path = write_bytes(tmp_path / f"a.txt{suffix}", pack(b"\0" * 10**6))
    assert found_texts(path) == ["\0" * 10**6]
    write_bytes(path, pack(b"\0" * 10**6 + b"\0"))
    assert f"{path}: the document exceeds 1000000 bytes; split it" in refusal(path)
    line = write_bytes(tmp_path / f"b.jsonl{suffix}", pack(lines(["fine"]) + b"\0" * 10**8))
    assert f"{line}, byte 26: a line exceeds 1000000 bytes; split the document" in refusal(line)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_compressed_file_is_read_as_its_documents_are_taken(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "PACKED_BUFFER_BYTES", 4_096)
    monkeypatch.setattr(compressed, "UNPACKED_BUFFER_BYTES", 4_096)
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, texts(20_000))
    storage, (chunk,) = counted(path)
    assert next(chunk.documents()).text == texts(1)[0]
    assert 0 < storage.num_read <= path.stat().st_size // 4


def test_other_columns_of_a_table_are_not_read(tmp_path: Path) -> None:
    heavy = pa.table({"text": texts(50), "image": pa.array([bytes(range(256)) * 400] * 50), "z": [1.5] * 50})
    pq.write_table(heavy, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    storage, chunks = counted(tmp_path / "a.parquet")
    assert [document.text for chunk in chunks for document in chunk.documents()] == texts(50)
    text_bytes = sum(len(text) + 4 for text in texts(50))
    # The footer is read when the file is cut and when it is read, 64 KiB at a time.
    assert text_bytes < storage.num_read < text_bytes + 3 * 65_536 < (tmp_path / "a.parquet").stat().st_size // 10


def test_small_row_groups_share_a_chunk_and_large_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_table(tmp_path / "a.parquet", texts(70), compression="none")
    (whole,) = find_chunks([str(path)])
    assert (whole.start, whole.stop) == (0, 70)
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1)
    chunks = find_chunks([str(path)])
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(row, row + 7) for row in range(0, 70, 7)]
    assert sum(chunk.num_bytes for chunk in chunks) == whole.num_bytes < path.stat().st_size
    assert [d.text for chunk in chunks for d in chunk.documents()] == texts(70)


# -- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.string_view(),
     pa.dictionary(pa.int32(), pa.string())],
    ids=str,
)  # fmt: skip
def test_text_is_read_from_every_type_that_holds_it(tmp_path: Path, kind: Any) -> None:
    assert found_texts(write_table(tmp_path / "a.parquet", ["né", "", "x\0\n"], kind=kind)) == ["né", "", "x\0\n"]


def test_nulls_of_a_column_are_empty_documents(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", ["one", None, "two", None])
    assert found_texts(path) == ["one", "", "two", ""]
    assert prepare([str(path)], Storage.open(str(tmp_path / "out")), OPTIONS).counts["empty_documents"] == 2


@pytest.mark.parametrize("kind", [pa.binary(), pa.string()])
def test_bytes_of_a_column_that_are_no_utf_8_are_replaced_and_said(tmp_path: Path, kind: Any) -> None:
    column = pa.array([b"caf\xe9"], pa.binary()).cast(kind, safe=False) if kind == pa.binary() else invalid_string()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert found(tmp_path / "a.parquet") == [Document("caf\ufffd", replaced=True)]


def invalid_string() -> Any:
    """What other writers put into a column of strings."""
    array = pa.array([b"caf\xe9"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 1, array.buffers())


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_may_have_another_name(tmp_path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": [1, 2], "body of it": ["a", "b"]}), tmp_path / "a.parquet")
    else:
        data = lines(["a", "b"], column="body of it")
        packed = {".jsonl": data, ".jsonl.gz": gzip.compress(data), ".jsonl.zst": zstd(data)}[suffix]
        write_bytes(tmp_path / f"a{suffix}", packed)
    assert found_texts(tmp_path, column="body of it") == ["a", "b"]
    assert "text" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ("content", "there is no column 'content', or more than one; choose another with --text-column: id (int64), text"),
        ("id", "the column 'id' is int64, not string or binary; choose another with --text-column: id (int64)"),
        ("", "there is no column ''"),
        ("Text", "there is no column 'Text'"),
    ],
)  # fmt: skip
def test_column_that_holds_no_text_is_refused_with_those_there_are(tmp_path: Path, column: str, words: str) -> None:
    path = write_table(tmp_path / "a.parquet", texts(3))
    said = refusal(path, column)
    assert said.startswith(f"file://{path}: {words}")
    assert said.endswith("id (int64), text (string), note (string)")


def test_nested_and_list_columns_are_no_text(tmp_path: Path) -> None:
    table = pa.table({"text": [["a"], ["b"]], "t": [{"text": "x"}, {"text": "y"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "'text' is list<" in refusal(tmp_path / "a.parquet")
    assert "'t' is struct<" in refusal(tmp_path / "a.parquet", "t")
    assert "no column 't.text'" in refusal(tmp_path / "a.parquet", "t.text")


def test_wide_table_is_told_in_one_readable_message(tmp_path: Path) -> None:
    pq.write_table(pa.table({f"c{n}": [1] for n in range(500)}), tmp_path / "a.parquet")
    said = refusal(tmp_path / "a.parquet")
    assert said.endswith("c19 (int64) and 480 more") and len(said) < 800


def test_table_without_rows_has_no_documents(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.parquet", [])
    assert found(path) == []
    with pytest.raises(DataError, match="hold no text to train on"):
        prepare([str(path)], Storage.open(str(tmp_path / "out")), OPTIONS)


# -- the tokenizer's share -------------------------------------------------------------------------------------------


def test_tokenizer_reads_a_share_of_a_file_that_unpacks_to_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed well must not flood the tokenizer's training."""
    monkeypatch.setattr("elastic_lm.data.prepare.CHUNK_BYTES", 1_000)
    early, late = ["early words"] * 300, ["later letters"] * 300
    write_bytes(tmp_path / "a.jsonl.gz", gzip.compress(lines(early + late)))
    whole = write_bytes(tmp_path / "b.jsonl.gz", gzip.compress(lines(early)))
    options = dataclasses.replace(OPTIONS, tokenizer_bytes=1_000, held_out=0.0)
    hashes = [
        prepare([str(source)], Storage.open(str(tmp_path / source.stem)), options).tokenizer_hash
        for source in (tmp_path / "a.jsonl.gz", whole)
    ]
    assert hashes[0] == hashes[1]


# -- over S3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.s3
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_every_format_is_read_from_s3(s3_url: str, tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"a{suffix}", texts(50))
    Storage.open(f"{s3_url}/in").write(f"deep/a{suffix}", (tmp_path / f"a{suffix}").read_bytes())
    there = prepare([f"{s3_url}/in/**/*{suffix}"], Storage.open(f"{s3_url}/out"), OPTIONS)
    here = prepare([str(tmp_path / f"a{suffix}")], Storage.open(str(tmp_path / "out")), OPTIONS)
    assert there.hash == here.hash
