"""Amounts as Kubernetes writes them: `500m` of a CPU, `24Gi` of memory, `1e3`, `4`. Exact, so that what just fits does fit."""

from __future__ import annotations

import re
from fractions import Fraction

from elastic_lm.errors import ConfigError

BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}  # powers of ten
SHOWN_CHARACTERS = 60
# Lengths are bounded: a number of a million digits is no amount of anything, and arithmetic with it takes minutes.
_FORM = re.compile(
    r"(?P<number>[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40}))"
    r"(?:(?P<binary>[KMGTPE]i)|(?P<decimal>[numkMGTPE]?)|[eE](?P<exponent>[+-]?[0-9]{1,3}))"
)


def quantity(value: object) -> Fraction:
    """`24Gi` in bytes, `500m` as 1/2; a number too, as YAML reads one without quotes.

    Raises: ConfigError when Kubernetes takes no such quantity.
    Source: resource.Quantity of Kubernetes' API; k is its only small letter for a multiple, and K is none.
    """
    text = str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""
    found = _FORM.fullmatch(text)
    if found is None:
        shown = repr(text[:SHOWN_CHARACTERS]) if text or value == "" else f"a {type(value).__name__}"
        raise ConfigError(f"{shown} is no quantity of Kubernetes; write e.g. 4, 500m, 24Gi or 24G")
    if found["binary"]:
        return Fraction(found["number"]) * BINARY[found["binary"]]
    power = DECIMAL[found["decimal"]] if found["exponent"] is None else int(found["exponent"])
    return Fraction(found["number"]) * Fraction(10) ** power


def told(amount: Fraction, *, memory: bool = False) -> str:
    """For people: a plain number, or memory in Gi or Mi. Rounded to six digits when it has more."""
    if memory:
        unit = "Gi" if abs(amount) >= BINARY["Gi"] else "Mi"
        return f"{told(amount / BINARY[unit])}{unit}"
    return str(amount.numerator) if amount.denominator == 1 else f"{float(amount):.6g}"
