"""`elastic-lm doctor`: each finding by its rule, nothing that hangs, nothing private, and the exit code that scripts look at."""

from __future__ import annotations

import importlib.metadata
import json
import resource
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_lm import doctor
from elastic_lm.doctor import Answer, Check, ask
from elastic_lm.engine.devices import devices
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.storage_probe import Probe
from tests.data.corpora import small_corpus
from tests.test_cli import run, write_config

Memory = namedtuple("Memory", "total available")
Disk = namedtuple("Disk", "total free")
SECRET = "wJalrXUtnFEMI"


# -- the machine -----------------------------------------------------------------------------------------------------


def test_package_that_is_not_installed_is_a_failure() -> None:
    def version_of(name: str) -> str:
        if name == "s3fs":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2"

    own, found, missing = doctor.versions(version_of)
    assert own.text.startswith("0.1.0, Python 3.")
    assert "torch 1.2, ray 1.2" in found.text and "s3fs" not in found.text
    assert (missing.status, missing.text) == ("failed", "not installed: s3fs")


@pytest.mark.parametrize(
    ("num_cpus", "num_usable", "limit", "joins", "status", "begin"),
    [
        (8, 8, None, False, "ok", "8 of 8 may be used"),
        (8, 8, 16.0, False, "ok", "8 of 8"),
        (64, 64, 2.5, False, "warning", "2.5 of 64"),
        (64, 4, None, False, "warning", "4 of 64"),
        (64, 64, 0.5, False, "warning", "0.5 of 64"),
        (64, 64, 2.5, True, "ok", "2.5 of 64"),  # the cluster counts its own
    ],
)
def test_cpus_that_may_not_be_used_are_a_warning_where_a_cluster_would_count_them(
    num_cpus: int, num_usable: int, limit: float | None, joins: bool, status: str, begin: str
) -> None:
    check = doctor.cpus(num_cpus, num_usable, limit, joins=joins)
    assert check.status == status
    assert check.text.startswith(begin)
    if status == "warning":
        assert check.remedy.endswith(f"= {max(1, int(min(num_usable, limit or num_usable)))}")


def test_memory_names_the_containers_limit_where_it_is_one() -> None:
    machine = Memory(total=64e9, available=60e9)
    assert doctor.memory(machine, None).text == "60.0 GB of 64.0 GB free"
    assert doctor.memory(machine, 2**63).text == "60.0 GB of 64.0 GB free"
    assert doctor.memory(machine, 8_000_000_000).text.endswith("; 8.0 GB allowed in this container")


def test_driver_is_read_from_the_kernel_module(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
    )
    assert doctor.driver_in(file) == "550.54.15"
    file.write_text("nothing")
    assert doctor.driver_in(file) is doctor.driver_in(tmp_path / "none") is None


FOUND = {"torch": "2", "instruction_set": "AVX2", "cuda": "13.0", "nccl": None, "gpus": ["NVIDIA H100"], "kernel": True}


@pytest.mark.parametrize(
    ("changes", "driver", "wants_gpu", "name", "status", "words"),
    [
        ({}, "550.1", False, "GPUs", "ok", "NVIDIA H100; driver 550.1"),
        ({"gpus": []}, None, False, "GPUs", "ok", "none"),
        ({"gpus": []}, "550.1", False, "GPUs", "warning", "none; driver 550.1"),
        ({"gpus": []}, None, True, "GPUs", "warning", "none"),
        ({}, None, False, "PyTorch", "ok", "built for CUDA 13.0, instruction set AVX2"),
        ({"nccl": "2.30.1"}, None, False, "PyTorch", "ok", "NCCL 2.30.1"),
        ({"cuda": None}, None, False, "PyTorch", "ok", "built for CPUs only"),
        ({}, None, False, "C kernel", "ok", "compiles"),
        ({"kernel": False}, None, False, "C kernel", "warning", "torch operations"),
    ],
)
def test_devices_are_judged_by_what_is_seen_and_wanted(
    changes: dict[str, Any], driver: str | None, wants_gpu: bool, name: str, status: str, words: str
) -> None:
    checks = {check.name: check for check in doctor.devices(Answer({**FOUND, **changes}), driver, wants_gpu=wants_gpu)}
    assert list(checks) == ["PyTorch", "GPUs", "C kernel"]
    assert (checks[name].status, words in checks[name].text) == (status, True)
    assert bool(checks[name].remedy) == (status != "ok")


def test_pytorch_that_does_not_start_is_a_failure() -> None:
    [check] = doctor.devices(Answer(None, "ImportError: libcudart"), None, wants_gpu=False)
    assert (check.status, check.text) == ("failed", "does not start: ImportError: libcudart")


def test_devices_of_this_machine_are_told_as_json() -> None:
    answer = ask("elastic_lm.engine.devices", 50)
    assert answer.error == ""
    assert answer.value == devices()


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (doctor.shared_memory(64e6), "warning"),  # Docker's
        (doctor.shared_memory(8e9), "ok"),
        (doctor.open_files(1024, 1_048_576), "ok"),  # Ray raises it
        (doctor.open_files(1024, 1024), "warning"),
        (doctor.open_files(1024, resource.RLIM_INFINITY), "ok"),
        (doctor.temporary_folder("/tmp", Disk(total=100e9, free=50e9)), "ok"),
        (doctor.temporary_folder("/tmp", Disk(total=100e9, free=4e9)), "warning"),  # more than 95% full
        (doctor.temporary_folder("/tmp", Disk(total=2e9, free=0.9e9)), "warning"),
    ],
    ids=lambda value: value.text if isinstance(value, Check) else value,
)
def test_limit_that_is_too_low_is_a_warning_with_a_remedy(check: Check, status: str) -> None:
    assert check.status == status
    assert bool(check.remedy) == (status == "warning")


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """Makes a module of this source."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda source: (tmp_path / "asked_module.py").write_text(source)


@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("print('noise'); print('{\"a\": 1}')", Answer({"a": 1})),
        ("import sys; sys.exit('it is so')", Answer(None, "it is so")),
        ("raise ValueError('wrong')", Answer(None, "ValueError: wrong")),
        ("import os; os.abort()", Answer(None, "ended with code -6 and said nothing")),
        ("print('no json')", Answer(None, "ended with code 0 and said nothing")),
    ],
)
def test_process_gives_an_answer_or_a_reason(source: str, answer: Answer, module: Callable[[str], object]) -> None:
    module(source)
    assert ask("asked_module", 50) == answer


def test_process_that_hangs_is_ended_with_its_children(module: Callable[[str], object], tmp_path: Path) -> None:
    module(
        "import os, pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(600)"
    )
    assert ask("asked_module", 10) == Answer(None, "no answer within 10 s")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _lives(pid):
        time.sleep(0.02)
    assert not _lives(pid)


def _lives(pid: int) -> bool:
    """Whether it runs; one that nobody has waited for yet does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


# -- ports and the cluster -------------------------------------------------------------------------------------------


def test_metrics_port_is_free_or_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check = doctor.metrics_port("127.0.0.1", port)
        assert (check.status, check.text) == ("warning", f"{port} on 127.0.0.1 is taken")
        assert "next free one" in check.remedy
    assert doctor.metrics_port("127.0.0.1", port) == Check("metrics port", "ok", f"{port} on 127.0.0.1 is free")
    assert doctor.metrics_port("127.0.0.1", None).status == "ok"


@pytest.mark.parametrize("host", ["192.0.2.1", "a\0b", "." * 300])
def test_host_that_is_not_this_machine_is_a_warning(host: str) -> None:
    check = doctor.metrics_port(host, 0)
    assert check.status == "warning"
    assert "metrics.host" in check.remedy


def test_no_address_is_no_failure() -> None:
    assert doctor.cluster(None).status == "ok"


def test_cluster_where_nobody_listens_is_a_failure_with_a_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    check = doctor.cluster(f"127.0.0.1:{port}")
    assert check.status == "failed"
    assert "Connection refused" in check.text and "`ray start --head`" in check.text


def test_cluster_that_says_nothing_is_given_up() -> None:
    """A head that hangs: it takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        check = doctor.cluster(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=6)
        assert time.monotonic() - began < 20
    assert (check.status, check.text.endswith("no answer within 6 s")) == ("failed", True)
    assert "unset RAY_ADDRESS" in check.remedy


@pytest.mark.ray
def test_cluster_that_answers_is_described(cluster: LocalCluster) -> None:
    check = doctor.cluster(cluster.address)
    assert check.status == "ok"
    assert check.text.startswith(f"Joined the Ray cluster at {cluster.address} (4 nodes, 6 CPUs)")


# -- storage ---------------------------------------------------------------------------------------------------------


def test_storage_that_works_is_one_line_and_each_failure_is_one() -> None:
    [well] = doctor.storage("s3://b", Probe(seconds={"write": 0.0123, "read": 0.0004}))
    assert well == Check("storage", "ok", "s3://b: write 12.3 ms, read 0.4 ms")
    bad = Probe(seconds={"write": 0.01}, failures={"create-only": "it was replaced", "list": "access denied"})
    first, second = doctor.storage("s3://b", bad)
    assert (first.status, first.text) == ("failed", "it was replaced (what worked: write 10 ms)")
    assert "If-None-Match" in first.remedy and "listing" in second.remedy


def test_every_operation_has_a_remedy() -> None:
    operations = {"write", "clock", "read", "ranged read", "create-only", "list", "delete"}
    assert set(doctor.REMEDIES) == operations


@pytest.mark.parametrize(
    ("ahead_s", "uncertain_s", "status", "words"),
    [
        (0.2, 0.6, "ok", "within 0.8 s"),
        (-5.4, 0.5, "ok", "within 5.9 s"),  # may be less than the limit
        (90.0, 0.6, "warning", "90 s behind storage's"),
        (-90.0, 0.6, "warning", "90 s ahead of storage's"),
    ],
)
def test_clock_is_judged_by_what_is_certain(ahead_s: float, uncertain_s: float, status: str, words: str) -> None:
    check = doctor.clock(ahead_s, uncertain_s)
    assert (check.status, words in check.text) == (status, True)


def test_corpus_is_whole_absent_or_damaged(tmp_path: Path) -> None:
    tokens, _ = small_corpus(tmp_path)
    assert "vocabulary 300; the first block is whole" in doctor.corpus(tokens.url).text
    absent = doctor.corpus(f"file://{tmp_path}/none")
    assert (absent.status, "elastic-lm prepare" in absent.text) == ("warning", True)
    for shard in (tmp_path / "tokens" / "shards").iterdir():
        shard.write_bytes(bytes(shard.stat().st_size))
    assert doctor.corpus(tokens.url).status == "failed"
    tokens.write("manifest.json", b"{}")
    assert (doctor.corpus(tokens.url).status, "damaged" in doctor.corpus(tokens.url).text) == ("failed", True)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


NAMES = [
    "elastic-lm", "packages", "system", "CPUs", "memory", "PyTorch", "GPUs", "C kernel", "/dev/shm", "open files",
    "temporary folder", "metrics port", "cluster", "storage", "clock", "corpus", "environment",
]  # fmt: skip


def test_run_is_examined_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_corpus(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))
    told = run("doctor", write_config(tmp_path), "--json")
    assert told.exit_code == 0, told.stdout
    checks = json.loads(told.stdout)
    assert [check["name"] for check in checks] == NAMES
    assert {check["status"] for check in checks} <= {"ok", "warning"}
    assert str(tmp_path) not in told.stdout and SECRET not in told.stdout
    assert "AWS_SECRET_ACCESS_KEY" in checks[-1]["text"]
    assert sorted(path.name for path in tmp_path.iterdir() if "doctor" in path.name) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes give no answer at once."""
    monkeypatch.setattr(doctor, "ask", lambda *_, **__: Answer(FOUND))


@pytest.mark.usefixtures("quick")
def test_lines_fit_a_terminal_and_are_told_in_order(tmp_path: Path) -> None:
    told = run("doctor", f"{tmp_path}/storage")
    assert told.exit_code == 0
    lines = told.stdout.splitlines()
    assert all(len(line) <= 80 or len(line.split()) == 1 for line in lines)  # an address is not broken
    names = [line[9:27].strip() for line in lines if line[:9].strip()]
    assert names == [name for name in NAMES if name != "corpus"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["people", "programs"])
def test_storage_that_fails_is_code_4(options: list[str]) -> None:
    told = run("doctor", "/dev/null/x", *options)
    assert told.exit_code == 4
    assert "is a file, not a folder" in " ".join(told.stdout.split())


@pytest.mark.usefixtures("quick")
def test_warning_changes_no_code(tmp_path: Path) -> None:
    told = run("doctor", write_config(tmp_path))  # its corpus is not prepared yet
    assert told.exit_code == 0
    assert "\nwarning  corpus" in told.stdout and "elastic-lm prepare" in " ".join(told.stdout.split())


@pytest.mark.parametrize(
    ("target", "words"),
    [("no.yaml", "no.yaml: No such file"), ("gs://bucket", "gs:// is not supported"), ("s3://", "names no bucket")],
)
def test_target_that_is_none_is_a_usage_error(target: str, words: str) -> None:
    told = run("doctor", target)
    assert (told.exit_code, told.stdout) == (2, "")
    assert words in told.stderr


@pytest.mark.usefixtures("quick")
def test_without_a_target_storage_is_not_tried() -> None:
    told = run("doctor")
    assert told.exit_code == 0
    assert "not tried: name a RUN.YAML or an address" in told.stdout
