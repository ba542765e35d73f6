"""Whether a run has a loss spike that nothing was done about, whoever coordinated it when it came.

Invariant: what an earlier attempt has committed is judged just as it was then, so a spike that has ended a run ends whoever only
begins it again. It is past when the config accepts it, or when an attempt with other rules has trained on behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from elastic_lm.config import RunConfig
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment.rewinds import rules_of
from elastic_lm.experiment.spikes import Spike, SpikeDetector, SpikeRules
from elastic_lm.protocol import StepRecord


class SpikeWatch:
    """Fed with every step that is committed, and before that with the log of earlier attempts."""

    def __init__(self, config: RunConfig) -> None:
        self._rules = rules_of(config)
        self._accepts = config.spikes.accepts
        self._policy = _policy_of(config.model_dump(mode="json"))
        self._detector = None if self._rules is None else SpikeDetector(self._rules)
        self._is_heeded = True  # by the attempt whose steps come now
        self._last_step = -1
        self._passed: list[int] = []  # steps with which a spike was past that may go on
        self.found: Spike | None = None
        self.num_rewinds = 0

    def observe(self, record: StepRecord) -> None:
        """The step is committed."""
        if self._detector is None:
            return
        found = self._detector.observe(record.step, record.loss, record.grad_norm, left_out=record.refused > 0)
        self._last_step = record.step
        if found is None:
            return
        if self._is_heeded and not self._accepts(found.last_step):
            self.found = self.found or found
        else:
            self._pass_over()

    def recall(self, event: Event) -> None:
        """An event of an earlier attempt; its steps are observed, too."""
        if event.kind is EventKind.RUN_STARTED:
            self._is_heeded = _policy_of(event.fields["config"]) == self._policy
            if not self._is_heeded:
                self._accept()
        elif event.kind is EventKind.REWOUND:
            self.num_rewinds = max(self.num_rewinds, event.fields["number"])

    def _accept(self) -> None:
        """What was found is past, and so are the steps that go on from it."""
        if self.found is not None:
            self._pass_over()
        self.found = None

    def _pass_over(self) -> None:
        if self._detector is not None:
            self._detector.pass_over()
            self._passed.append(self._last_step)

    def go_back(self, records: Iterable[StepRecord]) -> None:
        """The run has; these are its last steps now, as far as they are known."""
        if self._rules is None:
            return
        self._detector = SpikeDetector(self._rules)
        passed, self._passed = set(self._passed), []
        for record in records:
            self.observe(record)
            if record.step in passed:
                self._pass_over()
        self.found = None


def _policy_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What decides which steps are a spike, and whether it counts."""
    chosen = config.get("spikes")
    if not isinstance(chosen, dict):
        return None
    return {name: chosen.get(name) for name in ("policy", *(field.name for field in fields(SpikeRules)))}
