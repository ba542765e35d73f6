"""Mixtures: each document occurs as often as its source's weight says, and what is held out occurs once."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_lm.data import documents as documents_module
from elastic_lm.data.manifest import Manifest
from elastic_lm.data.mixture import LARGEST_WEIGHT, Source, is_chosen, passes
from elastic_lm.data.parts import is_held_out
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.errors import ConfigError, DataError
from elastic_lm.storage import Storage
from tests.data.corpora import find_chunks, write_lines
from tests.data.test_prepare import decoded

OPTIONS = PrepareOptions(vocab_size=261, block_tokens=65, held_out=0.2)


def numbered(name: str, num_documents: int = 30) -> list[str]:
    return [f"{name} {number}" for number in range(num_documents)]


def prepared(folder: Path, *sources: Source | str, options: PrepareOptions = OPTIONS) -> tuple[Storage, Manifest]:
    out = Storage.open(f"{folder}/out")
    return out, prepare(list(sources), out, options)


def occurrences(documents: Sequence[str], weight: float, held_out: float = 0.2) -> list[list[str]]:
    """The passes over a source, as the documentation has them."""
    trained = [text for text in documents if not is_held_out(text, held_out)]
    whole = math.floor(weight)
    extra = [text for text in trained if is_chosen(text, weight - whole)]
    return [trained] * whole + ([extra] if weight > whole else [])


@given(
    weights=st.lists(st.sampled_from([0.25, 1, 1.5, 2, 3.75]), min_size=1, max_size=3), part_bytes=st.integers(1, 900)
)
@settings(max_examples=15)
def test_documents_occur_in_passes_as_often_as_their_weight_says(
    tmp_path_factory: pytest.TempPathFactory, weights: list[float], part_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("mixture")
    texts = [numbered(f"source {number} document") for number in range(len(weights))]
    sources = [
        Source(write_lines(folder / f"{number}.jsonl", documents), weight)
        for number, (documents, weight) in enumerate(zip(texts, weights, strict=True))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "CHUNK_BYTES", 300)
        out, manifest = prepared(folder, *sources, options=dataclasses.replace(OPTIONS, part_bytes=part_bytes))
    wanted = [occurrences(documents, weight) for documents, weight in zip(texts, weights, strict=True)]
    rounds = range(math.ceil(max(weights)))
    expected = [text for number in rounds for source in wanted if number < len(source) for text in source[number]]
    assert decoded(out, manifest) == expected
    assert manifest.counts["documents"] == len(expected)
    held_out = [text for documents in texts for text in documents if is_held_out(text, 0.2)]
    assert decoded(out, manifest.held_out_part()) == held_out
    assert manifest.counts["held_out_documents"] == len(held_out) > 0


def test_weight_of_one_is_the_corpus_without_weights(tmp_path: Path) -> None:
    hashes = set()
    for name, weight in (("a", None), ("b", 1.0), ("c", 1)):
        address = write_lines(tmp_path / name / "x.jsonl", numbered("document"))
        hashes.add(prepared(tmp_path / name, address if weight is None else Source(address, weight))[1].hash)
    assert len(hashes) == 1


def test_held_out_part_does_not_depend_on_weights(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tmp_path)
    parts = set()
    for weight in (0.1, 1, 2.5):
        folder = tmp_path / str(weight)
        source = Source(write_lines(folder / "x.jsonl", numbered("document", 200)), weight)
        manifest = prepared(folder, source, options=dataclasses.replace(OPTIONS, tokenizer=tokenizer))[1]
        parts.add(manifest.held_out)
    assert len(parts) == 1


def train_tokenizer(folder: Path) -> str:
    out, _ = prepared(folder, write_lines(folder / "t.jsonl", numbered("document")))
    return f"{out.url}/tokenizer.json"


def test_empty_and_replaced_documents_count_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b" ")
    counts = prepared(tmp_path, Source(f"{tmp_path}/*.txt", 3), options=dataclasses.replace(OPTIONS, held_out=0))[
        1
    ].counts
    assert counts == {"documents": 3, "held_out_documents": 0, "empty_documents": 1, "replaced_documents": 1}


def test_share_is_chosen_by_another_draw_than_what_is_held_out() -> None:
    """With the same draw, the half of a source would hold all of its held-out documents, and the others none."""
    texts = numbered("document", 20_000)
    both = Counter((is_held_out(text, 0.5), is_chosen(text, 0.5)) for text in texts)
    assert all(abs(count - 5_000) < 4 * 61 for count in both.values())  # four standard deviations of a fair draw
    assert len(both) == 4


def test_tokenizer_learns_from_the_mixture(tmp_path: Path) -> None:
    rare, common = numbered("zebra"), numbered("giraffe", 60)
    sources = [write_lines(tmp_path / "rare.jsonl", rare), write_lines(tmp_path / "common.jsonl", common)]
    options = dataclasses.replace(OPTIONS, vocab_size=266, held_out=0.0)  # five merges
    known = {}
    for weight in (1, 100):
        out, _ = prepared(tmp_path / str(weight), Source(sources[0], weight), Source(sources[1]), options=options)
        known[weight] = json.loads(out.read("tokenizer.json"))["model"]["vocab"].keys()
    assert {"raffe", "zebra"} & known[1] == {"raffe"}
    assert {"raffe", "zebra"} & known[100] == {"zebra"}


def test_sources_of_small_weight_may_hold_nothing_to_train_on(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["alone"])
    options = dataclasses.replace(OPTIONS, held_out=0.0)
    assert not is_chosen("alone", 0.01)
    with pytest.raises(DataError, match="hold no text to train on"):
        prepared(tmp_path, Source(source, 0.01), options=options)


@given(st.lists(st.floats(0.01, 8), max_size=5))
def test_item_comes_as_often_as_its_weight_rounded_up(weights: list[float]) -> None:
    sources = [Source("x", weight) for weight in weights]
    found = list(passes(range(len(weights)), sources))
    assert Counter(item for item, _ in found) == Counter({n: math.ceil(w) for n, w in enumerate(weights)})
    assert Counter(item for item, is_whole in found if is_whole) == Counter(
        {n: math.floor(w) for n, w in enumerate(weights) if w >= 1}
    )


def test_passes_go_over_all_sources_before_one_comes_again() -> None:
    found = list(passes("abc", [Source("x", 2), Source("y"), Source("z", 2.5)]))
    assert found == [("a", True), ("b", True), ("c", True), ("a", True), ("c", True), ("c", False)]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "weight"),
    [
        ("web/", "web/", 1.0),
        ("web/=1", "web/", 1.0),
        ("books/**/*.jsonl.gz=2.5", "books/**/*.jsonl.gz", 2.5),
        ("a=b/c.txt=.5", "a=b/c.txt", 0.5),
        ("year=2020/*.txt", "year=2020/*.txt", 1.0),  # folders as Hive names them
        ("year=*", "year=*", 1.0),
        ("year=2020/", "year=2020/", 1.0),
        ("x=two", "x=two", 1.0),
        ("s3://bucket=1e-1", "s3://bucket", 0.1),
    ],
)
def test_weight_is_what_follows_the_last_sign_if_it_is_a_number(text: str, address: str, weight: float) -> None:
    assert Source.parse(text) == Source(address, weight)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e9", "0.0"])
def test_weight_that_no_document_can_have_is_refused(weight: str) -> None:
    with pytest.raises(ConfigError, match=rf"^web/: weight=.* use more than 0 and at most {LARGEST_WEIGHT:g}"):
        Source.parse(f"web/={weight}")


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("text"), lambda path: path.mkdir()], ids=["file", "folder"]
)
def test_path_that_is_there_wins_over_a_weight(tmp_path: Path, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "part=2")  # type: ignore[operator]
    for text in ("part=2", f"{tmp_path}/part=2", f"file://{tmp_path}/part=2"):
        assert Source.parse(text) == Source(text)
    assert Source.parse("part=2=3") == Source("part=2", 3)


@pytest.mark.s3
def test_object_that_is_there_wins_over_a_weight(s3_url: str) -> None:
    storage = Storage.open(s3_url)
    storage.write("part=2/a.txt", b"text")
    storage.write("b=3", b"text")
    for text in (f"{s3_url}/part=2", f"{s3_url}/b=3"):
        assert Source.parse(text) == Source(text)
    assert Source.parse(f"{s3_url}/part=3") == Source(f"{s3_url}/part", 3)
    assert Source.parse(f"{s3_url}=3") == Source(s3_url, 3)


def test_file_with_two_weights_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one"])
    with pytest.raises(
        ConfigError, match=rf"a\.jsonl is named by {tmp_path} with weight 2 and by .*a\.jsonl with weight 1;"
    ):
        find_chunks([Source(str(tmp_path), 2), source])
    same = Source(source, 2)
    assert len(find_chunks([Source(str(tmp_path), 2), same, same])) == 1


def test_word_that_is_no_weight_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"=2,5: no such file.*; a weight is a number, e\.g\. texts/=2\.5"):
        find_chunks([Source.parse(f"{tmp_path}=2,5")])


def test_secret_in_an_address_is_not_repeated() -> None:
    for text in ("s3://key:hunter2@bucket=2", "s3://key:hunter2@bucket=0", "s3://key:hunter2@bucket"):
        with pytest.raises(ConfigError, match="credentials belong into AWS_") as refused:
            Source.parse(text)
        assert "hunter2" not in str(refused.value)
