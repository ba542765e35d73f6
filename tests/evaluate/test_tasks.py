"""Tasks of the user's own: equal to hand-worked figures, and refused by name where something is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_lm.config import RunConfig
from elastic_lm.config_text import beside
from elastic_lm.data.tokenizer import SMALLEST_VOCABULARY, train
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate import tasks
from elastic_lm.evaluate.fields import Fields
from elastic_lm.evaluate.intervals import Metric, wilson
from elastic_lm.evaluate.likelihood import log_likelihoods, rivals
from elastic_lm.evaluate.result import Outcome
from elastic_lm.evaluate.safety import Safety
from elastic_lm.evaluate.tasks import Task
from tests.evaluate.models import END, Alike, Neighbours, bigrams, outcome_of, trained

CHOICE = {"context": "a", "choices": ["b", "c"], "answer": 0}
PAIR = {"more": "ab", "less": "ac"}
PROMPT = {"prompt": "a"}
TRANSLATION = {"prompt": "a", "references": ["b"]}
SCORER = f"{__name__}:share_of_b"


def share_of_b(text: str) -> float:
    return text.count("b") / len(text) if text else 0.0


def fails(text: str) -> float:
    raise RuntimeError("no model of harm is loaded")


def fails_on_b(text: str) -> float:
    assert "b" not in text
    return 0.0


def exits(text: str) -> float:
    raise SystemExit(0)


def says_two(text: str) -> float:
    return 2.0


def write(folder: Path, items: Any, *, name: str = "mine", **fields: Any) -> str:
    """A task's file. `items`: JSON objects, or the text of their file."""
    text = items if isinstance(items, str) else "".join(json.dumps(item) + "\n" for item in items)
    (folder / f"{name}.jsonl").write_text(text)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"data": f"{name}.jsonl", **fields}))
    return str(path)


def asked(folder: Path, items: Any, objective: str = "causal", **fields: Any) -> Task:
    return tasks.load(write(folder, items, **fields), objective)


# -- choices ---------------------------------------------------------------------------------------------------------


def test_choices_by_hand(tmp_path: Path) -> None:
    """Behind a, ln P: b -1.20; cc -1.39 - 0.11 = -1.49, and -0.75 a byte: the first is right as a whole, the second by byte."""
    model = bigrams({("a", "b"): 0.3, ("a", "c"): 0.25, ("c", "c"): 0.9})
    items = [
        {"context": "a", "choices": ["b", "cc"], "answer": 0},
        {"context": "xa", "choices": ["cc", "b"], "answer": 0, "id": "other fields are left alone"},
        {
            "context": "",
            "choices": ["a", "aa", "é"],
            "answer": 0,
        },  # nothing is known: the shortest; by byte all are alike
    ]
    outcome = outcome_of(asked(tmp_path, items, kind="choices").question, model)
    assert outcome.metrics == {"accuracy": wilson(2, 3), "accuracy_per_byte": wilson(2, 3)}
    assert outcome.counts == {"items": 3, "choices": 7, "cut_contexts": 0, "shortened_contexts": 0}


def test_contexts_that_lose_their_beginning_are_counted(tmp_path: Path) -> None:
    model = bigrams({("a", "b"): 0.5}, max_tokens=4)
    items = [{**CHOICE, "context": "x" * 20 + "a"}, CHOICE]
    outcome = outcome_of(asked(tmp_path, items, kind="choices").question, model)
    assert outcome.metrics["accuracy"].value == 1.0
    assert outcome.counts["cut_contexts"] == 2  # both choices of the first


def test_choices_that_join_with_the_context_are_compared_over_the_same_span(tmp_path: Path) -> None:
    """Every token costs log V; "zip" is scored with the " un" that "happy" takes in."""
    encoder = train(["it is unhappy"] * 9, SMALLEST_VOCABULARY + 20)
    model = dataclasses.replace(bigrams({}), module=Alike(encoder.vocab_size), encoder=encoder)
    assert " unhappy" in [encoder.decode([token]) for token in encoder.encode("it is unhappy")]
    found = rivals(model, "it is un", ["happy", "zip"])
    happy, zip_ = found.readings
    assert happy.ids[: happy.places[0] + 1] == zip_.ids[: zip_.places[0] + 1]
    assert [encoder.decode(each.targets) for each in found.readings] == [" unhappy", " unzip"]
    assert (found.tail_bytes, found.shortened) == (3, True)
    scores = log_likelihoods(model, found.readings)
    assert scores == pytest.approx([-len(each.targets) * math.log(encoder.vocab_size) for each in found.readings])
    items = [{"context": "it is un", "choices": ["happy", "zip"], "answer": 0}, {**CHOICE, "context": "it is "}]
    counts = outcome_of(asked(tmp_path, items, kind="choices").question, model).counts
    assert counts["shortened_contexts"] == 1


def test_scores_that_are_not_finite_are_told(tmp_path: Path) -> None:
    model = bigrams({("a", "b"): math.nan})
    items = [CHOICE, {**CHOICE, "context": "x"}]
    outcome = outcome_of(asked(tmp_path, items, kind="choices").question, model)
    assert outcome.metrics == {"accuracy": Metric(None), "accuracy_per_byte": Metric(None)}
    assert (outcome.counts["items"], outcome.counts["not_finite"]) == (2, 1)
    outcome = outcome_of(asked(tmp_path, [PAIR, {"more": "x", "less": "y"}], kind="pairs").question, model)
    assert outcome.metrics == {"share_more": Metric(None), "mean_lead": Metric(None)}
    assert (outcome.counts["pairs"], outcome.counts["not_finite"]) == (2, 1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_continuations_of_weights_that_are_not_finite_are_told(temperature: float, tmp_path: Path) -> None:
    """All behind b is lost; of a nothing but b comes. What no scorer was asked about has no say in the figures."""
    model = bigrams({("a", "b"): 1.0, ("b", "c"): math.nan, ("d", END): 1.0})
    items = [PROMPT, {"prompt": "d"}]
    fields = {"kind": "safety", "scorer": f"{__name__}:fails_on_b", "temperature": temperature, "max_new_tokens": 3}
    outcome = outcome_of(asked(tmp_path, items, **fields).question, model)
    assert outcome.metrics == {"share_above": Metric(None), "mean": Metric(None)}
    assert (outcome.counts["prompts"], outcome.counts["not_finite"]) == (2, 1)
    references = [{**item, "references": ["b"]} for item in items]
    outcome = outcome_of(asked(tmp_path, references, kind="bleu").question, model)
    assert outcome.metrics == {"bleu": Metric(None)}
    assert (outcome.counts["prompts"], outcome.counts["not_finite"]) == (2, 1)


# -- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_by_hand(tmp_path: Path) -> None:
    model = bigrams({(END, "a"): 0.5, ("a", "b"): 0.25, ("a", "c"): 0.125})
    items = [PAIR, {"more": "ac", "less": "ab"}, {"more": "ax", "less": "ay"}, {"more": "ab", "less": "x"}]
    outcome = outcome_of(asked(tmp_path, items, kind="pairs").question, model)
    assert outcome.metrics["share_more"] == wilson(2.5, 4)
    lead = (math.log(0.125) - math.log(0.5 / 260)) / 4  # the first two cancel out, the third is a tie
    assert outcome.metrics["mean_lead"].value == pytest.approx(lead)
    assert outcome.counts == {"pairs": 4, "ties": 1}
    assert outcome.method["score"] == "log-likelihood"


def test_masked_model_scores_pairs_by_pseudo_likelihood(tmp_path: Path) -> None:
    model = trained(Neighbours(), "masked")
    there, back = (
        outcome_of(asked(tmp_path, [item], "masked", kind="pairs").question, model).metrics["mean_lead"].value or 0
        for item in (PAIR, {"more": "ac", "less": "ab"})
    )
    assert there == -back != 0


def test_sentence_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """By the file's name and the line, whatever the objective."""
    items = [PAIR, {"more": "b", "less": "a" * 17}]
    question = asked(tmp_path, items, kind="pairs").question
    with pytest.raises(
        ConfigError,
        match=r"mine\.jsonl, line 2: 'a{17}' has 17 tokens, and the model's context is 16; shorten it, or leave the item out",
    ):
        outcome_of(question, bigrams({}))
    question = asked(tmp_path, items, "masked", kind="pairs").question
    with pytest.raises(ConfigError, match=r"mine\.jsonl, line 2: 'a{17}' has 19 tokens with those that begin and end"):
        outcome_of(question, trained(Neighbours(), "masked"))


def test_choice_that_does_not_fit_is_refused_by_its_line(tmp_path: Path) -> None:
    question = asked(tmp_path, [CHOICE, {**CHOICE, "choices": ["b", "c" * 17]}], kind="choices").question
    with pytest.raises(ConfigError, match=r"mine\.jsonl, line 2: 'c{17}' has 17 tokens, and the model's context is 16"):
        outcome_of(question, bigrams({}))


# -- safety ----------------------------------------------------------------------------------------------------------

CHAIN = {("a", "b"): 0.9, ("b", "c"): 0.9, ("c", END): 0.9, ("x", "b"): 0.9, ("y", END): 0.9}


def test_safety_by_hand(tmp_path: Path) -> None:
    """Behind a and x comes bc, of which half is b; behind b comes c, of which nothing is; behind y comes the end."""
    items = [{"prompt": prompt} for prompt in ("a", "x", "b", "y", "z" * 30 + "a")]
    outcome = outcome_of(asked(tmp_path, items, kind="safety", scorer=SCORER).question, bigrams(CHAIN))
    assert outcome.metrics["share_above"] == wilson(3, 5)
    assert outcome.metrics["mean"].value == pytest.approx(1.5 / 5)
    assert outcome.counts == {"prompts": 5, "above": 3, "empty_continuations": 1, "cut_prompts": 1}
    outcome = outcome_of(asked(tmp_path, items, kind="safety", scorer=SCORER, threshold=0.51).question, bigrams(CHAIN))
    assert outcome.metrics["share_above"] == wilson(0, 5)
    outcome = outcome_of(asked(tmp_path, items, kind="safety", scorer=SCORER, stop="c").question, bigrams(CHAIN))
    assert outcome.metrics["mean"].value == pytest.approx(3 / 5)
    assert outcome.counts["empty_continuations"] == 2


def test_texts_are_drawn_where_there_is_a_temperature(tmp_path: Path) -> None:
    model = bigrams({("a", "b"): 0.5, ("a", "c"): 0.5, ("b", END): 1.0, ("c", END): 1.0})
    found = [
        outcome_of(asked(tmp_path, [PROMPT], kind="safety", scorer=SCORER, temperature=1.0, seed=seed).question, model)
        for seed in range(20)
    ]
    assert {outcome.metrics["mean"].value for outcome in found} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (f"{__name__}:fails", "failed on 'bc': RuntimeError: no model of harm is loaded; correct it"),
        (f"{__name__}:exits", "failed on 'bc': SystemExit: 0; correct it"),
        (f"{__name__}:says_two", "said 2.0 of 'bc'; it must be a number in"),
    ],
)
def test_scorer_that_does_not_do_is_told(scorer: str, message: str, tmp_path: Path) -> None:
    question = asked(tmp_path, [PROMPT], kind="safety", scorer=scorer).question
    with pytest.raises(ConfigError, match=message):
        outcome_of(question, bigrams(CHAIN))


# -- what is wrong with a task ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "items", "message"),
    [
        ({}, [PAIR], "mine.yaml: kind is missing"),
        (
            {"kind": "pair"},
            [PAIR],
            r"kind='pair' is unknown \(did you mean pairs\?\); choose choices, pairs, bleu, safety",
        ),
        ({"kind": "pairs", "treshold": 1}, [PAIR], "'treshold' is not a field here; use kind, data"),
        ({"kind": "safety", "scorer": SCORER, "treshold": 1}, [PROMPT], r"did you mean threshold\?"),
        ({"kind": "pairs", "data": "other.jsonl"}, [PAIR], "data=other.jsonl is not there; correct the address"),
        ({"kind": "pairs"}, "", "mine.jsonl holds no items; write one JSON object a line"),
        ({"kind": "pairs"}, "\n  \n", "holds no items"),
        ({"kind": "pairs"}, '{"more": "a", "less": "b"}\n{"more"', "mine.jsonl, line 2 is no JSON object"),
        (
            {"kind": "pairs"},
            '{"more": "a", "less": "b", "more": "c"}',
            r"line 1 is no JSON object \('more' is written twice",
        ),
        ({"kind": "pairs"}, '\n["a", "b"]\n', "line 2 is .'a', 'b'., and not fields with names"),
        ({"kind": "pairs"}, [{"more": "a"}], "line 1: less is missing; add it, a text that is not blank"),
        ({"kind": "pairs"}, [PAIR, {"more": "a", "less": "a"}], "line 2: more and less are the same sentence"),
        ({"kind": "choices"}, [{**CHOICE, "answer": 2}], "line 1: answer=2 is not a whole number from 0 to 1"),
        ({"kind": "choices"}, [{**CHOICE, "answer": -1}], "answer=-1 is not a whole number from 0 to 1; correct it$"),
        ({"kind": "choices"}, [{**CHOICE, "answer": "b"}], "answer='b' is not a whole number"),
        ({"kind": "choices"}, [{**CHOICE, "answer": True}], "answer=True is not a whole number"),
        ({"kind": "choices"}, [{**CHOICE, "choices": ["b"]}], "is not a list of at least 2 texts"),
        ({"kind": "choices"}, [{**CHOICE, "choices": ["b", " "]}], "is not a list of at least 2 texts"),
        ({"kind": "choices"}, [{"choices": ["b", "c"], "answer": 0}], "context is missing"),
        (
            {"kind": "choices"},
            [CHOICE, {**CHOICE, "choices": [" b", " c", " b"]}],
            "line 2: the choices 0 and 2, counted from 0, are the same text; correct one, or leave it out",
        ),
        (
            {"kind": "choices"},
            [{**CHOICE, "choices": [" b", ""]}],
            r"choices=\[' b', ''\] is not a list of at least 2 texts: number 1 of it, counted from 0, is blank, ''; write it,",
        ),
        (
            {"kind": "choices"},
            [{**CHOICE, "choices": "b"}],
            r"is not a list of at least 2 texts; write \['b', \.\.\.\]$",
        ),
        (
            {"kind": "choices"},
            [{**CHOICE, "choices": ["b", 7]}],
            "number 1 of it, counted from 0, is 7; write it as a text",
        ),
        ({"kind": "choices"}, [{**CHOICE, "choices": {}}], "is not a list of at least 2 texts; write a list$"),
        ({"kind": "bleu"}, [{**PROMPT, "references": "b"}], r"is not a list of at least 1 text; write \['b'\]$"),
        (
            {"kind": "bleu"},
            [{**PROMPT, "references": ["a text that is longer than what an error shows of it" * 2, " "]}],
            "number 1 of it, counted from 0, is blank",
        ),
        ({"kind": "bleu"}, [PROMPT], "line 1: references is missing; add it, a list of at least 1 text$"),
        (
            {"kind": "bleu"},
            [{**PROMPT, "references": []}],
            "references=.. is not a list of at least 1 text: it has 0; add more$",
        ),
        (
            {"kind": "bleu", "max_new_tokens": 0},
            [TRANSLATION],
            "max_new_tokens=0 is not a whole number from 1 to 65536",
        ),
        ({"kind": "bleu", "stop": ""}, [TRANSLATION], "stop='' is not a text"),
        ({"kind": "safety"}, [PROMPT], "scorer is missing"),
        ({"kind": "safety", "scorer": "no.such:thing"}, [PROMPT], "scorer='no.such:thing' cannot be imported"),
        ({"kind": "safety", "scorer": SCORER, "threshold": 2}, [PROMPT], "threshold=2 is not a number from 0 to 1"),
    ],
)
def test_mistake_in_a_task_is_told(fields: dict[str, Any], items: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        asked(tmp_path, items, **fields)


def test_task_that_the_objective_cannot_answer_is_refused(tmp_path: Path) -> None:
    for kind, item in (("bleu", TRANSLATION), ("choices", CHOICE), ("safety", PROMPT)):
        with pytest.raises(
            ConfigError, match=f"kind {kind} takes a model with objective.name causal, and the run's is masked"
        ):
            asked(tmp_path, [item], "masked", kind=kind)
    with pytest.raises(ConfigError, match="objective.name causal or masked, and the run's is mine:loss"):
        asked(tmp_path, [PAIR], "mine:loss", kind="pairs")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "is .1., and not fields with names"),
        (b"", "is None, and not fields"),
        (b"kind: [", "is not YAML"),
        (b"kind: \xff", "is no UTF-8 text"),
    ],
)
def test_file_that_is_no_task_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        tasks.load(str(tmp_path / "mine.yaml"), "causal")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["heldout"],
            r"'heldout' is no task \(did you mean held_out\?\); write held_out, or the address of a YAML file",
        ),
        (["tasks/mine.jsonl"], r"is no task; write held_out, or the address of a YAML file, e.g. tasks/mine.yaml"),
        ([""], "'' is no task"),
        ([], "no task is named"),
        (["nowhere/mine.yaml"], "nowhere/mine.yaml is not there; correct the address"),
        (["held_out", "held_out"], "two tasks are called held_out"),
        (["held_out.yaml"], "use letters, digits"),
        (["my task.yaml"], "use letters, digits"),
    ],
)
def test_name_that_is_no_task_is_told(names: list[str], message: str, causal_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks.find(names, causal_run)


@pytest.mark.parametrize(
    ("kind", "item", "fields"),
    [("choices", CHOICE, {}), ("pairs", PAIR, {}), ("bleu", TRANSLATION, {}), ("safety", PROMPT, {"scorer": SCORER})],
)
def test_figures_of_a_task_are_known_before_it_is_asked(
    kind: str, item: dict[str, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    question = asked(tmp_path, [item], kind=kind, **fields).question
    assert question.figures == tuple(outcome_of(question, bigrams(CHAIN)).metrics)


def test_hash_is_the_same_where_what_is_left_out_is_written_or_a_number_is_written_otherwise(tmp_path: Path) -> None:
    def task_hash(**fields: Any) -> str:
        return asked(tmp_path, [PROMPT], kind="safety", scorer=SCORER, **fields).hash

    same: list[dict[str, Any]] = [
        {}, {"threshold": 0.5}, {"temperature": 0}, {"temperature": 0.0, "seed": 0, "max_new_tokens": 64},
    ]  # fmt: skip
    assert len({task_hash(**fields) for fields in same}) == 1
    assert len({task_hash(), task_hash(threshold=1), task_hash(stop="."), task_hash(seed=1)}) == 4


@pytest.mark.parametrize(
    ("kind", "item", "name"),
    [
        ("choices", {**CHOICE, "choices": ["\ud800", "b"]}, "choices"),
        ("choices", {**CHOICE, "context": "a\udfff"}, "context"),
        ("pairs", {"more": "a\ud800", "less": "b"}, "more"),
        ("bleu", {**TRANSLATION, "references": ["b", "\ud83d"]}, "references"),
        ("safety", {"prompt": "\ud83d"}, "prompt"),
    ],
)
def test_half_of_a_character_is_told_with_its_line(kind: str, item: Any, name: str, tmp_path: Path) -> None:
    fine = {"choices": CHOICE, "pairs": PAIR, "bleu": TRANSLATION, "safety": PROMPT}[kind]
    fields = {"scorer": SCORER} if kind == "safety" else {}
    with pytest.raises(ConfigError, match=rf"mine\.jsonl, line 2: {name}=.* has half of a surrogate pair, '\\ud"):
        asked(tmp_path, [fine, item], kind=kind, **fields)


def test_whole_character_of_two_surrogates_is_text(tmp_path: Path) -> None:
    assert asked(tmp_path, '{"prompt": "\\ud83d\\ude00"}\n', kind="safety", scorer=SCORER).kind == "safety"


def test_number_of_samples_is_refused_where_nothing_heeds_it(causal_run: RunConfig, tmp_path: Path) -> None:
    own = write(tmp_path, [PROMPT], kind="safety", scorer=SCORER)
    with pytest.raises(ConfigError, match="samples=3 are of held_out, which is not asked for"):
        tasks.find([own], causal_run, 3)
    assert len(tasks.find([own, "held_out"], causal_run, 3)) == 2


def test_hash_says_how_texts_are_drawn_where_they_are() -> None:
    """What was drawn by another rule is the result of another task; the most probable text is the same by any."""
    for temperature, is_drawn in ((0, False), (1, True)):
        options = Fields({"scorer": SCORER, "temperature": temperature}, "task.yaml")
        Safety([Fields(PROMPT, "items")], options)
        assert ("drawn" in options.rules) == is_drawn


def test_hash_is_of_what_is_asked_and_not_of_where(tmp_path: Path) -> None:
    first = write(tmp_path, [PAIR], kind="pairs")
    (tmp_path / "elsewhere").mkdir()
    for name in ("mine.yaml", "mine.jsonl"):
        shutil.copy(tmp_path / name, tmp_path / "elsewhere" / name)
    copy = tasks.load(str(tmp_path / "elsewhere" / "mine.yaml"), "causal")
    assert tasks.load(first, "causal").hash == copy.hash
    other = tasks.load(write(tmp_path, [PAIR, PAIR], kind="pairs"), "causal")
    options = [tasks.load(write(tmp_path, [TRANSLATION], kind="bleu", max_new_tokens=n), "causal").hash for n in (8, 9)]
    assert len({copy.hash, other.hash, *options}) == 4


@pytest.mark.parametrize(
    ("address", "data", "place"),
    [
        ("s3://bucket/tasks/mine.yaml", "mine.jsonl", "s3://bucket/tasks/mine.jsonl"),
        ("s3://bucket/tasks/mine.yaml", "../data/./mine.jsonl", "s3://bucket/data/mine.jsonl"),
        ("s3://bucket/a/b/mine.yaml", "../../x/../mine.jsonl", "s3://bucket/mine.jsonl"),
        ("s3://bucket/a//b/mine.yaml", "mine.jsonl", "s3://bucket/a//b/mine.jsonl"),
        ("s3://bucket/mine.yaml", "s3://other/mine.jsonl", "s3://other/mine.jsonl"),
        ("s3://bucket/mine.yaml", "/data/mine.jsonl", "/data/mine.jsonl"),
        ("file:///tasks/mine.yaml", "../mine.jsonl", "file:///tasks/../mine.jsonl"),
        ("tasks/mine.yaml", "../mine.jsonl", "tasks/../mine.jsonl"),
        ("mine.yaml", "mine.jsonl", "mine.jsonl"),
    ],
)
def test_relative_address_is_beside_the_task(address: str, data: str, place: str) -> None:
    assert beside(address, data) == place


@pytest.mark.parametrize("data", ["../mine.jsonl", "../other/mine.jsonl", "a/../../mine.jsonl"])
def test_relative_address_does_not_leave_its_bucket(data: str) -> None:
    with pytest.raises(ConfigError, match="leads out of the bucket bucket; write its whole address, s3://BUCKET/PATH"):
        beside("s3://bucket/mine.yaml", data)


def test_items_of_a_task_in_a_bucket_may_lie_in_another_folder_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"s3://bucket/tasks/mine.yaml": "kind: pairs\ndata: ../data/items.jsonl\n"}
    there["s3://bucket/data/items.jsonl"] = json.dumps(PAIR)
    monkeypatch.setattr(tasks, "_text", lambda address, source: there[address])
    assert tasks.load("s3://bucket/tasks/mine.yaml", "causal").name == "mine"


def test_items_may_lie_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "data" / "items.jsonl").write_text(json.dumps(PAIR))
    monkeypatch.chdir(tmp_path)
    for data in ("../data/items.jsonl", str(tmp_path / "data/items.jsonl"), f"file://{tmp_path}/data/items.jsonl"):
        Path("tasks/mine.yaml").write_text(f"kind: pairs\ndata: {data}\n")
        assert tasks.load("tasks/mine.yaml", "causal").name == "mine"
    shutil.copy("data/items.jsonl", "items.jsonl")
    Path("here.yaml").write_text("kind: pairs\ndata: items.jsonl\n")
    assert outcome_of(tasks.load("here.yaml", "causal").question, bigrams({})) == Outcome(
        {"share_more": wilson(0.5, 1), "mean_lead": Metric(0.0)},
        {"pairs": 1, "ties": 1},
        {"score": "log-likelihood", "intervals": "Wilson; bootstrap over pairs"},
    )
