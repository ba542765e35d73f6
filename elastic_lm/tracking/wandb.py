"""A run at Weights & Biases: its config, its scalars by step, its verdict.

Invariant: the run there has an id that follows from our run's name and address, so every attempt and every export goes on with
the same one. Online, the server says which step comes next, and what it has is not sent again. Offline, the folder
holds one run of ours, written anew each time. Nothing is written outside `folder`, and we send nothing but the above: no
system metrics, code, console output, packages, host or error reports (wandb adds its version, Python's and the platform's
name). Keys are wandb's own affair (`wandb login`, WANDB_API_KEY on the head node).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.events.types import Event, EventKind
from elastic_lm.tracking.folder_lock import FolderLock
from elastic_lm.tracking.sink import point_of

INIT_S = 30.0
PEACEFUL = ("done", "stopped")  # verdicts of runs that did not fail


def run_id_of(config: RunConfig) -> str:
    """The id at Weights & Biases."""
    return hashlib.sha256(f"{config.name}\n{config.run_url}".encode()).hexdigest()[:16]


class WeightsAndBiases:
    """See `Sink`. Writes to `folder`/wandb; None: to a temporary one. `finish_s`: how long the end may wait for the server."""

    key = "wandb"
    title = "Weights & Biases"

    def __init__(self, config: RunConfig, folder: Path | None, *, finish_s: float) -> None:
        self._config, self._folder, self._finish_s = config, folder, finish_s
        self._temporary: Path | None = None
        self._lock: FolderLock | None = None
        self._began = False
        self._run: Any = None
        self._next_step = 0
        self._exit_code = 1  # until there is a verdict

    def open(self) -> None:
        root, run_id = self._begin_folder(), run_id_of(self._config)
        files = root / "wandb"  # wandb's own choice of a name
        files.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(files)
        self._lock.take()
        for left in files.glob(f"*run-*-{run_id}"):
            shutil.rmtree(left)
        shutil.rmtree(files / "cache", ignore_errors=True)
        with _environment(WANDB_CACHE_DIR=str(files / "cache"), WANDB_ERROR_REPORTING="false"):
            self._run = self._begin_run(root, run_id)
        self._next_step = self._run.starting_step

    def _begin_folder(self) -> Path:
        if self._folder is not None:
            return self._folder
        self._temporary = Path(tempfile.mkdtemp(prefix="elastic-lm-wandb-"))
        return self._temporary

    def _begin_run(self, root: Path, run_id: str) -> Any:
        import wandb

        self._began = True
        tracking = self._config.tracking
        return wandb.init(
            project=tracking.wandb_project,
            entity=tracking.wandb_entity,
            mode=tracking.wandb_mode,
            id=run_id,
            name=self._config.name,
            resume="allow",
            dir=str(root),
            config=self._config.model_dump(mode="json"),
            settings=wandb.Settings(
                console="off",
                silent=True,
                save_code=False,
                disable_code=True,
                disable_git=True,
                disable_job_creation=True,
                init_timeout=INIT_S,
                finish_timeout=self._finish_s,
                finish_timeout_raises=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )

    def write(self, event: Event) -> None:
        if event.kind is EventKind.RUN_FINISHED:
            self._run.summary.update({"verdict": event.fields["verdict"], "message": event.message})
            self._exit_code = 0 if event.fields["verdict"] in PEACEFUL else 1
        point = point_of(event)
        if point is None or point.step < self._next_step:  # it has that step, and steps do not go back there
            return
        if point.is_step:
            self._next_step, self._exit_code = point.step + 1, 1
        self._run.log({**point.scalars, "_timestamp": event.time_s}, step=point.step, commit=point.is_step)

    def caught_up(self) -> None:
        """It sends by itself."""

    def flush(self) -> None:
        """It sends by itself."""

    def close(self) -> None:
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish(exit_code=self._exit_code)
        finally:
            self._let_go()

    def _let_go(self) -> None:
        try:
            if self._began:
                import wandb

                wandb.teardown()  # ends the process that it started
        finally:
            if self._lock is not None:
                self._lock.release()
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables that the process which wandb starts is to see, where the user has not chosen them."""
    chosen = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name in chosen:
            os.environ.pop(name, None)
