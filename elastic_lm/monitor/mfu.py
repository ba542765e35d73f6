"""MFU, model FLOPs utilisation: the FLOPs per second that the model's mathematics needs, by the peak of the devices held.

Recomputed work does not count, and a device that waits counts in full. Known when the run's model has a known count
(`flops_per_token` of run_started; not for models of a user's own) and its device a known peak (a GPU of the table).
Source: Chowdhery et al., PaLM, 2022, appendix B.
"""

from __future__ import annotations

from elastic_lm.events.types import Event, EventKind
from elastic_lm.model.flops import peak_flops


class Mfu:
    """Fed with every event of a run in order, `observe`; asked for the ratio at any time."""

    def __init__(self) -> None:
        self._flops_per_token: int | None = None
        self._precision = ""
        self._num_gpus = 1.0  # that a worker holds; a part of one where several share it
        self._peak: float | None = None  # FLOP/s of one device

    def observe(self, event: Event) -> None:
        """Learn of the model from the run's start, of the device from its members."""
        if event.kind is EventKind.RUN_STARTED:
            self._flops_per_token = event.fields.get("flops_per_token")
            config = event.fields["config"]
            self._precision = config.get("training", {}).get("precision", "")
            self._num_gpus = config.get("workers", {}).get("num_gpus", 1.0)
        elif event.kind in (EventKind.MEMBER_READY, EventKind.MEMBER_RETURNED):
            device = (event.fields.get("environment") or {}).get("gpu")
            self._peak = peak_flops(device, self._precision) if device else None

    def ratio(self, tokens_per_s: float | None, num_workers: int) -> float | None:
        """From 0 to 1; None when anything that it takes is unknown. `num_workers`: held, whether or not they train."""
        num_devices = num_workers * self._num_gpus
        if tokens_per_s is None or not self._flops_per_token or not self._peak or not num_devices:
            return None
        return tokens_per_s * self._flops_per_token / (self._peak * num_devices)
