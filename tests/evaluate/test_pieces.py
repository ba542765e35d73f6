"""Pieces: whoever answers them, how many do, and whoever is lost, the figures have the same bits."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError, ConfigError
from elastic_lm.evaluate import evaluation, held_out, likelihood
from elastic_lm.evaluate.assignments import Assignments
from elastic_lm.evaluate.pieces import Answer, Answerer, Piece, Subject, here
from elastic_lm.evaluate.progress import Progress
from elastic_lm.storage import Storage
from tests.evaluate.test_tasks import write

WORDS = ["the cat", "a dog", "slowly", "the river and", "it is", "a quick fox", "over the lazy", "zzz"]
CHOICES = [{"context": word, "choices": [" runs", " sleeps", " is what it is"], "answer": 1} for word in WORDS]
PAIRS = [{"more": f"{word} runs", "less": f"{word} sleeps well"} for word in WORDS]
PROMPTS = [{"prompt": word, "references": [f"{word} runs", "it sleeps"]} for word in WORDS]
SCORER = f"{__name__}:share_of_vowels"
FAILING = f"{__name__}:fails_on_some"


def share_of_vowels(text: str) -> float:
    return sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text))


def fails_on_some(text: str) -> float:
    raise RuntimeError(f"no model of harm for {len(text)} characters")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each task has several."""
    monkeypatch.setattr(held_out, "PIECE_TOKENS", 64)
    monkeypatch.setattr(likelihood, "PIECE_TOKENS", 64)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 32)


def workers(number: int, seed: int = 0, lost: float = 0.0) -> Answerer:
    """Each has its own copy of model and pieces; who is next to be heard of, and who is lost, is drawn."""

    def answerer(subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        def new() -> tuple[list[Piece], object]:
            copied, own = pickle.loads(pickle.dumps((list(pieces), subject)))
            return copied, own.load()

        draw, assignments = random.Random(seed), Assignments(len(pieces))
        crew = {worker: new() for worker in range(number)}
        holds: dict[int, int] = {}
        while not assignments.done:
            for worker in crew:
                if worker not in holds and (piece := assignments.give(worker)) is not None:
                    holds[worker] = piece
            worker = draw.choice(sorted(holds))
            piece = holds.pop(worker)
            if draw.random() < lost:
                assignments.lost(worker, "chance")
                crew[worker] = new()
                continue
            own, model = crew[worker]
            try:
                assignments.answered(worker, Answer.to(own[piece], model))  # type: ignore[arg-type]
            except ConfigError as error:
                assignments.failed(worker, error)
            yield from assignments.coming()

    return answerer


def results(config: RunConfig, names: list[str], answerer: Answerer = here) -> list[str]:
    found = evaluation.evaluate(Storage.open(config.run_url), config, names, answerer=answerer)
    return [json.dumps(result.as_dict()) for result in found]


def until_it_fails(config: RunConfig, names: list[str], answerer: Answerer) -> tuple[list[str], str]:
    """Tasks that are told, and the error after them."""
    told: list[str] = []
    try:
        for result in evaluation.evaluate(Storage.open(config.run_url), config, names, answerer=answerer):
            told.append(result.task)
    except ConfigError as error:
        return told, str(error)
    raise AssertionError("nothing failed")


def tasks_of(folder: Path, objective: str) -> list[str]:
    asked = ["held_out", write(folder, PAIRS, name="pairs", kind="pairs")]
    if objective == "causal":
        asked += [
            write(folder, CHOICES, name="choices", kind="choices"),
            write(folder, PROMPTS, name="bleu", kind="bleu", max_new_tokens=6),
            write(folder, PROMPTS, name="safety", kind="safety", scorer=SCORER, temperature=1.0, max_new_tokens=6),
        ]
    return asked


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_figures_have_the_same_bits_for_any_number_of_workers(
    objective: str, causal_run: RunConfig, masked_run: RunConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = causal_run if objective == "causal" else masked_run
    names = tasks_of(tmp_path, objective)
    whole = results(config, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "PIECE_TOKENS", 64)
        patch.setattr(likelihood, "PIECE_TOKENS", 64)
        assert results(config, names) == whole
        for number in (1, 2, 3):
            assert results(config, names, workers(number, seed=number)) == whole
        assert results(config, names, workers(3, seed=9, lost=0.2)) == whole


def test_pieces_are_whole_batches_of_the_task(causal_run: RunConfig, small_pieces: None, tmp_path: Path) -> None:
    """Whoever answers a piece reads together what one process reads together, all readings at once."""
    readings = [likelihood.Reading(tuple(range(length)), (0,), (0,)) for length in (8, 3, 8, 8, 5, 3, 8, 8, 8) * 3]
    together = [[readings[number] for number in numbers] for numbers in likelihood._batches(readings)]
    plan = likelihood.plan(readings, lambda log_p: None)  # type: ignore[arg-type, return-value]
    assert len(plan.pieces) > 3
    again = [
        [piece.readings[number] for number in numbers]
        for piece in plan.pieces
        if isinstance(piece, likelihood.Likelihoods)
        for numbers in likelihood._batches(piece.readings)
    ]
    assert again == together


def test_piece_of_all_kinds_has_more_than_one(causal_run: RunConfig, small_pieces: None, tmp_path: Path) -> None:
    """Else nothing here would be shared out."""
    seen: list[Progress] = []

    class Seen:
        def show(self, progress: Progress) -> None:
            seen.append(progress)

    names = tasks_of(tmp_path, "causal")
    list(evaluation.evaluate(Storage.open(causal_run.run_url), causal_run, names, view=Seen()))
    assert seen[0] == Progress("held_out", 0, seen[0].total, 0)
    assert [progress.done for progress in seen] == list(range(seen[0].total + 1))
    counted = [
        sum(progress.stage == name for progress in seen[1:]) for name in ("held_out", "choices", "bleu", "safety")
    ]
    assert min(counted) > 1
    assert all(before.tokens < after.tokens for before, after in zip(seen, seen[1:], strict=False))


def test_failing_scorer_ends_the_evaluation_with_the_error_of_one_process(
    causal_run: RunConfig, tmp_path: Path
) -> None:
    """What was done before it is told."""
    pairs = write(tmp_path, PAIRS, name="pairs", kind="pairs")
    safety = write(tmp_path, PROMPTS, name="safety", kind="safety", scorer=FAILING, max_new_tokens=3)
    told = [
        until_it_fails(causal_run, [pairs, safety], answerer) for answerer in (here, workers(2), workers(3, seed=5))
    ]
    assert told[0] == told[1] == told[2]
    assert told[0][0] == ["pairs"] and "RuntimeError: no model of harm for" in told[0][1]


def test_this_process_computes_on_its_cpu_also_where_the_run_has_gpus(causal_run: RunConfig) -> None:
    """They are at work, maybe: no memory of theirs is taken."""
    assert results(causal_run.replace("workers.num_gpus=1"), ["held_out"]) == results(causal_run, ["held_out"])


def test_item_that_does_not_fit_is_told_before_a_model_is_loaded(causal_run: RunConfig, tmp_path: Path) -> None:
    def nobody(subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        raise AssertionError("nothing is to be asked")
        yield

    long = write(tmp_path, [{"more": "a " * 500, "less": "b"}], name="long", kind="pairs")
    with pytest.raises(ConfigError, match="shorten it, or leave the item out"):
        results(causal_run, ["held_out", long], nobody)


def test_step_that_is_not_there_is_told_before_anybody_is_asked(causal_run: RunConfig) -> None:
    def nobody(subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        raise AssertionError("nobody is to be asked")
        yield

    found = evaluation.evaluate(Storage.open(causal_run.run_url), causal_run, ["held_out"], step=999, answerer=nobody)
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 999; the nearest are 4 and 6"):
        next(found)


def test_answers_of_other_weights_are_refused(causal_run: RunConfig, small_pieces: None) -> None:
    def changing(subject: Subject, pieces: Sequence[Piece]) -> Generator[Answer, None, None]:
        for number, answer in enumerate(here(subject, pieces)):
            yield Answer(answer.value, answer.step, "f" * 64) if number else answer

    with pytest.raises(CheckpointError, match="changed while it was evaluated: its weights were .* and are ffffffff"):
        results(causal_run, ["held_out"], changing)
