"""`fit` and `elastic-lm train` from end to end: through Ray Train, on S3, and to an orderly end by every signal.

The tests that need no S3 join the shared cluster with file storage, as a driver with RAY_ADDRESS does.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
import ray
import torch

from elastic_lm import Run, RunConfig, RunResult, fit
from elastic_lm.checkpoint import registry
from elastic_lm.checkpoint.layout import MANIFEST, folder_of
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.errors import ClusterError, StorageError
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.run_address import RunAddress
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from elastic_lm.runtime.mailbox import find_mailbox
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.faults.harness import assert_nothing_left, make_config, processes_titled
from tests.faults.oracle import undisturbed
from tests.tracking.readers import tensorboard_scalars, wandb_history
from tests.tracking.test_tensorboard import float32

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
WAIT_S = 240.0  # half of it may be a new cluster that starts, and a dead owner whose time has to run out
FIRST_STEPS, ALL_STEPS = 20, 40
ENDLESS = 1_000_000
STOPPED = 5  # the exit code
METRICS = {"port": 0, "interval_s": 0.1}


def events(config: RunConfig) -> list[Event]:
    return list(read(Storage.open(config.run_url).child("events")))


def await_workers(config: RunConfig, number: int) -> None:
    """Until the log tells of so many: what a coordinator has not stored is lost with it."""

    def are_told() -> bool:
        return sum(event.kind is EventKind.MEMBER_STARTED for event in events(config)) >= number

    wait_for(are_told, timeout_s=WAIT_S, what=f"a log that tells of {number} workers", poll_s=0.1)


def expected_digest(config: RunConfig) -> str:
    return undisturbed(config)[0]


def train_folders(folder: str | Path) -> list[str]:
    """What Ray Train was given to write to, as long as it is there."""
    return [name for name in os.listdir(folder) if name.startswith("elastic-lm-train-")]


# -- on S3, in this process ------------------------------------------------------------------------------------------


@dataclass
class Fitted:
    config: RunConfig
    result: RunResult
    lines: list[str]


@pytest.fixture(scope="module")
def bucket(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a bucket with a corpus below tokens/."""
    boto3.client("s3").create_bucket(Bucket="fit")
    source = write_lines(tmp_path_factory.mktemp("text") / "text.jsonl", texts(1000))
    prepare([source], Storage.open("s3://fit/tokens"), PrepareOptions(vocab_size=300, block_tokens=1025))
    return "s3://fit"


def s3_config(bucket: str, **changes: Any) -> RunConfig:
    schedule = {"total_steps": ALL_STEPS}  # the same whether or not the run is prolonged
    return make_config(f"{bucket}/tokens", bucket, "on-s3", **{"steps": FIRST_STEPS, "schedule": schedule, **changes})


def fit_and_listen(config: RunConfig) -> Fitted:
    lines: list[str] = []
    return Fitted(config, fit(config, on_line=lines.append), lines)


@pytest.fixture(scope="module")
def first(shared_cluster: LocalCluster, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A run whose metrics port is taken."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as taken:
        folder = tmp_path_factory.mktemp("temporary")
        patch.setattr(tempfile, "tempdir", str(folder))
        fitted = fit_and_listen(s3_config(bucket, metrics={"port": taken.getsockname()[1]}))
    assert train_folders(folder) == []
    assert_nothing_left(shared_cluster)
    return fitted


@pytest.fixture(scope="module")
def second(first: Fitted, bucket: str) -> Fitted:
    """The same run, prolonged, by another PyTorch as far as the checkpoint knows."""
    run = Storage.open(first.config.run_url)
    manifest = registry.verified(run, FIRST_STEPS)
    environment = {**manifest.meta["environment"], "torch": "0.1"}
    elsewhere = replace(manifest, meta={**manifest.meta, "environment": environment})
    run.write(f"{folder_of(FIRST_STEPS)}/{MANIFEST}", elsewhere.to_json())
    return fit_and_listen(s3_config(bucket, steps=ALL_STEPS))


def test_fit_ends_with_the_bits_of_an_undisturbed_run(first: Fitted) -> None:
    result = first.result
    assert (result.verdict, result.last_step, result.ok) == ("done", FIRST_STEPS, True)
    assert result.digest["state"] == expected_digest(first.config)
    assert result.checkpoint == f"{first.config.run_url}/checkpoints/step-{FIRST_STEPS:08d}"
    assert result.metrics["loss"] > 0 and result.metrics["tokens_per_s"] > 0 and 0 < result.metrics["goodput"] <= 1


def test_tensorboard_has_the_losses_of_the_log_and_the_log_the_result(
    cluster: LocalCluster, corpus: str, tmp_path: Path
) -> None:
    """By its coordinator in Ray Train's process, which is killed as soon as it has returned."""
    tracking = {"tensorboard": True, "wandb_project": "p", "wandb_mode": "offline"}
    config = make_config(corpus, f"file://{tmp_path}", "tracked", steps=20, metrics=METRICS, tracking=tracking)
    lines: list[str] = []
    result = fit(config, on_line=lines.append)
    assert result.ok and Run.open(config).result == result
    losses = [(e.step, e.fields["loss"]) for e in events(config) if e.kind is EventKind.STEP_COMMITTED]
    assert len(losses) == 20
    shown = tensorboard_scalars(tmp_path / "runs/tracked/tensorboard")["train/loss"]
    assert [(step, value) for step, _, value in shown] == [(step, float32(loss)) for step, loss in losses]
    assert [(row["_step"], row["train/loss"]) for row in wandb_history(tmp_path / "runs/tracked/wandb")] == losses
    assert not [line for line in lines if "gets nothing more" in line]


def test_run_keeps_the_config_that_it_is_trained_with(first: Fitted) -> None:
    kept = RunAddress.at(first.config.run_url).config()
    assert kept.training == first.config.training
    assert kept.data.manifest is not None and kept.data.window_blocks is not None  # what was left to the corpus


def test_run_whose_storage_takes_nothing_is_refused_and_leaves_nothing(
    cluster: LocalCluster, corpus: str, tmp_path: Path
) -> None:
    config = make_config(corpus, f"file://{tmp_path}", "unwritable", steps=20, metrics=METRICS)
    (tmp_path / "runs/unwritable/config.yaml").mkdir(parents=True)  # a folder stands where the file belongs
    for _ in range(2):  # the second time nothing of the first is in the way
        with pytest.raises(StorageError, match="config.yaml"):
            fit(config, on_line=print)


def test_fit_tells_the_cluster_first_then_the_run_to_its_end(first: Fitted) -> None:
    assert first.lines[0].startswith("Using the Ray cluster this process has joined")
    assert any(f"step {FIRST_STEPS}/{FIRST_STEPS}" in line for line in first.lines)
    assert len(first.lines) == len(set(first.lines))


def test_taken_metrics_port_is_told_and_the_next_one_used(first: Fitted) -> None:
    port = first.config.metrics.port
    (line,) = [line for line in first.lines if line.startswith("Metrics at")]
    found = re.fullmatch(rf"Metrics at http://127.0.0.1:(\d+)/metrics \(port {port} is taken\)\.", line)
    assert found and int(found[1]) > port


def test_run_of_the_same_name_resumes_where_it_ended(second: Fitted) -> None:
    assert (second.result.verdict, second.result.last_step) == ("done", ALL_STEPS)
    assert second.result.digest["state"] == expected_digest(second.config)
    logged = events(second.config)
    assert [e.step for e in logged if e.kind is EventKind.STEP_COMMITTED] == list(range(ALL_STEPS))
    before = [event.kind for event in logged].index(EventKind.RUN_FINISHED)
    starts = [e.fields["start_step"] for e in logged[before:] if e.kind is EventKind.LEASE_GRANTED]
    assert min(starts) == FIRST_STEPS


def test_run_that_goes_on_in_another_environment_says_that_bits_are_no_longer_promised(second: Fitted) -> None:
    told = (
        f"Bits are no longer promised: the checkpoint of step {FIRST_STEPS} was written in another environment: "
        f"torch 0.1 -> {torch.__version__}."
    )
    notes = [event.message for event in events(second.config) if event.kind is EventKind.NOTE]
    assert [note for note in notes if note.startswith("Bits")] == [
        told
    ]  # not by the first attempt, and once by the second
    assert [line for line in second.lines if line.endswith(told)]
    meta = registry.verified(Storage.open(second.config.run_url), ALL_STEPS).meta
    assert meta["environment"]["torch"] == torch.__version__


@pytest.mark.thorough
def test_run_goes_on_when_its_mailbox_is_lost(cluster: LocalCluster, corpus: str, tmp_path: Path) -> None:
    config = make_config(corpus, f"file://{tmp_path}", "unseen", steps=100, metrics=METRICS)
    lines: list[str] = []

    def listen(line: str) -> None:
        lines.append(line)
        if "step " in line and len(killed) == 0:
            killed.extend(processes_titled(cluster, "ray::Mailbox"))
            os.kill(killed[0], signal.SIGKILL)

    killed: list[int] = []
    result = fit(config, on_line=listen)
    assert len(killed) == 1
    assert re.match(r"The mailbox is lost \(Actor(Died|Unavailable)Error\): the run goes on unseen", lines[-1])
    assert (result.verdict, result.digest["state"]) == ("done", expected_digest(config))


# -- drivers ---------------------------------------------------------------------------------------------------------


class Driver:
    """`python -m elastic_lm train` in a process of its own, with a folder for its temporary files and its output."""

    def __init__(self, folder: Path, config: RunConfig, *, address: str | None, stdout: int | None = None) -> None:
        self.config = config
        self._folder = folder
        file = folder / f"{config.name}.yaml"
        file.write_text(config.to_yaml())
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= {"TMPDIR": str(folder)} | ({"RAY_ADDRESS": address} if address else {})
        command = [sys.executable, "-m", "elastic_lm", "train", str(file)]
        with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
            self.process = psutil.Popen(
                command, cwd=ROOT, env=environment, stdout=out if stdout is None else stdout, stderr=err
            )

    def output(self) -> str:
        return (self._folder / "out").read_text()

    def errors(self) -> str:
        return (self._folder / "err").read_text()

    def told(self) -> str:
        return self.output() + self.errors()

    def await_end(self) -> int:
        """The exit code."""
        return int(self.process.wait(WAIT_S))

    def await_line(self, pattern: str) -> None:
        wait_for(lambda: self._has_ended() or re.search(pattern, self.output()), timeout_s=WAIT_S, what=pattern)
        assert not self._has_ended()

    def await_step(self, step: int) -> dict[str, Any]:
        """The run's status on the cluster that this process has joined, too."""

        def look() -> dict[str, Any] | None:
            assert not self._has_ended()
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # no mailbox yet
                status = ray.get(find_mailbox(self.config.name).status.remote(), timeout=10)
                return dict(status) if status.get("step", -1) >= step else None
            return None

        return dict(wait_for(look, timeout_s=WAIT_S, what=f"step {step}", poll_s=0.1))

    def await_successor(self, pid: int) -> dict[str, Any]:
        """The status that another coordinator than this process gives."""
        changed = lambda: (status := self.await_step(0))["coordinator"]["pid"] != pid and status  # noqa: E731
        return dict(wait_for(changed, timeout_s=WAIT_S, what="another coordinator", poll_s=0.1))

    def await_signal_taken(self) -> None:
        """Until the next SIGHUP would have its default effect: the handlers stand for one signal."""
        status = Path(f"/proc/{self.process.pid}/status")
        caught = lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16)  # type: ignore[index] # noqa: E731
        wait_for(lambda: not caught() & 1 << signal.SIGHUP - 1, timeout_s=WAIT_S, what="the first signal is taken")

    def assert_nothing_left(self) -> None:
        assert train_folders(self._folder) == []

    def _has_ended(self) -> bool:
        return self.process.poll() is not None


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Starts drivers; ends those that a failed test has left. Their folder has a short name: Ray puts sockets there."""
    drivers: list[Driver] = []
    with tempfile.TemporaryDirectory(prefix="fit-", dir="/tmp", ignore_cleanup_errors=True) as folder:

        def start(config: RunConfig, **options: Any) -> Driver:
            drivers.append(Driver(Path(folder), config, **options))
            return drivers[-1]

        yield start
        for driver in drivers:
            print(driver.told())  # shown when the test fails
            with contextlib.suppress(psutil.NoSuchProcess):
                family = [driver.process, *driver.process.children(recursive=True)]
                for process in family:
                    process.kill()
                psutil.wait_procs(family, timeout=10)


def checkpoints_of(config: RunConfig) -> list[int]:
    """Steps of the complete ones."""
    return [c.step for c in registry.found(Storage.open(config.run_url)) if c.state == "complete"]


def committed_steps(config: RunConfig) -> list[int | None]:
    return [event.step for event in events(config) if event.kind is EventKind.STEP_COMMITTED]


def endless(corpus: str, folder: Path, name: str) -> RunConfig:
    return make_config(corpus, f"file://{folder}", name, steps=ENDLESS, checkpoint={}, metrics=METRICS)


def assert_no_actor_left(cluster: LocalCluster) -> None:
    """Neither ours nor Ray Train's."""
    titles = ("ray::Worker", "ray::Reader", "ray::Mailbox", "ray::RayTrainWorker", "ray::TrainController")

    def gone() -> bool:
        return not any(processes_titled(cluster, title) for title in titles)

    wait_for(gone, timeout_s=WAIT_S, what="every actor of the driver ended")


def test_coordinator_that_dies_or_freezes_is_succeeded_and_workers_train_on(
    cluster: LocalCluster, corpus: str, drive: Callable[..., Driver], tmp_path: Path
) -> None:
    config = endless(corpus, tmp_path, "succeeded")
    driver = drive(config, address=cluster.address)
    await_workers(config, 3)
    for number in (signal.SIGKILL, signal.SIGSTOP):
        status = driver.await_step(driver.await_step(0)["step"] + 20)
        pid = status["coordinator"]["pid"]
        os.kill(pid, number)
        driver.await_successor(pid)
        driver.await_step(status["step"] + 20)
    wait_for(lambda: not psutil.pid_exists(pid), timeout_s=WAIT_S, what="the frozen coordinator's end")
    driver.process.send_signal(signal.SIGTERM)
    assert driver.await_end() == STOPPED
    assert_nothing_left(cluster)
    logged = events(config)
    steps = [event.step for event in logged if event.kind is EventKind.STEP_COMMITTED]
    assert steps == list(range(len(steps)))
    kinds = Counter(event.kind for event in logged)
    assert (kinds[EventKind.MEMBER_STARTED], kinds[EventKind.MEMBER_LOST]) == (3, 0)
    assert kinds[EventKind.RUN_STARTED] >= 3  # Ray Train may have one that is slow to answer succeeded, too
    assert kinds[EventKind.STEP_MISMATCH] == 0


def test_command_that_is_given_again_after_its_driver_was_killed_goes_on_with_the_workers(
    cluster: LocalCluster, corpus: str, drive: Callable[..., Driver], tmp_path: Path
) -> None:
    config = endless(corpus, tmp_path, "given-again")
    first = drive(config, address=cluster.address)
    step = first.await_step(30)["step"]
    await_workers(config, 3)
    first.process.kill()
    first.process.wait(WAIT_S)
    again = drive(config, address=cluster.address)
    again.await_step(step + 30)
    again.process.send_signal(signal.SIGTERM)
    assert again.await_end() == STOPPED
    assert_nothing_left(cluster)
    logged = events(config)
    steps = [event.step for event in logged if event.kind is EventKind.STEP_COMMITTED]
    assert steps == list(range(len(steps)))
    kinds = Counter(event.kind for event in logged)
    assert (kinds[EventKind.MEMBER_STARTED], kinds[EventKind.MEMBER_RETURNED]) == (3, 3)
    assert "is taken over with 3 workers" in again.output()


def test_run_whose_whole_cluster_is_lost_goes_on_from_its_checkpoint_on_another(
    corpus: str, drive: Callable[..., Driver], tmp_path: Path
) -> None:
    """With the head, its control store, the driver and every worker at once, as when the power fails."""
    gate = tmp_path / "go-on"
    config = make_config(
        corpus, f"file://{tmp_path}", "power-cut", steps=100, checkpoint={"every_steps": 10}, metrics=METRICS,
        failpoints=[f"*:data@25=wait:{gate}"],
    )  # fmt: skip
    first = drive(config, address=None)
    wait_for(lambda: checkpoints_of(config), timeout_s=WAIT_S, what="a checkpoint")
    everything = [first.process, *first.process.children(recursive=True)]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everything, timeout=WAIT_S)
    saved, committed = max(checkpoints_of(config)), max(committed_steps(config))
    gate.touch()
    again = drive(config, address=None)
    assert again.await_end() == 0
    assert f"goes on from the checkpoint of step {saved}" in again.output()
    assert committed - saved < 2 * 10, "more than an interval, and the one that was being saved, was computed again"
    assert committed_steps(config) == list(range(100))
    assert Run.open(config).result.digest["state"] == expected_digest(config)
    assert EventKind.STEP_MISMATCH not in {event.kind for event in events(config)}


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.thorough)],
    ids=lambda number: number.name,
)
def test_terminated_driver_saves_and_leaves_nothing_though_nobody_listens(
    number: signal.Signals, cluster: LocalCluster, corpus: str, drive: Callable[..., Driver], tmp_path: Path
) -> None:
    config = endless(corpus, tmp_path, "terminated")
    reading, writing = os.pipe()
    driver = drive(config, address=cluster.address, stdout=writing)
    os.close(writing)
    os.close(reading)
    driver.await_step(30)  # lines that nobody took are behind it
    with pytest.raises(ClusterError, match="run terminated is being trained on this cluster already"):
        fit(config, on_line=print)
    driver.process.send_signal(number)
    assert driver.await_end() == STOPPED
    assert driver.told() == ""
    (finished,) = [event for event in events(config) if event.kind is EventKind.RUN_FINISHED]
    assert f"{number.name} received" in finished.message
    assert Storage.open(config.run_url).exists(f"checkpoints/step-{finished.step:08d}/manifest.json")
    driver.assert_nothing_left()
    assert_no_actor_left(cluster)


@pytest.mark.thorough
def test_interrupted_driver_with_a_cluster_of_its_own_saves_and_takes_all_of_it_down(
    bucket: str, drive: Callable[..., Driver]
) -> None:
    config = s3_config(bucket, steps=ENDLESS, metrics=METRICS).replace("name=interrupted")
    driver = drive(config, address=None)
    driver.await_line(r"step \d+/")
    family = driver.process.children(recursive=True)
    assert len(family) > 5
    driver.process.send_signal(signal.SIGINT)
    assert driver.await_end() == STOPPED
    assert "RAY_ADDRESS is not set: started a local Ray cluster" in driver.output()
    assert "verdict  stopped: SIGINT received" in driver.output()
    (address,) = re.findall(r"checkpoint  (s3://\S+)", driver.output())
    assert Storage.open(address).exists("manifest.json")
    assert "testing" not in driver.told()  # the secret key
    driver.assert_nothing_left()
    _, alive = psutil.wait_procs(family, timeout=WAIT_S)
    assert not alive


def test_second_interrupt_ends_a_driver_whose_coordinator_hangs(
    cluster: LocalCluster, corpus: str, drive: Callable[..., Driver], tmp_path: Path
) -> None:
    driver = drive(endless(corpus, tmp_path, "impatient"), address=cluster.address)
    (coordinator,) = wait_for(
        lambda: processes_titled(cluster, "ray::RayTrainWorker"), timeout_s=WAIT_S, what="the coordinator's process"
    )
    os.kill(coordinator, signal.SIGSTOP)
    try:
        driver.process.send_signal(signal.SIGINT)
        driver.await_signal_taken()
        driver.process.send_signal(signal.SIGINT)
        assert driver.await_end() == 128 + signal.SIGINT
        driver.assert_nothing_left()
        assert_no_actor_left(cluster)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(coordinator, signal.SIGCONT)
