"""What control is told. Each is a fact with a sender; none is an instruction."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_lm.protocol import Heartbeat, LeaseReport, ReadyReport, ReturnReport


@dataclass(frozen=True)
class MemberStarted:
    """The member's process runs; it is warming up."""

    member_id: str
    node_id: str
    pid: int


@dataclass(frozen=True)
class MemberReady:
    report: ReadyReport


@dataclass(frozen=True)
class MemberFound:
    """A member that served an earlier coordinator was called; it will return, or fail. Told before anything else."""

    member_id: str
    node_id: str
    pid: int


@dataclass(frozen=True)
class MemberReturned:
    report: ReturnReport


@dataclass(frozen=True)
class MemberFailed:
    """A call to the member failed: its process is known to be dead or it raised (`proof`), or it could not be reached."""

    member_id: str
    cause: str
    proof: bool
    raised: bool = False


@dataclass(frozen=True)
class ConnectionLost:
    """The member's lifeline closed: its process died, or the network cut it."""

    member_id: str


@dataclass(frozen=True)
class ConnectionRestored:
    member_id: str


@dataclass(frozen=True)
class Beat:
    heartbeat: Heartbeat


@dataclass(frozen=True)
class Reported:
    report: LeaseReport


@dataclass(frozen=True)
class Saved:
    """The upload of a member's share of a checkpoint ended, well or not. `lost`: its owner is gone, not the store's fault."""

    number: int
    member_id: str
    ok: bool
    error: str | None = None
    lost: bool = False


@dataclass(frozen=True)
class Published:
    """The manifest of a checkpoint was stored, or could not be."""

    number: int
    ok: bool
    error: str | None = None


@dataclass(frozen=True)
class CheckpointFound:
    """The answer to `FindCheckpoint`: the newest one whose every byte was read. `step`: None when there is none.

    `skipped`: a sentence about each newer one. `verdict` and `error`: when it could not be found out, how the run ends, and why.
    """

    step: int | None
    skipped: tuple[str, ...] = ()
    verdict: str | None = None
    error: str = ""


@dataclass(frozen=True)
class NodeDraining:
    """The node goes at `deadline` (unix seconds, 0 when unknown). `hosts_us`: with the coordinator on it."""

    node_id: str
    deadline: float
    hosts_us: bool = False


@dataclass(frozen=True)
class NodeLost:
    """A node that was asked after is dead. Its workers are told of one by one, most of them earlier."""

    node_id: str


@dataclass(frozen=True)
class DrainRequested:
    """Somebody wants a member, or every member of a node, to leave between leases."""

    member_id: str | None = None
    node_id: str | None = None


@dataclass(frozen=True)
class Resized:
    min_workers: int
    max_workers: int


@dataclass(frozen=True)
class StopRequested:
    reason: str


SPOILED = ("poisoned", "spiked")  # verdicts


@dataclass(frozen=True)
class Spoiled:
    """There is no point in training on: too many steps on end changed nothing, or the loss has spiked once too often.

    `verdict`: one of `SPOILED`.
    """

    verdict: str
    message: str


@dataclass(frozen=True)
class SpikeFound:
    """The run is to go back, to before this step: what is in memory is given up, and so is what was not saved by then."""

    to_step: int
    reason: str


@dataclass(frozen=True)
class ReaderReplaced:
    reader_id: str
    replacement: str
    cause: str


@dataclass(frozen=True)
class CoordinatorSlept:
    """The coordinator itself did not run for this long: nobody's silence in that time is their own."""

    seconds: float


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


COMMANDS = (DrainRequested, Resized, StopRequested)  # of people

Input = (
    MemberStarted | MemberReady | MemberFound | MemberReturned | MemberFailed | ConnectionLost | ConnectionRestored | Beat
    | Reported | Saved | Published | CheckpointFound | NodeDraining | NodeLost | DrainRequested | Resized | StopRequested
    | Spoiled | SpikeFound | ReaderReplaced | CoordinatorSlept | Tick
)  # fmt: skip
