"""`Run`: what a run left behind, from its folder alone; and docs/api.md, whose code is run against one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml

import elastic_lm
from elastic_lm import Event, EventKind, Experiment, ExperimentResult, Run, RunConfig, RunResult, RunStatus
from elastic_lm.errors import ClusterError, ConfigError, NotFoundError
from elastic_lm.events.log import EventLog
from elastic_lm.monitor.progress import Lines
from elastic_lm.runtime import remote
from elastic_lm.runtime.trainer import with_files
from tests.monitor.story import committed
from tests.monitor.test_history import begun, finished
from tests.solo import Solo, solo_config
from tests.test_cli_run import write_log

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"


@pytest.fixture
def config(small_corpus: str, tmp_path: Path) -> RunConfig:
    return solo_config(small_corpus, f"file://{tmp_path}")


def whole(config: RunConfig, **shown: Any) -> RunResult:
    """Trained to its end, with the files that `fit` makes then."""
    solo = Solo(config)
    return with_files(solo.train(), solo.plan, Lines(lambda line: None, 1.0))


# -- looking ---------------------------------------------------------------------------------------------------------


def test_result_of_the_log_is_what_fit_returned(config: RunConfig) -> None:
    result = whole(config)
    assert result.ok and result.report and result.table and result.digest
    assert Run.open(config).result == result


def test_run_is_found_by_file_address_folder_name_and_config(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(config)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    monkeypatch.chdir(tmp_path)
    for name in (tmp_path / "run.yaml", config.run_url, tmp_path / "runs/solo", "solo", config):
        run = Run.open(name)
        assert (run.name, run.url, run.status().step) == ("solo", config.run_url, 6)
        assert repr(run) == f"Run({config.run_url!r})"


def test_config_is_the_one_it_was_last_trained_with(config: RunConfig, tmp_path: Path) -> None:
    solo = Solo(config)
    solo.train()
    assert Run.open(config).config == solo.plan.config
    (tmp_path / "runs").rename(tmp_path / "elsewhere")  # looking at it is fine wherever it is
    assert Run.open(tmp_path / "elsewhere" / "solo").config == solo.plan.config


def test_status_is_typed_and_counts_what_is_wanted(config: RunConfig) -> None:
    whole(config)
    status = Run.open(config).status()
    assert isinstance(status, RunStatus)
    assert (status.run, status.verdict, status.step, status.of, status.workers) == ("solo", "done", 6, 6, 1)
    assert status.loss == Run.open(config).metrics()["loss_nats"][-1].as_py()
    assert 0 <= status.seconds_ago < 60


def test_events_are_typed_and_in_order(config: RunConfig) -> None:
    whole(config)
    events = list(Run.open(config).events())
    assert all(isinstance(event, Event) for event in events)
    assert events[0].kind is EventKind.RUN_STARTED and events[-1].kind is EventKind.RUN_FINISHED
    assert [event.step for event in events if event.kind is EventKind.STEP_COMMITTED] == list(range(6))


def test_metrics_are_the_table_that_the_run_wrote(config: RunConfig, tmp_path: Path) -> None:
    result = whole(config)
    table = Run.open(config).metrics()
    assert result.table == f"{config.run_url}/metrics/steps.parquet"
    written = pandas.read_parquet(tmp_path / "runs/solo/metrics/steps.parquet")
    pandas.testing.assert_frame_equal(table.to_pandas(), written)


def test_files_are_written_into_the_run_or_where_one_says(config: RunConfig, tmp_path: Path) -> None:
    Solo(config).train()
    run = Run.open(config)
    assert run.report() == f"{config.run_url}/report.html"
    assert run.export() == f"{config.run_url}/metrics/steps.parquet"
    assert run.report(tmp_path / "mine.html") == str(tmp_path / "mine.html")
    assert run.export(tmp_path / "mine.csv") == str(tmp_path / "mine.csv")
    assert (tmp_path / "mine.html").read_text() == (tmp_path / "runs/solo/report.html").read_text()


def test_run_that_trains_has_no_result(config: RunConfig) -> None:
    assert Run.open(config).url == config.run_url
    with pytest.raises(NotFoundError, match="no event log"):
        _ = Run.open(config).result
    Solo(config).die()
    assert Run.open(config).result is None
    Solo(config).train(until=4)
    assert Run.open(config).result is not None
    log = EventLog(Run.open(config).address.log())
    log.append(begun(attempt=2))
    assert log.close()
    assert Run.open(config).result is None


def test_result_of_several_attempts_is_that_of_the_last(config: RunConfig) -> None:
    first = Solo(config).train(until=4)
    assert (first.last_step, Run.open(config).result) == (4, first)
    second = Solo(config).train()
    assert Run.open(config).result == second
    assert second.last_step == 6 and second.digest != first.digest


def test_digest_is_not_that_of_an_older_checkpoint(config: RunConfig, tmp_path: Path) -> None:
    Solo(config).train(until=4)
    Solo(config).train()
    manifest = tmp_path / "runs/solo/checkpoints/step-00000006/manifest.json"
    manifest.write_text("damaged")
    result = Run.open(config).result
    assert result is not None and result.checkpoint == f"{config.run_url}/checkpoints/step-00000004"
    assert result.digest == {}
    assert manifest.read_text() == "damaged"  # looking changes nothing


def test_result_of_a_log_without_checkpoints_or_reason(tmp_path: Path) -> None:
    url = write_log(tmp_path, begun(), committed(1, 0, loss=1.25), finished(2, "failed", step=1))
    result = Run.open(url).result
    assert result is not None
    assert (result.verdict, result.message, result.last_step) == ("failed", "run_finished happened.", 1)
    assert result.metrics["loss"] == 1.25 and result.checkpoint is None and result.report is None


def test_run_that_is_not_there_says_so(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "runs" / "absent")
    for look in (run.status, run.events, run.metrics, run.report, run.export, lambda: run.result, lambda: run.config):
        with pytest.raises(NotFoundError, match="no run at|absent"):
            look()
    assert not (tmp_path / "runs").exists()  # nothing was written for it either


def test_file_that_cannot_be_written_is_the_callers_mistake(config: RunConfig, tmp_path: Path) -> None:
    Solo(config).train()
    for write in (Run.open(config).report, Run.open(config).export):
        with pytest.raises(ConfigError, match=r"absent/x\.csv cannot be written"):
            write(tmp_path / "absent/x.csv")


# -- reaching into it ------------------------------------------------------------------------------------------------


def test_words_for_the_coordinator_are_left_under_the_runs_name(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def command(name: str, kind: str, arguments: dict[str, Any], *, node: str | None = None) -> str:
        asked.append((name, kind, arguments, node))
        return "abcdef"

    monkeypatch.setattr(remote, "command", command)
    run = Run.open(config)
    run.scale(2, 6)
    run.stop("enough")
    assert run.drain("abc") == "abcdef"
    assert asked == [
        ("solo", "scale", {"min_workers": 2, "max_workers": 6}, None),
        ("solo", "stop", {"reason": "enough"}, None),
        ("solo", "drain", {}, "abc"),
    ]


@pytest.mark.parametrize("workers", [(0, 1), (3, 2)])
def test_range_that_is_none_is_refused_before_anybody_is_asked(workers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"{workers[0]} to {workers[1]} workers is no range"):
        Run.open("mine").scale(*workers)


def test_without_a_cluster_nobody_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="RAY_ADDRESS is not set"):
        Run.open("mine").stop()


# -- the document ----------------------------------------------------------------------------------------------------


def test_code_of_the_document_runs(
    config: RunConfig, held_out_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 5
    config = config.replace(f"data.tokens={held_out_corpus}", "training.steps=100")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    plan = {
        "name": "tuned",
        "base": "run.yaml",
        "target": "loss <= 100",
        "samples": 4,
        "changes": [{"model.dropout": 0.1}],
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("elastic_lm.runtime.trainer.fit", whole)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert pandas.read_csv(tmp_path / "steps.csv")["step"].tolist() == list(range(6))
    assert len(names["slow"]) < 6
    assert names["outcome"].ok


def test_document_names_everything_that_is_public() -> None:
    text = re.sub(r"```.*?```", "", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    told = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`]+`", text))))
    members = [name for kind in (Run, Experiment) for name in vars(kind) if not name.startswith("_")]
    fields = [f.name for kind in (RunResult, RunStatus, ExperimentResult) for f in dataclasses.fields(kind)]
    public = [name for name in elastic_lm.__all__ if name != "__version__"]
    assert not [name for name in (*public, *members, *fields) if name not in told]
