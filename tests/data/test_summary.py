"""The summary: figures that add up to the corpus, whole and by source."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from elastic_lm.data.manifest import Manifest
from elastic_lm.data.mixture import Source, is_chosen
from elastic_lm.data.parts import is_held_out
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.data.summary import Figures, Summary
from elastic_lm.errors import DataError
from elastic_lm.storage import Storage
from tests.data.corpora import small_corpus, texts, write_lines

OPTIONS = PrepareOptions(vocab_size=261, block_tokens=65, held_out=0.2)  # bytes and special tokens: no merges


def loaded(storage: Storage, manifest: Manifest) -> Summary:
    summary = Summary.load(storage, manifest)
    assert summary is not None
    return summary


def figures(documents: list[str], weight: float) -> Figures:
    """Worked out from the documents: a token for each byte, and one at each end."""
    trained = [t for t in documents if t.strip() and not is_held_out(t, 0.2)]
    held_out = [t for t in documents if t.strip() and is_held_out(t, 0.2)]
    occurring = trained * int(weight) + [t for t in trained if is_chosen(t, weight % 1)]
    return Figures(
        documents=len(occurring),
        tokens=sum(len(t.encode()) + 1 for t in occurring),
        text_bytes=sum(len(t.encode()) for t in occurring),
        held_out_documents=len(held_out),
        held_out_tokens=sum(len(t.encode()) + 1 for t in held_out),
        read_documents=len(trained) + len(held_out),
        empty_documents=sum(not t.strip() for t in documents),
    )


@pytest.mark.parametrize("part_bytes", [1, 10**9])
def test_figures_are_those_of_the_documents(tmp_path: Path, part_bytes: int) -> None:
    documents = {"a": ["", *texts(30), "é"], "b": texts(30, seed=1), "c": texts(30, seed=2)}
    weights = {"a": 1.0, "b": 1.0, "c": 2.5}
    sources = [Source(write_lines(tmp_path / f"{n}.jsonl", documents[n]), weights[n]) for n in documents]
    out = Storage.open(f"{tmp_path}/out")
    manifest = prepare(sources, out, dataclasses.replace(OPTIONS, part_bytes=part_bytes))
    summary = loaded(out, manifest)
    expected = [(f"{tmp_path}/{n}.jsonl", weights[n], figures(documents[n], weights[n])) for n in documents]
    assert list(summary.sources) == expected
    total = summary.total
    assert total == sum((f for _, _, f in expected), Figures())
    assert (total.tokens, total.held_out_tokens) == (manifest.num_tokens, manifest.held_out_part().num_tokens)
    assert total.counts == manifest.counts


def test_replaced_documents_and_bytes_as_they_are_encoded(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    out = Storage.open(f"{tmp_path}/out")
    total = loaded(out, prepare([f"{tmp_path}/a.txt"], out, dataclasses.replace(OPTIONS, held_out=0))).total
    assert (total.replaced_documents, total.text_bytes, total.tokens) == (1, 6, 7)
    assert total.bytes_per_token == 6 / 7


def test_nothing_has_no_bytes_per_token() -> None:
    assert Figures().bytes_per_token is None


def test_source_without_documents_has_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    out = Storage.open(f"{tmp_path}/out")
    sources = [f"{tmp_path}/a.jsonl", write_lines(tmp_path / "b.jsonl", texts(20))]
    rows = loaded(out, prepare(sources, out, OPTIONS)).sources
    assert [(address, figures == Figures()) for address, _, figures in rows] == [
        (sources[0], True),
        (sources[1], False),
    ]


def test_summary_of_another_corpus_is_not_used(tmp_path: Path) -> None:
    out, manifest = small_corpus(tmp_path)
    assert Summary.load(out, dataclasses.replace(manifest, vocab_size=301)) is None
    out.delete("summary.json")
    assert Summary.load(out, manifest) is None


@pytest.mark.parametrize("place", ["sources", "manifest", "format_version"])
def test_damaged_summary_is_refused_with_the_remedy(tmp_path: Path, place: str) -> None:
    out, manifest = small_corpus(tmp_path)
    fields = json.loads(out.read("summary.json"))
    del fields[place]
    for content in (json.dumps(fields).encode(), b"not json", b"[]"):
        out.write("summary.json", content)
        with pytest.raises(DataError, match=r"summary\.json is damaged .*remove it to do without"):
            Summary.load(out, manifest)
