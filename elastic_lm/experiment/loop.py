"""The loop of attempts: one after another until one reaches the target, the plan has no more, or the budget is spent.

Invariant: what comes next follows from what storage holds (journal.py) and the plan alone. An attempt is written down before
anything of its run is, and again with its score when that is known; in between the run goes on by its own means. So the same
command goes on wherever it was cut short, and makes no attempt twice. One process at a time holds the experiment (ownership.py).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.errors import CheckpointError, ConfigError, DataError, StorageError, UnfitError
from elastic_lm.experiment import tree_page
from elastic_lm.experiment.account import Account
from elastic_lm.experiment.attempt import (
    DONE,
    FAILURES,
    PASSING,
    Attempt,
    Begun,
    Ended,
    Figures,
    Trouble,
    best,
    parent_of,
    seconds_of,
    tokens_of,
)
from elastic_lm.experiment.beginning import Beginning, going_on
from elastic_lm.experiment.journal import FOLDER, Journal
from elastic_lm.experiment.rehearsal import Rehearsal
from elastic_lm.experiment.result import BUDGET, EXHAUSTED, REACHED, ExperimentResult, Verdict
from elastic_lm.experiment.target import exact
from elastic_lm.experiment.trainer import OUT_OF_TIME, Trainer
from elastic_lm.ownership import Ownership
from elastic_lm.run_address import RunAddress
from elastic_lm.storage import Storage

HOUR_S = 3600.0
# What may pass and may not, by what it is called in a record. Storage, a cluster or an owner that is in the way passes.
ERRORS = {ConfigError: "bad_config", CheckpointError: "bad_checkpoint", DataError: "data_error"}


class Loop:
    """One experiment, to be run or gone on with."""

    def __init__(
        self, beginning: Beginning, trainer: Trainer, tell: Callable[[str], None] = lambda sentence: None
    ) -> None:
        """`tell` gets a sentence when an attempt begins and when it ends. Writes nothing.

        Raises: ConfigError when the plan cannot be carried out, or is not the one that began; DataError, StorageError.
        """
        self._beginning, self._trainer, self._tell = beginning, trainer, tell
        self._plan, self._target = beginning.plan, beginning.plan.wanted
        self._journal = Journal(Storage.open(beginning.base.storage).child(f"{FOLDER}/{self._plan.name}"))
        self._read()
        self.rehearsal = Rehearsal.of(beginning, trainer, self._begun)
        self._journal.check(self.rehearsal.setup)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """All of the plan, as far as they are."""
        return tuple(
            Attempt(
                prospect.planned,
                self._beginning.run(number),
                self._begun.get(number),
                self._ended.get(number),
                prospect.same_as,
            )
            for number, prospect in enumerate(self.rehearsal.prospects)
        )

    def run(self) -> ExperimentResult:
        """Go on until there is a verdict.    Raises: OwnershipError when another process does; whatever a trainer raises."""
        if (verdict := self._verdict()) is not None:
            return self._concluded(verdict)
        owner = self._acquire()
        try:
            self._read()  # somebody may have gone on meanwhile
            self._journal.check(self.rehearsal.setup)
            self._journal.adopt(self.rehearsal.setup)
            return self._concluded(self._go_on(owner))
        finally:
            owner.release()

    def _read(self) -> None:
        found = self._journal.records()
        self._begun, self._ended, self._troubles = found.begun, found.ended, found.troubles

    def _concluded(self, verdict: Verdict) -> ExperimentResult:
        result = self._result(verdict)
        return replace(result, page=self._draw(result))

    def _result(self, verdict: Verdict) -> ExperimentResult:
        """What it comes to so far, without a page."""
        tokens, seconds = self._taken()
        return ExperimentResult(
            name=self._plan.name,
            target=self._target,
            verdict=verdict.kind,
            message=verdict.message,
            attempts=self.attempts,
            tokens=tokens,
            hours=seconds / HOUR_S,
            url=self._journal.folder.url,
        )

    def _taken(self) -> tuple[int, float]:
        """(tokens, seconds) of all attempts, that which is under way among them."""
        tokens, seconds = tokens_of(self.attempts), seconds_of(self.attempts)
        for each in self.attempts:
            if each.is_under_way:
                account = self._account(each)
                tokens, seconds = tokens + self._tokens_of(each, account), seconds + account.seconds
        return tokens, seconds

    def _account(self, attempt: Attempt) -> Account:
        return self._trainer.account(self.rehearsal.prospects[attempt.number].config)  # its run is there in any case

    def _tokens_of(self, attempt: Attempt, account: Account) -> int:
        """That the attempt was trained on."""
        if not account.num_steps:
            return 0
        return account.num_steps * self._beginning.config(attempt.number, self._begun).batch.tokens

    # -- what comes next ---------------------------------------------------------------------------------------------

    def _verdict(self) -> Verdict | None:
        """None while there is something to do."""
        attempts = self.attempts
        for each in attempts:
            if self._target.is_reached(each.score):
                return Verdict(REACHED, f"{each.run} reaches {self._target}: {self._scored(each)}")
        if any(each.is_under_way for each in attempts):
            return None
        following = next((each for each in attempts if each.is_waiting), None)
        if following is None:
            return Verdict(EXHAUSTED, f"no attempt reaches {self._target}, and the plan has no more{self._best_told()}")
        return self._over_budget(following)

    def _over_budget(self, following: Attempt) -> Verdict | None:
        """Whether the next attempt is one too many."""
        budget, begun = self._plan.budget, len(self._begun)
        if budget.attempts is not None and begun >= budget.attempts:
            return self._spent(f"all {budget.attempts} attempts of budget.attempts are made")
        if budget.tokens is not None:
            spent, needed = tokens_of(self.attempts), self._tokens(self._decide(following))
            if spent + needed > budget.tokens:
                return self._spent(
                    f"{spent:,} tokens are trained on, and {following.run} would take {needed:,} more, beyond budget.tokens="
                    f"{exact(budget.tokens)}"
                )
        if budget.hours is not None and seconds_of(self.attempts) >= budget.hours * HOUR_S:
            return self._out_of_time()
        return None

    def _out_of_time(self) -> Verdict:
        hours = self._plan.budget.hours
        assert hours is not None
        return self._spent(f"the {exact(hours)} hours of budget.hours are over")

    def _spent(self, why: str) -> Verdict:
        return Verdict(BUDGET, f"{why}, and no attempt reaches {self._target}{self._best_told()}")

    def _best_told(self) -> str:
        found = best(self.attempts, self._target)
        return "; no attempt has a score" if found is None else f"; the best is {found.run} with {self._scored(found)}"

    def _decide(self, attempt: Attempt) -> Begun:
        """Where an attempt begins that has not: from the scores so far."""
        number = attempt.number
        if number == 0 or not self._plan.forks:
            return Begun(number)
        parent = parent_of(self._plan.parent, self.attempts[:number], self._target)
        if parent is None:
            return Begun(number, note=f"no attempt that could be its parent ({self._plan.parent}) has a score")
        assert parent.ended is not None and parent.ended.step is not None
        wanted = self._plan.parent_step or parent.ended.step
        kept = self._checkpoints(parent)
        step = self._forked_step(attempt, parent, kept, wanted)
        if step is None:
            lacks = "leaves anything to train" if kept else "can be used any more"
            return Begun(number, note=f"no checkpoint of {parent.run} {lacks}")
        if step == wanted:
            return Begun(number, parent.number, step)
        place = "last one before" if step < wanted else "first one after"
        note = f"there is no checkpoint of step {wanted:,}, and that is the {place} it"
        return Begun(number, parent.number, step, note)

    def _forked_step(self, attempt: Attempt, parent: Attempt, kept: Sequence[int], wanted: int) -> int | None:
        """The last of these checkpoints up to the wanted step; without one, the first after it that leaves something to train."""
        before = max((step for step in kept if step <= wanted), default=None)
        if before is not None:
            return before
        config = self._beginning.config(parent.number, self._begun)
        return min(
            (step for step in kept if self._beginning.last_step(attempt.number, config, step) > step), default=None
        )

    def _checkpoints(self, attempt: Attempt) -> Sequence[int]:
        """Steps at which it can be forked."""
        try:
            return self._trainer.checkpoints(self.rehearsal.prospects[attempt.number].config)
        except CheckpointError:
            return ()

    def _tokens(self, record: Begun) -> int:
        """That the attempt will train on. Of one whose changes do not fit its parent: none."""
        try:
            config = self._beginning.config(record.number, {**self._begun, record.number: record})
        except UnfitError:
            return 0
        return config.batch.tokens * max(0, config.training.steps - (record.parent_step or 0))

    # -- doing it ----------------------------------------------------------------------------------------------------

    def _go_on(self, owner: Ownership) -> Verdict:
        self._trainer.signal = None  # what ended the loop before is done with
        while (verdict := self._verdict()) is None:
            attempt = next(each for each in self.attempts if each.is_under_way or each.is_waiting)
            if attempt.begun is None:
                attempt = self._begin(attempt, owner)
            else:
                self._tell(f"{attempt.run} goes on: {self._beginning_told(attempt)}.")
            self._draw()
            found = self._made(attempt, owner)
            if isinstance(found, Verdict):
                return found
            owner.check()
            self._journal.end(found)
            self._ended[found.number] = found
            self._tell_end(self.attempts[found.number])
            self._draw()
            # A run that a signal finds in its last step is done all the same.
            if self._trainer.signal is not None and self._verdict() is None:
                return Verdict("stopped", f"{self._trainer.signal} received; the same command goes on")
        return verdict

    def _begin(self, attempt: Attempt, owner: Ownership) -> Attempt:
        record = replace(self._decide(attempt), time_s=time.time())
        owner.check()
        self._journal.begin(record)
        self._begun[record.number] = record
        attempt = replace(attempt, begun=record)
        self._tell(f"{attempt.run} begins: {self._beginning_told(attempt)}.")
        return attempt

    def _made(self, attempt: Attempt, owner: Ownership) -> Ended | Verdict:
        """What comes of an attempt; a verdict when that is not known yet.    Raises: as a trainer, when it may pass."""
        try:
            return self._tried(attempt, owner)
        except UnfitError as error:  # only now is it known whose state the changes have to fit
            if attempt.parent is None and not self._beginning.is_from_folder(attempt.number):
                raise
            return Ended(attempt.number, "refused", str(error), time_s=time.time())
        except tuple(ERRORS) as error:
            verdict = next(name for kind, name in ERRORS.items() if isinstance(error, kind))
            ended = self._troubled(attempt, verdict, str(error), self._account(attempt), owner)
            if ended is None:
                raise
            return ended

    def _tried(self, attempt: Attempt, owner: Ownership) -> Ended | Verdict:
        config = self._beginning.config(attempt.number, self._begun)
        self._check_alone(attempt, config)
        self._fork(attempt, config)
        if attempt.parent is not None:
            config = going_on(RunAddress.at(config.run_url).stored_config(), config)
        account = self._trainer.account(config)
        if account.verdict != DONE and account.verdict not in FAILURES:
            limit_s = self._limit_s(account.seconds)
            if limit_s is not None and limit_s <= 0:
                return self._out_of_time()
            result = self._trainer.train(config, limit_s)
            if result.verdict == OUT_OF_TIME:
                return self._out_of_time()
            account = self._trainer.account(config).concluded(result)
            goes_on = Verdict(result.verdict, f"{attempt.run}: {result.message}; the same command goes on")
            if result.verdict in PASSING:
                return self._troubled(attempt, result.verdict, result.message, account, owner) or goes_on
            if result.verdict != DONE and result.verdict not in FAILURES:
                return goes_on
        assert account.verdict is not None
        figures: Figures = {}
        if account.verdict == DONE:
            figures = self._trainer.evaluate(config, config.training.steps if account.step is None else account.step)
        return self._end(attempt, account.verdict, account.message, account, figures)

    def _end(
        self, attempt: Attempt, verdict: str, message: str, account: Account, figures: Figures | None = None
    ) -> Ended:
        return Ended(
            attempt.number,
            verdict,
            message,
            score=self._target.score(figures or {}),
            step=account.step,
            tokens=self._tokens_of(attempt, account),
            seconds=account.seconds,
            figures=figures or {},
            time_s=time.time(),
        )

    def _troubled(
        self, attempt: Attempt, verdict: str, message: str, account: Account, owner: Ownership
    ) -> Ended | None:
        """What may pass is written down, and ends the attempt when it has come to the same before: else one would block all.

        Returns: None when it had not.
        """
        trouble = Trouble(attempt.number, verdict, message, account.step, time.time())
        earlier = self._troubles.setdefault(attempt.number, [])
        if any(trouble.is_like(each) for each in earlier):
            return self._end(attempt, verdict, message, account)
        owner.check()
        self._journal.trouble(trouble, len(earlier))
        earlier.append(trouble)
        place = "before it is trained" if account.step is None else f"at step {account.step:,}"
        self._tell(
            f"{attempt.run} is interrupted: {verdict}. Should it come to that {place} again, it ends without a score."
        )
        return None

    def _check_alone(self, attempt: Attempt, config: RunConfig) -> None:
        """Raises: UnfitError when it has no parent, and begins in no shape that model.init's folder has."""
        if attempt.parent is None and self._beginning.is_from_folder(attempt.number):
            try:
                self._trainer.check(config)
            except ConfigError as error:
                raise UnfitError(f"it has no parent, and from scratch it cannot begin: {error}") from error

    def _fork(self, attempt: Attempt, config: RunConfig) -> None:
        """Raises: UnfitError when the parent's state cannot take the changes; as a trainer."""
        record = attempt.begun
        assert record is not None
        if record.parent is None or Storage.open(config.run_url).exists(CONFIG_FILE):
            return
        assert record.parent_step is not None
        parent = self._beginning.config(record.parent, self._begun)
        overrides = self._beginning.overrides(attempt.number, record.parent_step)
        self._trainer.fork(parent, record.parent_step, config, overrides, attempt.planned.skip)

    def _limit_s(self, seconds: float) -> float | None:
        """How long a run may still be trained that has been for `seconds`; None: as long as it takes."""
        hours = self._plan.budget.hours
        return None if hours is None else hours * HOUR_S - seconds_of(self.attempts) - seconds

    def _acquire(self) -> Ownership:
        return Ownership.acquire(
            self._journal.folder,
            self._plan.name,
            job_token=secrets.token_hex(16),
            noun="experiment",
            held="run by another process",
            remedy="Wait for its end, or stop it there; the same command goes on then",
            on_waiting=self._tell,
        )

    # -- telling -----------------------------------------------------------------------------------------------------

    def _beginning_told(self, attempt: Attempt) -> str:
        record = attempt.begun
        assert record is not None
        place = "from scratch"
        if record.parent is not None:
            place = f"a fork of {self._beginning.run(record.parent)} at step {record.parent_step:,}"
        note = "" if record.note is None else f", as {record.note}"
        return f"{attempt.planned.told}; {place}{note}; {self._tokens(record):,} tokens"

    def _tell_end(self, attempt: Attempt) -> None:
        assert attempt.ended is not None
        if attempt.ended.verdict != DONE:
            told = f"{attempt.ended.verdict}, without a score: {attempt.ended.message}"
        elif attempt.score is None:
            told = f"its {self._target.figure} is {self._target.lacks(attempt.ended.figures)}, so it has no score"
        else:
            missed = "reaches" if self._target.is_reached(attempt.score) else "does not reach"
            told = f"{self._scored(attempt)} {missed} {self._target}"
        self._tell(f"{attempt.run} ends: {told}.")

    def _scored(self, attempt: Attempt) -> str:
        assert attempt.score is not None
        return f"{self._target.figure.replace('_', ' ')} {self._target.shown(attempt.score)}"

    def _draw(self, result: ExperimentResult | None = None) -> str | None:
        """The page of this, or of what there is so far.

        Returns: where it is; None when storage fails, which is no reason to stop.
        """
        try:
            result = result or self._result(self._verdict() or Verdict("running", self._under_way_told()))
            return self._journal.write_page(tree_page.render(result))
        except StorageError as error:
            self._tell(f"The page of the experiment could not be written: {error}")
            return None

    def _under_way_told(self) -> str:
        runs = [each.run for each in self.attempts if each.is_under_way]
        return f"{runs[0]} is under way" if runs else "the next attempt has not begun"
