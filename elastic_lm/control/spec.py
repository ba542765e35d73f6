"""What control needs to know about a run: sizes, limits and deadlines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ControlSpec:
    """Times in seconds, steps and micro-batches as counts. Defaults carry the measurement they rest on."""

    min_workers: int
    max_workers: int
    num_micro_batches: int
    total_steps: int
    checkpoint_every: int | None = None
    # The largest preset's 16 GB take 800 s at the slowest rate that storage waits for: two parts at once, 10 MB/s each.
    checkpoint_timeout_s: float = 900.0
    exact: bool = True
    lease_steps: int = 10_000  # a vote ends a lease early; this bounds the records that members keep

    heartbeat_timeout_s: float = 1.0  # five missed beats; a margin for the machine's load is added (see health.py)
    lost_connection_grace_s: float = 0.1  # a living member reconnects within 20 ms
    progress_timeout_s: float = 60.0
    start_timeout_s: float = 120.0  # importing torch and warming up take 3-4 s on two cores
    join_batch_s: float = 0.1  # joiners that become ready this close together enter together

    backoff_base_s: float = 1.0
    backoff_limit_s: float = 60.0
    quarantine_failures: int = 4
    quarantine_window_s: float = 60.0

    straggler_factor: float = 1.5
    rebalance_gain: float = 0.2
    rebalance_every_s: float = 30.0
    same_error_limit: int = 2

    evaluate_every: int | None = None
    num_held_out_batches: int = 0
