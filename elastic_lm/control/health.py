"""Who must be given up. Short limits on a quiet machine, longer ones where heartbeats are seen to come late.

A frozen process must be found within two seconds; a process that waits for an overloaded CPU must not be taken for one.
The limit on silence therefore follows the longest gap between two beats that any living member has shown lately.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_lm.control.membership import Member, MemberState
from elastic_lm.control.spec import ControlSpec
from elastic_lm.protocol import Phase

# Of those who owe a report. WAITING: one that has its lease and has not begun.
OWING_PROGRESS = (Phase.WAITING, Phase.COMPUTE, Phase.OPTIMIZER, Phase.COPYING, Phase.FORMING, Phase.EVALUATING)
MICRO_BATCHES_OF_PATIENCE = 20
WINDOW_S = 60.0
RETURN_S = 5.0  # a member that a new coordinator calls connects to it within 0.1 s, on a busy machine within seconds
SETTLING_S = 10.0  # for as long a successor, which has seen no gap between beats, waits RETURN_S: a takeover is work
# Of a stop with who waits for tokens; a window that is not read ahead comes within a second or two.
STOP_PATIENCE_S = 5.0
USUAL_GAP_S = 0.3  # beats come every 0.2 s
MARGIN = 3.0
LONGEST_LIMIT_S = 30.0


class SilenceLimit:
    """`heartbeat_timeout_s`, plus three times the lateness seen in the last one to two minutes."""

    def __init__(self, heartbeat_timeout_s: float) -> None:
        self._timeout_s = heartbeat_timeout_s
        self._longest = [0.0, 0.0]  # this window's, the last window's
        self._window_began = 0.0

    def saw_gap(self, seconds: float, now: float) -> None:
        """Two beats of one member came this far apart."""
        if now - self._window_began > WINDOW_S:
            self._longest = [0.0, self._longest[0] if now - self._window_began < 2 * WINDOW_S else 0.0]
            self._window_began = now
        self._longest[0] = max(self._longest[0], seconds)

    def seconds(self) -> float:
        late = max(0.0, max(self._longest) - USUAL_GAP_S)
        return min(LONGEST_LIMIT_S, self._timeout_s + MARGIN * late)


class Health:
    """Judges members by the signs of life they give."""

    def __init__(self, spec: ControlSpec) -> None:
        self._spec = spec
        self._limit = SilenceLimit(spec.heartbeat_timeout_s)

    def saw_beat(self, member: Member, now: float) -> None:
        """A beat came; the member still holds the time of the one before."""
        if member.last_beat is not None and member.has_joined:
            self._limit.saw_gap(now - member.last_beat, now)

    def ailment(
        self, member: Member, now: float, *, owes_report: bool, fenced_at: float | None, worth_s: float
    ) -> str | None:
        """Why this member must be given up, if it must.

        Args: `owes_report`: a lease is out and this member has not reported; `fenced_at`: when it was told to drop it;
        `worth_s`: the least that it is waited for, on account of what it holds.
        """
        spec = self._spec
        lost_at = member.lost_connection_at
        if lost_at is not None and now - lost_at >= spec.lost_connection_grace_s:
            return "process died"  # the kernel closed its connection and nobody opened another
        if member.state is MemberState.STARTING and now - member.since > spec.start_timeout_s:
            waited = f"not ready {spec.start_timeout_s:.0f} s after its process started"
            return f"{waited}; where a start takes longer (training.compile), raise control.start_timeout_s"
        returning = member.state is MemberState.RETURNING
        if not member.has_joined and not returning:
            return None
        silence = now - (member.last_beat or (member.since if returning else now))
        settles = member.returned_at is not None and now - member.returned_at < SETTLING_S
        limit = max(self._limit.seconds(), worth_s, RETURN_S if returning or settles else 0.0)
        if silence > limit:
            return f"silent for {silence:.1f} s, limit {limit:.1f} s"
        if returning and now - member.since > spec.start_timeout_s:
            return f"not back {spec.start_timeout_s:.0f} s after it was called"
        if returning and member.phase is not Phase.STARTING:
            owes_report, fenced_at = True, member.since  # as if it was fenced then
        if not owes_report or (fenced_at is None and member.phase not in OWING_PROGRESS):
            return None
        patience = max(self.patience_s(member), worth_s)
        still_s = now - max(member.progress_at, member.since, fenced_at or 0.0)
        if still_s > patience:
            return f"no progress in {member.phase} for {still_s:.1f} s, limit {patience:.1f} s"
        return None

    def patience_s(self, member: Member) -> float:
        """How long a member may go without progress."""
        return max(self._spec.progress_timeout_s, MICRO_BATCHES_OF_PATIENCE * (member.micro_batch_s or 0))

    def stalled_s(self, members: Sequence[Member], now: float) -> float | None:
        """For how long these have all waited for each other; None while that is within the patience with one of them.

        Nobody stalls who waits for storage.
        """
        if any(m.phase is Phase.DATA for m in members):
            return None
        still_s = now - max(max(m.progress_at, m.since) for m in members)
        return still_s if still_s > max(self.patience_s(m) for m in members) else None

    def lack_tokens(self, members: Sequence[Member], now: float) -> bool:
        """Whether one of these waits for what storage does not give, as far as a run that stops waits for it."""
        return any(m.phase is Phase.DATA and now - max(m.progress_at, m.since) > STOP_PATIENCE_S for m in members)
