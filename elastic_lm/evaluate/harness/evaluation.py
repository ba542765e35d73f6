"""Tasks of lm-evaluation-harness by their names: checked, asked, and turned into results like all others."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.config_text import hint
from elastic_lm.engine.spec import CAUSAL
from elastic_lm.errors import ConfigError
from elastic_lm.evaluate.fields import check_number
from elastic_lm.evaluate.harness.answers import Answers
from elastic_lm.evaluate.harness.child import Child
from elastic_lm.evaluate.intervals import Metric, around
from elastic_lm.evaluate.pieces import Subject
from elastic_lm.evaluate.progress import Progress, Unseen, View
from elastic_lm.evaluate.result import Outcome, Result
from elastic_lm.evaluation_file import name_with_hash
from elastic_lm.experiment.rewinds import Rewinds
from elastic_lm.storage import Storage
from elastic_lm.trained_model import TrainedModel, interface_of

KIND = "harness"
VARIABLE = "ELASTIC_LM_HARNESS_PYTHON"
MOST_CHARACTERS = 200  # of a result's name
UNFIT = re.compile(r"[^A-Za-z0-9._()-]")  # for a file's name


@dataclass(frozen=True)
class Harness:
    """What is asked: `tasks`, also groups and tags, by the harness's names.

    `python`: the one that has lm-eval; else ELASTIC_LM_HARNESS_PYTHON, else our own. `include`: a folder with tasks of the user's
    own. `samples`: at most so many items of each task. `shots`: examples before each item, unless a task allows none.
    """

    tasks: Sequence[str]
    python: str | None = None
    include: str | None = None
    samples: int | None = None
    shots: int | None = None

    def __post_init__(self) -> None:
        """Raises: ConfigError."""
        if not self.tasks or not all(self.tasks):
            raise ConfigError("a task of lm-evaluation-harness has no name; write, e.g., crows_pairs,toxigen")
        if twice := next((name for name in self.tasks if self.tasks.count(name) > 1), None):
            raise ConfigError(f"{twice} is named twice; leave one out")
        if self.include is not None and not Path(self.include).is_dir():
            raise ConfigError(f"{self.include} is no folder; name the one that has the YAML files of your tasks")
        check_number("samples", self.samples, 1)
        check_number("shots", self.shots, 0)

    def evaluate(
        self, run_storage: Storage, config: RunConfig, step: int | None = None, *, view: View | None = None
    ) -> Iterator[Result]:
        """The result of each task as soon as it is there; nothing is stored. `step` None: the newest complete checkpoint's.

        Raises: ConfigError when the corpus is another than the run's, the harness is not there, a task is unknown, cannot be
        loaded, or fails; CheckpointError when there is no such checkpoint; DataError, StorageError.
        """
        if config.objective.name != CAUSAL:
            raise ConfigError(
                f"lm-evaluation-harness asks for texts behind others, which takes objective.name={CAUSAL}, and the run's is "
                f"{config.objective.name}; a task of the kind pairs takes masked models, too"
            )
        subject = Subject(run_storage, config, step)
        interface_of(config)  # another corpus and a step that is not there are told before the harness starts
        subject.pinned()
        course = _Course(view or Unseen())
        course.begin("lm-evaluation-harness", doing="starting")
        with Child(self.python or os.environ.get(VARIABLE) or sys.executable, config.workers.threads) as child:
            version, num_tasks = self._loaded(child, course)
            course.begin("the model", doing="loading")
            num_rewinds, model = len(Rewinds.load(run_storage)), subject.load()
            child.tell({"max_tokens": model.max_tokens, "end_of_text": model.special_ids["end_of_text"]})
            for told, about in self._results(child, model, course, num_tasks):
                name = _file_name(told["task"])
                outcome = _outcome(told, about, version)
                yield Result(config.name, model.step, model.digest, name, KIND, told["hash"], outcome, num_rewinds)

    def _loaded(self, child: Child, course: _Course) -> tuple[str, int]:
        """The harness's version, when it has loaded all tasks, and how many there are."""
        include = None if self.include is None else str(Path(self.include).resolve())
        child.tell({"tasks": list(self.tasks), "include": include, "samples": self.samples, "shots": self.shots})
        hello = child.first()
        version: str = hello.get("harness", "")
        if "failed" in hello:
            raise ConfigError(f"lm-evaluation-harness cannot list its tasks: {hello['failed']}; correct that")
        if hello["unknown"]:
            name = hello["unknown"][0]
            raise ConfigError(
                f"{name!r} is no task of lm-evaluation-harness {version}{hint(name, hello['known'])}; "
                f"`{child.python} -m lm_eval ls tasks` lists them, and --harness-include adds a folder with your own"
            )
        course.begin(self.tasks[0] if len(self.tasks) == 1 else f"{len(self.tasks)} tasks", doing="loading")
        message = child.next()
        if "failed" in message:
            raise ConfigError(
                f"lm-evaluation-harness {version} cannot load {', '.join(self.tasks)}: {message['failed']}; leave the task out, "
                "correct it, or see that its data can be had: from Hugging Face's hub, or from where HF_HOME keeps it"
            )
        self._check_that_none_is_in_two(message["loaded"])
        return version, sum(map(len, message["loaded"].values()))

    def _check_that_none_is_in_two(self, loaded: dict[str, list[str]]) -> None:
        owners: dict[str, str] = {}
        for name, tasks in loaded.items():
            for task in tasks:
                if (owner := owners.setdefault(task, name)) != name:
                    raise ConfigError(f"the task {task} is in both {owner} and {name}; leave one out")

    def _results(
        self, child: Child, model: TrainedModel, course: _Course, num_tasks: int
    ) -> Iterator[tuple[dict[str, Any], list[Answers]]]:
        """What the harness tells of each task or group, with the answers that it rests on."""
        given: dict[str, Answers] = {}
        answers, number = Answers(model, course.answered), 0
        while "done" not in (message := child.next()):
            if "begun" in message:
                number += 1
                at = f" ({number:,} of {num_tasks:,})" if num_tasks > 1 else ""
                course.begin(f"{message['begun']}{at}", doing="preparing")
            elif "ask" in message:
                if message["ask"] != "encode":
                    course.ask(len(message["about"]))
                child.tell(answers.to(message["ask"], message["about"]))
            elif "result" in message:
                told = message["result"]
                given.setdefault(told["task"], answers)
                yield told, [given[task] for task in told["tasks"]]
                answers = Answers(model, course.answered)
            else:
                raise ConfigError(
                    f"lm-evaluation-harness failed: {message['failed']}; leave the task out, or correct it"
                )


class _Course:
    """Shows how far it has come: what is done now and, of a task, how many of the requests that it made last are answered."""

    def __init__(self, view: View) -> None:
        self._view = view

    def begin(self, stage: str, *, doing: str) -> None:
        self._show(Progress(stage, 0, None, 0, doing, "requests"))

    def ask(self, num_requests: int) -> None:
        self._show(replace(self._now, done=0, total=num_requests, tokens=0, doing="evaluating"))

    def answered(self, num_requests: int, num_tokens: int) -> None:
        self._show(replace(self._now, done=self._now.done + num_requests, tokens=self._now.tokens + num_tokens))

    def _show(self, progress: Progress) -> None:
        self._now = progress
        self._view.show(progress)


def _file_name(task: str) -> str:
    """A long name loses its end to a hash of the whole: file systems take 255 characters, and more is put behind it."""
    name = f"{KIND}-{UNFIT.sub('_', task)}"
    if len(name) <= MOST_CHARACTERS:
        return name
    return name_with_hash(name[:MOST_CHARACTERS], hashlib.sha256(task.encode()).hexdigest())


def _outcome(told: dict[str, Any], about: list[Answers], version: str) -> Outcome:
    """Where a score was not finite, neither are the figures."""
    counts = {**told["counts"], "cut_contexts": sum(answers.num_cut for answers in about)}
    method = {
        "harness": version,
        **told["method"],
        "intervals": "1.96 standard errors of the harness to each side",
    }
    if num_not_finite := sum(answers.num_not_finite for answers in about):
        counts["not_finite"] = num_not_finite
        return Outcome({name: Metric(None) for name in told["metrics"]}, counts, method)
    return Outcome({name: _metric(*figure) for name, figure in told["metrics"].items()}, counts, method)


def _metric(value: float | None, error: float | None, is_share: bool) -> Metric:
    return Metric(value) if value is None or error is None else around(value, error, is_share=is_share)
