"""Runs that are there to be evaluated, each trained once."""

from __future__ import annotations

import os

import pytest

from elastic_lm.config import RunConfig
from tests.solo import Solo, solo_config


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
