"""An experiment as its plan.yaml says it: a base, a target, a budget, and what is tried to get there.

Invariant: a plan that exists is of the right form, and its attempts are numbered for good: the base is attempt 0, the changes
follow in the order of the list, a grid's in that of its fields, the first of them slowest. Whether they can be trained is
rehearsal.py's business.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from elastic_lm import config_text
from elastic_lm.config import Count, Part, RunConfig
from elastic_lm.errors import ConfigError, NotFoundError
from elastic_lm.experiment.changes import PLACE
from elastic_lm.experiment.skip import Skip, ranges_told
from elastic_lm.experiment.target import HELD_OUT, Target
from elastic_lm.storage import Storage

MOST_ATTEMPTS = 1_000  # each is gone through beforehand, which takes some 50 ms
LAST_STEP = "training.steps"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,57}$", examples=["lower-rate"])]
Parent = Literal["scratch", "best", "last", "base"]


@dataclass(frozen=True)
class Planned:
    """One attempt. `changes`: what it changes, by dotted names. `skip`: batches that it leaves out beside that.

    `steps`: how many a fork trains beyond its parent's; None: to training.steps.
    """

    number: int
    changes: dict[str, Any] = field(default_factory=dict)
    skip: Skip = ()
    steps: int | None = None

    @property
    def overrides(self) -> list[str]:
        """As `a.b=value`."""
        return [f"{name}={_as_yaml(value)}" for name, value in self.changes.items()]

    @property
    def told(self) -> str:
        """In a few words."""
        parts = [f"{name}={config_text.inline(value)}" for name, value in self.changes.items()]
        if self.skip:
            parts.append(f"skip {ranges_told(self.skip)}")
        return ", ".join(parts) or ("the base" if self.number == 0 else "nothing changed")


class Budget(Part):
    """What an experiment may take, all of its attempts together. None: as much as they take."""

    tokens: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=[2.0e9])
    """Tokens that are trained on. No attempt begins that would go beyond them."""
    hours: float | None = Field(default=None, gt=0, allow_inf_nan=False, examples=[12.0])
    """Hours of training, as the runs' logs tell them; what is running then stops with a checkpoint."""
    attempts: int | None = Field(default=None, ge=1)
    """Attempts, the base among them."""


class Plan(Part):
    """What plan.yaml holds."""

    name: Name
    """Name of the experiment; its runs are NAME-00, NAME-01 and so on."""
    base: str = Field(min_length=1, examples=["run.yaml"])
    """The config that all attempts begin with: a YAML file, relative to the plan, or its address."""
    target: str = Field(examples=["held_out.perplexity <= 30"])
    """What is wanted: TASK.FIGURE <= NUMBER, with <=, <, >= or >. A figure alone is of held_out."""
    tasks: tuple[str, ...] = Field(default=(HELD_OUT,), strict=False, min_length=1)
    """What each attempt is asked: held_out, or YAML files of tasks, relative to the plan."""
    samples: int | None = Field(default=None, ge=1)
    """Held-out samples, at most. None: all. Refused where `held_out` is no task."""
    budget: Budget = Budget()
    """What may be spent."""
    parent: Parent = "scratch"
    """Where attempts after the base begin: at step 0 (scratch), or as a fork of the attempt with the best score (best), of the
    last one that has a score (last), or of the base (base)."""
    parent_step: Count | None = None
    """Which of its parent's checkpoints a fork goes on from. None: the last."""
    steps: Count | None = None
    """Steps that a fork trains beyond its parent's. None: to training.steps."""
    changes: tuple[dict[str, Any], ...] = Field(
        default=(), strict=False, examples=[[{"optimizer.learning_rate": 0.001}]]
    )
    """One attempt each, in this order: fields of the config with their values; for one alone also `steps`, and `skip`, a list of
    ranges of batches that it leaves out."""
    grid: dict[str, list[Any]] = Field(default_factory=dict, examples=[{"optimizer.learning_rate": [0.001, 0.003]}])
    """In place of changes: fields with a list of values each, in all combinations; the last field changes fastest."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(config_text.sentences(error, type(self)).replace("of the config", "of a plan")) from None
        self._check()

    @classmethod
    def load(cls, address: str | os.PathLike[str]) -> Plan:
        """The YAML file at a path or an address; relative ones in it are made whole.    Raises: ConfigError, StorageError."""
        where = os.fspath(address)
        values = config_text.parse(text_of(where, "plan"), where)
        if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
            raise ConfigError(f"{where} is no plan; write name:, base:, target: and changes:, each with its value")
        try:
            plan = cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        tasks = tuple(config_text.beside(where, task) if config_text.is_yaml(task) else task for task in plan.tasks)
        return plan.model_copy(update={"base": config_text.beside(where, plan.base), "tasks": tasks})

    @property
    def wanted(self) -> Target:
        return Target.parse(self.target)

    @property
    def forks(self) -> bool:
        """Whether attempts after the base are forks, where there is something to fork."""
        return self.parent != "scratch"

    def base_config(self) -> RunConfig:
        """Raises: ConfigError, StorageError."""
        return RunConfig.from_yaml(text_of(self.base, "base config"), self.base)

    def attempts(self) -> tuple[Planned, ...]:
        """All, the base first.    Raises: ConfigError."""
        tried = [*self.changes, *self._combined()]
        return (Planned(0), *(self._planned(number, values) for number, values in enumerate(tried, start=1)))

    def _combined(self) -> Iterator[dict[str, Any]]:
        if self.grid:
            for values in itertools.product(*self.grid.values()):
                yield dict(zip(self.grid, values, strict=True))

    def _planned(self, number: int, values: dict[str, Any]) -> Planned:
        fields = {name: value for name, value in values.items() if name not in ("steps", "skip")}
        changes = _flat(number, fields)
        steps = self.steps
        if LAST_STEP in changes:  # which says the same
            if "steps" in values:
                raise ConfigError(f"attempt {number} gives both steps and {LAST_STEP}; give one of the two")
            steps = None
        return Planned(
            number, changes, _skip(number, values.get("skip", [])), _steps(number, values.get("steps", steps))
        )

    def _check(self) -> None:
        """Raises: ConfigError when fields do not go together."""
        Target.parse(self.target)
        if bool(self.changes) == bool(self.grid):
            what = "both changes and grid are" if self.grid else "neither changes nor a grid is"
            raise ConfigError(f"{what} given; give one of the two, e.g. changes: [{{optimizer.learning_rate: 1.0e-3}}]")
        for name, values in self.grid.items():
            if not values:
                raise ConfigError(f"grid: {name} has no values; give some, or leave the field out")
        number = len(self.changes) + math.prod(len(values) for values in self.grid.values()) * bool(self.grid)
        if number > MOST_ATTEMPTS:
            raise ConfigError(
                f"the plan has {number:,} attempts, and may have {MOST_ATTEMPTS:,}; leave out fields or values of its grid"
            )
        planned = self.attempts()
        for each in planned:
            for name in each.changes:
                if name.partition(".")[0] in PLACE:
                    raise ConfigError(
                        f"attempt {each.number} changes {name}, but its run is called by the plan's name and kept where the base "
                        "is; leave it out"
                    )
        given = [name for name in ("parent_step", "steps") if getattr(self, name) is not None]
        given += ["steps of an attempt"] if not given and any(each.steps for each in planned) else []
        if given and not self.forks:
            raise ConfigError(
                f"{' and '.join(given)} count for forks, and parent: scratch makes none; change training.steps instead, or say "
                "parent: best, last or base"
            )


def text_of(address: str, what: str) -> str:
    """Of a file or an object.    Raises: ConfigError when it is not there, or no text; StorageError."""
    if "://" not in address:
        return config_text.text_of(address, what)
    folder, _, name = address.rpartition("/")
    try:
        return Storage.open(folder).read(name).decode()
    except NotFoundError as error:
        raise ConfigError(f"the {what} {address} is not there; correct the address") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the {what} {address} is no UTF-8 text; write it as UTF-8") from error


def _flat(number: int, fields: dict[str, Any]) -> dict[str, Any]:
    """By dotted names.    Raises: ConfigError when one is given twice or is no name, or its value is none that is kept."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        for field_name, given in config_text.flatten({name: value}).items():
            if field_name != field_name.strip() or "=" in field_name:
                raise ConfigError(
                    f"attempt {number}: {field_name!a} is no field's name; write it without = and without spaces around it"
                )
            if field_name in flat:
                raise ConfigError(f"attempt {number} gives {field_name} twice; leave one out")
            _check_plain(number, field_name, given)
            flat[field_name] = given
    return flat


def _as_yaml(value: Any) -> str:
    """As JSON, in which YAML has no pairs of surrogates: what is beyond U+FFFF stands as it is, and what YAML folds does not."""
    text = json.dumps(value, ensure_ascii=False)
    return "".join(char if char < "\x7f" or char > "\uffff" else f"\\u{ord(char):04x}" for char in text)


def _check_plain(number: int, name: str, value: Any) -> None:
    """Raises: ConfigError unless it is kept as it is given: numbers, text, true, false, null, and lists of these."""
    try:
        json.dumps({name: value}, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"attempt {number}: {name!a}={value!a} is no value that is kept as it is ({error}); write finite numbers, text (in "
            "quotes where it looks like a date), true, false, null, or a list of these"
        ) from None


def _steps(number: int, value: Any) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ConfigError(f"attempt {number}: steps={value!r} is no number of steps; write a whole one above 0")


def _skip(number: int, value: Any) -> Skip:
    ranges: Sequence[Any] = value if isinstance(value, list) else [None]
    for each in ranges:
        whole = isinstance(each, list) and len(each) == 2 and all(type(end) is int for end in each)
        if not whole or not 0 <= each[0] < each[1]:
            raise ConfigError(
                f"attempt {number}: skip={value!r} is no list of ranges of batches; write e.g. [[500, 520]], of which 520 is not "
                "left out"
            )
    return tuple((start, stop) for start, stop in ranges)
