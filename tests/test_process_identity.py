"""Who has ended is known of processes of this machine alone, and an id that is used again deceives nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_lm import process_identity
from elastic_lm.process_identity import has_ended, this_process

SAY = "from elastic_lm.process_identity import this_process; print(this_process(), flush=True); input()"


def test_process_that_runs_has_not_ended_and_one_that_was_killed_has() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SAY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        name = other.stdout.readline().strip()
        assert name.split("/")[2] == str(other.pid)
        assert not has_ended(name)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
        assert has_ended(name)
    assert has_ended(name)


def test_this_process_has_not_ended() -> None:
    assert not has_ended(this_process())


def test_later_process_with_the_same_id_is_another() -> None:
    space, ticks = this_process().rsplit("/", 1)
    assert has_ended(f"{space}/{int(ticks) - 1}")


def test_process_that_proc_does_not_show_is_not_known_to_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with hidepid=2, of another user's."""
    name, gone = this_process(), "/".join([*this_process().split("/")[:2], "4194305", "1"])
    for shown in ("sys", "self"):
        (tmp_path / shown).symlink_to(f"/proc/{shown}")
    monkeypatch.setattr(process_identity, "PROC", tmp_path)
    assert not has_ended(name)
    assert has_ended(gone)  # beyond any id


@pytest.mark.parametrize("part", [0, 1], ids=["another boot", "another namespace"])
def test_process_of_elsewhere_is_not_known_to_have_ended(part: int) -> None:
    parts = this_process().split("/")
    parts[part], parts[2] = "0", "4194305"  # beyond any id
    assert not has_ended("/".join(parts))


@pytest.mark.parametrize("name", ["", "/", "a/b/c", "a/b/c/d", "1/2/3/4/5", "//", "x"])
def test_name_that_is_none_is_of_nobody_known(name: str) -> None:
    assert not has_ended(name)


def test_name_of_here_with_a_wrong_number_is_of_nobody_known() -> None:
    boot, namespace, _, ticks = this_process().split("/")
    assert not has_ended(f"{boot}/{namespace}/x/{ticks}")
    assert not has_ended(f"{boot}/{namespace}/{os.getpid()}/x")
