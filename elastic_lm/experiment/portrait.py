"""One run with all that its folder tells without reading its whole log; of a fork, its curve, from that and its ancestors'."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from elastic_lm import config_text
from elastic_lm.checkpoint.registry import Found
from elastic_lm.config import RunConfig
from elastic_lm.events.log import last, read
from elastic_lm.events.types import EventKind
from elastic_lm.experiment import ancestry, catalogue, evaluations, standing
from elastic_lm.experiment.catalogue import Listed
from elastic_lm.experiment.evaluations import Measured
from elastic_lm.experiment.lineage import Lineage
from elastic_lm.experiment.rewinds import Rewind, Rewinds
from elastic_lm.monitor import report
from elastic_lm.monitor.ancestors import Ancestors, Stretch
from elastic_lm.monitor.history import History
from elastic_lm.run_address import EVENTS, RunAddress


@dataclass(frozen=True)
class Portrait:
    """`message`: the verdict's sentence. `report`: the address of the HTML report, if there is one.

    `curve`: of a fork, who has trained which steps of its line, itself the last, as far as that is known.
    """

    listed: Listed
    config: RunConfig
    lineage: Lineage | None
    rewinds: tuple[Rewind, ...]
    checkpoints: tuple[Found, ...]
    measured: tuple[Measured, ...]
    message: str | None
    report: str | None
    ancestors: Ancestors
    curve: tuple[Stretch, ...]

    @classmethod
    def of(cls, run: RunAddress) -> Portrait:
        """Raises: ConfigError, NotFoundError when there is no such run; CheckpointError when its lineage or a rewind is damaged;
        StorageError.
        """
        folder = run.folder()
        config = run.stored_config()
        names = folder.list()
        newest = last(folder.child(EVENTS), 1)
        lineage = Lineage.load(folder)
        ancestors = ancestry.of(lineage)
        rewinds = Rewinds.load(folder)
        return cls(
            listed=catalogue.look(folder, names, time.time()),
            config=config,
            lineage=lineage,
            rewinds=rewinds.made,
            checkpoints=tuple(standing.found(folder, rewinds)),
            measured=tuple(evaluations.found(folder)),
            message=newest[0].message if newest and newest[0].kind is EventKind.RUN_FINISHED else None,
            report=f"{folder.url}/{report.FILE}" if report.FILE in names else None,
            ancestors=ancestors,
            curve=() if lineage is None else (*ancestors.stretches, *_own(run, lineage)),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """The choices that change bits, by dotted name."""
        return config_text.flatten(self.config.identity())

    @property
    def task_names(self) -> dict[tuple[str, str], str]:
        """(task, hash) -> what to call it."""
        return evaluations.names(self.measured)

    def as_json(self) -> dict[str, Any]:
        """For programs. Of checkpoints without what their writers said."""
        checkpoints = [{**asdict(found), "loss": found.loss} for found in self.checkpoints]
        for checkpoint in checkpoints:
            del checkpoint["meta"]
        return {
            **asdict(self.listed),
            "message": self.message,
            "report": self.report,
            "fingerprint": self.config.identity_fingerprint(),
            "identity": self.identity,
            "lineage": None if self.lineage is None else self.lineage.body(),
            "curve": [
                {
                    "run": each.name,
                    "url": each.url,
                    "start": each.start,
                    "stop": each.stop,
                    "first_loss": each.losses[0] if each.losses else None,
                    "last_loss": each.losses[-1] if each.losses else None,
                    "tokens": each.num_tokens,
                }
                for each in self.curve
            ],
            "curve_lacks": self.ancestors.lacks,
            "rewinds": [asdict(rewind) for rewind in self.rewinds],
            "checkpoints": checkpoints,
            "evaluations": [asdict(one) for one in self.measured],
        }


def _own(run: RunAddress, lineage: Lineage) -> list[Stretch]:
    """What a fork has trained itself; nothing yet when it has not begun."""
    folder = run.folder()
    points = History.of(read(folder.child(EVENTS), on_problem=lambda problem: None)).points
    if not points:
        return []
    return [Stretch(run.name, folder.url, lineage.parent.step, points[-1].step + 1, tuple(points))]
