"""A checkpoint on its way from one run's folder into another's, with some of its tensors made anew.

Invariant: a part whose tensors all stay is copied as it is, every byte verified. Any other is read and verified, and what stays
of it is written bit for bit beside what is made of it. Nothing counts until a manifest names the parts, whose names follow from
their content; so whatever interrupts the way, the same call comes to the same parts. A few parts are in memory at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from elastic_lm.checkpoint import store, transfer
from elastic_lm.checkpoint.layout import PART_BYTES, Entry, Manifest, Part, folder_of
from elastic_lm.storage import Storage

ITEM_BYTES = 4  # a state is fp32


@dataclass(frozen=True)
class Recipe:
    """How a tensor of this shape is made, of the stored tensor `source` or of none. The same bits whenever it is made."""

    shape: tuple[int, ...]
    source: str | None
    make: Callable[[Tensor | None], Tensor]


def alter_parts(
    source: Storage,
    manifest: Manifest,
    target: Storage,
    recipes: Mapping[str, Recipe],
    dropped: Collection[str],
    *,
    part_bytes: int = PART_BYTES,
) -> tuple[Part, ...]:
    """Store a checkpoint in the folder of another run, with these tensors made anew or added and those left out.

    Raises: as `transfer.copy_parts`.
    Returns: its parts.
    """
    path = folder_of(manifest.step)
    here, there = source.child(path), target.child(path)
    stored = {name: part for part in manifest.parts for name in part.tensors}
    added = {name: recipe for name, recipe in recipes.items() if name not in stored}

    def copied(part: Part) -> list[Part]:
        transfer.copy_part(here, there, part)
        return [part]

    def altered(share: int, part: Part) -> list[Part]:
        tensors = store.read_part(here, part)
        shapes = {
            name: recipes[name].shape if name in recipes else entry.shape
            for name, entry in part.tensors.items()
            if name not in dropped
        }
        return [
            store.write_part(there, share, number, {name: _made(recipes.get(name), name, tensors) for name in names})
            for number, names in enumerate(_split(shapes, part_bytes))
        ]

    def made_anew(name: str) -> Tensor:
        origin = added[name].source
        return _made(added[name], name, {} if origin is None else store.read_part(here, stored[origin]))

    def new(share: int, number: int, names: Sequence[str]) -> list[Part]:
        return [store.write_part(there, share, number, {name: made_anew(name) for name in names})]

    jobs: list[Callable[[], list[Part]]] = [
        functools.partial(copied, part)
        if _stays(part.tensors, recipes, dropped)
        else functools.partial(altered, share, part)
        for share, part in enumerate(manifest.parts)
    ]
    share, shapes = len(jobs), {name: recipe.shape for name, recipe in added.items()}
    jobs += [functools.partial(new, share, number, names) for number, names in enumerate(_split(shapes, part_bytes))]
    written = transfer.all_of(jobs, f"alter-{manifest.step}")
    return tuple(part for parts in written for part in parts)


def _stays(tensors: Mapping[str, Entry], recipes: Mapping[str, Recipe], dropped: Collection[str]) -> bool:
    return not any(name in recipes or name in dropped for name in tensors)


def _made(recipe: Recipe | None, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if recipe is None:
        return tensors[name]
    return recipe.make(None if recipe.source is None else tensors[recipe.source])


def _split(shapes: Mapping[str, tuple[int, ...]], part_bytes: int) -> Iterator[list[str]]:
    return store.split({name: ITEM_BYTES * math.prod(shape) for name, shape in shapes.items()}, part_bytes)
