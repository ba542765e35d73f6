"""Parts: named by their content, found again, and the same whether their documents fit into memory or not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from elastic_lm.data import parts as parts_module
from elastic_lm.data.parts import EMPTY, HELD_OUT, REPLACED, TRAIN, Part, PartResult, encode_part, is_held_out
from elastic_lm.data.tokenizer import train
from elastic_lm.errors import DataError
from elastic_lm.storage import Storage
from tests.data.corpora import find_chunks, texts, write_lines

ENCODER = train(texts(20), 300)


def part_of(*sources: Path) -> Part:
    return Part(tuple(find_chunks([str(source) for source in sources])))


def encoded(part: Part, out: Storage, held_out: float = 0.3) -> PartResult:
    return encode_part(part, out=out, tokenizer_json=ENCODER.json, held_out=held_out)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(write_lines(tmp_path / "a.jsonl", texts(30)))


@pytest.fixture
def out(tmp_path: Path) -> Storage:
    return Storage.open(str(tmp_path / "out"))


def test_records_say_what_became_of_each_document(tmp_path: Path, out: Storage) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    lines = [json.dumps({"text": text}) for text in ("", "one", "zwö")]
    (tmp_path / "b.jsonl").write_text("\n" + "\n".join(lines))
    result = encoded(part_of(tmp_path / "a.txt", tmp_path / "b.jsonl"), out, held_out=0.0)
    (records,) = result.records(out)
    (tokens,) = result.tokens(out, "train", ENCODER.dtype)
    assert records["chunk"].tolist() == [0, 1, 1, 1]
    assert records["fate"].tolist() == [TRAIN | REPLACED, EMPTY, TRAIN, TRAIN]
    assert records["place"].tolist() == [0, 1, 1 + len(lines[0]) + 1, 1 + len(lines[0]) + 1 + len(lines[1]) + 1]
    assert records["num_bytes"].tolist() == [6, 0, 3, 4]  # of the text as it is encoded, U+FFFD and all
    lengths = [len(ENCODER.encode(text)) for text in ("caf\ufffd", "one", "zwö")]
    assert records["num_tokens"].tolist() == [lengths[0], 0, *lengths[1:]]
    assert len(tokens) == sum(lengths) == result.num_tokens["train"]


def test_streams_hold_the_documents_of_their_side(source: Path, out: Storage) -> None:
    result = encoded(part_of(source), out)
    (records,) = result.records(out)
    sides = np.where([is_held_out(text, 0.3) for text in texts(30)], HELD_OUT, TRAIN)
    assert records["fate"].tolist() == sides.tolist() and len(set(sides.tolist())) == 2
    for stream, side in (("train", TRAIN), ("held_out", HELD_OUT)):
        expected = [t for text, s in zip(texts(30), sides, strict=True) if s == side for t in ENCODER.encode(text)]
        assert np.concatenate(list(result.tokens(out, stream, ENCODER.dtype))).tolist() == expected


def test_part_is_found_again(source: Path, out: Storage) -> None:
    first = encoded(part_of(source), out)
    done = Path(out.url[7:]) / "parts" / first.name / "done.json"
    time_ns = done.stat().st_mtime_ns
    assert not first.was_there
    assert encoded(part_of(source), out) == dataclasses.replace(first, was_there=True)
    assert done.stat().st_mtime_ns == time_ns


@pytest.mark.parametrize("kept_bytes", [0, 2_000])
def test_part_that_does_not_fit_into_memory_is_the_same(
    source: Path, out: Storage, tmp_path: Path, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded(part_of(source), out)
    other = Storage.open(str(tmp_path / "other"))
    monkeypatch.setattr(parts_module, "KEPT_BYTES", kept_bytes)
    assert encoded(part_of(source), other) == whole
    assert {path: other.read(path) for path in other.list()} == {path: out.read(path) for path in out.list()}


class ChangesMeanwhile(Storage):
    """A file that holds other text when it is read a second time."""

    num_reads = 0

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        self.num_reads += 1
        return super().read_range(path, offset, length).replace(b"the", b"THE" if self.num_reads > 1 else b"the")


def test_file_that_changes_between_two_readings_is_refused(
    source: Path, out: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "KEPT_BYTES", 0)
    (chunk,) = part_of(source).chunks
    file = dataclasses.replace(chunk.file, storage=ChangesMeanwhile(chunk.file.storage.url))
    with pytest.raises(DataError, match=r"a\.jsonl, byte 0 to .*a\.jsonl, byte \d+: the files were changed while"):
        encoded(Part((dataclasses.replace(chunk, file=file),)), out)
    assert not [path for path in out.list() if path.endswith("done.json")]


@pytest.mark.parametrize("change", ["text", "order", "held_out", "tokenizer"])
def test_name_follows_everything_that_tokens_depend_on(source: Path, out: Storage, change: str) -> None:
    first = encoded(part_of(source), out).name
    if change == "tokenizer":
        other = encode_part(part_of(source), out=out, tokenizer_json=train(texts(5), 290).json, held_out=0.3)
    elif change == "held_out":
        other = encoded(part_of(source), out, held_out=0.31)
    else:
        write_lines(source, texts(30)[::-1] if change == "order" else [*texts(29), "another"])
        other = encoded(part_of(source), out)
    assert other.name != first
