"""What control wants done. The runtime does it, in this order, and reports what comes of it as events."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lm.events.types import Event, EventKind
from elastic_lm.protocol import Generation, Lease

REWOUND = "rewound"


@dataclass(frozen=True)
class Verdict:
    """How a run ended: `done`, `stopped`, `failed_bug`, `poisoned`, `spiked`, `data_error`, `unavailable` or `failed`.

    Or only this attempt: `REWOUND`, and another one is to go on from before `step`.
    """

    kind: str
    message: str
    step: int

    def event(self, generation: str | None = None) -> Event:
        """That tells of it."""
        fields = {"verdict": self.kind, "reason": self.message}
        told = f"Run finished: {self.kind} ({self.message})."
        return Event(EventKind.RUN_FINISHED, told, self.step, generation, fields=fields)


@dataclass(frozen=True)
class StartMember:
    """Ask for one more worker, anywhere but on `avoid_nodes`."""

    member_id: str
    avoid_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class KillMember:
    """End the member's process for certain; it is not part of the run any more."""

    member_id: str


@dataclass(frozen=True)
class Retire:
    """Let the member end itself; it is not part of the run any more."""

    member_id: str


@dataclass(frozen=True)
class Fence:
    """Members leave this generation, and every lower one, at once."""

    member_ids: tuple[str, ...]
    generation: Generation


@dataclass(frozen=True)
class Grant:
    """Give every member of the lease this lease, with a rendezvous of its own."""

    lease: Lease


@dataclass(frozen=True)
class EndLease:
    """Members vote to end this generation's lease after the running step."""

    generation: Generation
    member_ids: tuple[str, ...]


@dataclass(frozen=True)
class SaveCheckpoint:
    """Each of these members copies its share of the state before its next lease, and uploads the copy.

    `number` tells attempts at one step apart.
    """

    number: int
    member_ids: tuple[str, ...]
    step: int


@dataclass(frozen=True)
class PublishCheckpoint:
    """All shares are stored: write the manifest."""

    number: int


@dataclass(frozen=True)
class AbandonCheckpoint:
    """This attempt is given up. These members may be uploading their shares still."""

    number: int
    member_ids: tuple[str, ...]


@dataclass(frozen=True)
class FindCheckpoint:
    """The newest checkpoint cannot be restored: read them, and tell which one can."""


@dataclass(frozen=True)
class GoBack:
    """The checkpoint that was found is the run's newest from now on: newer ones cannot be restored."""

    step: int | None


@dataclass(frozen=True)
class AskAfterNode:
    """A worker was lost there: tell if the node turns out to be dead."""

    node_id: str


@dataclass(frozen=True)
class Emit:
    event: Event


@dataclass(frozen=True)
class Finish:
    verdict: Verdict


Action = (
    StartMember
    | KillMember
    | Retire
    | Fence
    | Grant
    | EndLease
    | SaveCheckpoint
    | PublishCheckpoint
    | AbandonCheckpoint
    | FindCheckpoint
    | GoBack
    | AskAfterNode
    | Emit
    | Finish
)
