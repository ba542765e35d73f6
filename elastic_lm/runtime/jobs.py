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

from elastic_lm import __version__
from elastic_lm.config import RunConfig
from elastic_lm.errors import ClusterError, ConfigError
from elastic_lm.runtime import cluster
from elastic_lm.terminal import Exit

CONFIG = "run.yaml"
ANSWER_S = 30.0  # of one request
IDLE_S = 60.0  # without a line; a connection that a network has forgotten looks the same, so a new one is made
AWAY_S = 300.0  # for which the job server may be away while a log is followed; the job does not depend on it
RETRY_S = 1.0
STOP_S = 600  # from the request to stop to a SIGKILL: a last step and a checkpoint
MAX_CODE_BYTES = 100 * 2**20  # of what the cluster keeps of a job
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", ".ipynb_checkpoints")


class _Client(JobSubmissionClient):
    """Ray's own, whose requests would wait for ever."""

    def _do_request(self, method: str, endpoint: str, **arguments: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **{"timeout": ANSWER_S, **arguments})


class Jobs:
    """The job server of a cluster. Each method raises ClusterError when it gives no answer, or another than it should."""

    def __init__(self, address: str) -> None:
        """Raises: ClusterError when nobody listens there, the token is wrong, or its Ray is of another version."""
        logging.getLogger("ray.dashboard").setLevel(logging.WARNING)  # it tells of each connection that ends
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
        Raises: ConfigError when the run has a job already, or its code is nowhere to be found.
        """
        self._forget(config.name)
        with tempfile.TemporaryDirectory(prefix="elastic-lm-job-") as folder:
            pack(config, Path(folder))
            with self._told():
                return self._client.submit_job(
                    entrypoint=f"elastic-lm train {CONFIG}",
                    submission_id=config.name,
                    runtime_env={"working_dir": folder, "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S)}},
                    metadata={"run": config.name, "run_url": config.run_url, "elastic_lm": __version__},
                )

    def _forget(self, run: str) -> None:
        try:
            details = self.details(run)
        except ConfigError:
            return
        if not details.status.is_terminal():
            raise ConfigError(
                f"run {run} has a job at {self.address} already, which is {details.status.value}; `elastic-lm logs {run} "
                f"--address {self.address}` tells how it is doing, and `elastic-lm stop` in place of logs stops it"
            )
        with self._told():
            self._client.delete_job(run)

    def details(self, run: str) -> JobDetails:
        """What the job server knows of the run's job.    Raises: ConfigError when there is none."""
        with self._told():
            found = [job for job in self._client.list_jobs() if job.submission_id == run]
        if not found:
            raise ConfigError(f"run {run} has no job at {self.address}; `elastic-lm submit` begins one")
        return found[0]

    def log(self, run: str) -> str:
        """All that the job has printed so far."""
        self.details(run)
        with self._told():
            return str(self._client.get_job_logs(run))

    def follow(self, run: str, on_away: Callable[[str], None] = lambda sentence: None) -> Iterator[str]:
        """What the job prints, from its beginning to its end, each character once, whatever becomes of connections.

        `on_away` is told when there is no answer.    Raises: ClusterError when there was none for `AWAY_S`.
        """
        told, answered = 0, time.monotonic()
        with asyncio.Runner() as runner:
            while True:
                try:
                    ended = self.details(run).status.is_terminal()
                    for start, piece in self._stream(runner, run):
                        if new := piece[max(0, told - start) :]:
                            told = start + len(piece)
                            yield new
                    if ended:
                        yield self.log(run)[told:]
                        return
                    answered = time.monotonic()
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
        except (ValueError, KeyError, RuntimeError) as error:
            raise ClusterError(f"{self.address} does not do what was asked: {str(error)[:1000]}") from error


def _url(address: str) -> str:
    """Raises: ClusterError when this can be no address of a job server."""
    url = address if "://" in address else f"http://{address}"
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
        raise ClusterError(f"--address {address} is no address of a job server; write http://HEAD:8265")
    return url.rstrip("/")


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
    for name in sorted(modules_of(config)):
        module, package = Path(f"{name}.py"), Path(name)
        if package.is_dir():
            shutil.copytree(package, folder / name, ignore=JUNK)
        elif module.is_file():
            shutil.copy(module, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MAX_CODE_BYTES:
        raise ConfigError(
            f"the modules that the configuration names hold {size / 1e6:,.0f} MB, and a job may take {MAX_CODE_BYTES / 1e6:,.0f} "
            "MB along; keep data out of them, or install them on the cluster"
        )


def modules_of(config: RunConfig) -> set[str]:
    """Top-level names of the modules in a user's import paths."""
    paths = [config.model.factory, config.objective.name]
    return {path.partition(":")[0].partition(".")[0] for path in paths if path is not None and ":" in path}
