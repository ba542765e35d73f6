"""The lineage of an experiment's attempts, as a tree: each below the one that it is a fork of.

Invariant: every attempt is in it once, children in the order in which they were made, all from scratch at its top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elastic_lm.experiment.attempt import DONE, Attempt, best
from elastic_lm.experiment.target import Target

Tone = Literal["good", "best", "bad", "plain", "faint"]


@dataclass(frozen=True)
class Node:
    """An attempt in its place. `depth`: 0 from scratch. `is_last`: of its siblings. `open`: at which depths siblings follow."""

    attempt: Attempt
    depth: int
    is_last: bool
    open: tuple[bool, ...]
    tone: Tone


def nodes(attempts: Sequence[Attempt], target: Target) -> list[Node]:
    """Depth first, as they are read from top to bottom. A lineage may be as deep as a plan is long."""
    winner = best(attempts, target)
    children: dict[int | None, list[Attempt]] = {}
    for each in attempts:
        children.setdefault(each.parent, []).append(each)

    found = []
    waiting: list[tuple[Attempt, tuple[bool, ...]]] = [(each, ()) for each in reversed(children.get(None, []))]
    while waiting:
        each, open_ = waiting.pop()
        is_last = each is children[each.parent][-1]
        found.append(Node(each, len(open_), is_last, open_, _tone(each, winner, target)))
        waiting += [(child, (*open_, not is_last)) for child in reversed(children.get(each.number, []))]
    return found


def _tone(attempt: Attempt, winner: Attempt | None, target: Target) -> Tone:
    if target.is_reached(attempt.score):
        return "good"
    if winner is not None and attempt.number == winner.number:
        return "best"
    if attempt.ended is None:
        return "plain" if attempt.is_under_way else "faint"
    return "plain" if attempt.score is not None else "bad"


def state_of(attempt: Attempt, target: Target) -> str:
    """In a word or two, of people's."""
    if attempt.ended is None:
        return attempt.state
    if attempt.score is not None:
        return "reaches it" if target.is_reached(attempt.score) else "misses it"
    return target.lacks(attempt.ended.figures) if attempt.ended.verdict == DONE else attempt.ended.verdict


def lines(attempts: Sequence[Attempt], target: Target, *, plain: bool = False) -> list[tuple[str, Tone]]:
    """For a terminal: a head and a line for each attempt, in columns. `plain`: ASCII only."""
    found = nodes(attempts, target)
    head = ("run", target.figure.replace("_", " "), "step", "tokens", "", "changes")
    rows = [(f"{_branch(node, plain)}{node.attempt.run}", *_cells(node.attempt, target)) for node in found]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    tones: list[Tone] = ["faint", *(node.tone for node in found)]
    return [(_aligned(row, widths), tone) for row, tone in zip((head, *rows), tones, strict=True)]


def _cells(attempt: Attempt, target: Target) -> tuple[str, ...]:
    ended = attempt.ended
    return (
        "" if attempt.score is None else target.shown(attempt.score),
        "" if ended is None or ended.step is None else f"{ended.step:,}",
        "" if ended is None else f"{ended.tokens:,}",
        state_of(attempt, target),
        attempt.planned.told,
    )


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.rjust(w) if 0 < c < 4 else cell.ljust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(cells).rstrip()


def _branch(node: Node, plain: bool) -> str:
    """What leads to a node: `│  └─ `. From scratch nothing does."""
    if node.depth == 0:
        return ""
    through, turn, end = ("|  ", "|- ", "`- ") if plain else ("│  ", "├─ ", "└─ ")
    above = "".join(through if is_open else "   " for is_open in node.open[1:])
    return above + (end if node.is_last else turn)
