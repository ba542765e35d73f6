"""What an evaluation on held-out text says, in the units in which people compare models."""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_lm.events.types import Event


@dataclass(frozen=True)
class HeldOutScore:
    """At `step`. `loss` and its standard error in nats per target; `accuracy` from 0 to 1. None where it is not known."""

    step: int
    loss: float
    loss_stderr: float | None
    accuracy: float | None
    nats_per_byte: float | None

    @classmethod
    def of(cls, event: Event) -> HeldOutScore:
        """Of an EVALUATED event.    Raises: KeyError, TypeError or ValueError on one of another shape."""
        fields = event.fields
        loss, targets = float(fields["loss"]), int(fields["num_targets"])
        hits, size = fields["num_correct"], fields["num_bytes"]
        return cls(
            step=int(event.step or 0),
            loss=loss,
            loss_stderr=fields["loss_stderr"],
            accuracy=None if hits is None else hits / targets,
            nats_per_byte=loss * targets / size if size else None,
        )

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.nats_per_byte is None else self.nats_per_byte / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that has no number."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def words(self) -> str:
        """All of it in one line."""
        parts = [f"perplexity {self.perplexity:,.4g}"]
        if self.bits_per_byte is not None:
            parts.append(f"{self.bits_per_byte:.3f} bits per byte")
        if self.accuracy is not None:
            parts.append(f"{self.accuracy:.1%} right")
        return ", ".join(parts)
