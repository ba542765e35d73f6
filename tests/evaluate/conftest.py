"""Runs that are there to be evaluated, each trained once."""

from __future__ import annotations

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.solo import Solo, solo_config


@pytest.fixture(scope="session")
def held_out_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a corpus with a tenth held out."""
    folder = tmp_path_factory.mktemp("held-out")
    source = write_lines(folder / "text.jsonl", texts(300))
    options = PrepareOptions(vocab_size=300, block_tokens=257, held_out=0.1)
    prepare([source], Storage.open(f"file://{folder}/tokens"), options)
    return f"file://{folder}/tokens"


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
