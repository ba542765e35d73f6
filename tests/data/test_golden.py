"""Prepared corpora keep their bytes from release to release: a run's identity names its corpus by the manifest's hash.

A change of code that moves these values makes every corpus prepared before another one. The checksums are of tokens alone;
the hash covers names of Arrow files and the tokenizer, too, so it may move with a new pyarrow or tokenizers as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.storage import Storage
from tests.data.corpora import texts

MANIFEST_HASH = "84c60d537b357f1ce0c888b881c2274713b4f63d2eacce12a8f84ecad7206e57"
NUM_TOKENS = 3290
CHECKSUMS = ["6e9939c4a49068e4", "fbdb64398b71e505"]  # of the first block and of the tail
HELD_OUT_CHECKSUM = "96d03d7799a774ae"  # of its first block
COUNTS = {"documents": 72, "empty_documents": 2, "held_out_documents": 14, "replaced_documents": 2}


def write_sources(folder: Path) -> None:
    lines = [*texts(60), "", "half \ud800 pair", "nul \0 and\nnew\r\nlines", "\ufeffmarked", "né 𝄞 <|end_of_text|>"]
    (folder / "lines").mkdir(parents=True)
    (folder / "lines" / "a.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in lines))
    (folder / "lines" / "b.jsonl").write_text("\n\n" + json.dumps({"text": "the last line has no end"}))
    (folder / "plain").mkdir()
    for number, text in enumerate(texts(20, seed=1)):
        (folder / "plain" / f"{number}.{('txt', 'md', 'py')[number % 3]}").write_text(text)
    (folder / "plain" / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (folder / "plain" / "empty.txt").write_bytes(b" \n")


@pytest.mark.parametrize("part_bytes", [1, 2_000, 10**9])
def test_corpus_has_the_bytes_of_earlier_releases(tmp_path: Path, part_bytes: int) -> None:
    write_sources(tmp_path / "in")
    out = Storage.open(str(tmp_path / "out"))
    options = PrepareOptions(vocab_size=300, block_tokens=65, held_out=0.2, part_bytes=part_bytes)
    sources = [f"{tmp_path}/in/lines", f"{tmp_path}/in/plain/**/*.py", f"{tmp_path}/in"]
    manifest = prepare(sources, out, options)
    assert manifest.num_tokens == NUM_TOKENS
    assert [manifest.blocks[at][1].checksum for at in (0, -1)] == CHECKSUMS
    assert manifest.held_out_part().blocks[0][1].checksum == HELD_OUT_CHECKSUM
    assert manifest.counts == COUNTS
    assert manifest.hash == Manifest.load(out).hash == MANIFEST_HASH
