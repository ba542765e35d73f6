"""Evaluations that lie in a run's folder: those that can be read, in order."""

from __future__ import annotations

import json
from pathlib import Path

from elastic_lm.experiment.evaluations import Measured, found
from elastic_lm.storage import Storage


def test_metrics_are_found_by_step_task_and_name(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    of = {"loss": {"value": 2.5, "low": 2.4, "high": 2.6}, "accuracy": {"value": 1}, "plain": 0.5}
    folder.write("evaluations/step-00000010/held_out.json", json.dumps({"task": "held_out", "metrics": of}).encode())
    folder.write("evaluations/step-00000009/bleu.json", json.dumps({"metrics": {"bleu": {"value": 30.25}}}).encode())
    assert found(folder) == [
        Measured(9, "bleu", "bleu", 30.25),
        Measured(10, "held_out", "accuracy", 1.0),
        Measured(10, "held_out", "loss", 2.5, 2.4, 2.6),
        Measured(10, "held_out", "plain", 0.5),
    ]
    assert [str(one) for one in found(folder)] == ["30.25", "1", "2.5 [2.4, 2.6]", "0.5"]


def test_figure_that_is_not_finite_is_told(tmp_path: Path) -> None:
    """A model that fell apart is not one that nobody evaluated."""
    folder = Storage.open(str(tmp_path))
    text = b'{"metrics": {"loss": {"value": null, "low": null, "high": null}, "mine": NaN, "none": {"low": 1}}}'
    folder.write("evaluations/step-00000010/held_out.json", text)
    assert found(folder) == [Measured(10, "held_out", "loss", None), Measured(10, "held_out", "mine", None)]
    assert [str(one) for one in found(folder)] == ["not finite"] * 2


def test_what_is_of_another_shape_is_passed_over(tmp_path: Path) -> None:
    folder = Storage.open(str(tmp_path))
    for number, text in enumerate(
        (b"", b"{", b"[]", b"7", b'{"metrics": []}', b'{"metrics": {"a": {"value": "x"}, "b": true}}')
    ):
        folder.write(f"evaluations/step-00000010/{number}.json", text)
    folder.write("evaluations/notes.txt", b"not ours")
    assert found(folder) == []
