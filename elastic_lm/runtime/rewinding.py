"""What is to be done about a spike: go back, or end the run; by the config, and by how often the run has gone back."""

from __future__ import annotations

import json

from elastic_lm.config import RunConfig
from elastic_lm.control import events as ev
from elastic_lm.control.actions import Verdict
from elastic_lm.experiment.rewinds import Rewind, Rewinds
from elastic_lm.experiment.spikes import POISONED, Spike
from elastic_lm.protocol import LeaseEnd, LeaseReport


class Rewinding:
    """Of one attempt. `config`: with the `rewinds` so far; `begins_at`: the step at which the run begins, that of a fork."""

    def __init__(self, config: RunConfig, rewinds: Rewinds, begins_at: int) -> None:
        self._config, self._rewinds, self._begins_at = config, rewinds, begins_at
        self._floor = rewinds.floor(begins_at)
        self.decided: Rewind | None = None
        self._spoiled: ev.Spoiled | None = (
            None  # once it was said: a run that ends may be asked about its spike for minutes
        )

    def judge(self, spike: Spike) -> ev.Spoiled | ev.SpikeFound:
        """For control. What it is to hear of once it can hear of any number of times."""
        if self._config.spikes.goes_back and self._has_room:
            return self._go_back(spike)
        self._spoiled = self._spoiled or ev.Spoiled("spiked", self._advice(spike))
        return self._spoiled

    def judge_report(self, report: LeaseReport) -> ev.SpikeFound | None:
        """A step that came to nothing is as good as a spike, where the run is to go back for it; else control's affair."""
        wanted = self._config.training.on_nonfinite == "rewind" and self._has_room
        if not wanted or report.end is not LeaseEnd.POISONED or report.error_step is None:
            return None
        return self._go_back(Spike(report.error_step, report.error_step, POISONED, reason=report.error or ""))

    @property
    def _has_room(self) -> bool:
        return len(self._rewinds) < self._config.spikes.max_rewinds

    def _rewind(self, spike: Spike) -> Rewind:
        return Rewind.of(spike, self._config, number=len(self._rewinds) + 1, floor=self._floor)

    def _go_back(self, spike: Spike) -> ev.SpikeFound:
        self.decided = self.decided or self._rewind(spike)
        return ev.SpikeFound(self.decided.to_step, str(self.decided))

    def end(self, rewind: Rewind, obstacle: str, step: int) -> Verdict:
        """In place of a rewind that cannot be. `step`: where the run ends."""
        self.decided = None
        if rewind.cause == POISONED:
            kind, way = "poisoned", "To train on through it, resume it with --set training.on_nonfinite=skip"
        else:
            kind, way = "spiked", _way_through(rewind)
        return Verdict(kind, f"{rewind.reason}. The run cannot go back: {obstacle}. {way}", step)

    def _advice(self, spike: Spike) -> str:
        times = f"{len(self._rewinds)} time{'s' if len(self._rewinds) > 1 else ''}"
        often = f" The run has gone back {times} (spikes.max_rewinds)." if self._rewinds else ""
        rewind = self._by_hand(spike)
        return f"{rewind.reason}.{often} {self._way_round(rewind)}. {_way_through(rewind)}"

    def _by_hand(self, spike: Spike) -> Rewind:
        """What a person would do about it. `skip_batches` may be too few to reach the spike's end where nothing uses them."""
        rewind = self._rewind(spike)
        needed = spike.last_step + 1 - rewind.to_step
        if self._config.spikes.policy == "skip" or self._config.spikes.skip_batches >= needed:
            return rewind
        enough = self._config.replace(f"spikes.skip_batches={needed}")
        return Rewind.of(spike, enough, number=rewind.number, floor=self._floor)

    def _way_round(self, rewind: Rewind) -> str:
        """To go on without the batches, from a state that there may be."""
        config, every = self._config, self._config.checkpoint.every_steps
        has_saved = self._begins_at > 0 or (every is not None and rewind.to_step >= every)
        if not has_saved:
            skip = json.dumps([list(each) for each in rewind.after], separators=(",", ":"))
            return (
                f"To train without the batches around it, begin another run: the same YAML with --set name={config.name}-2 "
                f"--set 'training.skip={skip}', for no checkpoint is of step {rewind.to_step} or earlier"
            )
        (start, _), (_, stop) = rewind.left_out[0], rewind.left_out[-1]
        return (
            f"To go on without the batches around it: elastic-lm fork {config.run_url}@STEP --name {config.name}-2 --skip "
            f"{start}:{stop}, with a checkpoint of step {rewind.to_step} or earlier"
        )


def _way_through(rewind: Rewind) -> str:
    """For whoever has looked at the spike, and wants nothing done about it."""
    return f"To train on through it, resume it with --set spikes.accept_until={rewind.last_step + 1}"
