"""A target is read as people write it, and what is not finite reaches nothing."""

from __future__ import annotations

import math

import pytest

from elastic_lm.errors import ConfigError
from elastic_lm.experiment.target import Target

FIGURES = {"held_out": ("loss", "perplexity"), "capitals": ("accuracy", "accuracy_per_byte")}


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("perplexity <= 30", Target("held_out", "perplexity", "<=", 30.0)),
        ("held_out.perplexity<30", Target("held_out", "perplexity", "<", 30.0)),
        ("capitals.accuracy >= 0.5", Target("capitals", "accuracy", ">=", 0.5)),
        ("my.task-2.accuracy > 5e-1", Target("my.task-2", "accuracy", ">", 0.5)),
    ],
)
def test_target_is_read_as_it_is_written(text: str, target: Target) -> None:
    assert Target.parse(text) == target
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize("number", ["30.00001", "123456789", "1e+300", "2.3456784", "0.1"])
def test_target_is_told_with_all_of_its_number(number: str) -> None:
    assert str(Target.parse(f"loss <= {number}")) == f"held_out.loss <= {number}"


@pytest.mark.parametrize(
    ("score", "shown"),
    [(31.0, "31.0000"), (30.0, "30.0000"), (30.00001, "30.00001"), (29.99999999, "30.0000"), (1234.5, "1,234.5000")],
)
def test_score_is_shown_with_the_digits_that_tell_it_from_the_bound(score: float, shown: str) -> None:
    target = Target.parse("loss <= 30")
    assert target.shown(score).startswith(shown)
    assert target.is_reached(float(target.shown(score).replace(",", ""))) == target.is_reached(score)


def test_figure_that_is_not_told_is_not_called_infinite() -> None:
    target = Target.parse("loss <= 30")
    told = [target.lacks({"held_out": figures}) for figures in ({}, {"loss": None}, {"loss": math.inf})]
    assert told == ["not told", "not finite", "not finite"]


@pytest.mark.parametrize(
    "text", ["", "perplexity", "perplexity = 30", "perplexity <= ", "<= 30", "a b <= 30", "30 >= perplexity"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no target; write TASK.FIGURE <= NUMBER"):
        Target.parse(text)


@pytest.mark.parametrize("number", ["thirty", "nan", "inf"])
def test_bound_that_is_no_finite_number_is_refused(number: str) -> None:
    with pytest.raises(ConfigError, match="is no finite number"):
        Target.parse(f"perplexity <= {number}")


@pytest.mark.parametrize(
    ("sign", "below", "equal", "above"),
    [("<", True, False, False), ("<=", True, True, False), (">", False, False, True), (">=", False, True, True)],
)
def test_target_is_reached_on_its_side(sign: str, below: bool, equal: bool, above: bool) -> None:
    target = Target("held_out", "loss", sign, 3.0)
    assert [target.is_reached(score) for score in (2.0, 3.0, 4.0, None)] == [below, equal, above, False]
    assert (target.order(2.0) < target.order(4.0)) == target.wants_less == below


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_score_is_finite_or_none(value: float | None) -> None:
    assert Target.parse("loss <= 3").score({"held_out": {"loss": value}}) is None


def test_score_is_the_figure_of_its_task() -> None:
    figures = {"held_out": {"accuracy": 0.1}, "capitals": {"accuracy": 0.6}}
    assert Target.parse("capitals.accuracy >= 0.5").score(figures) == 0.6
    assert Target.parse("other.accuracy >= 0.5").score(figures) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "held_out.perplexty <= 30",
            r"held_out tells no perplexty \(did you mean perplexity\?\); it tells loss, perplexity",
        ),
        ("capital.accuracy > 0.5", r"not among tasks: held_out, capitals \(did you mean capitals\?\)"),
        ("bleu > 20", "held_out tells no bleu"),
    ],
)
def test_figure_that_no_task_produces_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Target.parse(text).check(FIGURES)
