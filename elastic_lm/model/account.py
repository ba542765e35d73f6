"""What became of a model's parameters when its shape was changed, for people and for programs. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["added", "padded", "repeated", "cut", "dropped"]
Shape = tuple[int, ...]

_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Fate:
    """That of one parameter which is not as it was. `begins`: with which values, in words; empty where it is dropped.

    `before` and `after`: its shapes; None where there is no such parameter.
    """

    name: str
    kind: Kind
    before: Shape | None
    after: Shape | None
    begins: str = ""


@dataclass(frozen=True)
class Account:
    """`matched`: how many parameters are as they were. `differs`: why the new model computes something else than the old one
    did, in words; where there is nothing, it computes the same up to rounding."""

    matched: int
    fates: tuple[Fate, ...]
    differs: tuple[str, ...] = ()

    @property
    def effect(self) -> str:
        """A sentence."""
        if not self.differs:
            cut = [fate.after[0] for fate in self.fates if fate.kind == "cut" and fate.after]  # rows of positions
            within = f", within {min(cut)} tokens" if cut else ""
            return f"The model computes what its parent's does, up to rounding{within}."
        return f"The model computes something else than its parent's: {'; '.join(self.differs)}."

    def table(self) -> Iterator[str]:
        """Aligned lines: how many parameters there are of each kind, then the fates; those that blocks share are told once."""
        kinds = [fate.kind for fate in self.fates]
        counts = [f"{self.matched} matched", *(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))]
        yield f"Parameters: {', '.join(counts)}."
        rows = [(fate.kind, name, _shapes(fate), fate.begins) for name, fate in self._by_block()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)] if rows else []
        for row in rows:
            yield "  ".join(["", *(cell.ljust(width) for cell, width in zip(row, widths, strict=True))]).rstrip()

    def _by_block(self) -> Iterator[tuple[str, Fate]]:
        """Each fate once, with the name of its parameter in all blocks that share it: `blocks.[2:4].attention.qkv.weight`."""
        shared: dict[tuple[object, ...], list[Fate]] = {}
        for fate in self.fates:
            key = (_BLOCK.sub("", fate.name), fate.kind, fate.before, fate.after, fate.begins)
            shared.setdefault(key, []).append(fate)
        for fates in shared.values():
            first, last = (_BLOCK.match(fate.name) for fate in (fates[0], fates[-1]))
            if first is None or last is None or len(fates) == 1:
                yield fates[0].name, fates[0]
            else:  # what happens to blocks happens to all of them, or to those at the end
                label = f"blocks.[{first[1]}:{int(last[1]) + 1}]."
                yield fates[0].name.replace(first[0], label), fates[0]

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> Account:
        """The inverse of `dataclasses.asdict`, through JSON.    Raises: KeyError or TypeError on anything else."""
        fates = (
            Fate(**{**fate, "before": _shape(fate["before"]), "after": _shape(fate["after"])}) for fate in body["fates"]
        )
        return cls(body["matched"], tuple(fates), tuple(body["differs"]))


def _shape(sizes: list[int] | None) -> Shape | None:
    return None if sizes is None else tuple(sizes)


def _shapes(fate: Fate) -> str:
    return " -> ".join(str(list(shape)) for shape in (fate.before, fate.after) if shape is not None)
