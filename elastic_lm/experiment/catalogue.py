"""All runs of a store at a glance.

One listing tells which runs there are and which checkpoints they have, unless a run went back from some; of each run the end of
its log, its config and its lineage are read, and never a whole log. So hundreds of runs take seconds. A run that cannot be read
keeps nobody from the others, and what is of another type than it should be is not known.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from elastic_lm.checkpoint.layout import MANIFEST, folder_of, steps_in
from elastic_lm.config import CONFIG_FILE
from elastic_lm.evaluation_file import number
from elastic_lm.events import segments
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment import lineage, standing
from elastic_lm.experiment.lineage import Lineage
from elastic_lm.experiment.rewinds import FOLDER as REWINDS
from elastic_lm.ownership import FOLDER as OWNER
from elastic_lm.run_address import EVENTS
from elastic_lm.storage import Storage

RUNS = "runs"
AT_ONCE = 16  # runs: each is a handful of requests of some ten milliseconds
MOST_SEGMENTS = 8  # of a log, from its end: a step is committed between any two of them, unless much else happens
ALIVE_S = 60.0  # a run is told as running for so long after its last sign of life; its owner gives one every 5 s
# As config.yaml is written. To parse one takes 6 ms, which hundreds would make seconds.
STEPS = re.compile(r"^training:\n(?:  .*\n)*?  steps: (\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Listed:
    """One run, as far as that is cheap to know. None where nothing is known.

    `state`: its verdict, or "running", "interrupted" (no verdict and no sign of life), "not begun" (no log), "unreadable".
    `step` counts committed steps, `of` those that are wanted; `checkpoint` is the newest one's step. `loss`: of the last step
    that was not left out, if it is finite. `last_s`: unix time of the last event, or of the fork.
    """

    name: str
    url: str
    state: str
    step: int | None = None
    of: int | None = None
    loss: float | None = None
    checkpoint: int | None = None
    parent: str | None = None
    parent_step: int | None = None
    last_s: float | None = None
    problem: str | None = None


def listed(storage: Storage, clock: Callable[[], float] = time.time) -> list[Listed]:
    """The runs below `storage`, the one that was active last first.    Raises: StorageError."""
    folder = storage.child(RUNS)
    paths = folder.list()
    if not paths and storage.url.endswith(f"/{RUNS}"):  # that folder itself was named
        folder, paths = storage, storage.list()
    names: dict[str, list[str]] = {}
    for path in paths:
        run, _, name = path.partition("/")
        names.setdefault(run, []).append(name)
    there = [(run, of_run) for run, of_run in names.items() if _is_run(of_run)]
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="runs") as pool:
        found = list(pool.map(lambda each: look(folder.child(each[0]), each[1], clock()), there))
    return sorted(found, key=lambda run: (-(run.last_s or 0.0), run.name))


def look(folder: Storage, names: Sequence[str], now: float) -> Listed:
    """At the run in this folder, which holds objects of these names."""
    name, checkpoint = folder.url.rpartition("/")[2], _newest_checkpoint(names)
    try:
        origin = Lineage.load(folder) if lineage.FILE in names else None
        if any(path.startswith(f"{REWINDS}/") for path in names):  # of which checkpoints names alone do not tell
            checkpoint = max((one.step for one in standing.complete(folder)), default=None)
        steps = STEPS.search(folder.read(CONFIG_FILE).decode(errors="replace")) if CONFIG_FILE in names else None
        end = _End.of(folder, names)
        state = end.verdict or _state(folder, names, end, now)
        begun_at = _whole(origin.parent.step) if origin else None
        return Listed(
            name=name,
            url=folder.url,
            state=state,
            step=begun_at if end.step is None else end.step,
            of=int(steps[1]) if steps else None,
            loss=end.loss,
            checkpoint=checkpoint,
            parent=_text(origin.parent.name) if origin else None,
            parent_step=begun_at,
            last_s=end.last_s or (number(origin.time_s) if origin else None),
        )
    except Exception as error:  # noqa: BLE001 - told; whatever somebody has written there
        return Listed(name, folder.url, "unreadable", checkpoint=checkpoint, problem=str(error) or type(error).__name__)


def _is_run(names: Sequence[str]) -> bool:
    """And not a corpus, or a fork that was cut short."""
    return CONFIG_FILE in names or any(name.startswith(f"{EVENTS}/") for name in names)


def _newest_checkpoint(names: Sequence[str]) -> int | None:
    """By name: the newest with a manifest."""
    complete = [step for step, paths in steps_in(list(names)).items() if f"{folder_of(step)}/{MANIFEST}" in paths]
    return max(complete, default=None)


# -- the end of a log --------------------------------------------------------------------------------------------------


@dataclass
class _End:
    """What the newest events say."""

    verdict: str | None = None
    step: int | None = None
    loss: float | None = None
    last_s: float | None = None

    @classmethod
    def of(cls, folder: Storage, names: Sequence[str]) -> _End:
        end, is_open, stays = cls(), False, math.inf
        for event in _backwards(folder, names):
            end.last_s = end.last_s or number(event.time_s)
            is_open = is_open or event.kind is EventKind.RUN_STARTED  # what comes before is of an earlier attempt
            if event.kind is EventKind.RUN_FINISHED and not is_open:
                end.verdict = end.verdict or _text(event.fields.get("verdict"))
            if event.kind is EventKind.REWOUND and event.step is not None:
                stays = min(stays, event.step)  # of what comes before
                end.step = event.step if end.step is None else end.step
            if event.kind is EventKind.STEP_COMMITTED and event.step is not None and event.step < stays:
                end.step = event.step + 1 if end.step is None else end.step
                if not event.fields.get("refused"):
                    end.loss = number(event.fields.get("loss"))
                    break
        return end


def _backwards(folder: Storage, names: Sequence[str]) -> Iterator[Event]:
    """The newest events, the last first."""
    log = folder.child(EVENTS)
    there = sorted(name.removeprefix(f"{EVENTS}/") for name in names if name.startswith(f"{EVENTS}/"))
    for name in there[: -MOST_SEGMENTS - 1 : -1]:
        lines = segments.lines(log, segments.Segment(name, 0))
        parsed = (segments.parse(line, number, lambda told: None) for number, line in reversed(list(enumerate(lines))))
        yield from (event for event in parsed if event is not None)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _state(folder: Storage, names: Sequence[str], end: _End, now: float) -> str:
    """Of a run without a verdict. Clocks of storage and of this machine are compared: it is for people."""
    if end.last_s is None:
        return "not begun"
    claims = sorted(name for name in names if name.startswith(f"{OWNER}/") and name.endswith(".json"))
    signs = [end.last_s]
    if claims:
        claim = claims[-1].removesuffix(".json")
        if f"{claim}.released" in names:
            return "interrupted"
        if f"{claim}.renewed" in names:
            signs.append(folder.modified_s(f"{claim}.renewed") or 0.0)
    return "running" if now - max(signs) < ALIVE_S else "interrupted"
