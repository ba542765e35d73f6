"""What tasks of lm-evaluation-harness cannot do here is refused by name, before the model is loaded or the harness starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.errors import CheckpointError, ConfigError
from elastic_lm.evaluate.harness.evaluation import Harness
from elastic_lm.trained_model import TrainedModel
from tests.evaluate import fake_harness
from tests.evaluate.fake_harness import asked


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["goood"], f"'goood' is no task of lm-evaluation-harness {fake_harness.VERSION} \\(did you mean good\\?\\)"),
        (["good", "nothing_like_it"], "'nothing_like_it' is no task of .* lists them, and --harness-include adds"),
        (
            ["unloadable"],
            "cannot load unloadable: ConnectionError: no such data\nis anywhere; leave the task out, correct it, or see",
        ),
        (["unsafe"], "unsafe runs code that the model writes"),
        (["both", "good"], "the task good is in both both and good; leave one out"),
        (["good", "good"], "good is named twice"),
        (["good", ""], "has no name"),
    ],
)
def test_task_is_refused_before_the_model_is_loaded(
    names: list[str], message: str, causal_run: RunConfig, python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedModel, "load", None)
    with pytest.raises(ConfigError, match=message):
        asked(causal_run, *names, python=python, include=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_beams": 10},
            "generation_kwargs has num_beams=10, which is not done here; leave the task out, correct it",
        ),
        ({"repetition_penalty": 1.2}, r"has repetition_penalty=1\.2, which is not done here"),
        ({"temperature": 0.5, "min_p": 0.1}, r"has min_p=0\.1, which is not done here"),
        ({"what_nobody_knows": False}, "has what_nobody_knows=False, which is not done here"),
        ({"do_sample": True}, "has do_sample without a temperature; write which"),
    ],
)
def test_text_that_cannot_be_written_as_asked_is_refused_before_the_model_is_loaded(
    options: dict[str, Any],
    message: str,
    causal_run: RunConfig,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TrainedModel, "load", None)
    (tmp_path / "options.json").write_text(json.dumps(options))
    with pytest.raises(ConfigError, match=f"writes: .*{message}"):
        asked(causal_run, "writes", python=python, include=str(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "repetition_penalty": 1.0, "min_length": 0, "use_cache": False, "what_nobody_knows": None},
        {"temperature": 0.0, "top_p": 0.0, "min_p": 0.1},  # of draws, and nothing is drawn
        {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0},
    ],
)
@pytest.mark.usefixtures("by_hand")
def test_options_of_a_text_that_change_nothing_pass(
    options: dict[str, Any], causal_run: RunConfig, python: str, tmp_path: Path
) -> None:
    (tmp_path / "options.json").write_text(json.dumps(options))
    [found] = asked(causal_run, "writes", python=python, include=str(tmp_path))
    assert found.outcome.metrics["written"].value is not None


def test_folder_that_cannot_be_read_is_told(causal_run: RunConfig, python: str, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").touch()
    with pytest.raises(ConfigError, match=r"cannot list its tasks: ValueError: broken\.yaml is no task; correct that"):
        asked(causal_run, "good", python=python, include=str(tmp_path))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"include": "/nowhere"}, "/nowhere is no folder"),
        ({"samples": 0}, "samples=0 is too few; use at least 1"),
        ({"samples": 2.5}, r"samples=2\.5 is no whole number; use at least 1, or leave it out"),
        ({"shots": -1}, "shots=-1 is too few; use at least 0"),
    ],
)
def test_choice_is_refused_before_anything_starts(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Harness(["good"], **choices)


def test_masked_objective_is_refused(masked_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"takes objective\.name=causal, and the run's is masked"):
        asked(masked_run, "good", python="/nowhere")


def test_step_without_checkpoint_is_told_before_the_harness_starts(causal_run: RunConfig) -> None:
    with pytest.raises(CheckpointError, match="has no complete checkpoint of step 5; the nearest are 4 and 6"):
        asked(causal_run, "good", python="/nowhere", step=5)


def test_another_corpus_is_told_before_the_harness_starts(causal_run: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"is not the corpus at data\.tokens="):
        asked(causal_run.replace(f"data.manifest={'f' * 64}"), "good", python="/nowhere")
