"""`fit`: train one run from a config to a verdict, on whatever Ray cluster there is.

Ray Train hosts the coordinator (one worker, pinned to the head node) and starts another when it dies or freezes, which
goes on with the workers that are there; everything elastic is ours. Ray Train stays out of the run's data: its storage path
is a temporary folder on the head, its reports carry metrics only. The trainer runs in a thread, because Ray Train would
replace the signal handlers of the main one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError

from elastic_lm import failpoints
from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.control.actions import REWOUND
from elastic_lm.errors import ElasticLMError, SupersededError, UnavailableError
from elastic_lm.monitor.progress import Lines, News, Quiet, View
from elastic_lm.result import RunResult
from elastic_lm.runtime import cluster
from elastic_lm.runtime.claim import claim, new_token
from elastic_lm.runtime.mailbox import Attempt, Command, create_mailbox
from elastic_lm.runtime.placement import refuse_lacking
from elastic_lm.runtime.roster import Reassurance, Roster, reap

if TYPE_CHECKING:
    from elastic_lm.ownership import Ownership
    from elastic_lm.runtime.coordinator import Legacy, Plan
    from elastic_lm.storage import Storage

logger = logging.getLogger(__name__)

FOLLOW_S = 3.0  # without news; the longest that the end of a coordinator that crashed goes unseen
SUPERSEDED = "superseded"  # the verdict of one whose workers may be another's by now
MAX_ATTEMPTS = 5  # coordinators in a row without a step between: a bug that kills each of them must end, not loop

# Ray Train looks after the coordinator every 2 s and leaves a frozen one alone for 600 s, unless it is told otherwise. To succeed
# one that was merely slow costs no worker and no step, so these need no margin.
RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "5",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


def fit(
    config: RunConfig,
    *,
    on_line: Callable[[str], None] | None = None,
    view: View | None = None,
    quiet: bool = False,
    on_signal: Callable[[str], None] = lambda name: None,
) -> RunResult:
    """Train until done, stopped or beyond help. Blocks.

    Args: how the run is shown: by a live display on a terminal or in a notebook and by lines elsewhere; `on_line` gets such
    lines one at a time in its place, a `view` gets news and figures as objects, and `quiet` shows nothing. All are called
    in this thread.
    In the main thread, the first SIGINT (a notebook's interrupt), SIGTERM or SIGHUP stops the run with a checkpoint, and
    its result is returned; the second ends it at once. `on_signal` hears the first one's name: a run that is all but done is
    `done` all the same. In another thread signals are left alone; `Run.stop` stops it.
    Returns: the verdict with its figures; an interrupted or failed run has a verdict too.
    Raises: ConfigError, DataError, CheckpointError, StorageError or ClusterError when it cannot start.
    """
    from elastic_lm.runtime.plan import make_plan
    from elastic_lm.tracking.trackers import check_installed, wanted_by

    check_installed(wanted_by(config))
    plan = make_plan(config, may_be_held=True)
    with _shown(plan.config, on_line, view, quiet) as chosen:
        return _fit(plan, chosen, on_signal)


@contextlib.contextmanager
def _shown(config: RunConfig, on_line: Callable[[str], None] | None, view: View | None, quiet: bool) -> Iterator[View]:
    """The view that was chosen, or the one that suits where output goes."""
    from elastic_lm.monitor.live import watching
    from elastic_lm.terminal import say

    if quiet:
        yield Quiet()
    elif view is not None:
        yield view
    elif on_line is not None:
        yield Lines(on_line, config.metrics.interval_s)
    else:
        with watching(say, config.metrics.interval_s) as suitable:
            yield suitable


def _fit(plan: Plan, view: View, on_signal: Callable[[str], None]) -> RunResult:
    config = plan.config
    with cluster.connected(config.workers.min * config.workers.num_cpus) as sentence:
        view.news(News(sentence))
        refuse_lacking(config)
        _refuse_lost(plan)
        mailbox = create_mailbox(config.name)
        job: Ownership | None = None
        result: RunResult | None = None
        try:
            token = new_token()
            job = claim(config, token, on_waiting=lambda sentence: view.news(News(sentence)))
            plan.run_storage.write(CONFIG_FILE, config.to_yaml().encode())
            with _temporary_folder() as folder:
                hosted = _Hosted(config, mailbox, token, folder)
                with _stop_on_signal(mailbox, on_signal), Reassurance(Roster(config.name)):
                    hosted.start()
                    _follow(mailbox, hosted, view)
                    result = hosted.result()
            return with_files(result, plan, view)
        finally:
            if job is not None:
                if result.verdict != SUPERSEDED if result is not None else job.is_of_job():
                    Roster(config.name).end_all()  # of a coordinator that could not
                job.release_job()
            ray.kill(mailbox)


def _refuse_lost(plan: Plan) -> None:
    """Raises: CheckpointError when the run cannot begin, and no worker of an earlier job holds its state either."""
    if plan.problem is None:
        return
    from elastic_lm.runtime.coordinator import roster_of

    if not any(worker.is_ours for worker in roster_of(plan).found()):
        raise plan.problem


def with_files(result: RunResult, plan: Plan, view: View) -> RunResult:
    """The result with the addresses of what is made of the log at a run's end: its report and its table of steps."""
    from elastic_lm.experiment import ancestry
    from elastic_lm.monitor import report, table

    def write_report(name: str, folder: Storage) -> str:
        return report.write(name, folder, ancestry.of_run(folder))

    return replace(
        result,
        report=_written("report", write_report, plan, view),
        table=_written("table of steps", table.write, plan, view),
    )


def _written(what: str, write: Callable[[str, Storage], str], plan: Plan, view: View) -> str | None:
    """The address of what `write` has written; None, with a line that says why, when it could not be."""
    try:
        return write(plan.config.name, plan.run_storage)
    except Exception as error:  # noqa: BLE001 - told; a month's result must not be lost for its picture
        view.news(News(f"The {what} could not be written: {type(error).__name__}: {error}", "bad"))
        return None


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """Where Ray Train writes. It belongs to the caller's thread, which outlives an interrupt that the other does not."""
    return tempfile.TemporaryDirectory(prefix="elastic-lm-train-", ignore_cleanup_errors=True)


class _Hosted(threading.Thread):
    """The coordinator under Ray Train, in a thread of its own."""

    def __init__(self, config: RunConfig, mailbox: Any, token: str, folder: str) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._config, self._mailbox, self._token, self._folder = config, mailbox, token, folder
        self._outcome: RunResult | BaseException | None = None

    def run(self) -> None:
        try:
            self._outcome = run_trainer(self._config, self._mailbox, self._token, self._folder)
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread by `result`
            self._outcome = error

    def result(self) -> RunResult:
        self.join()
        if isinstance(self._outcome, RunResult):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome


def run_trainer(config: RunConfig, mailbox: Any, token: str, folder: str) -> RunResult:
    """What Ray Train makes of the run of the job with this token. It writes to `folder`."""
    os.environ.update({name: value for name, value in RAY_TRAIN_SETTINGS.items() if name not in os.environ})
    from ray import train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    trainer = DataParallelTrainer(
        host_coordinator,
        train_loop_config={"config": config, "mailbox": mailbox, "token": token},
        scaling_config=train.ScalingConfig(num_workers=1, resources_per_worker={"CPU": 0, **cluster.ON_HEAD}),
        run_config=train.RunConfig(
            name=config.name, storage_path=folder, failure_config=train.FailureConfig(max_failures=-1)
        ),
    )
    return trainer.fit().return_value


def host_coordinator(arguments: dict[str, Any]) -> RunResult:
    """Ray Train's train function. Returning is final, whatever the verdict; raising asks for a successor."""
    config, mailbox = arguments["config"], arguments["mailbox"]
    place = ray.get_runtime_context().get_node_id(), os.getpid()
    try:
        attempt: Attempt = ray.get(mailbox.begin_attempt.remote(place))
    except RayActorError as error:
        return RunResult(
            "failed",
            f"the coordinator was lost, and the run's mailbox before it ({type(error).__name__}), so nobody counts how often "
            "that happens; give the command again to go on",
        )
    if attempt.predecessor is not None and attempt.predecessor != place:
        node_id, pid = attempt.predecessor
        reap(node_id, pid, title="ray::RayTrainWorker")  # frozen, Ray would leave it behind, and it might thaw
    if attempt.number_in_vain > MAX_ATTEMPTS:
        return RunResult(
            "failed", f"the coordinator died {MAX_ATTEMPTS} times in a row, at last because {attempt.failure_before}"
        )
    failpoints.arm(config.failpoints, f"c{attempt.number}")
    try:
        return coordinate(config, mailbox, arguments["token"])
    except SupersededError as error:
        return RunResult(SUPERSEDED, str(error))
    except UnavailableError as error:
        return RunResult("unavailable", str(error))
    except ElasticLMError as error:
        return RunResult("failed", str(error))
    except Exception:
        cause = traceback.format_exc()
        if ray.get(mailbox.end_attempt.remote(cause)):
            return RunResult("failed", f"the coordinator failed twice in the same way: {cause}")
        raise


def coordinate(config: RunConfig, mailbox: Any, token: str) -> RunResult:
    """One life of the coordinator, from the claim on the run to the verdict. Without a verdict the claim stays, for a successor.

    A run that goes back is claimed anew: its workers go on with whoever has a higher epoch than the one before.
    Storage that gives no answer is waited for: a successor often comes when much is in trouble at once.
    Raises: SupersededError, UnavailableError, and what `make_plan` raises.
    """
    from elastic_lm.runtime.coordinator import Legacy
    from elastic_lm.runtime.patience import Patience

    patience, what = Patience(config.data.storage_timeout_s), f"answer from {config.run_url} or {config.data.tokens}"
    owner: Ownership | None = None
    with contextlib.closing(Legacy()) as legacy:
        while True:
            owner = patience.outlast(what, partial(_claim, config, token, owner))
            result = patience.outlast(what, partial(_attempt, config, mailbox, owner, legacy))
            if result.verdict != REWOUND:
                failpoints.hit("coordinator.finished", result.last_step)
                owner.release()
                return result


def _claim(config: RunConfig, token: str, before: Ownership | None, _number: int) -> Ownership:
    return claim(config, token, succeeds=before)


def _attempt(config: RunConfig, mailbox: Any, owner: Ownership, legacy: Legacy, _number: int) -> RunResult:
    """By a plan of this moment: of the run as it was left, and with the batches left out that it went back from."""
    from elastic_lm.experiment import rewinds
    from elastic_lm.runtime.coordinator import Coordinator
    from elastic_lm.runtime.plan import make_plan

    plan = make_plan(config, may_be_held=True)
    if plan.rewinds:
        rewinds.clear(plan.run_storage, plan.rewinds, owner.check)
        owner.check()
        plan.run_storage.write(CONFIG_FILE, plan.config.to_yaml().encode())
    return Coordinator(plan, mailbox, owner, legacy).run()


def _follow(mailbox: Any, hosted: _Hosted, view: View) -> None:
    """Show what the coordinator tells until it has returned and everything is told."""
    cursor = 0
    while True:
        alive = hosted.is_alive()
        try:
            wait_s = min(FOLLOW_S, view.tick_s) if alive else 0.0
            news, cursor, status = ray.get(mailbox.follow.remote(cursor, wait_s))
        except RayActorError as error:
            lost = (
                f"The mailbox is lost ({type(error).__name__}): the run goes on unseen; its event log has everything."
            )
            view.news(News(lost, "bad"))
            return
        if "snapshot" in status:
            view.snapshot(status["snapshot"])
        for piece in news:
            view.news(piece)
        if not alive:
            return


@contextlib.contextmanager
def _stop_on_signal(mailbox: Any, on_signal: Callable[[str], None]) -> Iterator[None]:
    """First signal: ask for a stop with a checkpoint. Second: the default, which ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        for signum in before:
            signal.signal(signum, signal.SIG_DFL if signum != signal.SIGINT else signal.default_int_handler)
        name = signal.Signals(number).name
        on_signal(name)
        mailbox.post.remote(Command("stop", {"reason": f"{name} received"}))

    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)
