"""Preparation: same input, same bytes; restartable; every document on one side; odd input is told or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pytest

from elastic_lm.data import documents as documents_module
from elastic_lm.data import plain
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.parts import Part, PartResult, is_held_out
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.progress import Progress
from elastic_lm.data.shards import block_tokens_for
from elastic_lm.data.tokenizer import PIECE_CHARACTERS, SPECIAL_NAMES, TextEncoder, pieces, train
from elastic_lm.data.windows import read_block
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.storage import Storage
from tests.data.corpora import contents, find_chunks, identity, small_corpus, texts, write_lines

OPTIONS = PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.2)


def decoded(out: Storage, manifest: Manifest) -> list[str]:
    encoder = TextEncoder(out.read("tokenizer.json").decode())
    ids = [int(token) for block in range(len(manifest.blocks)) for token in read_block(out, manifest, block)]
    found, start = [], 0
    for at, token in enumerate(ids):
        if token == encoder.special_ids["end_of_text"]:
            found.append(encoder.decode(ids[start:at]))
            start = at + 1
    return found


def test_tokens_are_the_documents_in_order(tmp_path: Path) -> None:
    originals = texts(40)
    out = Storage.open(str(tmp_path / "out"))
    manifest = prepare([write_lines(tmp_path / "a.jsonl", originals)], out, OPTIONS)
    assert decoded(out, manifest) == [t for t in originals if not is_held_out(t, 0.2)]
    assert decoded(out, manifest.held_out_part()) == [t for t in originals if is_held_out(t, 0.2)]
    assert manifest.counts["documents"] + manifest.counts["held_out_documents"] == 40
    assert Manifest.load(out) == manifest
    assert not out.list("parts/")


def test_shards_are_plain_arrow_files(tmp_path: Path) -> None:
    out, manifest = small_corpus(tmp_path)
    shard = manifest.shards[0]
    table = pa.ipc.open_file(out.read(shard.path)).read_all()
    assert table.num_rows == shard.num_tokens
    assert table.column("tokens").to_pylist()[:65] == read_block(out, manifest, 0).tolist()


def test_bytes_do_not_depend_on_parts_or_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "CHUNK_BYTES", 500)
    monkeypatch.setattr(plain, "READ_AHEAD_BYTES", 7)
    outs = []
    for place, name, part_bytes in (("x", "1", 1), ("x", "2", 2_000), ("x", "3", 10**9), ("y", "4", 2_000)):
        source = write_lines(tmp_path / place / "a.jsonl", texts(40))
        (tmp_path / place / "b.txt").write_text("one more document")
        outs.append(Storage.open(str(tmp_path / f"out-{name}")))
        options = PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.2, part_bytes=part_bytes)
        prepare([source, str(tmp_path / place / "b.txt")], outs[-1], options)
    assert contents(outs[0]) == contents(outs[1]) == contents(outs[2])
    assert contents(outs[3]) != contents(outs[0]) and identity(outs[3]) == identity(outs[0])


def test_interrupted_preparation_goes_on_with_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "CHUNK_BYTES", 500)
    source = write_lines(tmp_path / "a.jsonl", texts(40))
    options = PrepareOptions(vocab_size=300, block_tokens=65, part_bytes=1)
    out, whole = Storage.open(str(tmp_path / "out")), Storage.open(str(tmp_path / "whole"))

    def breaks_off(encode: Callable[[Part], PartResult], parts: Iterable[Part]) -> list[PartResult]:
        for part in list(parts)[:3]:
            encode(part)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], out, options, breaks_off)
    done = [path for path in out.list("parts/") if path.endswith("done.json")]
    assert len(done) == 3
    times = [(tmp_path / "out" / path).stat().st_mtime_ns for path in done]
    kept: list[list[int]] = []

    def watches(encode: Callable[[Part], PartResult], parts: Iterable[Part]) -> list[PartResult]:
        results = [encode(part) for part in parts]
        kept.append([(tmp_path / "out" / path).stat().st_mtime_ns for path in done])
        return results

    prepare([source], out, options, watches)
    prepare([source], whole, options)
    assert kept == [times]
    assert contents(out) == contents(whole)


def test_preparing_again_changes_nothing(tmp_path: Path) -> None:
    out, manifest = small_corpus(tmp_path)
    before = contents(out)
    assert small_corpus(tmp_path)[1] == manifest
    assert contents(out) == before


def test_odd_documents_are_handled_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "name with [brackets] \n é.md").write_text("odd name")
    (folder / "spells.txt").write_text("<|end_of_text|> is text")
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\0\1")
    (folder / "z.jsonl").write_text('{"text": "half \\ud800 pair"}\n\n{"text": ""}\n{"text": "bom"}')
    out = Storage.open(str(tmp_path / "out"))
    manifest = prepare([str(folder)], out, PrepareOptions(vocab_size=300, held_out=0.0))
    expected = ["caf\ufffd au lait", "odd name", "<|end_of_text|> is text", "half \ufffd\ufffd\ufffd pair", "bom"]
    assert decoded(out, manifest) == expected
    assert manifest.counts == {"documents": 5, "empty_documents": 2, "held_out_documents": 0, "replaced_documents": 2}


@pytest.mark.parametrize(
    "line",
    ["not json", '["a"]', '{"text": 1}', '{"body": "x"}', "[" * 100_000],  # the last one is nested too deep to parse
)
def test_line_that_is_no_document_is_refused_with_its_place(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=r"a\.jsonl, byte 0 plus 1 lines"):
        prepare([str(tmp_path / "a.jsonl")], Storage.open(str(tmp_path / "out")), OPTIONS)


def test_link_that_leads_out_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(DataError, match="leads out"):
        prepare([str(tmp_path / "in")], Storage.open(str(tmp_path / "out")), OPTIONS)


@pytest.mark.parametrize("source", ["none.txt", "none/", "*.txt", "picture.png"])
def test_source_without_text_is_refused(tmp_path: Path, source: str) -> None:
    (tmp_path / "picture.png").write_bytes(b"\0")
    with pytest.raises(ConfigError, match=r"none|\*|picture"):
        prepare([str(tmp_path / source)], Storage.open(str(tmp_path / "out")), OPTIONS)


def test_corpus_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        prepare([str(tmp_path / "a.txt")], Storage.open(str(tmp_path / "out")), OPTIONS)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("*.txt", ["a.txt"]), ("**/*.txt", ["a.txt", "b/c.txt", "b/d/e.txt"]), ("b/?.txt", ["b/c.txt", "a.txt"])],
)
def test_patterns_match_as_shells_do(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for path in ("a.txt", "b/c.txt", "b/d/e.txt", "f.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    found = find_chunks([str(tmp_path / pattern), str(tmp_path / "a.txt")])
    places = [chunk.file.url.removeprefix(f"file://{tmp_path}/") for chunk in found]
    assert places == expected


@pytest.mark.s3
def test_corpus_is_prepared_from_s3_to_s3(s3_url: str) -> None:
    source, out = Storage.open(f"{s3_url}/in"), Storage.open(f"{s3_url}/out")
    source.write("deep/a.jsonl", b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts(20)))
    manifest = prepare([f"{s3_url}/in"], out, PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.0))
    assert decoded(out, manifest) == texts(20)


def test_tokenizer_of_others_gets_the_special_tokens(tmp_path: Path) -> None:
    own = train(texts(20), 290)
    foreign = json.loads(own.json)
    foreign["added_tokens"] = []
    foreign["model"]["vocab"] = {t: i - 5 for t, i in foreign["model"]["vocab"].items() if i >= 5}
    (tmp_path / "tokenizer.json").write_text(json.dumps(foreign))
    source = write_lines(tmp_path / "a.jsonl", texts(20))
    out = Storage.open(str(tmp_path / "out"))
    options = PrepareOptions(tokenizer=str(tmp_path / "tokenizer.json"), held_out=0.0)
    manifest = prepare([source], out, options)
    assert sorted(manifest.special_ids) == sorted(SPECIAL_NAMES)
    assert manifest.vocab_size == own.vocab_size
    assert decoded(out, manifest) == texts(20)


def test_damaged_tokenizer_is_refused() -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        TextEncoder("{}")
    with pytest.raises(ConfigError, match="at least 261"):
        train(["x"], 200)


def test_giant_document_is_encoded_in_pieces() -> None:
    giant = "word " * (PIECE_CHARACTERS // 2) + "x" * (2 * PIECE_CHARACTERS)
    assert "".join(pieces(giant)) == giant
    assert max(map(len, pieces(giant))) <= PIECE_CHARACTERS
    encoder = train(["word x"], 270)
    assert encoder.decode(encoder.encode(giant)) == giant


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "expected"),
    [
        (1_000, "uint16", 4_097),  # tiny: the smallest block
        (10**8, "uint16", 524_289),  # 1 MiB
        (10**10, "uint16", 2_097_153),  # 4 MiB from 10 GB
        (10**10, "uint32", 1_048_577),
    ],
)
def test_block_size_follows_the_corpus(num_tokens: int, dtype: str, expected: int) -> None:
    assert block_tokens_for(num_tokens, dtype) == expected


@pytest.mark.parametrize("fields", [{"held_out": 1.0}, {"held_out": -0.1}, {"block_tokens": 1}, {"part_bytes": 0}])
def test_impossible_options_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PrepareOptions(**fields)  # type: ignore[arg-type]


def test_corpus_holds_the_files_that_the_documentation_names(tmp_path: Path) -> None:
    block = (Path(__file__).parents[2] / "docs" / "data.md").read_text().partition("CORPUS/\n")[2].partition("```")[0]
    named = {re.sub(r"-[0-9a-f…]+\.", "-HASH.", line.split()[0]) for line in block.splitlines()} - {"parts/"}
    out, _ = small_corpus(tmp_path)
    assert {re.sub(r"-[0-9a-f]{16}\.", "-HASH.", path) for path in out.list()} == named


# -- progress --------------------------------------------------------------------------------------------------------


class Recording:
    """A view that keeps everything."""

    def __init__(self) -> None:
        self.shown: list[Progress] = []

    def show(self, progress: Progress) -> None:
        self.shown.append(progress)

    def of(self, stage: str) -> list[Progress]:
        return [progress for progress in self.shown if progress.stage == stage]


def test_progress_goes_through_the_stages_and_ends_with_everything_done(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{number}.jsonl", texts(20, seed=number)) for number in range(3)]
    view = Recording()
    out = Storage.open(f"{tmp_path}/out")
    options = PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.2, part_bytes=1)
    manifest = prepare(files, out, options, view=view)
    stages = [progress.stage for progress in view.shown]
    assert sorted(stages, key=["find", "tokenizer", "encode", "shards"].index) == stages
    assert [progress.done for progress in view.of("find")] == [0, 1, 2, 3]
    total = sum(Path(file).stat().st_size for file in files)
    for stage in ("tokenizer", "encode"):
        done = [progress.done for progress in view.of(stage)]
        assert done == sorted(done) and (done[0], done[-1]) == (0, total)
        assert {progress.total for progress in view.of(stage)} == {total}
    assert len(view.of("encode")) > 60  # within parts, too
    num_tokens = manifest.num_tokens + manifest.held_out_part().num_tokens
    assert view.of("shards")[0] == Progress("shards", 0, num_tokens)
    assert view.of("shards")[-1] == Progress("shards", num_tokens, num_tokens)
    assert {progress.kept for progress in view.shown} == {0}


def test_progress_of_a_preparation_that_goes_on_knows_what_was_there(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{number}.jsonl", texts(20, seed=number)) for number in range(3)]
    out = Storage.open(f"{tmp_path}/out")
    options = PrepareOptions(vocab_size=300, block_tokens=65, part_bytes=1)

    def breaks_off(encode: Callable[[Part], PartResult], parts: Iterable[Part]) -> list[PartResult]:
        encode(next(iter(parts)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(files, out, options, breaks_off)
    view = Recording()
    prepare(files, out, options, view=view)
    first = Path(files[0]).stat().st_size
    assert [progress.kept for progress in view.of("encode")][:2] == [0, first]
    assert view.of("encode")[-1].kept == first


def test_progress_over_a_map_comes_part_by_part(tmp_path: Path) -> None:
    files = [write_lines(tmp_path / f"{number}.jsonl", texts(20, seed=number)) for number in range(3)]
    view = Recording()
    options = PrepareOptions(vocab_size=300, block_tokens=65, part_bytes=1)
    prepare(files, Storage.open(f"{tmp_path}/out"), options, map, view)
    sizes = [Path(file).stat().st_size for file in files]
    assert [progress.done for progress in view.of("encode")] == [0, sizes[0], sum(sizes[:2]), sum(sizes)]
