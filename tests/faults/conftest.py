from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.runtime.cluster import LocalCluster
from tests.faults.harness import Run, assert_nothing_left, make_config, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def start(cluster: LocalCluster, corpus: str, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts runs; afterwards nothing of them may be left."""
    number = 0

    def begin(*, steps: int, **changes: Any) -> Run:
        nonlocal number
        number += 1
        name = f"{tmp_path.name.replace('[', '-').replace(']', '')[:40]}-{number}"
        return Run(make_config(corpus, f"file://{tmp_path}", name, steps=steps, **changes))

    yield begin
    assert_nothing_left(cluster)
