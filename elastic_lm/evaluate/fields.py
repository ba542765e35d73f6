"""What a user wrote, taken field by field: each is checked as it is taken, and what nobody took is a mistake or a remark."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic_lm.config_text import hint
from elastic_lm.errors import ConfigError

MISSING: Any = object()
SHOWN_CHARACTERS = 60


class Fields:
    """A mapping from `source`, which errors name: a file, or a line of one.    Raises: ConfigError when it is none."""

    def __init__(self, values: object, source: str) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{source} is {_shown(values)}, and not fields with names; write NAME: VALUE for each")
        self.values, self.source = values, source
        self.taken: dict[str, Any] = {}  # with what stands for those that are not there
        self.rules: dict[str, str] = {}  # what else decides the outcome, by whoever takes the fields

    def text(self, name: str, *, empty: bool = False) -> str:
        """Raises: ConfigError when it is missing, no text, or blank where that makes no sense."""
        rule = "a text" if empty else "a text that is not blank"
        found: str = self._take(name, MISSING, lambda value: isinstance(value, str) and (empty or value.strip()), rule)
        self._check_text(name, found)
        return found

    def optional_text(self, name: str) -> str | None:
        """It may be blank, and not empty.    Raises: ConfigError."""
        found: str | None = self._take(name, None, lambda value: isinstance(value, str) and value, "a text")
        self._check_text(name, found or "")
        return found

    def texts(self, name: str, least: int) -> list[str]:
        """Raises: ConfigError when these are not at least so many texts."""
        rule = f"a list of at least {least} text{'s' * (least > 1)}"
        found: list[str] = self._take(name, MISSING, lambda value: True, rule)
        if (fault := _fault_of_texts(found, least)) is not None:
            raise ConfigError(f"{self.source}: {name}={_shown(found)} is not {rule}{fault}")
        for each in found:
            self._check_text(name, each)
        return found

    def whole(self, name: str, low: int, high: int, default: int = MISSING) -> int:
        """From `low` to `high`, both included.    Raises: ConfigError."""

        def fits(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

        found: int = self._take(name, default, fits, f"a whole number from {low} to {high}")
        return found

    def number(self, name: str, low: float, high: float, default: float) -> float:
        """From `low` to `high`, both included.    Raises: ConfigError."""

        def fits(value: object) -> bool:
            return (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
                and low <= value <= high
            )

        self.taken[name] = float(self._take(name, default, fits, f"a number from {low:g} to {high:g}"))
        return float(self.taken[name])

    def end(self) -> None:
        """Raises: ConfigError for a field that nobody took."""
        for name in self.values:
            if name not in self.taken:
                raise ConfigError(
                    f"{self.source}: {name!r} is not a field here{hint(str(name), self.taken)}; use {', '.join(self.taken)}"
                )

    def _take(self, name: str, default: Any, fits: Any, rule: str) -> Any:
        self.taken[name] = default
        if name not in self.values:
            if default is MISSING:
                raise ConfigError(f"{self.source}: {name} is missing; add it, {rule}")
            return default
        value = self.values[name]
        if not fits(value):
            raise ConfigError(f"{self.source}: {name}={_shown(value)} is not {rule}; correct it")
        self.taken[name] = value
        return value

    def _check_text(self, name: str, text: str) -> None:
        """Raises: ConfigError for half of a surrogate pair, which JSON can write and no UTF-8 text holds."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"{self.source}: {name}={_shown(text)} has half of a surrogate pair, {text[error.start]!r}, which is no "
                "character; correct it"
            ) from None


@contextmanager
def from_source(source: str) -> Iterator[None]:
    """Errors in here are about what is written there.    Raises: ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def check_number(name: str, number: object, least: int) -> None:
    """Of something that a caller may leave out, with None.    Raises: ConfigError."""
    if number is None:
        return
    if not isinstance(number, int) or isinstance(number, bool):
        raise ConfigError(f"{name}={number!r} is no whole number; use at least {least}, or leave it out")
    if number < least:
        raise ConfigError(f"{name}={number} is too few; use at least {least}, or leave it out")


def _fault_of_texts(value: object, least: int) -> str | None:
    """What is wrong with this list of texts, and what to do about it. It may be longer than what is shown of it."""
    if isinstance(value, str):
        return f"; write [{_shown(value)}{', ...' * (least > 1)}]"
    if not isinstance(value, list):
        return "; write a list"
    for number, each in enumerate(value):
        if not isinstance(each, str):
            return f": number {number} of it, counted from 0, is {_shown(each)}; write it as a text, in quotes"
        if not each.strip():
            return f": number {number} of it, counted from 0, is blank, {_shown(each)}; write it, or leave it out"
    return None if len(value) >= least else f": it has {len(value)}; add more"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
