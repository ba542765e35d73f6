"""The image: what its Dockerfile and its lists of packages promise, and that the wheel runs where nothing else of ours is.

There is no engine to build it here, so it is kept simple enough to be read by a test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from elastic_lm import __version__
from elastic_lm.deploy.choices import RAY_VERSION
from elastic_lm.deploy.pods import USER
from tests.cluster.schemas import ROOT

IMAGE = ROOT / "cluster" / "image"
KINDS = ("cpu", "gpu")
UNFROZEN = {"setuptools"}  # what `pip freeze` leaves out


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments), comments left out and continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(name.upper(), rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def faults(text: str) -> list[str]:
    """What a Dockerfile of ours must not have."""
    found, parsed = [], instructions(text)
    arguments = {name: [rest for kind, rest in parsed if kind == name] for name, _ in parsed}
    for base in arguments.get("FROM", []):
        if not re.fullmatch(rf"rayproject/ray:{re.escape(RAY_VERSION)}-py311-\$\{{VARIANT\}}", base):
            found.append(f"base {base}")
    if parsed[-1] != ("USER", str(USER)):
        found.append("does not end as the user of its pods")
    found += ["root" for user in arguments.get("USER", []) if user.split(":")[0] in ("root", "0")]
    found += ["ADD" for _ in arguments.get("ADD", [])]
    for command in arguments.get("RUN", []):
        found += [
            word for word in ("sudo", "apt", "apt-get", "curl", "wget") if re.search(rf"(^|[\s;&]){word}\s", command)
        ]
        for install in re.findall(r"pip install ([^&;]*)", command):
            if "-r " in install and not {"--require-hashes", "--no-deps"} <= set(install.split()):
                found.append(f"not by hash: {install}")
            if "-r " not in install and not re.search(r"torch==[\d.]+|--no-deps \S+\.whl", install):
                found.append(f"not pinned: {install}")
            if "--no-cache-dir" not in install:
                found.append(f"keeps its cache: {install}")
    for name in ("ARG", "ENV"):
        secret = r"(?i)(token|secret|passw|_key|credential)"
        found += [f"secret in {name}: {rest}" for rest in arguments.get(name, []) if re.search(secret, rest)]
    return found


def packages(kind: str) -> dict[str, tuple[str, str]]:
    """Canonical name -> (version, hash) of a list."""
    rows = [line for line in (IMAGE / f"requirements-{kind}.txt").read_text().splitlines() if not line.startswith("#")]
    found = {}
    for row in rows:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+) --hash=sha256:([0-9a-f]{64})", row)
        assert match, row
        found[canonicalize_name(match[1])] = match[2], match[3]
    return found


def constraints() -> dict[str, str]:
    rows = [
        row.split("==") for row in (ROOT / "constraints.txt").read_text().splitlines() if "==" in row and row[0] != "#"
    ]
    return {canonicalize_name(name): pinned for name, pinned in rows}


def closure(extra: str | None, *, without: str = "") -> set[str]:
    """What pyproject.toml leads to, by the metadata of what is installed."""
    import tomllib

    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [*project["dependencies"], *(project["optional-dependencies"][extra] if extra else [])]
    seen: set[str] = set()
    found: set[str] = set()
    while waiting:
        if (text := waiting.pop()) in seen:
            continue
        seen.add(text)
        needed = Requirement(text)
        name = canonicalize_name(needed.name)
        if name == without:
            continue
        found.add(name)
        from importlib.metadata import requires

        for below in requires(name) or []:
            inner = Requirement(below)
            wanted = [{"extra": one} for one in (*needed.extras, "")]
            if inner.marker is None or any(inner.marker.evaluate(one) for one in wanted):
                inner.marker = None
                waiting.append(str(inner))
    return found


def test_dockerfile_is_sound() -> None:
    assert faults((IMAGE / "Dockerfile").read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("USER 1000", "USER root", "root"),
        ("USER 1000", "", "does not end"),
        (RAY_VERSION + "-py311", "latest-py311", "base"),
        ("--require-hashes ", "", "not by hash"),
        ("torch==2.13.0;", "torch;", "not pinned"),
        ("ARG TORCH_INDEX", "ARG INDEX_TOKEN", "secret in ARG"),
        ("ENV NVIDIA", "ENV AWS_SECRET_ACCESS_KEY=x NVIDIA", "secret in ENV"),
        ("COPY requirements", "ADD https://example.com/x /x\nCOPY requirements", "ADD"),
        ("    && elastic-lm version", "    && sudo apt-get upgrade -y", "sudo"),
    ],
)
def test_unsound_dockerfile_would_be_found(old: str, new: str, fault: str) -> None:
    text = (IMAGE / "Dockerfile").read_text()
    assert old in text
    assert any(told.startswith(fault) for told in faults(text.replace(old, new)))


def test_dockerfile_names_the_versions_of_the_lists() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    assert f"torch=={constraints()['torch']}" in text
    assert f'startswith("{constraints()["torch"]}")' in text
    assert f'ray.__version__ == "{constraints()["ray"]}"' in text
    assert set(re.findall(r"elastic-lm:(\S+)-[cg]pu", text)) == {__version__}


@pytest.mark.parametrize("kind", KINDS)
def test_versions_are_the_pinned_ones(kind: str) -> None:
    expected = constraints() | {name: version(name) for name in UNFROZEN}
    assert {name: found.partition("+")[0] for name, (found, _) in packages(kind).items()} == {
        name: expected[name] for name in packages(kind)
    }


def test_lists_hold_all_that_is_needed_and_nothing_else() -> None:
    """pip installs them without looking for dependencies."""
    assert packages("cpu").keys() == closure("demo")
    assert packages("gpu").keys() == closure(None, without="torch")


def test_two_lists_agree() -> None:
    cpu, gpu = packages("cpu"), packages("gpu")
    assert gpu.items() <= cpu.items()


def test_cpu_build_of_pytorch_is_pinned_by_its_hash() -> None:
    assert packages("cpu")["torch"][0].endswith("+cpu")


# -- the wheel -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_runs_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """As in the image: installed without dependencies beside those that are there, far from this tree."""

    def run(*command: str | Path, cwd: Path) -> str:
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=clean, timeout=50)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").iterdir()
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # behind its own packages

    where = run(python, "-c", "import elastic_lm; print(elastic_lm.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(site)
    command = python.with_name("elastic-lm")
    assert run(command, "version", cwd=tmp_path).strip() == __version__
    assert "deploy" in run(command, "--help", cwd=tmp_path)
    manifest = run(command, "deploy", ROOT / "cluster/kuberay/run.yaml", cwd=tmp_path)
    assert "kind: RayJob" in manifest
