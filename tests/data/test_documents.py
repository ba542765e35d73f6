"""Documents out of files: the same ones in the same order, however the files are cut, listed or named."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data import documents as documents_module
from elastic_lm.data import plain
from elastic_lm.data.documents import Chunk, Document, File
from elastic_lm.data.mixture import Source
from elastic_lm.data.plain import Lines
from elastic_lm.errors import ConfigError
from elastic_lm.storage import Storage
from tests.data.corpora import find_chunks

CHARACTERS = st.characters(codec="utf-8")
TEXTS = st.lists(st.text(CHARACTERS, max_size=40), max_size=12)


def found(*sources: str | Path) -> list[str]:
    return [d.text for d in all_documents(*sources)]


def all_documents(*sources: str | Path) -> list[Document]:
    chunks = find_chunks([str(source) for source in sources])
    return [document for chunk in chunks for document in chunk.documents()]


def places(*sources: str | Path) -> list[str]:
    return [chunk.file.url for chunk in find_chunks([str(source) for source in sources])]


def lines(texts: list[str], end: str = "\n", *, last_end: bool = True, ascii_only: bool = True) -> bytes:
    text = end.join(json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts)
    return (text + (end if last_end else "")).encode()


# -- cutting ---------------------------------------------------------------------------------------------------------


@given(texts=TEXTS, chunk_bytes=st.integers(1, 90), ahead_bytes=st.integers(1, 40), data=st.data())
@settings(max_examples=80)
def test_every_line_is_read_once_wherever_the_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], chunk_bytes: int, ahead_bytes: int, data: Any
) -> None:
    texts = [text.lstrip("\ufeff") for text in texts]
    content = lines(
        texts,
        data.draw(st.sampled_from(["\n", "\n\n", "\r\n", " \n"])),
        last_end=data.draw(st.booleans()),
        ascii_only=data.draw(st.booleans()),
    )
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(plain, "READ_AHEAD_BYTES", ahead_bytes)
        chunks = find_chunks([str(path)])
        assert found(path) == texts
    assert [chunk.start for chunk in chunks] == list(range(0, len(content), chunk_bytes))
    assert sum(chunk.num_bytes for chunk in chunks) == len(content)


def test_last_line_needs_no_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one", "two"], last_end=False))
    assert found(tmp_path) == ["one", "two"]


def test_blank_lines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n \t\r\n" + lines(["one"]) + b"\n\n")
    assert found(tmp_path) == ["one"]


def test_line_separators_inside_a_text_end_no_line(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x0be"
    (tmp_path / "a.jsonl").write_bytes(lines([text], ascii_only=False).replace(b"\x0b", b"\\u000b"))
    assert found(tmp_path) == [text]


def test_other_fields_of_a_line_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": [1, {"text": "no"}], "text": "yes", "meta": null}')
    assert found(tmp_path) == ["yes"]


def test_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    text = "first\r\n\n second\t\x00 é 𝄞 \n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert all_documents(tmp_path) == [Document(text, replaced=False)]


@given(st.binary(max_size=60))
@settings(max_examples=60)
def test_bytes_that_are_no_utf_8_are_replaced_and_said(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.txt"
    path.write_bytes(content)
    (document,) = all_documents(path)
    try:
        assert document == Document(content.decode("utf-8-sig"), replaced=False)
    except UnicodeDecodeError:
        assert document.replaced
        assert "\ufffd" in document.text
    document.text.encode()  # no half of a surrogate pair gets through


# -- finding ---------------------------------------------------------------------------------------------------------


def test_order_is_that_of_the_sources_then_of_the_paths(tmp_path: Path) -> None:
    for path in ("b/2.txt", "b/10.txt", "a/x.txt", "a.txt", "b/1/z.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    assert found(tmp_path / "b", tmp_path) == ["b/1/z.txt", "b/10.txt", "b/2.txt", "a.txt", "a/x.txt"]


def test_order_does_not_depend_on_how_folders_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        path = tmp_path / f"folder {number % 3}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(str(number))
    listed, walk = found(tmp_path), os.walk

    def backwards(top: str, **options: Any) -> Iterator[tuple[str, list[str], list[str]]]:
        folders = walk(top, **options)
        return iter([(folder, names, sorted(files, reverse=True)) for folder, names, files in folders][::-1])

    monkeypatch.setattr(os, "walk", backwards)
    assert found(tmp_path) == listed


def test_file_that_is_named_twice_comes_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    b, folder = str(tmp_path / "b.txt"), str(tmp_path)
    assert found(b, folder, f"{folder}/*.txt", f"file://{b}", f"{folder}/./b.txt") == ["b", "a"]


ODD_NAMES = [
    "with space.txt",
    " leading and trailing .txt",
    "new\nline.txt",
    "tab\there.txt",
    "é.txt",
    "e\u0301.txt",  # the same to the eye, another name
    "日本語.txt",
    "𝄞.txt",
    "-rf.txt",
    "a*b?.txt",
    "[a-z].txt",
    "per%20cent.txt",
    "#hash&ampersand=.txt",
    "quote'\".txt",
    "back\\slash.txt",
    "dots...txt",
    "x" * 200 + ".txt",
    os.fsdecode(b"not utf-8 \xe9.txt"),
]


def test_files_with_odd_names_are_found_in_a_fixed_order(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        (tmp_path / name).write_text(f"text of {name}", errors="surrogateescape")
    assert [place.removeprefix(f"file://{tmp_path}/") for place in places(tmp_path)] == sorted(ODD_NAMES)
    assert len(set(found(tmp_path))) == len(ODD_NAMES)


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_file_with_an_odd_name_can_be_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "bystander.txt").write_text("bystander")
    (tmp_path / name).write_text("text")
    assert found(tmp_path / name) == ["text"]


def test_folder_may_end_like_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").mkdir()
    (tmp_path / "x.txt" / "y.txt").write_text("inside")
    assert found(tmp_path / "x.txt") == found(tmp_path) == ["inside"]


def test_hidden_files_and_unknown_suffixes_do_not_count(tmp_path: Path) -> None:
    for path in ("a.txt", ".git/b.txt", ".c.txt", "d.png", "e", "f.TXT", "g.txt~", "h.tar.gz", "i.gz"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(path)
    assert found(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("**/*.md", ["a/b/c.md", "a/d.md", "e.md"]),
        ("a/**", ["a/b/c.md", "a/d.md", "a/f.txt"]),
        ("*/*.md", ["a/d.md"]),
        ("a/?.*", ["a/d.md", "a/f.txt"]),
        ("a/**/c.md", ["a/b/c.md"]),
        ("a/**/d.md", ["a/d.md"]),  # `**/` may stand for no folder at all
    ],
)
def test_pattern_finds_what_shells_find(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for path in ("a/b/c.md", "a/d.md", "e.md", "a/f.txt", "a/.g.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(path)
    assert found(f"{tmp_path}/{pattern}") == expected


def test_pattern_characters_other_than_wildcards_are_literal(tmp_path: Path) -> None:
    for name in ("a+b.txt", "aab.txt", "[x].txt", "x.txt"):
        (tmp_path / name).write_text(name)
    assert found(f"{tmp_path}/a+*.txt") == ["a+b.txt"]
    assert found(f"{tmp_path}/[x]*.txt") == ["[x].txt"]


def test_link_inside_its_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert found(tmp_path) == ["a", "a"]


def test_link_that_is_itself_named_is_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").write_text("a")
    (tmp_path / "file.txt").symlink_to(tmp_path / "out" / "a.txt")
    (tmp_path / "folder").symlink_to(tmp_path / "out")
    assert found(tmp_path / "file.txt") == found(tmp_path / "folder") == ["a"]


def test_no_sources_are_refused_with_an_example() -> None:
    with pytest.raises(ConfigError, match="no sources; name files"):
        find_chunks([])


def test_place_counts_bytes_of_the_file() -> None:
    file = File(Storage.open("s3://bucket/prefix"), "a b.jsonl", 1_000, Source("a b.jsonl"))
    assert Chunk(file, Lines("text"), 100, 200, 100).at(107) == "s3://bucket/prefix/a b.jsonl, byte 107"
