"""Who may train: a member whose probe, the gradient of one fixed micro-batch, has the run's bits."""

from __future__ import annotations

from elastic_lm.control.emit import Emit
from elastic_lm.control.spec import ControlSpec
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import ReadyReport


class Admission:
    """Compares probes. The first member's is the run's; with fast sums there is no promise to protect."""

    def __init__(self, spec: ControlSpec, emit: Emit) -> None:
        self._spec, self._emit = spec, emit
        self._reference: ReadyReport | None = None

    def admits(self, report: ReadyReport) -> bool:
        if self._reference is None:
            self._reference = report
        return report.probe == self._reference.probe or not self._spec.exact

    def prefer(self, holder: ReadyReport) -> ReadyReport | None:
        """The bits of the state in memory are the run's, not those of a newcomer that was ready before its holder was back.

        Returns: that newcomer's report, if its bits are others. Whoever was admitted meanwhile has them too.
        """
        first = self._reference
        if first is None or self.admits(holder):
            return None
        self._reference = holder
        return first

    def refuse(self, member_id: str, report: ReadyReport) -> None:
        """Tell why. `report`: the member's, or that of one with the same bits."""
        assert self._reference is not None
        expected = self._reference.environment
        differing = {k: (v, expected.get(k)) for k, v in report.environment.items() if v != expected.get(k)}
        told = ", ".join(f"{k}={mine} (the run: {runs})" for k, (mine, runs) in differing.items())
        self._emit(EventKind.MEMBER_REFUSED,
                   f"{member_id} computes other bits than the run and is refused: "
                   f"{told or 'no recorded difference in its environment'}.",
                   member_id=member_id, environment=report.environment, expected=expected)  # fmt: skip
