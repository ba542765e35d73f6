"""A run's folder to save into."""

from __future__ import annotations

import pytest

from elastic_lm.storage import Storage


@pytest.fixture
def run(folder_url: str) -> Storage:
    return Storage.open(folder_url)
