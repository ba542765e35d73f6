"""Trackers of a run: where they write, what they cost a run that they fail, and how what they missed is filled in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from elastic_lm import EventKind, Run, RunConfig, fit
from elastic_lm.errors import ConfigError, TrackingError
from elastic_lm.runtime.cluster import wait_for
from elastic_lm.storage import Storage
from elastic_lm.tracking import trackers
from elastic_lm.tracking.folder_lock import FolderLock
from elastic_lm.tracking.sink import TAGS, Sink
from elastic_lm.tracking.trackers import check_installed, wanted_by
from tests.conftest import Fake
from tests.monitor.story import committed
from tests.solo import Solo, Unheard, solo_config, without_ray
from tests.test_cli import run, write_config
from tests.test_cli_run import STORY, write_log
from tests.tracking.readers import tensorboard_scalars, wandb_history
from tests.tracking.sinks import Hanging, Keeping, Raising
from tests.tracking.test_tensorboard import float32

ROOT = Path(__file__).parents[2]
BOTH = {"tensorboard": True, "wandb_project": "my-project", "wandb_mode": "offline"}


def config_in(small_corpus: str, place: Path, **changes: Any) -> RunConfig:
    return solo_config(small_corpus, f"file://{place}", tracking={**BOTH, **changes})


def assert_shown(config: RunConfig, tracked: Path) -> None:
    """Both trackers have the log's losses, each step once and in order."""
    table = Run.open(config).metrics()
    losses = list(zip(table["step"].to_pylist(), table["loss_nats"].to_pylist(), strict=True))
    shown = tensorboard_scalars(tracked / "tensorboard")["train/loss"]
    assert [(step, value) for step, _, value in shown] == [(step, float32(loss)) for step, loss in losses]
    rows = wandb_history(tracked / "wandb")
    assert [(row["_step"], row["train/loss"]) for row in rows] == losses


# -- a run and its trackers ------------------------------------------------------------------------------------------


def test_run_feeds_its_trackers_from_its_log(small_corpus: str, tmp_path: Path) -> None:
    config = config_in(small_corpus, tmp_path)
    Solo(config).train()
    assert_shown(config, tmp_path / "runs/solo")


def test_later_attempt_goes_on_and_nothing_is_shown_twice(small_corpus: str, tmp_path: Path) -> None:
    config = config_in(small_corpus, tmp_path)
    Solo(config).train(until=4)
    Solo(config).train()
    assert_shown(config, tmp_path / "runs/solo")


def test_tracker_that_is_asked_for_late_has_the_steps_before(small_corpus: str, tmp_path: Path) -> None:
    config = config_in(small_corpus, tmp_path)
    Solo(config.replace("tracking={}")).train(until=4)
    assert not (tmp_path / "runs/solo/tensorboard").exists()
    Solo(config).train()
    assert_shown(config, tmp_path / "runs/solo")


def test_files_go_to_the_folder_that_was_named_below_the_runs_name(small_corpus: str, tmp_path: Path) -> None:
    config = config_in(small_corpus, tmp_path, folder=f"{tmp_path}/elsewhere")
    Solo(config).train()
    assert_shown(config, tmp_path / "elsewhere" / "solo")
    assert not (tmp_path / "runs/solo/tensorboard").exists()


def test_run_without_trackers_has_none(small_corpus: str, tmp_path: Path) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}")
    assert wanted_by(config) == []
    Solo(config).train()
    assert {path.name for path in (tmp_path / "runs/solo").iterdir()} == {"config.yaml", "events", "checkpoints"}


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What stands in the place of the trackers, by their keys; what hangs is let go in the end."""
    chosen: dict[str, Any] = {}
    monkeypatch.setattr(trackers, "sink_of", lambda config, key, *, finish_s: chosen[key])
    monkeypatch.setattr(trackers, "CLOSE_S", 3.0)
    yield chosen
    for sink in chosen.values():
        if isinstance(sink, Hanging):
            sink.over.set()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Raising("open", RuntimeError("no")), "RuntimeError: no"),
        (Raising("write", RuntimeError("no")), "RuntimeError: no"),
        (Raising("close", RuntimeError("no")), "RuntimeError: no"),
        (Hanging("open"), "it did not end in time"),
        (Hanging("write"), "it did not end in time"),
        (Hanging("close"), "it did not end in time"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.where}" if isinstance(value, Keeping) else "",
)
def test_tracker_that_fails_costs_a_run_one_warning(
    bad: Any, reason: str, sinks: dict[str, Any], small_corpus: str, tmp_path: Path
) -> None:
    config, good = config_in(small_corpus, tmp_path), Keeping()
    sinks.update(tensorboard=good, wandb=bad)
    heard = Unheard()
    result = Solo(config, heard).train()
    undisturbed = Solo(config.replace("tracking={}", "name=undisturbed")).train()
    assert result.ok and result.digest == undisturbed.digest
    warnings = [line for line in heard.news if "gets nothing more" in line]
    assert len(warnings) == 1
    assert f"{bad.title} gets nothing more: {reason}. Training goes on. To fill in what it missed: " in warnings[0]
    assert f"elastic-lm export {config.run_url} --to wandb" in warnings[0]
    events = list(Run.open(config).events())
    assert events[-1].kind is EventKind.RUN_FINISHED  # whoever follows the log sees its end
    assert [event.step for event in good.events if event.kind is EventKind.STEP_COMMITTED] == list(range(6))


def test_warning_in_time_is_in_the_log(sinks: dict[str, Any], small_corpus: str, tmp_path: Path) -> None:
    config = config_in(small_corpus, tmp_path)
    bad = Raising("open", RuntimeError("no"))
    sinks.update(tensorboard=bad, wandb=Keeping())
    solo = Solo(config, Unheard())
    bad.closed.wait(20)
    solo.train()
    notes = [event.message for event in Run.open(config).events() if event.kind is EventKind.NOTE]
    assert len(notes) == 1 and notes[0].startswith("Raising gets nothing more: RuntimeError: no.")


# -- before it starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tracking", "package", "message"),
    [
        (
            {"wandb_project": "p"},
            "wandb",
            "tracking.wandb_project needs the package wandb: pip install 'elastic-lm[wandb]'",
        ),
        (
            {"tensorboard": True},
            "tensorboardX",
            "tracking.tensorboard needs the package tensorboardX: pip install 'elastic-lm[tensorboard]'",
        ),
    ],
)
def test_missing_package_is_told_before_anything_begins(
    tracking: dict[str, Any],
    package: str,
    message: str,
    small_corpus: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = solo_config(small_corpus, f"file://{tmp_path}", tracking=tracking)
    monkeypatch.setitem(sys.modules, package, None)
    with without_ray() as mailboxes, pytest.raises(ConfigError) as raised:
        fit(config)
    assert str(raised.value) == message
    assert mailboxes == [] and not (tmp_path / "runs").exists()
    check_installed([])  # who wants none needs none


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["tracking.tensorboard=true"], ["tracking.tensorboard=true writes files", "s3://bucket/x", "tracking.folder"]),
        (["tracking.wandb_project=p", "tracking.wandb_mode=offline"], ["tracking.wandb_mode=offline writes files"]),
        (["tracking.wandb_entity=me"], ["has no effect without tracking.wandb_project"]),
        (["tracking.folder=s3://bucket/y"], ["is no folder of a machine", "/folder or file:///folder"]),
        (["tracking.wandb_project=a/b"], ["tracking.wandb_project='a/b'", "For example wandb_project: my-project"]),
        (["tracking.wandb_mode=disabled"], ["tracking.wandb_mode='disabled'", "'online' or 'offline'"]),
        (["tracking.tensorboard=1"], ["is neither true nor false"]),
        (["tracking.wandb=p"], ["tracking.wandb is not a field", "did you mean wandb_mode?"]),
        ([f"tracking.wandb_project={'a1' * 20}"], ["tracking.wandb_project looks like a key", "`wandb login`"]),
    ],
)
def test_mistaken_section_is_refused_with_field_rule_and_remedy(
    changes: list[str], words: list[str], fake_fit: Fake, tmp_path: Path
) -> None:
    options = [word for change in changes for word in ("--set", change)]
    told = run("train", write_config(tmp_path, storage="s3://bucket/x"), *options)
    assert told.exit_code == 2 and "a1a1a1" not in told.stderr
    for word in words:
        assert word.replace("'", "") in told.stderr.replace("'", ""), told.stderr


def test_online_needs_no_folder_and_trackers_change_no_identity(tmp_path: Path) -> None:
    config = RunConfig.load(write_config(tmp_path, storage="s3://bucket/x"))
    tracked = config.replace("tracking.wandb_project=p", "tracking.wandb_entity=me", f"tracking.folder={tmp_path}")
    assert tracked.identity_fingerprint() == config.identity_fingerprint()
    assert wanted_by(tracked) == ["wandb"]
    assert tracked.tracking.folder == str(tmp_path)
    assert config.replace("tracking.folder=file:///data/x/").tracking.folder == "/data/x"


# -- filling in ------------------------------------------------------------------------------------------------------


def test_what_a_tracker_missed_is_filled_in_and_again_it_is_the_same(
    small_corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(small_corpus, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(trackers, "sink_of", lambda *_, **__: Raising("open", RuntimeError("no")))
        Solo(config).train()
    assert not (tmp_path / "runs/solo/tensorboard").exists()
    for _ in range(2):
        for key in ("tensorboard", "wandb"):
            told = run("export", config.run_url, "--to", key)
            assert (told.exit_code, told.stdout) == (0, f"Filled {key}.\n"), told.stderr
        assert_shown(config, tmp_path / "runs/solo")


def _is_taken(folder: Path) -> bool:
    lock = FolderLock(folder)
    try:
        lock.take()
    except ConfigError:
        return True
    lock.release()
    return False


def test_run_that_feeds_a_tracker_now_keeps_an_export_out(small_corpus: str, tmp_path: Path) -> None:
    config = config_in(small_corpus, tmp_path)
    Solo(config).train(until=4)
    solo = Solo(config)
    lock = tmp_path / "runs/solo/tensorboard"
    wait_for(lambda: _is_taken(lock), timeout_s=20, what="the run has begun to feed TensorBoard")
    told = run("export", config.run_url, "--to", "tensorboard")
    assert told.exit_code == 2
    assert told.stderr == (
        f"elastic-lm: {lock} is being written by the run itself, or by another export; wait for its end\n"
    )
    solo.train()
    assert_shown(config, tmp_path / "runs/solo")


def stored(folder: Path, **changes: Any) -> str:
    """The address of a run with a log and a config."""
    config = RunConfig.load(write_config(folder, name="mine", **changes))
    url = write_log(folder, *STORY)
    Storage.open(url).write("config.yaml", config.to_yaml().encode())
    return url


def test_run_that_had_no_tracker_can_be_given_one(tmp_path: Path) -> None:
    url = stored(tmp_path)
    assert run("export", url, "--to", "tensorboard").exit_code == 0
    assert [step for step, _, _ in tensorboard_scalars(Path(url, "tensorboard"))["train/loss"]] == [0, 1]
    told = run(
        "export", url, "--to", "wandb", "--set", "tracking.wandb_project=p", "--set", "tracking.wandb_mode=offline"
    )
    assert told.exit_code == 0, told.stderr
    assert [row["_step"] for row in wandb_history(Path(url, "wandb"))] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "wandb"], "tracking.wandb_project is not set; name the project"),
        (["--to", "mlflow"], "'mlflow' is no tracker; choose tensorboard or wandb"),
        (["--to", "tensorboard", "--out", "x.csv"], "give one of the two"),
        (["--set", "tracking.folder=/x"], "--set changes where --to TRACKER writes"),
        (["--to", "wandb", "--set", "tracking.wandb_projekt=p"], "did you mean wandb_project?"),
    ],
)
def test_mistaken_export_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    told = run("export", stored(tmp_path), *arguments)
    assert (told.exit_code, told.stdout) == (2, "")
    assert message in told.stderr


def test_run_in_object_storage_needs_a_folder_for_files(s3_url: str, tmp_path: Path) -> None:
    config = RunConfig.load(write_config(tmp_path, storage=s3_url))
    storage = Storage.open(config.run_url)
    storage.write("config.yaml", config.to_yaml().encode())
    storage.write("events/000000000000.jsonl", "".join(f"{event.to_json()}\n" for event in STORY).encode())

    def export(*options: str) -> Result:
        return run("export", config.run_url, "--to", "tensorboard", *options)

    assert "set tracking.folder to a folder on this machine" in export().stderr
    assert export("--set", f"tracking.folder={tmp_path}/tb").exit_code == 0
    assert len(tensorboard_scalars(tmp_path / "tb/first/tensorboard")["train/loss"]) == 2


def test_tracker_that_does_not_take_it_is_unavailable(tmp_path: Path) -> None:
    url = stored(tmp_path)
    Path(url, "tensorboard").write_text("a file where the folder belongs")
    told = run("export", url, "--to", "tensorboard")
    assert told.exit_code == 4
    assert told.stderr.startswith("elastic-lm: TensorBoard did not take the run: FileExistsError")


def test_failure_while_filling_lets_go_of_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink: Sink = Raising("write", RuntimeError("no"))
    monkeypatch.setattr(trackers, "sink_of", lambda *_, **__: sink)
    with pytest.raises(TrackingError, match="Raising did not take the run: RuntimeError: no"):
        trackers.refill(RunConfig.load(write_config(tmp_path)), "tensorboard", [committed(1, 0)])
    assert sink.calls[-1] == "close"  # type: ignore[attr-defined]


def test_document_names_every_scalar_and_every_field() -> None:
    text = (ROOT / "docs/tracking.md").read_text(encoding="utf-8")
    fields = [f"tracking.{name}" for name in RunConfig.model_fields["tracking"].annotation.model_fields]  # type: ignore[union-attr]
    assert not [name for name in (*TAGS.values(), *fields) if f"`{name}`" not in text]
