"""Looking at a corpus: what is shown is what a worker trains on, with where it is from, and safe to show."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lm import RunConfig, cli_data
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.tokenizer import TextEncoder
from elastic_lm.data.windows import LocalTokens, read_block
from elastic_lm.storage import Storage
from elastic_lm.terminal import Exit, say
from tests.data.corpora import small_corpus, texts, write_lines
from tests.data.test_formats import write_table
from tests.test_cli import run, write_config

SHAPE = {"sequence_length": 16, "micro_batches": 2, "micro_batch_size": 3, "seed": 7}
OPTIONS = [word for name, value in SHAPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Storage, Manifest]:
    """Two sources of two formats, and the folder it is all in."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = Path(write_lines(folder / "a.jsonl", texts(40))).read_bytes()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    write_table(folder / "b.parquet", texts(20, seed=1))
    out = Storage.open(f"{folder}/tokens")
    sources = [f"{folder}/a.jsonl.gz", f"{folder}/b.parquet"]
    return folder, out, prepare(sources, out, PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.1))


def shown(*arguments: str) -> list[dict[str, Any]]:
    result = run("data", "show", *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


def refused(*arguments: str, code: int = Exit.USAGE) -> str:
    result = run("data", *arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def stream(storage: Storage, manifest: Manifest) -> list[int]:
    return [int(token) for block in range(len(manifest.blocks)) for token in read_block(storage, manifest, block)]


def ids_of(sample: dict[str, Any]) -> list[int]:
    return [token for passage in sample["passages"] for token in passage["ids"]]


# -- the samples of a step -------------------------------------------------------------------------------------------


def test_samples_of_every_step_are_what_a_worker_reads(corpus: tuple[Path, Storage, Manifest]) -> None:
    folder, storage, manifest = corpus
    order = manifest.order(**SHAPE)
    worker = LocalTokens(storage, manifest, order)
    for step in range(order.num_samples // 6 + 2):  # into the second epoch
        samples = shown(f"{folder}/tokens", "--step", str(step), *OPTIONS, "--ids")
        expected = [row.tolist() for j in range(2) for row in worker.tokens(step, j)]
        assert [ids_of(sample) for sample in samples] == expected
        assert [(s["step"], s["micro_batch"], s["sample"]) for s in samples] == [
            (step, j, row) for j in range(2) for row in range(3)
        ]


@pytest.mark.parametrize("named_by", ["yaml", "run"])
def test_samples_of_a_run_are_those_of_its_config(
    corpus: tuple[Path, Storage, Manifest], named_by: str, tmp_path: Path
) -> None:
    folder, storage, manifest = corpus
    file = write_config(
        tmp_path,
        data={"tokens": f"{folder}/tokens", "window_blocks": 3},
        batch={"micro_batches": 2, "micro_batch_size": 3, "sequence_length": 16},
        training={"steps": 100, "seed": 5, "skip": [[1, 4]]},
    )
    config = RunConfig.load(file)
    if named_by == "run":
        Storage.open(config.run_url).write("config.yaml", config.to_yaml().encode())
        file = config.run_url
    order = manifest.order(**SHAPE | {"seed": 5}, window_blocks=3, skip=((1, 4),))
    samples = shown(file, "--step", "2", "--ids")
    expected = [row.tolist() for j in range(2) for row in LocalTokens(storage, manifest, order).tokens(2, j)]
    assert [ids_of(sample) for sample in samples] == expected
    assert {sample["batch"] for sample in samples} == {5}
    assert "step 2 (batch 5), micro-batch 0, sample 0: tokens" in run("data", "show", file, "--step", "2").stdout


def test_micro_batch_and_sample_choose(corpus: tuple[Path, Storage, Manifest]) -> None:
    arguments = [f"{corpus[0]}/tokens", "--step", "1", *OPTIONS]
    everything = shown(*arguments)
    assert shown(*arguments, "--micro-batch", "1") == everything[3:]
    assert shown(*arguments, "--sample", "2") == everything[2::3]
    assert shown(*arguments, "--micro-batch", "1", "--sample", "0") == everything[3:4]


# -- documents -------------------------------------------------------------------------------------------------------


def test_passages_lead_back_to_their_documents(corpus: tuple[Path, Storage, Manifest]) -> None:
    folder, storage, manifest = corpus
    encoder = TextEncoder(storage.read("tokenizer.json").decode())
    (whole,) = shown(f"{folder}/tokens", "--tokens", f"0..{manifest.num_tokens}", "--ids")
    assert ids_of(whole) == stream(storage, manifest)
    lines = (folder / "a.jsonl").read_text()
    for passage in whole["passages"]:
        document = passage["document"]
        if document["unit"] == "row":
            assert document["file"] == f"file://{folder}/b.parquet"
            text = texts(20, seed=1)[document["place"]]
        else:
            assert document["file"] == f"file://{folder}/a.jsonl.gz"
            text = json.loads(lines[document["place"] :].partition("\n")[0])["text"]
        assert passage["text"] == text and passage["ends"]
        assert passage["ids"] == encoder.encode(text)
        assert passage["tokens"] == [document["first_token"], document["first_token"] + document["num_tokens"]]


def test_held_out_text_is_shown_when_it_is_asked_for(corpus: tuple[Path, Storage, Manifest]) -> None:
    folder, storage, manifest = corpus
    part = manifest.held_out_part()
    (found,) = shown(f"{folder}/tokens", "--tokens", f"3..{part.num_tokens}", "--held-out", "--ids")
    assert ids_of(found) == stream(storage, part)[3:]
    assert not {p["text"] for p in found["passages"][1:]} & set(trained_texts(folder, manifest))


def trained_texts(folder: Path, manifest: Manifest) -> list[str]:
    (whole,) = shown(f"{folder}/tokens", "--tokens", f"0..{manifest.num_tokens}")
    return [passage["text"] for passage in whole["passages"]]


def test_corpus_without_an_index_is_shown_and_said_to_be_without_sources(tmp_path: Path) -> None:
    out, manifest = small_corpus(tmp_path)
    (known,) = shown(out.url, "--tokens", f"5..{manifest.num_tokens - 1}", "--ids")
    out.delete("documents.json")
    (unknown,) = shown(out.url, "--tokens", f"5..{manifest.num_tokens - 1}", "--ids")
    assert {passage.pop("document") is None for passage in known["passages"]} == {False}
    assert {passage.pop("document") for passage in unknown["passages"]} == {None}
    assert known == unknown
    told = run("data", "show", out.url, "--tokens", "0..3")
    assert "source unknown: 3 tokens of a document" in told.stdout
    assert told.stderr.startswith("elastic-lm: this corpus has no index of documents")


def test_tokens_are_told_to_people_with_their_source(corpus: tuple[Path, Storage, Manifest]) -> None:
    folder = corpus[0]
    first = trained_texts(folder, corpus[2])[0]
    lines = run("data", "show", f"{folder}/tokens", "--tokens", "0..1_000", "--ids", "--full").stdout.splitlines()
    assert lines[0] == "tokens 0..1000"
    document = shown(f"{folder}/tokens", "--tokens", "0..1")[0]["passages"][0]["document"]
    size = document["num_tokens"]
    assert lines[1] == f"  file://{folder}/a.jsonl.gz, byte {document['place']}: tokens 0..{size} of {size}, its end"
    assert lines[2] == f"    {first}"
    assert lines[3].split() == [str(token) for token in stream(*corpus[1:])[:size]]


# -- on a terminal ---------------------------------------------------------------------------------------------------


ODD = "red \x1b[31m tab\t nul\0 bell\a bidi\u202e line\u2028 c1\x9b end\r\nnext"


@pytest.fixture
def odd(tmp_path: Path) -> Storage:
    (tmp_path / "a.txt").write_bytes(ODD.encode())
    (tmp_path / "b.txt").write_text("広い文字" * 40)
    out = Storage.open(f"{tmp_path}/tokens")
    prepare([f"{tmp_path}/*.txt"], out, PrepareOptions(vocab_size=261, held_out=0))
    return out


def test_nothing_that_a_terminal_acts_on_gets_through(odd: Storage) -> None:
    for arguments in ([], ["--full"]):
        told = run("data", "show", odd.url, "--tokens", "0..60", *arguments).stdout
        assert all(c.isprintable() for line in told.split("\n") for c in line)
        for escape in (r"\x1b[31m", r"\t", r"\x00", r"\x07", r"\u202e", r"\u2028", r"\x9b"):
            assert escape in told


def test_names_of_files_are_made_visible_too(tmp_path: Path) -> None:
    (tmp_path / "new\nline \x1b[31m.txt").write_text("text")
    out = Storage.open(f"{tmp_path}/tok\nens")
    prepare([f"{tmp_path}/new\nline \x1b[31m.txt"], out, PrepareOptions(vocab_size=261, held_out=0))
    assert rf"{tmp_path}/new\nline \x1b[31m.txt, byte 0" in run("data", "show", out.url, "--tokens", "0..2").stdout
    assert rf"{tmp_path}/tok\nens" in run("data", "info", out.url).stdout


def test_text_is_cut_to_the_terminal_and_full_keeps_all(odd: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.cells import cell_len

    monkeypatch.setenv("COLUMNS", "50")
    tokens = f"0..{Manifest.load(odd).num_tokens}"
    lines = run("data", "show", odd.url, "--tokens", tokens).stdout.splitlines()
    cut = [line for line in lines if line.startswith("    ")]
    assert [line[-1] for line in cut] == ["…", "…"] and all(46 < cell_len(line) <= 50 for line in cut)
    full = run("data", "show", odd.url, "--tokens", tokens, "--full").stdout
    assert "広い文字" * 40 in full
    assert "end\\r\n    next\n" in full  # a line break where the text has one


def test_json_has_the_text_as_it_is(odd: Storage) -> None:
    (found,) = shown(odd.url, "--tokens", f"0..{len(ODD.encode()) + 1}")
    assert found["passages"][0]["text"] == ODD


@pytest.mark.parametrize("text", ["plain", "naïve 日本", "half \udce9"])
def test_what_a_stream_cannot_spell_is_said_as_escapes(text: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="")
    say(text, stream)
    stream.flush()
    assert stream.buffer.getvalue().decode() == text.encode("ascii", "backslashreplace").decode() + "\n"  # type: ignore[attr-defined]


# -- figures ---------------------------------------------------------------------------------------------------------


def test_info_tells_people_and_programs_the_same(corpus: tuple[Path, Storage, Manifest]) -> None:
    folder, storage, manifest = corpus
    facts = json.loads(run("data", "info", storage.url, "--json").stdout)
    held_out = manifest.held_out_part().num_tokens
    assert facts["manifest"] == manifest.hash and facts["tokens"] == manifest.num_tokens
    assert [row["source"] for row in facts["sources"]] == [f"{folder}/a.jsonl.gz", f"{folder}/b.parquet"]
    assert facts["tokens"] == sum(row["tokens"] for row in facts["sources"])
    text = run("data", "info", storage.url).stdout
    num = facts["held_out_documents"]
    for line in (
        f"   manifest  {manifest.hash}",
        f"  documents  {facts['documents']} to train on",
        f"     tokens  {manifest.num_tokens:,} in {len(manifest.blocks)} blocks of 65, as uint16",
        f"bytes/token  {facts['text_bytes'] / facts['tokens']:.2f}",
        f"   held out  {num} documents ({num / 60:.1%}), {held_out} tokens "
        f"({held_out / (held_out + manifest.num_tokens):.1%})",
    ):
        assert line in text.splitlines()
    title, *rows = text.splitlines()[-3:]
    assert title.split() == ["weight", "documents", "tokens", "share", "source"]
    for line, row in zip(rows, facts["sources"], strict=True):
        share = f"{row['tokens'] / manifest.num_tokens:.1%}"
        assert line.split() == ["1", f"{row['documents']:,}", f"{row['tokens']:,}", share, row["source"]]
        assert line.index(row["source"]) == title.index("source")
    assert "empty" not in text and "replaced" not in text  # there are none


def test_info_of_a_corpus_without_a_summary_tells_what_the_manifest_has(tmp_path: Path) -> None:
    out, manifest = small_corpus(tmp_path)
    out.delete("summary.json")
    assert "sources" not in json.loads(run("data", "info", out.url, "--json").stdout)
    assert f"{manifest.num_tokens:,} in" in run("data", "info", out.url).stdout


def test_many_sources_are_told_together(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.txt").write_text("text")
    out = Storage.open(f"{tmp_path}/tokens")
    manifest = prepare([f"{tmp_path}/{n:02}.txt" for n in range(50)], out, PrepareOptions(vocab_size=261, held_out=0))
    lines = run("data", "info", out.url).stdout.splitlines()
    assert lines[-1].split() == ["30", f"{manifest.num_tokens * 30 // 50}", "60.0%", "30", "more"]
    assert lines[-2].endswith(f"{tmp_path}/19.txt")


# -- mistakes --------------------------------------------------------------------------------------------------------


def test_mistaken_question_is_refused_with_the_remedy(corpus: tuple[Path, Storage, Manifest], tmp_path: Path) -> None:
    url, num_tokens = corpus[1].url, corpus[2].num_tokens
    assert "one of both: --step N, or --tokens START..STOP" in refused("show", url)
    assert "one of both" in refused("show", url, "--step", "1", "--tokens", "0..1")
    assert "--held-out --tokens START..STOP" in refused("show", url, "--step", "1", "--held-out", *OPTIONS)
    assert "add --micro-batches, --micro-batch-size, --seed" in refused(
        "show", url, "--step", "1", "--sequence-length", "4"
    )
    assert "--micro-batch 2: there are 2, 0 to 1" in refused("show", url, "--step", "1", *OPTIONS, "--micro-batch", "2")
    assert "--sample 3: there are 3, 0 to 2" in refused("show", url, "--step", "1", *OPTIONS, "--sample", "3")
    assert "no block of the corpus holds a sample of 99" in refused(
        "show", url, "--step", "1", *OPTIONS[2:], "--sequence-length", "99"
    )
    for wrong in ("5", "5..", "..5", "5..5", "6..5", "a..b", "-1..5", "0..1.5"):
        assert "is no range of tokens; write START..STOP" in refused("show", url, f"--tokens={wrong}")
    assert f"it has {num_tokens} tokens" in refused("show", url, "--tokens", f"0..{num_tokens + 1}")
    file = write_config(tmp_path, data={"tokens": url})
    assert "the run says what its batches are; leave out --seed" in refused("show", file, "--step", "0", "--seed", "1")


def test_what_is_neither_corpus_nor_run_is_told(tmp_path: Path) -> None:
    assert f"{tmp_path} is no corpus (there is no manifest.json in file://{tmp_path}) and no run (" in refused(
        "info", str(tmp_path)
    )
    assert "nowhere is no corpus" in refused("show", "nowhere", "--tokens", "0..1")
    assert "gs:// is not supported" in refused("info", "gs://bucket/x")
    assert "elastic-lm prepare" in refused("info", write_config(tmp_path), code=Exit.DATA)


def test_run_on_another_corpus_is_refused(corpus: tuple[Path, Storage, Manifest], tmp_path: Path) -> None:
    file = write_config(tmp_path, data={"tokens": corpus[1].url, "manifest": "0" * 64})
    assert "is not the corpus at data.tokens" in refused("show", file, "--step", "0")


def test_corpus_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    out, _ = small_corpus(tmp_path)
    out.write("tokenizer.json", out.read("tokenizer.json") + b" ")
    assert "it is not the one the corpus was made with" in refused("show", out.url, "--tokens", "0..1", code=Exit.DATA)
    out.delete("tokenizer.json")
    assert "has lost its tokenizer.json" in refused("show", out.url, "--tokens", "0..1", code=Exit.DATA)


def test_damaged_block_is_refused_as_in_training(tmp_path: Path) -> None:
    out, manifest = small_corpus(tmp_path)
    path, block = manifest.blocks[0]
    data = bytearray(out.read(path))
    data[block.offset] ^= 1
    out.write(path, bytes(data))
    assert "checksum" in refused("show", out.url, "--tokens", "0..1000", code=Exit.DATA)


@pytest.mark.s3
def test_corpus_on_s3_is_shown(s3_url: str, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts(30))
    there, here = (Storage.open(url) for url in (f"{s3_url}/tokens", f"{tmp_path}/tokens"))
    for out in (there, here):
        prepare([source], out, PrepareOptions(vocab_size=300, block_tokens=65))
    arguments = ["--step", "1", *OPTIONS]
    assert shown(there.url, *arguments) == shown(here.url, *arguments)


def test_visible_text_leaves_printable_characters_as_they_are() -> None:
    assert cli_data.visible("a\\b é 日本 😀\u00a0") == "a\\b é 日本 😀\\xa0"
    assert cli_data.visible("a\r\nb") == "a\\r\\nb"
    assert cli_data.visible("a\r\nb", line_breaks=True) == "a\\r\nb"
