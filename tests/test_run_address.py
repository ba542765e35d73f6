"""Which run a person means, and what they are told when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lm.errors import ConfigError, NotFoundError
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage
from tests.test_cli import write_config


def test_yaml_file_names_the_run_and_its_folder(tmp_path: Path) -> None:
    address = RunAddress.find(write_config(tmp_path))
    assert address.name == "first"
    assert address.storage is not None
    assert address.storage.url == f"file://{tmp_path}/runs/first"


@pytest.mark.parametrize("end", ["", "/"])
def test_address_ends_with_the_name(tmp_path: Path, end: str) -> None:
    address = RunAddress.find(f"file://{tmp_path}/runs/mine{end}")
    assert address.name == "mine"
    assert RunAddress.find(f"{tmp_path}/runs/mine{end}").name == "mine"
    assert RunAddress.find("s3://bucket/runs/mine").name == "mine"


def test_address_that_cannot_be_one_is_the_callers_mistake() -> None:
    with pytest.raises(ConfigError, match="ftp"):
        RunAddress.find("ftp://host/runs/mine")


def test_name_alone_names_a_run_but_not_its_log() -> None:
    address = RunAddress.find("mine")
    assert address == RunAddress("mine")
    with pytest.raises(ConfigError, match=r"'mine' alone does not say where .*STORAGE/runs/mine"):
        address.log()


def test_folder_without_a_log_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no run at file://.*/runs/first: no event log"):
        RunAddress.find(write_config(tmp_path)).log()


def test_log_is_the_runs_events(tmp_path: Path) -> None:
    Storage.open(f"file://{tmp_path}/runs/mine").write("events/000000000000.jsonl", b"{}\n")
    assert RunAddress.find(f"{tmp_path}/runs/mine").log().url == f"file://{tmp_path}/runs/mine/events"
