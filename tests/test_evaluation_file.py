"""Names of evaluations' files: written by one part, read by another."""

from __future__ import annotations

import pytest

from elastic_lm.evaluation_file import name_with_hash, path_of, place_of


@pytest.mark.parametrize(
    "step", [0, 1_000, 123_456_789]
)  # the last one has more digits than the others are filled up to
def test_place_is_read_from_the_path_that_is_made_of_it(step: int) -> None:
    assert place_of(path_of(step, "held_out-0a1b")) == (step, "held_out-0a1b")


def test_paths_are_what_the_documents_say() -> None:
    assert path_of(1_000, "animals") == "evaluations/step-00001000/animals.json"
    assert path_of(1_000, name_with_hash("animals", "2" * 64)) == "evaluations/step-00001000/animals-22222222.json"


@pytest.mark.parametrize(
    "path",
    [
        "evaluations/step-00000010/notes.txt", "evaluations/step-10/held_out.json", "evaluations/step-00000010/a/b.json",
        "old/evaluations/step-00000010/held_out.json",
    ],
)  # fmt: skip
def test_what_is_called_otherwise_is_no_evaluation(path: str) -> None:
    assert place_of(path) is None
