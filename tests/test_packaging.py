"""The wheel: what a user installs holds all that the package needs, nothing of its tests, and runs from where it lands."""

from __future__ import annotations

import email
import email.message
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

from elastic_lm import __version__

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / ".pre-commit-config.yaml"
INFO = f"elastic_lm-{__version__}.dist-info"


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=environment.pop("cwd", str(ROOT)),
        env={**os.environ, **environment},
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from this tree, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's content and nothing else of this tree."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder, wheel]
    run(*pip, PIP_DISABLE_PIP_VERSION_CHECK="1")
    return folder


def names_in(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata_of(wheel: Path) -> email.message.Message:
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(f"{INFO}/METADATA"))


def files_of_the_package() -> set[str]:
    found = (path.relative_to(ROOT) for path in (ROOT / "elastic_lm").rglob("*") if path.is_file())
    return {str(path) for path in found if "__pycache__" not in path.parts}


def test_wheel_holds_the_package_and_its_data(wheel: Path) -> None:
    assert files_of_the_package() <= names_in(wheel)
    assert {"elastic_lm/py.typed", "elastic_lm/monitor/report.html", f"{INFO}/licenses/LICENSE"} <= names_in(wheel)


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    assert {name.partition("/")[0] for name in names_in(wheel)} == {"elastic_lm", INFO}
    assert not [name for name in names_in(wheel) if "__pycache__" in name or name.endswith((".pyc", ".so"))]


def test_metadata_says_what_pyproject_says(wheel: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = metadata_of(wheel)
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == project["requires-python"]
    assert metadata.get_all("Provides-Extra") == sorted(project["optional-dependencies"])
    classifiers = metadata.get_all("Classifier") or []
    assert "Typing :: Typed" in classifiers
    assert any(name.startswith("Development Status ::") for name in classifiers)
    assert f"Programming Language :: Python :: {project['requires-python'].removeprefix('>=')}" in classifiers


def test_no_license_classifier_beside_the_expression(wheel: Path) -> None:
    """An index refuses a package that has both."""
    assert not [name for name in metadata_of(wheel).get_all("Classifier") or [] if name.startswith("License ::")]


def test_installed_command_runs_from_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(installed), "cwd": str(tmp_path)}
    where = run(sys.executable, "-c", "import elastic_lm; print(elastic_lm.__file__)", **environment)
    assert Path(where.strip()) == installed / "elastic_lm" / "__init__.py"
    assert run(sys.executable, "-m", "elastic_lm", "version", **environment).strip() == __version__
    assert run(installed / "bin" / "elastic-lm", "version", **environment).strip() == __version__


def test_installed_report_finds_its_page(installed: Path, tmp_path: Path) -> None:
    script = "from elastic_lm.monitor.report import render; print(render('a-run', []))"
    page = run(sys.executable, "-c", script, PYTHONPATH=str(installed), cwd=str(tmp_path))
    assert "a-run" in page
    assert page.rstrip().endswith("</html>")


def test_hooks_are_the_tools_of_make_lint() -> None:
    """Hook, `make lint` and CI never differ: the same programs out of the same environment."""
    hooks = {hook["id"]: hook for repo in yaml.safe_load(HOOKS.read_text())["repos"] for hook in repo["hooks"]}
    run(Path(sys.executable).with_name("pre-commit"), "validate-config", HOOKS)
    lint = re.findall(
        r"^\t\$\(BIN\)/(.*)$", (ROOT / "Makefile").read_text().partition("\nlint:")[2], flags=re.MULTILINE
    )
    for hook_id, command in (("format", "ruff format"), ("lint", "ruff check"), ("types", "mypy")):
        assert hooks[hook_id]["entry"].startswith(f".venv/bin/{command}")
        assert any(line.startswith(command) for line in lint[:3])
    assert all(hook["language"] == "system" for hook in hooks.values())
