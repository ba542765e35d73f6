"""MFU on a hand-worked case, and unknown wherever a part of it is."""

from __future__ import annotations

import pytest

from elastic_lm.events.types import Event, EventKind
from elastic_lm.monitor.mfu import Mfu
from tests.monitor.story import at

H100 = "NVIDIA H100 80GB HBM3"


def begun(flops_per_token: int | None, precision: str = "bf16", **workers: float) -> Event:
    config = {"training": {"precision": precision}, "workers": workers}
    return at(0, EventKind.RUN_STARTED, config=config, flops_per_token=flops_per_token)


def ready(**environment: str) -> Event:
    return at(1, EventKind.MEMBER_READY, member_id="w0", environment=environment)


def fed(*events: Event) -> Mfu:
    mfu = Mfu()
    for event in events:
        mfu.observe(event)
    return mfu


def test_ratio_is_needed_flops_by_the_peak_of_all_devices_held() -> None:
    # 989.4 TFLOP/s dense bf16 per device by its data sheet; two devices at half of that together.
    tokens_per_s = 989.4e12 / 1e9
    assert fed(begun(10**9), ready(gpu=H100)).ratio(tokens_per_s, 2) == pytest.approx(0.5, rel=1e-3)


def test_workers_that_share_a_device_hold_a_part_of_it_each() -> None:
    tokens_per_s = 989.4e12 / 1e9
    assert fed(begun(10**9, num_gpus=0.25), ready(gpu=H100)).ratio(tokens_per_s, 4) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [begun(10**9)],  # no worker yet
        [begun(10**9), ready(device="cpu")],
        [begun(10**9), at(1, EventKind.MEMBER_READY, member_id="w0", environment=None)],  # told by another version
        [begun(10**9), ready(gpu="A device of next year")],
        [begun(None), ready(gpu=H100)],  # a model of the user's own
    ],
)
def test_ratio_is_unknown_where_a_part_of_it_is(events: list[Event]) -> None:
    assert fed(*events).ratio(1e6, 2) is None


@pytest.mark.parametrize(("tokens_per_s", "num_workers"), [(None, 2), (1e6, 0)])
def test_ratio_needs_a_rate_and_a_worker(tokens_per_s: float | None, num_workers: int) -> None:
    assert fed(begun(10**9), ready(gpu=H100)).ratio(tokens_per_s, num_workers) is None
