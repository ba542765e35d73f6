"""A job of another version of elastic-lm is refused with both versions named, before anything of its run is read or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_lm import __version__, job_version
from elastic_lm.errors import ConfigError
from elastic_lm.result import RunResult
from elastic_lm.terminal import Exit
from tests.conftest import Fake
from tests.test_cli import run, write_config


def test_what_a_client_tells_is_what_the_same_version_takes() -> None:
    job_version.check(job_version.variables())


def test_run_that_nobody_submitted_passes() -> None:
    job_version.check({"PATH": "/bin"})


@pytest.mark.parametrize("client", ["9.9.9", f"{__version__}.dev1", f"{__version__}+local", f"v{__version__}", ""])
def test_any_other_version_is_refused_with_both_and_the_remedy(client: str) -> None:
    with pytest.raises(ConfigError) as refused:
        job_version.check({job_version.VARIABLE: client})
    told = str(refused.value)
    assert f"submitted by elastic-lm {client}, and the cluster has elastic-lm {__version__};" in told
    assert "`elastic-lm submit`" in told and "`elastic-lm version`" in told


def test_variable_is_the_client_s_own_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_version, "__version__", "9.9.9")
    assert job_version.variables() == {"ELASTIC_LM_SUBMITTED_BY": "9.9.9"}


# -- the command in the job ------------------------------------------------------------------------------------------


@pytest.fixture
def other_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job_version.VARIABLE, "9.9.9")


@pytest.mark.usefixtures("other_client")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_job_of_another_version_trains_nothing_and_leaves_nothing(
    options: list[str], fake_fit: Fake, tmp_path: Path
) -> None:
    configs = fake_fit(RunResult("done", "all steps"))
    result = run("train", write_config(tmp_path), *options)
    assert (result.exit_code, result.stdout, configs) == (Exit.USAGE, "", [])
    assert result.stderr.startswith("elastic-lm: this job was submitted by elastic-lm 9.9.9")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.usefixtures("other_client")
def test_version_is_told_and_not_the_field_that_only_the_other_one_knows(tmp_path: Path) -> None:
    result = run("train", write_config(tmp_path, field_of_tomorrow=1))
    assert "submitted by elastic-lm 9.9.9" in result.stderr
    assert "field_of_tomorrow" not in result.stderr


def test_job_of_this_version_trains(fake_fit: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(job_version.VARIABLE, __version__)
    fake_fit(RunResult("done", "all steps"))
    assert run("train", write_config(tmp_path)).exit_code == Exit.DONE
