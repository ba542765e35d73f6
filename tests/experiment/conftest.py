"""A run to fork."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.storage import Storage
from tests.experiment.parents import address_of, cut_small, trained
from tests.solo import solo_config

STEPS, AT = 10, 4


@pytest.fixture(scope="session")
def trained_once(small_corpus: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of ten steps, with checkpoints at steps 4 and 10."""
    config = solo_config(small_corpus, f"file://{tmp_path_factory.mktemp('parent')}", "parent", steps=STEPS)
    trained(config, AT)
    cut_small(config, AT)
    return config


@pytest.fixture
def parent(trained_once: RunConfig, tmp_path: Path) -> RunConfig:
    """A copy of it that a test may spoil."""
    config = trained_once.replace(f"storage=file://{tmp_path}")
    here, there = Storage.open(trained_once.run_url), Storage.open(config.run_url)
    for path in here.list():
        there.write(path, here.read(path))
    there.write(
        "config.yaml", address_of(config).stored_config().replace(f"storage=file://{tmp_path}").to_yaml().encode()
    )
    return config
