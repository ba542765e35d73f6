"""Runs as Ray jobs: handed to a cluster's job server, watched and stopped through it, over one HTTP address.

A run's job has the run's name as its submission id, so that whoever knows one knows the other, and two jobs of one run cannot
be. It takes along the resolved configuration and the modules that this names, and nothing else of the folder that the
command was given in.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from elastic_lm import __version__, job_version
from elastic_lm.config import RunConfig
from elastic_lm.errors import ClusterError, ConfigError
from elastic_lm.runtime import cluster
from elastic_lm.terminal import Exit

# Of each connection that ends and each package that is sent.
TALKERS = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
CONFIG = "run.yaml"
ANSWER_S = 30.0  # of one request
IDLE_S = 60.0  # without a line; a connection that a network has forgotten looks the same, so a new one is made
AWAY_S = 300.0  # for which the job server may be away while a log is followed; the job does not depend on it
RETRY_S = 1.0
BEGINS_S = 60.0  # from a head's first answer until it takes jobs
SETTLED_S = 3.0  # after a job's end; Ray looks after it once a second, and takes another of its name for the old one
STOP_S = 600  # from the request to stop to a SIGKILL: a last step and a checkpoint
MAX_CODE_BYTES = 100 * 2**20  # of what the cluster keeps of a job
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", ".ipynb_checkpoints")


class _Client(JobSubmissionClient):
    """Ray's own, whose requests would wait for ever, and ask a proxy for what the log's stream asks the head itself."""

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> requests.Response:
        chosen = {"timeout": ANSWER_S, "proxies": {"http": "", "https": ""}}
        return super()._do_request(method, endpoint, **{**chosen, **arguments})


class Jobs:
    """The job server of a cluster. Each method raises ClusterError when it gives no answer, or another than it should."""

    def __init__(self, address: str) -> None:
        """Raises: ClusterError when nobody listens there, the token is wrong, or its Ray is of another version."""
        for talker in TALKERS:
            logging.getLogger(talker).setLevel(logging.WARNING)
        self.address = _url(address)
        place = urlsplit(self.address)
        with self._told(), _instead_of("RAY_API_SERVER_ADDRESS", self.address):
            cluster.knock(f"{place.hostname}:{place.port or (443 if place.scheme == 'https' else 80)}")
            self._client = _Client(self.address)
            theirs = self._client._do_request("GET", "/api/version").json()["ray_version"]
        if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
            raise ClusterError(
                f"{self.address} runs Ray {theirs}, and here is Ray {ray.__version__}; install ray=={theirs} here, or give "
                "the command where that version is"
            )

    def submit(self, config: RunConfig) -> str:
        """Begin the run's job.    Returns: its submission id.

        A job of the run that has ended is forgotten; the run's own log has what happened.
        Raises: ConfigError when the run has a job already, another job has its name, or its code is too much to take along.
        """
        if re.fullmatch("[0-9a-f]{8}", config.name):
            raise ConfigError(f"name={config.name} looks like an id that Ray gives to jobs; choose another name")
        with tempfile.TemporaryDirectory(prefix="elastic-lm-job-") as folder:
            pack(config, Path(folder))
            before = self._forget(config)  # when nothing of ours can fail any more
            metadata = {
                "run": config.name,
                "run_url": config.run_url,
                "elastic_lm": __version__,
                "log_begins": str(before),
            }
            with self._told():
                return self._submitted(config.name, folder, metadata)

    def _submitted(self, run: str, folder: str, metadata: dict[str, str]) -> str:
        """A head that has just begun answers before it takes jobs."""
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **job_version.variables()}
        deadline = time.monotonic() + BEGINS_S
        while True:
            try:
                return self._client.submit_job(
                    entrypoint=f"elastic-lm train {CONFIG}",
                    submission_id=run,
                    runtime_env={"working_dir": folder, "env_vars": environment},
                    metadata=metadata,
                )
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)

    def _forget(self, config: RunConfig) -> int:
        """A job that has ended.    Returns: how many characters its log has, to which Ray appends its successor's."""
        details = self._find(config.name)
        if details is None:
            return 0
        if (url := _metadata(details).get("run_url")) != config.run_url:
            raise ConfigError(
                f"{self.address} has a job {config.name} already, of {url or 'somebody else'}; choose another name for the run"
            )
        if not details.status.is_terminal():
            raise ConfigError(
                f"run {config.name} has a job at {self.address} already, which is {details.status.value}; `elastic-lm logs "
                f"{config.name} --address {self.address}` tells how it is doing, and `elastic-lm stop` in place of logs stops it"
            )
        time.sleep(SETTLED_S)
        with self._told():
            before = len(self._client.get_job_logs(config.name))
            self._client.delete_job(config.name)
        return before

    def _find(self, run: str) -> JobDetails | None:
        with self._told():
            return next((job for job in self._client.list_jobs() if job.submission_id == run), None)

    def details(self, run: str) -> JobDetails:
        """What the job server knows of the run's job.    Raises: ConfigError when there is none of ours."""
        found = self._find(run)
        if found is None or _metadata(found).get("run") != run:
            what = "has no job" if found is None else "has no job, but somebody else's has its name,"
            raise ConfigError(f"run {run} {what} at {self.address}; `elastic-lm submit` begins one")
        return found

    def log(self, run: str) -> str:
        """All that the job has printed so far."""
        begins = _log_begins(self.details(run))
        with self._told():
            return str(self._client.get_job_logs(run))[begins:]

    def follow(self, run: str, on_away: Callable[[str], None] = lambda sentence: None) -> Iterator[str]:
        """What the job prints, from its beginning to its end, each character once, whatever becomes of connections.

        `on_away` is told when there is no answer.    Raises: ClusterError when there was none for `AWAY_S`.
        """
        told = begins = _log_begins(self.details(run))
        answered = time.monotonic()
        with asyncio.Runner() as runner:
            while True:
                try:
                    if self.details(run).status.is_terminal():
                        yield self.log(run)[told - begins :]
                        return
                    for start, piece in self._stream(runner, run):  # until about three seconds after the job's end
                        answered = time.monotonic()
                        if new := piece[max(0, told - start) :]:
                            told = start + len(piece)
                            yield new
                    answered = time.monotonic()
                    if self.details(run).status.is_terminal():
                        continue
                except ClusterError as error:
                    if time.monotonic() - answered > AWAY_S:
                        raise
                    on_away(f"{error}; asking again")
                time.sleep(RETRY_S)

    def _stream(self, runner: asyncio.Runner, run: str) -> Iterator[tuple[int, str]]:
        """Pieces of the log from its beginning, each with the number of characters before it, until it gets quiet."""
        pieces: AsyncIterator[str] = self._client.tail_job_logs(run)

        async def following() -> str | None:
            try:
                return await asyncio.wait_for(anext(pieces, None), IDLE_S)
            except TimeoutError:
                return None

        start = 0
        with self._told():
            while (piece := runner.run(following())) is not None:
                yield start, piece
                start += len(piece)

    def stop(self, run: str) -> None:
        """Ask the job to stop: its run ends with a checkpoint.    Raises: ConfigError when there is none, or it has ended."""
        details = self.details(run)
        if details.status.is_terminal():
            raise ConfigError(f"the job of run {run} at {self.address} has ended already: {details.status.value}")
        with self._told():
            self._client.stop_job(run)

    def exit_code(self, run: str) -> int:
        """That of the job's `elastic-lm train`, once it has ended. Of one that was stopped Ray keeps none."""
        details = self.details(run)
        if details.driver_exit_code is not None:
            return details.driver_exit_code if details.driver_exit_code >= 0 else 128 - details.driver_exit_code
        return {JobStatus.SUCCEEDED: Exit.DONE, JobStatus.STOPPED: Exit.STOPPED}.get(details.status, Exit.FAILED)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """What requests and Ray raise, in words that say what to do."""
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                f"{self.address} refuses the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to "
                "the cluster's"
            ) from error
        except (requests.RequestException, aiohttp.ClientError, OSError) as error:
            raise ClusterError(
                f"no answer from a job server at {self.address} ({type(error).__name__}: {str(error)[:200]}); give the "
                "address of the head's dashboard, e.g. http://HEAD:8265, and see that it is reached from here"
            ) from error
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ClusterError(f"{self.address} does not do what was asked: ... {str(error)[-1000:]}") from error


def _url(address: str) -> str:
    """Raises: ClusterError when this can be no address of a job server."""
    url = address if "://" in address else f"http://{address}"
    try:
        place = urlsplit(url)
        known = place.scheme in ("http", "https") and place.hostname and place.port != 0
    except ValueError:
        known = False
    if not known:
        raise ClusterError(f"--address {address} is no address of a job server; write http://HEAD:8265")
    if place.username is not None or place.password is not None:
        raise ClusterError(
            "--address holds a user or a password, which would be printed; give a token by RAY_AUTH_TOKEN"
        )
    return url.rstrip("/")


def _metadata(details: JobDetails) -> dict[str, str]:
    return details.metadata or {}


def _log_begins(details: JobDetails) -> int:
    """Characters of its predecessors, which Ray keeps in one file."""
    return int(_metadata(details).get("log_begins", "0"))


@contextlib.contextmanager
def _instead_of(name: str, value: str) -> Iterator[None]:
    """An environment variable for as long as this lasts: Ray takes its word over an argument's."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def pack(config: RunConfig, folder: Path) -> None:
    """What a job takes along: the resolved configuration, and the modules that it names, from the current folder.

    A module that is not here is one that is installed on the cluster.    Raises: ConfigError when it is too much.
    """
    (folder / CONFIG).write_text(config.to_yaml(), encoding="utf-8")
    try:
        size = 0
        for name in sorted(modules_of(config)):
            module, package = Path(f"{name}.py"), Path(name)
            found = package if package.is_dir() else module
            size += sum(path.stat().st_size for path in (found, *found.rglob("*")) if path.is_file())
            if size > MAX_CODE_BYTES:
                raise ConfigError(
                    f"the modules that the configuration names hold {size / 1e6:,.0f} MB, and a job may take "
                    f"{MAX_CODE_BYTES / 1e6:,.0f} MB along; keep data out of them, or install them on the cluster"
                )
            if package.is_dir():
                shutil.copytree(package, folder / name, ignore=JUNK)
            elif module.is_file():
                shutil.copy(module, folder)
    except (OSError, shutil.Error) as error:
        raise ConfigError(
            f"the modules that the configuration names cannot be copied ({error}); look at their links and permissions"
        ) from error


def modules_of(config: RunConfig) -> set[str]:
    """Top-level names of the modules in a user's import paths."""
    paths = [config.model.factory, config.objective.name]
    return {path.partition(":")[0].partition(".")[0] for path in paths if path is not None and ":" in path}
