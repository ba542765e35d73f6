"""How soon a lost member is replaced, and where not: back-off for repeated losses, quarantine for a flapping node."""

from __future__ import annotations

from elastic_lm.control.spec import ControlSpec

QUARANTINE_WINDOWS = (
    10  # a quarantine lasts this many windows: a node may have been repaired, and it may be the only one
)
ANYWHERE = ""
LARGEST_EXPONENT = 100  # any limit is reached by then, and a float holds it


class Retries:
    """Counts crashes by node. Preemptions and drains are not crashes and are never entered here."""

    def __init__(self, spec: ControlSpec) -> None:
        self._spec = spec
        self._crashes: dict[str, list[float]] = {}
        self._quarantined: dict[str, float] = {}  # node -> until
        self.not_before = 0.0

    def crashed(self, node_id: str | None, now: float) -> bool:
        """Enter one crash.    Returns: whether its node is quarantined because of it."""
        spec = self._spec
        node = node_id or ANYWHERE
        recent = [t for t in self._crashes.get(node, []) if now - t < spec.quarantine_window_s] + [now]
        self._crashes[node] = recent
        if len(recent) > 1:
            pause = min(spec.backoff_limit_s, spec.backoff_base_s * 2.0 ** min(len(recent) - 2, LARGEST_EXPONENT))
            self.not_before = max(self.not_before, now + pause)
        if len(recent) >= spec.quarantine_failures and node != ANYWHERE and node not in self._quarantined:
            self._quarantined[node] = now + QUARANTINE_WINDOWS * spec.quarantine_window_s
            return True
        return False

    def release(self, now: float) -> list[str]:
        """Nodes whose quarantine is over now."""
        over = [node for node, until in self._quarantined.items() if now >= until]
        for node in over:
            del self._quarantined[node]
            self._crashes.pop(node, None)
        return over

    @property
    def avoided(self) -> tuple[str, ...]:
        return tuple(sorted(self._quarantined))
