"""The loop of attempts: what is made, in which order, from which parent, until when; and that nothing is made twice."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ElasticLMError,
    OwnershipError,
    StorageError,
    SupersededError,
)
from elastic_lm.experiment.attempt import Attempt, Ended, parent_of
from elastic_lm.experiment.plan import Planned
from elastic_lm.experiment.result import ExperimentResult
from elastic_lm.experiment.target import Target
from elastic_lm.ownership import Ownership
from elastic_lm.result import RunResult
from elastic_lm.storage import Storage
from tests.experiment.killed import Killed, Mortal
from tests.experiment.trainers import TRAINED, FakeTrainer, by_learning_rate, carried_out, loop_of, plan_of
from tests.solo import solo_config

STEPS, TOKENS = 10, 10 * 2 * 32  # of a run from scratch


@pytest.fixture
def base(small_corpus: str, tmp_path: Path) -> RunConfig:
    """A learning rate a hundred times too high."""
    return solo_config(small_corpus, f"file://{tmp_path}", "base", steps=STEPS, optimizer={"learning_rate": 0.1})


def told(result: ExperimentResult) -> list[tuple[str, float | None]]:
    """(state, score) of each attempt."""
    return [(each.state, each.score) for each in result.attempts]


# -- until when ------------------------------------------------------------------------------------------------------


def test_loop_stops_at_the_first_attempt_that_reaches_the_target(base: RunConfig) -> None:
    trainer = FakeTrainer()
    result = carried_out(base, plan_of(), trainer)
    assert (result.verdict, result.ok) == ("reached", True)
    assert result.message == "lower-02 reaches held_out.perplexity <= 30: perplexity 20.0000"
    assert told(result) == [
        ("done", 200.0),
        ("done", pytest.approx(63.2, rel=0.01)),
        ("done", 20.0),
        ("not begun", None),
    ]
    assert trainer.begun == ["lower-00", "lower-01", "lower-02"]
    assert result.best is not None and result.best.run == "lower-02"
    assert (result.tokens, result.hours) == (3 * TOKENS, pytest.approx(3 * STEPS / 60))
    assert result.page is not None and result.page.endswith("/experiments/lower/page.html")


def test_base_is_attempt_zero_and_may_be_enough(base: RunConfig) -> None:
    trainer = FakeTrainer(score=lambda config: 12.0)
    assert carried_out(base, plan_of(), trainer).verdict == "reached"
    assert trainer.begun == ["lower-00"]


def test_experiment_that_has_ended_does_nothing_more(base: RunConfig) -> None:
    first = carried_out(base, plan_of(), FakeTrainer())
    trainer, there = FakeTrainer(), contents(base)
    again = carried_out(base, plan_of(), trainer)
    assert again == first
    assert not [call for call in trainer.calls if not call.startswith("check")]
    assert contents(base) == there


def test_plan_without_a_success_is_exhausted(base: RunConfig) -> None:
    result = carried_out(base, plan_of(target="perplexity < 20"), FakeTrainer())
    assert result.verdict == "exhausted"
    assert result.message.endswith("the plan has no more; the best is lower-02 with perplexity 20.0000")
    assert len(told(result)) == 4


def test_more_may_be_wanted_than_less(base: RunConfig) -> None:
    trainer = FakeTrainer(score=lambda config: 1 / by_learning_rate(config))
    result = carried_out(base, plan_of(target="perplexity >= 0.04"), trainer)
    assert (result.verdict, result.best and result.best.run) == ("reached", "lower-02")


def test_lines_tell_each_beginning_and_each_end(base: RunConfig) -> None:
    lines: list[str] = []
    trainer = FakeTrainer(verdicts={"lower-01": ["poisoned"]})
    loop_of(base, plan_of(), trainer, lines.append).run()
    assert lines == [
        "lower-00 begins: the base; from scratch; 640 tokens.",
        "lower-00 ends: perplexity 200.0000 does not reach held_out.perplexity <= 30.",
        "lower-01 begins: optimizer.learning_rate=0.01; from scratch; 640 tokens.",
        "lower-01 ends: poisoned, without a score: it was poisoned.",
        "lower-02 begins: optimizer.learning_rate=0.001; from scratch; 640 tokens.",
        "lower-02 ends: perplexity 20.0000 reaches held_out.perplexity <= 30.",
    ]


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", ["poisoned", "spiked", "failed_bug", "refused"])
def test_attempt_that_fails_has_no_score_and_the_next_one_begins(verdict: str, base: RunConfig) -> None:
    trainer = FakeTrainer(verdicts={"lower-00": [verdict]})
    result = carried_out(base, plan_of(), trainer)
    assert told(result)[0] == (verdict, None)
    assert result.verdict == "reached"
    assert "evaluate lower-00" not in trainer.calls


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_attempt_that_diverged_has_no_score(score: float | None, base: RunConfig) -> None:
    def of(config: RunConfig) -> float | None:
        return score if config.name == "lower-00" else by_learning_rate(config)

    result = carried_out(base, plan_of(parent="best", steps=5), FakeTrainer(of))
    assert told(result)[0] == ("done", None)
    assert [each.parent for each in result.attempts[:3]] == [None, None, 1]


@pytest.mark.parametrize("verdict", ["stopped", "unavailable", "data_error", "superseded", "failed"])
def test_run_that_may_go_on_ends_the_loop_until_the_next_command(verdict: str, base: RunConfig) -> None:
    trainer = FakeTrainer(verdicts={"lower-01": [verdict]})
    result = carried_out(base, plan_of(), trainer)
    assert (result.verdict, result.ok) == (verdict, False)
    assert result.message == f"lower-01: it was {verdict}; the same command goes on"
    assert [state for state, _ in told(result)] == ["done", "under way", "not begun", "not begun"]
    assert TOKENS < result.tokens < 2 * TOKENS  # what it has trained on so far counts
    assert result.hours == pytest.approx((STEPS + STEPS - 1) / 60)
    lines: list[str] = []
    result = loop_of(base, plan_of(), trainer, lines.append).run()
    assert lines[0] == "lower-01 goes on: optimizer.learning_rate=0.01; from scratch; 640 tokens."
    assert result.verdict == "reached"
    assert trainer.begun == ["lower-00", "lower-01", "lower-02"]  # the run went on, and did not begin again
    assert result.tokens == 3 * TOKENS


@pytest.mark.parametrize("verdict", ["failed", "unavailable", "data_error"])
def test_run_that_comes_to_the_same_trouble_twice_ends_its_attempt(verdict: str, base: RunConfig) -> None:
    trainer = FakeTrainer(verdicts={"lower-01": [verdict] * 5})
    lines: list[str] = []
    first = loop_of(base, plan_of(), trainer, lines.append).run()
    assert (first.verdict, first.attempts[1].state) == (verdict, "under way")
    assert lines[-1] == (
        f"lower-01 is interrupted: {verdict}. Should it come to that at step 9 again, it ends without a score."
    )
    second = carried_out(base, plan_of(), trainer)
    assert told(second)[1] == (verdict, None)
    assert second.attempts[1].ended is not None and second.attempts[1].ended.message == f"it was {verdict}"
    assert second.verdict == "reached"


def test_run_that_comes_to_trouble_at_another_step_goes_on_with_the_next_command(
    base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, steps, states = FakeTrainer(), iter((3, 5, 5)), []
    monkeypatch.setattr(trainer, "train", lambda config, limit_s: RunResult("failed", "away", next(steps)))
    for _ in range(3):
        states.append(carried_out(base, plan_of(budget={"attempts": 1}), trainer).attempts[0].state)
    assert states == ["under way", "under way", "failed"]


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (ConfigError("too long"), "bad_config"),
        (CheckpointError("gone"), "bad_checkpoint"),
        (DataError("bad"), "data_error"),
    ],
)
@pytest.mark.parametrize("verb", ["fork", "train", "evaluate"])
def test_error_that_comes_twice_at_the_same_step_ends_the_attempt(
    verb: str, error: ElasticLMError, verdict: str, base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = FakeTrainer()
    real = getattr(trainer, verb)
    of = (lambda given: given[2]) if verb == "fork" else (lambda given: given[0])

    def function(*given: Any) -> Any:
        if of(given).name == "lower-01":
            raise error
        return real(*given)

    monkeypatch.setattr(trainer, verb, function)
    plan = plan_of(parent="base", steps=5)
    with pytest.raises(type(error), match=str(error)):
        carried_out(base, plan, trainer)
    second = carried_out(base, plan, trainer)
    assert told(second)[1] == (verdict, None)
    assert second.attempts[1].ended is not None and second.attempts[1].ended.message == str(error)
    assert second.attempts[1].ended.tokens == (TOKENS // 2 if verb == "evaluate" else 0)
    assert second.verdict == "reached"


def test_signal_in_a_runs_last_step_ends_the_loop_before_the_next_attempt(
    base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = FakeTrainer()
    real = trainer.train

    def train(config: RunConfig, limit_s: float | None) -> RunResult:
        trainer.signal = "SIGTERM"
        return real(config, limit_s)

    monkeypatch.setattr(trainer, "train", train)
    result = carried_out(base, plan_of(), trainer)
    assert (result.verdict, result.message) == ("stopped", "SIGTERM received; the same command goes on")
    assert [state for state, _ in told(result)] == ["done", "not begun", "not begun", "not begun"]
    assert carried_out(base, plan_of(), FakeTrainer()).verdict == "reached"


def test_loop_that_a_signal_has_ended_goes_on_to_the_end_when_it_is_run_again(
    base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = FakeTrainer(verdicts={"lower-00": ["stopped"]})
    real = trainer.train

    def train(config: RunConfig, limit_s: float | None) -> RunResult:
        trainer.signal = "SIGINT" if trainer.verdicts["lower-00"] else trainer.signal
        return real(config, limit_s)

    monkeypatch.setattr(trainer, "train", train)
    loop = loop_of(base, plan_of(), trainer)
    assert [loop.run().verdict for _ in range(2)] == ["stopped", "reached"]


def test_error_of_the_trainer_ends_the_loop_until_the_next_command(
    base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = FakeTrainer()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", raising(StorageError("away")))
        with pytest.raises(StorageError, match="away"):
            carried_out(base, plan_of(), trainer)
    assert carried_out(base, plan_of(), trainer).verdict == "reached"
    assert trainer.begun == ["lower-00", "lower-01", "lower-02"]
    assert trainer.calls.count("train lower-00") == 1  # it was done


def raising(error: Exception) -> Callable[..., Any]:
    def function(*_: object) -> Any:
        raise error

    return function


def test_spent_budget_is_told_with_all_its_digits(base: RunConfig) -> None:
    plan = plan_of(budget={"tokens": 1234567.5, "attempts": 1})
    carried_out(base, plan, FakeTrainer())
    with pytest.raises(ConfigError, match=r"budget.tokens: 1234567.5 -> 1234567.25, which is less"):
        loop_of(base, plan_of(budget={"tokens": 1234567.25, "attempts": 1}), FakeTrainer())


def test_page_that_cannot_be_written_is_told_and_stops_nothing(
    base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Storage.write

    def write(storage: Storage, path: str, data: bytes) -> None:
        if path == "page.html":
            raise StorageError("full")
        real(storage, path, data)

    monkeypatch.setattr(Storage, "write", write)
    lines: list[str] = []
    result = loop_of(base, plan_of(), FakeTrainer(), lines.append).run()
    assert (result.verdict, result.page) == ("reached", None)
    assert "The page of the experiment could not be written: full" in lines


def test_page_for_which_storage_does_not_answer_stops_nothing(base: RunConfig) -> None:
    """Within budget.tokens it takes a look at the next attempt's parent."""
    lines: list[str] = []

    class Flaky(FakeTrainer):
        def checkpoints(self, config: RunConfig) -> Sequence[int]:
            if " ends: " in lines[-1]:  # the page is what follows
                raise StorageError("away")
            return super().checkpoints(config)

    plan = plan_of(parent="best", steps=5, budget={"tokens": 1e6})
    assert loop_of(base, plan, Flaky(), lines.append).run().verdict == "reached"
    assert lines.count("The page of the experiment could not be written: away") == 2


# -- whose state -----------------------------------------------------------------------------------------------------


def attempt(number: int, score: float | None) -> Attempt:
    return Attempt(Planned(number), f"a-{number:02d}", None, Ended(number, "done", "", score))


@pytest.mark.parametrize(
    ("how", "scores", "sign", "number"),
    [
        ("best", [5.0, 3.0, 4.0], "<=", 1),
        ("best", [5.0, 3.0, 4.0], ">=", 0),
        ("best", [None, 3.0, 3.0], "<=", 1),  # the first of equal ones
        ("best", [None, None], "<=", None),
        ("last", [5.0, 3.0, 4.0], "<=", 2),
        ("last", [5.0, 3.0, None], "<=", 1),
        ("base", [5.0, 3.0], "<=", 0),
        ("base", [None, 3.0], "<=", None),
    ],
)
def test_parent_is_chosen_among_those_with_a_score(
    how: str, scores: list[float | None], sign: str, number: int | None
) -> None:
    found = parent_of(how, [attempt(n, score) for n, score in enumerate(scores)], Target("held_out", "loss", sign, 0.0))
    assert (None if found is None else found.number) == number


@pytest.mark.parametrize(
    ("parent", "forks"),
    [
        ("base", [("lower-00", 10, "lower-01"), ("lower-00", 10, "lower-02"), ("lower-00", 10, "lower-03")]),
        ("last", [("lower-00", 10, "lower-01"), ("lower-01", 15, "lower-02"), ("lower-02", 20, "lower-03")]),
        ("best", [("lower-00", 10, "lower-01"), ("lower-01", 15, "lower-02"), ("lower-02", 20, "lower-03")]),
    ],
)
def test_forks_go_on_from_the_chosen_parent(parent: str, forks: list[tuple[str, int, str]], base: RunConfig) -> None:
    trainer = FakeTrainer()
    result = carried_out(base, plan_of(parent=parent, steps=5, target="perplexity < 1"), trainer)
    assert trainer.forks == forks
    assert [each.ended.tokens for each in result.attempts if each.ended] == [TOKENS, *[TOKENS // 2] * 3]
    assert [each.parent for each in result.attempts] == [None, *(int(name[-2:]) for name, _, _ in forks)]


def test_checkpoints_are_looked_up_once_for_each_fork(base: RunConfig) -> None:
    """Each look reads all of the parent's manifests."""
    asked: list[str] = []

    class Noting(FakeTrainer):
        def checkpoints(self, config: RunConfig) -> Sequence[int]:
            asked.append(config.name)
            return super().checkpoints(config)

    carried_out(base, plan_of(parent="last", steps=5, target="perplexity < 1"), Noting())
    assert asked == ["lower-00", "lower-01", "lower-02"]


def test_fork_has_its_parents_changes_and_its_own(base: RunConfig) -> None:
    changes = [{"optimizer.learning_rate": 1e-2}, {"model.dropout": 0.1}, {"optimizer.learning_rate": 1e-4}]
    plan = plan_of(parent="best", steps=5, target="perplexity < 1", changes=changes)
    carried_out(base, plan, FakeTrainer())
    dropped = RunConfig.load(base.storage.removeprefix("file://") + "/runs/lower-02/config.yaml")
    assert (dropped.optimizer.learning_rate, dropped.model.dropout, dropped.training.steps) == (1e-2, 0.1, 20)


def test_fork_of_an_earlier_step_with_batches_left_out(base: RunConfig) -> None:
    base = base.replace("checkpoint.every_steps=4", "checkpoint.keep=3")
    plan = plan_of(parent="base", parent_step=8, target="perplexity < 1", changes=[{"skip": [[8, 9]]}])
    trainer = FakeTrainer()
    result = carried_out(base, plan, trainer)
    assert trainer.forks == [("lower-00", 8, "lower-01")]
    config = RunConfig.load(base.storage.removeprefix("file://") + "/runs/lower-01/config.yaml")
    assert config.training.skip == ((8, 9),)
    assert result.attempts[1].ended is not None and result.attempts[1].ended.tokens == TOKENS // 5


@pytest.mark.parametrize(
    ("kept", "change", "step", "num_steps"),
    [
        ([1, 10], {}, 1, 9),  # step 10 is nearer, and the end
        ([1, 4, 7, 10], {}, 4, 6),
        ([7, 10], {}, 7, 3),
        ([6, 7], {}, 6, 4),  # the one that is wanted
        ([10], {"steps": 5}, 10, 5),  # with steps of its own a fork goes on from any
        ([10], {"training.steps": 12}, 10, 2),
        ([10], {}, None, 10),
    ],
)
def test_fork_begins_where_it_is_wanted_or_before_and_after_it_only_where_something_is_left(
    kept: list[int], change: dict[str, int], step: int | None, num_steps: int, base: RunConfig
) -> None:
    base = base.replace("checkpoint.every_steps=2", "checkpoint.keep=10")
    trainer = FakeTrainer()
    trainer.kept["lower-00"] = kept
    plan = plan_of(parent="base", parent_step=6, changes=[{"optimizer.learning_rate": 1e-3, **change}])
    lines: list[str] = []
    result = loop_of(base, plan, trainer, lines.append).run()
    assert trainer.forks == ([] if step is None else [("lower-00", step, "lower-01")])
    assert result.verdict == "reached"
    assert result.attempts[1].ended is not None and result.attempts[1].ended.tokens == num_steps * TOKENS // STEPS
    if step is None:
        assert "; from scratch, as no checkpoint of lower-00 leaves anything to train; 640 tokens." in lines[2]


def test_fork_goes_on_from_another_checkpoint_when_the_promised_one_is_gone(base: RunConfig) -> None:
    base = base.replace("checkpoint.every_steps=4", "checkpoint.keep=3")
    trainer = FakeTrainer()
    trainer.kept = {"lower-00": [8, 9, 10], "lower-01": []}
    plan = plan_of(parent="last", parent_step=4, steps=8, target="perplexity < 1",
                   changes=[{"optimizer.learning_rate": 1e-2}, {"optimizer.learning_rate": 1e-3}])  # fmt: skip
    lines: list[str] = []
    result = loop_of(base, plan, trainer, lines.append).run()
    assert trainer.forks == [("lower-00", 8, "lower-01")]
    note = "there is no checkpoint of step 4, and that is the first one after it"
    assert [each.begun and each.begun.note for each in result.attempts] == [
        None, note, "no checkpoint of lower-01 can be used any more",
    ]  # fmt: skip
    assert (
        f"lower-01 begins: optimizer.learning_rate=0.01; a fork of lower-00 at step 8, as {note}; 512 tokens." in lines
    )


def test_what_changes_no_bits_reaches_forks_that_were_begun_before(
    base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, trained = FakeTrainer(verdicts={"lower-01": ["stopped"]}), []
    real = trainer.train

    def train(config: RunConfig, limit_s: float | None) -> RunResult:
        trained.append(config)
        return real(config, limit_s)

    monkeypatch.setattr(trainer, "train", train)
    plan = plan_of(parent="base", steps=5, changes=[{"optimizer.learning_rate": 1e-3, "workers.max": 1}])
    carried_out(base, plan, trainer)
    carried_out(base.replace("checkpoint.keep=7", "training.recompute=true", "workers.max=2"), plan, trainer)
    first, second = trained[-2:]
    assert first.name == second.name == "lower-01"
    assert (second.checkpoint.keep, second.training.recompute, second.workers.max) == (7, True, 1)
    assert second.identity() == first.identity() and second.training.steps == first.training.steps == 15


def test_attempt_without_a_usable_parent_begins_from_scratch_and_says_so(base: RunConfig) -> None:
    lines: list[str] = []
    trainer = FakeTrainer(verdicts={"lower-00": ["poisoned"]})
    result = loop_of(base, plan_of(parent="best", steps=5), trainer, lines.append).run()
    assert lines[2] == (
        "lower-01 begins: optimizer.learning_rate=0.01; from scratch, as no attempt that could be its parent (best) has a score; "
        "640 tokens."
    )
    assert trainer.forks == [("lower-01", 10, "lower-02")]
    assert result.attempts[1].begun is not None and result.attempts[1].begun.note is not None


def test_fork_whose_changes_do_not_fit_its_parent_is_an_attempt_without_a_score(base: RunConfig) -> None:
    trainer = FakeTrainer()
    trainer.refuses_forks = True
    result = carried_out(base, plan_of(parent="base", steps=5), trainer)
    assert (result.verdict, told(result)[1]) == ("exhausted", ("refused", None))
    assert result.attempts[1].ended is not None and result.attempts[1].ended.message == "that state cannot take it"


class OfOneShape(FakeTrainer):
    """From scratch nothing else can begin."""

    def check(self, config: RunConfig) -> None:
        if config.model.num_layers != 1:
            raise ConfigError("that is not what the folder has")


DEEPER: dict[str, Any] = {"parent": "base", "steps": 5, "changes": [{"model.num_layers": 2}]}


def of_a_folder(base: RunConfig) -> RunConfig:
    return base.replace("model.init=hf:/folder", f"model.init_hash={'f' * 64}")


def test_fork_may_have_another_shape_than_the_folder_that_the_base_begins_from(base: RunConfig) -> None:
    trainer = OfOneShape()
    result = carried_out(of_a_folder(base), plan_of(**DEEPER), trainer)
    assert trainer.forks == [("lower-00", 10, "lower-01")]
    assert [state for state, _ in told(result)] == ["done", "done"]
    for refused in ({**DEEPER, "parent": "scratch", "steps": None}, {**DEEPER, "changes": [{"model.num_layers": 0}]}):
        with pytest.raises(ConfigError):
            loop_of(of_a_folder(base), plan_of(name="another", **refused), OfOneShape())
    with pytest.raises(ConfigError, match="that is not what the folder has"):  # which there is none of
        loop_of(base, plan_of(name="another", **DEEPER), OfOneShape())


def test_attempt_of_another_shape_that_has_no_parent_is_refused(base: RunConfig) -> None:
    trainer = OfOneShape(verdicts={"lower-00": ["poisoned"]})
    result = carried_out(of_a_folder(base), plan_of(**DEEPER), trainer)
    assert told(result) == [("poisoned", None), ("refused", None)]
    assert result.attempts[1].ended is not None and result.attempts[1].ended.message == (
        "it has no parent, and from scratch it cannot begin: that is not what the folder has"
    )
    assert trainer.begun == ["lower-00"]


# -- what it may take ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "begun", "message"),
    [
        ({"attempts": 2}, 2, "all 2 attempts of budget.attempts are made"),
        (
            {"tokens": 2.5 * TOKENS},
            2,
            "1,280 tokens are trained on, and lower-02 would take 640 more, beyond budget.tokens=1600",
        ),
        ({"tokens": 2.0 * TOKENS}, 2, "beyond budget.tokens=1280"),
        ({"hours": 2 * STEPS / 60}, 2, "hours of budget.hours are over"),
    ],
)
def test_spent_budget_ends_the_loop(budget: dict[str, float], begun: int, message: str, base: RunConfig) -> None:
    trainer = FakeTrainer()
    result = carried_out(base, plan_of(budget=budget), trainer)
    assert (result.verdict, len(trainer.begun)) == ("budget", begun)
    assert message in result.message
    assert "the best is lower-01" in result.message
    assert carried_out(base, plan_of(), trainer).verdict == "reached"  # more of it, and the same command goes on
    assert len(trainer.begun) == 3


def test_hours_that_are_over_stop_the_run_that_trains_with_a_checkpoint(base: RunConfig) -> None:
    trainer = FakeTrainer()
    result = carried_out(base, plan_of(budget={"hours": 1.4 * STEPS / 60}), trainer)
    assert (result.verdict, told(result)[1]) == ("budget", ("under way", None))
    assert carried_out(base, plan_of(budget={"hours": 1.4 * STEPS / 60}), trainer).verdict == "budget"
    assert trainer.calls.count("train lower-01") == 1  # nothing is left of it
    assert carried_out(base, plan_of(budget={"hours": 9}), trainer).verdict == "reached"
    assert trainer.begun == ["lower-00", "lower-01", "lower-02"]


def test_page_counts_what_the_attempt_under_way_has_taken(base: RunConfig) -> None:
    result = carried_out(base, plan_of(budget={"hours": 1.5 * STEPS / 60}), FakeTrainer())
    assert (result.verdict, result.tokens, result.hours) == ("budget", 1.5 * TOKENS, 0.25)
    page = contents(base)["page.html"].decode()
    assert "<b>Tokens</b><span>960</span>" in page and "<b>Trained for</b><span>15:00</span>" in page


def test_page_says_that_an_attempt_goes_on(base: RunConfig) -> None:
    class Looking(FakeTrainer):
        def train(self, config: RunConfig, limit_s: float | None) -> RunResult:
            verdicts.append(re.findall("<b>Verdict</b><span>(.*?)</span>", contents(base)["page.html"].decode()))
            return super().train(config, limit_s)

    verdicts: list[list[str]] = []
    trainer = Looking(verdicts={"lower-01": ["stopped"]})
    assert carried_out(base, plan_of(), trainer).verdict == "stopped"
    assert "<span>stopped</span>" in contents(base)["page.html"].decode()
    assert carried_out(base, plan_of(), trainer).verdict == "reached"
    assert verdicts == [["running"]] * 4


def test_what_was_spent_before_an_interruption_counts(base: RunConfig) -> None:
    trainer = FakeTrainer(verdicts={"lower-01": ["stopped", "stopped", "stopped"]})
    plan = plan_of(budget={"tokens": 2.5 * TOKENS, "hours": 0.5})
    assert [carried_out(base, plan, trainer).verdict for _ in range(4)] == ["stopped", "stopped", "stopped", "budget"]
    assert trainer.begun == ["lower-00", "lower-01"]


# -- cut short at any moment -----------------------------------------------------------------------------------------


def contents(base: RunConfig, name: str = "lower") -> dict[str, bytes]:
    """Of the experiment, but for its claims."""
    folder = Storage.open(base.storage).child(f"experiments/{name}")
    return {path: folder.read(path) for path in folder.list() if not path.startswith("owner/")}


def runs(base: RunConfig) -> dict[str, bytes]:
    """What each run has come to: it would be more if one had been trained twice."""
    folder = Storage.open(base.storage).child("runs")
    return {path: folder.read(path) for path in folder.list() if path.endswith(TRAINED)}


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("parent", ["scratch", "best"])
def test_loop_that_is_killed_at_any_write_goes_on_and_makes_no_attempt_twice(
    parent: str, late: bool, base: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(parent=parent, changes=[{"optimizer.learning_rate": 1e-2}, {"optimizer.learning_rate": 1e-3}],
                   **({} if parent == "scratch" else {"steps": 4}))  # fmt: skip
    whole, mortal = FakeTrainer(verdicts={"lower-01": ["poisoned"]}), Mortal(monkeypatch)
    result = carried_out(base, plan, whole)
    assert mortal.count >= 25
    for allowed in range(mortal.count):
        mine = base.replace(f"storage={tmp_path}/{allowed}")
        trainer = FakeTrainer(verdicts={"lower-01": ["poisoned"]})
        mortal.left, mortal.late = allowed, late
        with pytest.raises(Killed):
            carried_out(mine, plan, trainer)
        mortal.left = 10**9
        trainer.verdicts["lower-01"] = ["poisoned"]
        again = carried_out(mine, plan, trainer)
        assert told(again) == told(result)
        assert (again.verdict, again.tokens, again.hours) == (result.verdict, result.tokens, result.hours)
        assert [each.parent for each in again.attempts] == [each.parent for each in result.attempts]
        assert runs(mine) == runs(base)
        assert contents(mine).keys() == contents(base).keys()
        assert contents(mine)["page.html"] == contents(base)["page.html"]


# -- two at once -----------------------------------------------------------------------------------------------------


def test_experiment_that_another_process_runs_is_left_alone(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_lm.ownership.LOOK_S", 0.02)
    folder = Storage.open(base.storage).child("experiments/lower")
    other = Ownership.acquire(folder, "lower", job_token=secrets.token_hex(4), renew_s=0.05, expiry_s=0.5)
    try:
        lines: list[str] = []
        trainer = FakeTrainer()
        with pytest.raises(OwnershipError) as refused:
            loop_of(base, plan_of(), trainer, lines.append).run()
        assert str(refused.value) == (
            f"experiment lower is being run by another process: {other.owner}; its claim was renewed while this one watched. "
            "Wait for its end, or stop it there; the same command goes on then"
        )
        assert trainer.begun == []
        assert lines[0].startswith("Experiment lower belongs to owner 1")
    finally:
        other.release()
    assert carried_out(base, plan_of(), trainer).verdict == "reached"


def test_experiment_that_another_process_took_over_ends_and_says_so(
    base: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, taken = FakeTrainer(), []
    real = trainer.train

    def train(config: RunConfig, limit_s: float | None) -> RunResult:
        folder = Storage.open(base.storage).child("experiments/lower")
        taken.append(Ownership.acquire(folder, "lower", job_token="other", is_gone=lambda owner: True))
        return real(config, limit_s)

    monkeypatch.setattr(trainer, "train", train)
    with pytest.raises(
        SupersededError, match=r"^experiment lower was taken over by .* and the experiment goes on there"
    ):
        carried_out(base, plan_of(), trainer)
    taken[0].release()


# -- the same name, another plan -------------------------------------------------------------------------------------


def test_attempts_may_be_added_and_the_budget_raised(base: RunConfig) -> None:
    trainer = FakeTrainer()
    first = [{"optimizer.learning_rate": 1e-2}]
    assert carried_out(base, plan_of(changes=first, budget={"attempts": 2}), trainer).verdict == "exhausted"
    more = [*first, {"optimizer.learning_rate": 1e-3}]
    assert carried_out(base, plan_of(changes=more, budget={"attempts": 2}), trainer).verdict == "budget"
    assert carried_out(base, plan_of(changes=more, budget={"attempts": 9}), trainer).verdict == "reached"
    assert trainer.begun == ["lower-00", "lower-01", "lower-02"]
    plans = [path for path in contents(base) if path.startswith("plans/")]
    assert plans == ["plans/00000000.json", "plans/00000001.json"]  # what began, and what went on


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": "loss <= 3"}, "target: held_out.perplexity <= 30 -> held_out.loss <= 3"),
        ({"parent": "best", "steps": 5}, "parent: scratch -> best"),
        (
            {"changes": [{"optimizer.learning_rate": 5e-3}]},
            r"attempt 1: \{changes: \{optimizer.learning_rate: 0.01\}.* -> ",
        ),
        ({"changes": [{"optimizer.learning_rate": 1e-2}]}, r"attempt 2: .* -> none"),
        ({"budget": {"tokens": 1e4}}, "budget.tokens: 100000 -> 10000, which is less"),
        ({"budget": {"tokens": 1e5, "hours": 5}}, "budget.hours: none -> 5, which is less"),
    ],
)
def test_another_plan_under_the_name_is_refused_with_what_differs(
    changed: dict[str, Any], message: str, base: RunConfig
) -> None:
    trainer = FakeTrainer(verdicts={"lower-01": ["stopped"]})
    kept = {"budget": {"tokens": 1e5}}
    carried_out(base, plan_of(**kept), trainer)
    with pytest.raises(ConfigError, match=f"is another one than this plan:\n  {message}"):
        loop_of(base, plan_of(**{**kept, **changed}), trainer)


def test_another_base_or_task_under_the_name_is_refused(base: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    carried_out(base, plan_of(), FakeTrainer())
    with pytest.raises(ConfigError, match=r"base.training.seed: 0 -> 1\n  base.training.steps: 10 -> 11"):
        loop_of(base.replace("training.seed=1", "training.steps=11"), plan_of(), FakeTrainer())
    trainer = FakeTrainer()
    monkeypatch.setattr(
        trainer,
        "asked",
        lambda config: {k: type(v)("other", v.figures) for k, v in FakeTrainer().asked(config).items()},
    )
    with pytest.raises(ConfigError, match="tasks.held_out: hash of 32 -> other"):
        loop_of(base, plan_of(), trainer)
    assert loop_of(base.replace("workers.max=2", "checkpoint.keep=7"), plan_of(), FakeTrainer()).run().ok


def test_files_that_are_none_of_the_experiments_are_passed_over(base: RunConfig) -> None:
    first = carried_out(base, plan_of(), FakeTrainer())
    folder = Storage.open(base.storage).child("experiments/lower")
    for path in ("plans/.DS_Store", "plans/zz.txt", "attempts/00-ended.json.orig", "attempts/mine-begun.json"):
        folder.write(path, b"x")
    assert carried_out(base, plan_of(), FakeTrainer()) == first
    more = plan_of(changes=[*plan_of().changes, {"model.dropout": 0.1}], target="perplexity <= 30")
    carried_out(base, more, FakeTrainer())


def test_record_that_is_damaged_is_told(base: RunConfig) -> None:
    carried_out(base, plan_of(), FakeTrainer())
    folder = Storage.open(base.storage).child("experiments/lower")
    for path, data in (("attempts/01-ended.json", b"{"), ("attempts/01-ended.json", b"[]"),
                       ("plans/00000000.json", b'{"format": "elastic-lm experiment", "version": 2}')):  # fmt: skip
        before = folder.read(path)
        folder.write(path, data)
        with pytest.raises(ConfigError, match=rf"{path} cannot be read: "):
            loop_of(base, plan_of(), FakeTrainer())
        folder.write(path, before)
