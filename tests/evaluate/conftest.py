"""Runs that are there to be evaluated, each trained once, and a small harness for a model that is known."""

from __future__ import annotations

import os

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.trained_model import TrainedModel
from tests.evaluate import fake_harness
from tests.evaluate.models import bigrams
from tests.solo import Solo, solo_config

CHANCES = {("a", "b"): 0.3, ("a", "c"): 0.25, ("b", "c"): 0.5, ("c", "\n"): 0.9}


@pytest.fixture(autouse=True)
def priorities(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the command would make of its own: a process cannot take that back, and this one has other tests to run."""
    taken: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "setpriority", lambda *asked: taken.append(asked))
    return taken


@pytest.fixture(scope="session")
def causal_run(held_out_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """With checkpoints of the steps 4 and 6."""
    config = solo_config(held_out_corpus, f"file://{tmp_path_factory.mktemp('causal')}")
    Solo(config).train(until=4)
    assert Solo(config).train().verdict == "done"
    return config


@pytest.fixture(scope="session")
def masked_run(held_out_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    changes = {"model": {"preset": "bert-tiny"}, "objective": {"name": "masked"}}
    config = solo_config(held_out_corpus, f"file://{tmp_path_factory.mktemp('masked')}", **changes)
    assert Solo(config).train().verdict == "done"
    return config


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One with the small harness of fake_harness.py."""
    return fake_harness.install(tmp_path_factory.mktemp("fake"))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run's model is one whose probabilities are known."""
    monkeypatch.setattr(TrainedModel, "load", lambda *_, **__: bigrams(CHANCES))
