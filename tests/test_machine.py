"""What a machine has and a container may use, from files as kernels write them."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from elastic_lm.machine import cpu_limit, memory_limit, processor_name, system_name


def files(root: Path, **contents: str) -> Path:
    """`a__b_c=text` becomes root/a/b.c: control groups have dots in their names."""
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own"
    path.write_text("0::/pod/worker\n")
    return path


def test_lowest_limit_between_the_process_and_the_root_holds(tmp_path: Path, own: Path) -> None:
    root = files(
        tmp_path / "v2",
        pod__worker__cpu_DOT_max="max 100000\n", pod__cpu_DOT_max="250000 100000\n", cpu_DOT_max="800000 100000\n",
        pod__worker__memory_DOT_max="1000\n", pod__memory_DOT_max="max\n", memory_DOT_max="4000\n",
    )  # fmt: skip
    assert cpu_limit(root, own) == 2.5
    assert memory_limit(root, own) == 1000


def test_group_of_a_container_that_sees_itself_as_the_root(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("0::/\n")
    root = files(tmp_path / "v2", cpu_DOT_max="50000 100000\n", memory_DOT_max="12\n")
    assert (cpu_limit(root, own), memory_limit(root, own)) == (0.5, 12)


def test_first_version_has_files_of_its_own(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n")
    root = files(
        tmp_path / "v1",
        cpu__cpu_DOT_cfs_quota_us="150000\n", cpu__cpu_DOT_cfs_period_us="100000\n",
        memory__memory_DOT_limit_in_bytes="2048\n",
    )  # fmt: skip
    assert (cpu_limit(root, own), memory_limit(root, own)) == (1.5, 2048)
    files(root, cpu__cpu_DOT_cfs_quota_us="-1\n")
    assert cpu_limit(root, own) is None


def test_no_limit_and_no_files_are_no_limit(tmp_path: Path, own: Path) -> None:
    assert (cpu_limit(tmp_path / "none", own), memory_limit(tmp_path / "none", tmp_path / "none")) == (None, None)
    root = files(tmp_path / "v2", pod__cpu_DOT_max="max 100000\n", pod__memory_DOT_max="max\n")
    assert (cpu_limit(root, own), memory_limit(root, own)) == (None, None)


def test_processor_has_the_kernels_name_or_its_architecture(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2.40GHz\n\nprocessor\t: 1\nmodel name\t: Another\n")
    assert processor_name(info) == "Some CPU @ 2.40GHz"
    info.write_text("processor\t: 0\n")
    assert processor_name(info) == processor_name(tmp_path / "none") != ""


def test_system_is_named_with_kernel_and_c_library() -> None:
    assert platform.release() in system_name()
    assert platform.machine() in system_name()
    assert platform.libc_ver()[1] in system_name()
