"""The kernel's library: compiled once, found again, private to this user, and done without where it cannot be had."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_lm.engine import kernel
from elastic_lm.engine.fixed_point import Unit, fold, to_float

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _forgets_the_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library is looked for once per process: begin and end without an answer."""
    monkeypatch.delenv("ELASTIC_LM_KERNEL", raising=False)
    kernel._library.cache_clear()
    yield
    kernel._library.cache_clear()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, in which nothing was compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "elastic-lm"


def is_available() -> bool:
    kernel._library.cache_clear()
    return kernel.available(torch.device("cpu"))


def fails(*args: Any, **kwargs: Any) -> Any:
    raise subprocess.CalledProcessError(1, "cc")


def test_it_is_compiled_into_the_cache_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_available()
    (library,) = cache.iterdir()  # and no working folder is left
    assert library.suffix == ".so"
    ctypes.CDLL(str(library))
    monkeypatch.setattr(subprocess, "run", fails)
    assert is_available()


def test_another_source_or_another_processor_is_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    key = kernel._key()
    assert kernel._key() == key
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "SOURCE", kernel.SOURCE + " ")
        assert kernel._key() != key
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda self: "flags : another processor")
        assert kernel._key() != key


@pytest.mark.parametrize("reason", ["none", "fails", "missing", "slow"])
def test_without_a_working_compiler_torch_does_the_work(
    cache: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    errors = {"missing": FileNotFoundError("cc"), "slow": subprocess.TimeoutExpired("cc", 60)}

    def run(*args: Any, **kwargs: Any) -> Any:
        raise errors.get(reason, subprocess.CalledProcessError(1, "cc"))

    monkeypatch.setattr(subprocess, "run", run)
    if reason == "none":
        monkeypatch.setattr(kernel.shutil, "which", lambda name: None)
    assert not is_available()
    assert list(cache.iterdir()) == []
    total = torch.full((3,), 7)
    assert int(fold(total, torch.tensor([1.0, 2.0, float("nan")]), Unit(1, 1), first=False)) == 1
    assert total.tolist() == [9, 11, 7]
    assert to_float(total, Unit(1, 1), 1, torch.empty(3)).tolist() == [4.5, 5.5, 3.5]


def test_an_environment_variable_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_available()
    monkeypatch.setenv("ELASTIC_LM_KERNEL", "torch")
    assert not is_available()


def test_a_damaged_library_in_the_cache_is_not_used(cache: Path) -> None:
    cache.mkdir()
    (cache / f"kernel-{kernel._key()}.so").write_bytes(b"not a library")
    assert not is_available()


def test_a_home_that_cannot_be_written_leads_to_a_private_temporary_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = kernel._cache_folder()
    assert folder == tmp_path / f"elastic-lm-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_temporary_folder_of_somebody_else_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(OSError, match="belongs to somebody else"):
        kernel._cache_folder()
    assert not is_available()


def test_it_refuses_what_its_pointers_could_not_walk() -> None:
    """A pointer knows neither strides nor sizes."""
    total, values = torch.zeros(8, dtype=torch.int64), torch.ones(16)
    assert is_available()
    with pytest.raises(AssertionError):
        kernel.fold(total, values[::2], 1.0, 1.0, True)
    with pytest.raises(AssertionError):
        kernel.fold(total, values, 1.0, 1.0, True)
    with pytest.raises(AssertionError):
        kernel.to_float(total, 1.0, values)
    assert total.tolist() == [0] * 8
