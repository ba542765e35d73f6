"""The index of documents: every token leads back to the document it came from, in bounded memory, and only in its corpus."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data import document_index
from elastic_lm.data.document_index import DocumentIndex, Origin
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.mixture import Source
from elastic_lm.data.parts import is_held_out
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.data.windows import read_block
from elastic_lm.errors import DataError
from elastic_lm.storage import Storage
from tests.data.corpora import contents, identity, small_corpus, texts, write_lines
from tests.data.test_formats import write_table

OPTIONS = PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.3)


def loaded(storage: Storage, manifest: Manifest, *, held_out: bool = False) -> DocumentIndex:
    index = DocumentIndex.load(storage, manifest, held_out=held_out)
    assert index is not None
    return index


def stream(storage: Storage, manifest: Manifest) -> list[int]:
    return [int(token) for block in range(len(manifest.blocks)) for token in read_block(storage, manifest, block)]


def mixed(folder: Path) -> tuple[Storage, Manifest]:
    """Four files of as many formats, one of them three times."""
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(Path(write_lines(folder / "x", texts(9, seed=1))).read_bytes()))
    write_table(folder / "c.parquet", texts(9, seed=2), row_group_size=2)
    (folder / "d.txt").write_text("a text of its own")
    sources = [write_lines(folder / "a.jsonl", texts(9)), f"{folder}/*.gz", Source(f"{folder}/*.parquet", 2.5)]
    out = Storage.open(f"{folder}/out")
    return out, prepare([*sources, f"{folder}/d.txt"], out, OPTIONS)


def test_every_document_is_at_its_place_and_has_its_tokens(tmp_path: Path) -> None:
    out, manifest = mixed(tmp_path)
    encoder = TextEncoder(out.read("tokenizer.json").decode())
    written = {"a.jsonl": texts(9), "b.jsonl.gz": texts(9, seed=1), "c.parquet": texts(9, seed=2)}
    for held_out, part in ((False, manifest), (True, manifest.held_out_part())):
        tokens = stream(out, part)
        origins = list(loaded(out, manifest, held_out=held_out).between(0, len(tokens)))
        assert [origin.first_token for origin in origins] == [0, *(origin.stop for origin in origins[:-1])]
        firsts = loaded(out, manifest, held_out=held_out).first_tokens().tolist()
        assert firsts == [origin.first_token for origin in origins]
        assert origins[-1].stop == len(tokens)
        for origin in origins:
            text = encoder.decode(tokens[origin.first_token : origin.stop])
            name = origin.file.removeprefix(f"file://{tmp_path}/")
            assert is_held_out(text, 0.3) is held_out
            if name == "d.txt":
                assert (text, origin.place) == ("a text of its own", 0)
            elif name == "c.parquet":
                assert text == written[name][origin.place]
            else:
                lines = "".join(json.dumps({"text": text}) + "\n" for text in written[name])
                assert json.loads(lines[origin.place :].partition("\n")[0]) == {"text": text}


def test_repeated_documents_are_there_as_often_as_they_occur(tmp_path: Path) -> None:
    out, manifest = mixed(tmp_path)
    origins = list(loaded(out, manifest).between(0, manifest.num_tokens))
    assert len(origins) == manifest.counts["documents"]
    repeated = [origin.place for origin in origins if origin.file.endswith("c.parquet")]
    once = len(set(repeated))
    assert 2 * once < len(repeated) < 3 * once


@given(start=st.integers(0, 600), length=st.integers(1, 200))
@settings(max_examples=60)
def test_range_of_tokens_has_the_documents_that_reach_into_it(
    index: tuple[DocumentIndex, list[Origin]], start: int, length: int
) -> None:
    found, everything = list(index[0].between(start, start + length)), index[1]
    assert found == [o for o in everything if o.first_token < start + length and o.stop > start]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[DocumentIndex, list[Origin]]:
    """One in many small files of small row groups."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_index, "FILE_DOCUMENTS", 10)
        patch.setattr(document_index, "ROW_GROUP_DOCUMENTS", 3)
        out, manifest = small_corpus(tmp_path_factory.mktemp("index"))
    assert len([path for path in out.list() if path.startswith("documents/train")]) > 3
    whole = loaded(out, manifest)
    everything = list(whole.between(0, manifest.num_tokens))
    assert len(everything) == manifest.counts["documents"] and manifest.num_tokens > 600
    return loaded(out, manifest), everything


def test_index_does_not_depend_on_parts_and_is_no_part_of_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_index, "FILE_DOCUMENTS", 7)
    source = write_lines(tmp_path / "a.jsonl", texts(40))
    outs = []
    for part_bytes in (1, 500, 10**9):
        outs.append(Storage.open(f"{tmp_path}/{part_bytes}"))
        manifest = prepare([source], outs[-1], dataclasses.replace(OPTIONS, part_bytes=part_bytes))
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])
    assert not [path for path in identity(outs[0]) if path.startswith("documents")]
    for path in outs[0].list():
        if path.startswith("documents"):
            outs[0].delete(path)
    assert Manifest.load(outs[0]).hash == manifest.hash
    assert DocumentIndex.load(outs[0], manifest) is None


def test_index_of_another_corpus_is_not_used(tmp_path: Path) -> None:
    out, manifest = small_corpus(tmp_path)
    assert DocumentIndex.load(out, dataclasses.replace(manifest, vocab_size=301)) is None
    newer = json.loads(out.read("documents.json")) | {"format_version": 2}
    out.write("documents.json", json.dumps(newer).encode())
    assert DocumentIndex.load(out, manifest) is None


def test_index_is_plain_parquet_and_small(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts(20_000))
    out = Storage.open(f"{tmp_path}/out")
    manifest = prepare([source], out, PrepareOptions(vocab_size=261))
    (path,) = (path for path in out.list() if path.startswith("documents/train"))
    table = pq.read_table(f"{tmp_path}/out/{path}")
    assert table.column_names == ["file", "place", "first_token", "num_tokens"]
    assert table.num_rows == manifest.counts["documents"]
    assert out.size(path) < 6 * table.num_rows  # bytes


def test_names_that_are_no_utf_8_are_spelled(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"\xe9 \xf0\x9f\x98\x80.txt")).write_text("text")
    out = Storage.open(f"{tmp_path}/out")
    manifest = prepare([f"{tmp_path}/*.txt"], out, dataclasses.replace(OPTIONS, held_out=0))
    (origin,) = loaded(out, manifest).between(0, 1)
    assert origin.file == f"file://{tmp_path}/\\xe9 😀.txt"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"not json", b"\xff", b"[" * 100_000, b'{"format_version": 1}'], ids=ascii
)
def test_damaged_list_of_files_is_refused_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    out, manifest = small_corpus(tmp_path)
    out.write("documents.json", content)
    with pytest.raises(DataError, match=r"documents\.json is damaged .*prepare the corpus again, or remove it"):
        DocumentIndex.load(out, manifest)


@pytest.mark.parametrize("damage", ["missing", "empty", "half", "flipped"])
def test_damaged_file_of_the_index_is_refused_with_the_remedy(tmp_path: Path, damage: str) -> None:
    out, manifest = small_corpus(tmp_path)
    (path,) = (path for path in out.list() if path.startswith("documents/train"))
    data = out.read(path)
    if damage == "missing":
        out.delete(path)
    else:
        out.write(
            path, {"empty": b"", "half": data[: len(data) // 2], "flipped": data[:40] + b"\x55" + data[41:]}[damage]
        )
    with pytest.raises(DataError, match=rf"{path}: this part of the index .*remove documents\.json"):
        list(loaded(out, manifest).between(0, 10))
    if damage != "flipped":  # that is in a column which is not read for this
        with pytest.raises(DataError, match=rf"{path}: this part of the index .*remove documents\.json"):
            loaded(out, manifest).first_tokens()


@pytest.mark.s3
def test_index_is_written_to_s3_and_read_from_there(s3_url: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts(30))
    there, here = Storage.open(f"{s3_url}/out"), Storage.open(f"{tmp_path}/out")
    manifest = prepare([source], there, OPTIONS)
    prepare([source], here, OPTIONS)
    assert contents(there) == contents(here)
    stop = manifest.num_tokens
    assert list(loaded(there, manifest).between(100, stop)) == list(loaded(here, manifest).between(100, stop)) != []
