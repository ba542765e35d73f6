"""A trainer that computes nothing: what it "trains" is in storage as JSON, so that it can be cut short like a real one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.errors import UnfitError
from elastic_lm.experiment.account import Account
from elastic_lm.experiment.attempt import Figures
from elastic_lm.experiment.beginning import Beginning, kept_steps
from elastic_lm.experiment.loop import Loop
from elastic_lm.experiment.plan import Plan
from elastic_lm.experiment.result import ExperimentResult
from elastic_lm.experiment.skip import Skip
from elastic_lm.experiment.trainer import OUT_OF_TIME, Asked
from elastic_lm.result import RunResult
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage

TRAINED, FORKED = "trained.json", "forked.txt"
STEP_S = 60.0  # a step takes a minute, by the log

Score = Callable[[RunConfig], float | None]


def by_learning_rate(config: RunConfig) -> float:
    """A perplexity that is lowest at a learning rate of 1e-3, 20 there, and ten times as high a hundred times off."""
    return 20.0 * 10 ** (abs(math.log10(config.optimizer.learning_rate / 1e-3)) / 2)


class FakeTrainer:
    """`score`: perplexity of a run. `verdicts`: of runs that do not end well, by name, the first of each list first.

    `begun`: runs whose training began, in their order; `forks`: (parent, step, run) of each. `kept`: steps of the checkpoints
    that a run has, by name, where they are not those of one that nothing has interrupted.
    """

    def __init__(self, score: Score = by_learning_rate, verdicts: Mapping[str, list[str]] | None = None) -> None:
        self.score, self.verdicts = score, {run: list(each) for run, each in (verdicts or {}).items()}
        self.calls: list[str] = []
        self.begun: list[str] = []
        self.forks: list[tuple[str, int, str]] = []
        self.signal: str | None = None
        self.refuses_forks = False
        self.kept: dict[str, Sequence[int]] = {}
        self.figures = ("loss", "perplexity")

    def asked(self, config: RunConfig) -> Mapping[str, Asked]:
        return {"held_out": Asked(f"hash of {config.batch.sequence_length}", self.figures)}

    def check(self, config: RunConfig) -> None:
        self.calls.append(f"check {config.name}")

    def checkpoints(self, config: RunConfig) -> Sequence[int]:
        folder = Storage.open(config.run_url)
        start = int(folder.read(FORKED)) if folder.exists(FORKED) else 0
        return self.kept.get(config.name, kept_steps(RunAddress.at(config.run_url).stored_config(), start))

    def fork(self, parent: RunConfig, step: int, config: RunConfig, overrides: list[str], skip: Skip) -> None:
        self.calls.append(f"fork {config.name}")
        if self.refuses_forks:
            raise UnfitError("that state cannot take it")
        assert Storage.open(parent.run_url).exists(TRAINED)
        folder = Storage.open(config.run_url)
        folder.write(FORKED, str(step).encode())
        folder.create(CONFIG_FILE, config.to_yaml().encode())
        self.forks.append((parent.name, step, config.name))

    def train(self, config: RunConfig, limit_s: float | None) -> RunResult:
        """Half of the steps, then the rest: two writes."""
        self.calls.append(f"train {config.name}")
        folder = Storage.open(config.run_url)
        start = int(folder.read(FORKED)) if folder.exists(FORKED) else 0
        if not folder.exists(TRAINED):
            self.begun.append(config.name)
        account = self.account(config)
        folder.write(CONFIG_FILE, config.to_yaml().encode())
        verdicts = self.verdicts.get(config.name, [])
        end = config.training.steps - start
        verdict = verdicts.pop(0) if verdicts else "done"
        for reached in ((account.num_steps + end) // 2, end if verdict == "done" else end - 1):
            seconds = reached * STEP_S
            if limit_s is not None and seconds - account.seconds > limit_s:
                steps = account.num_steps + int(limit_s / STEP_S)
                self._write(folder, Account(None, "", start + steps, steps, account.seconds + limit_s))
                return RunResult(OUT_OF_TIME, "time is up", start + steps)
            self._write(folder, Account(None, "", start + reached, reached, seconds))
        told = f"it was {verdict}"
        self._write(folder, Account(verdict, told, start + reached, reached, reached * STEP_S))
        return RunResult(verdict, told, start + reached)

    def account(self, config: RunConfig) -> Account:
        folder = Storage.open(config.run_url)
        return Account(**json.loads(folder.read(TRAINED))) if folder.exists(TRAINED) else Account()

    def evaluate(self, config: RunConfig, step: int) -> Figures:
        self.calls.append(f"evaluate {config.name}")
        assert (self.account(config).verdict, self.account(config).step) == ("done", step)
        value = self.score(config)
        Storage.open(config.run_url).write("evaluations/held_out.json", b"{}")
        return {"held_out": {"loss": None if value is None else math.log(value), "perplexity": value}}

    def _write(self, folder: Storage, account: Account) -> None:
        folder.write(TRAINED, json.dumps(asdict(account)).encode())


def plan_of(**changes: Any) -> Plan:
    """A learning rate a hundred times too high, to be lowered."""
    values: dict[str, Any] = {
        "name": "lower",
        "base": "base.yaml",
        "target": "perplexity <= 30",
        "changes": [{"optimizer.learning_rate": rate} for rate in (1e-2, 1e-3, 1e-4)],
    }
    if "grid" in changes:
        del values["changes"]
    return Plan(**{**values, **changes})


def loop_of(
    base: RunConfig, plan: Plan, trainer: FakeTrainer, tell: Callable[[str], None] = lambda sentence: None
) -> Loop:
    return Loop(Beginning.of(plan, base), trainer, tell)


def carried_out(base: RunConfig, plan: Plan, trainer: FakeTrainer) -> ExperimentResult:
    return loop_of(base, plan, trainer).run()
