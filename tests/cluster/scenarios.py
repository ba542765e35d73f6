"""What every alert is to make of a run: histories as data, from which promtool's unit tests are written.

`python -m tests.cluster.scenarios` prints cluster/prometheus/rules_test.yaml. Values are in promtool's notation, one a
minute: `0+5x20` rises by 5 for 20 minutes, `_x10` is no sample for ten, `stale` the end of a target.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from elastic_lm.monitor.alerts import ALERTS
from elastic_lm.monitor.metrics import PREFIX, by_name
from elastic_lm.monitor.rules import annotations_of, yaml_text

TARGET = {"job": "elastic-lm", "instance": "head:9464"}
RUN = "a-run"
PEACE = "no alert at all"


@dataclass(frozen=True)
class Scenario:
    """`series`: name of the catalogue, labels in braces after it if it has some -> values. `fires` and `silent`: minutes.

    `labels` are those that the alert has besides the target, the run and the severity. `ended`: minute and verdict; the run
    goes on where there are none. `gone_at`: the minute from which the target is not there.
    """

    alert: str
    story: str
    series: dict[str, str]
    fires: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    ended: tuple[int, str] | None = None
    gone_at: int | None = None


STEADY = {"steps_total": "0+10x200", "step": "0+10x200", "steps_planned": "5000x200"}

SCENARIOS = (
    Scenario(
        "ElasticLmNoStep",
        "steps end in the tenth minute, with some left",
        {"steps_total": "0+10x10 100x60", "step": "0+10x10 100x60", "steps_planned": "5000x80"},
        fires=(22, 60),
        silent=(5, 19),
    ),
    Scenario("ElasticLmNoStep", "steps go on", STEADY, silent=(5, 30, 120)),
    Scenario(
        "ElasticLmNoStep",
        "a run waits for its first workers, for less than ten minutes and then for more",
        {"steps_total": "0x60", "step": "0x60", "steps_planned": "5000x60"},
        fires=(12,),
        silent=(9,),
    ),
    Scenario(
        "ElasticLmNoStep",
        "all steps are trained, and the last checkpoint takes its time",
        {"steps_total": "0+10x10 100x60", "step": "0+10x10 100x60", "steps_planned": "100x80"},
        silent=(22, 60),
    ),
    Scenario("ElasticLmTargetAbsent", "the head node dies", {}, gone_at=20, fires=(26, 70), silent=(19, 24, 90)),
    Scenario("ElasticLmTargetAbsent", "the target is there", {}, silent=(5, 60)),
    Scenario("ElasticLmTargetAbsent", "done, then gone", {}, ended=(19, "done"), gone_at=20, silent=(26, 70)),
    Scenario(
        "ElasticLmTargetAbsent",
        "the coordinator's successor is on another node",
        {'run_info{run="a-run",version="1.0",instance="other:9464"}': "_x21 1x90"},
        gone_at=20,
        silent=(26, 70),
    ),
    Scenario(
        "ElasticLmTargetAbsent",
        "the successor on another node ends in peace",
        {
            'run_info{run="a-run",version="1.0",instance="other:9464"}': "_x21 1x9 _x60",
            'run_ended{run="a-run",verdict="done",instance="other:9464"}': "_x21 0x8 1 _x60",
        },
        gone_at=20,
        silent=(26, 40, 70),
    ),
    Scenario(
        "ElasticLmLossNotFinite", "poisoned, then gone", {}, ended=(20, "poisoned"), gone_at=21, fires=(20, 28), silent=(19, 40)
    ),
    Scenario("ElasticLmLossNotFinite", "stopped, then gone", {}, ended=(20, "stopped"), gone_at=21, silent=(20, 28)),
    Scenario("ElasticLmLossNotFinite", "no number", {"loss_nats": "3x10 NaN NaN NaN"}, fires=(12,), silent=(9,)),
    Scenario("ElasticLmLossNotFinite", "infinite", {"loss_nats": "3x10 Inf Inf Inf 3x10"}, fires=(12,), silent=(9, 25)),
    Scenario(
        "ElasticLmRunFailed",
        "the same exception twice",
        {},
        ended=(20, "failed_bug"),
        gone_at=21,
        fires=(20, 28),
        silent=(19, 40),
        labels={"verdict": "failed_bug"},
    ),
    Scenario("ElasticLmRunFailed", "done", {}, ended=(20, "done"), gone_at=21, silent=(20, 28)),
    Scenario("ElasticLmRunFailed", "stopped", {}, ended=(20, "stopped"), gone_at=21, silent=(20, 28)),
    Scenario("ElasticLmRunFailed", "poisoned, which another alert tells", {}, ended=(20, "poisoned"), silent=(20, 28)),
    Scenario("ElasticLmStepMismatch", "one step", {"step_mismatches_total": "0x10 1x20"}, fires=(11, 30), silent=(9,)),
    Scenario("ElasticLmStepMismatch", "none", {"step_mismatches_total": "0x60"}, silent=(30,)),
    Scenario("ElasticLmLossSpike", "from 3 to 4 nats", {"loss_nats": "3x40 4x20"}, fires=(50,), silent=(39, 41)),
    Scenario("ElasticLmLossSpike", "it falls from 11 nats", {"loss_nats": "11-0.1x80 3x40"}, silent=(30, 60, 110)),
    Scenario("ElasticLmLossSpike", "noise of 5 %", {"loss_nats": "3x30 3.15x5 3x5 3.15x20"}, silent=(35, 50)),
    Scenario("ElasticLmLossSpike", "one wild step", {"loss_nats": "3x30 4x0 3x30"}, silent=(30, 33, 36)),
    Scenario("ElasticLmRewound", "once", {"rewinds_total": "0x10 1x90"}, fires=(11, 60), silent=(9, 80)),
    Scenario("ElasticLmRewound", "long ago", {"rewinds_total": "1x60"}, silent=(0, 30)),
    Scenario(
        "ElasticLmThroughputDrop",
        "half the pace, with as many workers",
        {"tokens_total": "0+60000x60 3600000+30000x60", "world_size": "4x120"},
        fires=(80,),
        silent=(60, 70),
    ),
    Scenario(
        "ElasticLmThroughputDrop",
        "half the workers at the pace they had",
        {"tokens_total": "0+60000x60 3600000+30000x60", "world_size": "4x60 2x60"},
        silent=(60, 80, 110),
    ),
    Scenario(
        "ElasticLmWorldBelowMinimum",
        "one of two is lost, and nobody comes for a while",
        {"world_size": "2x10 1x20 2x20", "members_held": "2x10 1x20 2x20", "workers_min": "2x60"},
        fires=(17, 30),
        silent=(10, 14, 40),
    ),
    Scenario(
        "ElasticLmWorldBelowMinimum",
        "all are lost, so that there is no new generation",
        {"world_size": "2x30", "members_held": "2x10 0x20", "workers_min": "2x30"},
        fires=(17,),
        silent=(10,),
    ),
    Scenario(
        "ElasticLmWorldBelowMinimum",
        "as many as needed, fewer than wanted",
        {"world_size": "2x60", "members_held": "2x60", "workers_min": "2x60", "workers_max": "4x60"},
        silent=(20, 50),
    ),
    Scenario(
        "ElasticLmWorldBelowWanted",
        "two of four",
        {"world_size": "2x60", "workers_max": "4x60"},
        fires=(31, 50),
        silent=(20,),
    ),
    Scenario("ElasticLmWorldBelowWanted", "four of four", {"world_size": "4x60", "workers_max": "4x60"}, silent=(50,)),
    Scenario(
        "ElasticLmRescaleStorm",
        "two a minute for two causes",
        {'rescales_total{cause="failure"}': "0x20 0+1x30", 'rescales_total{cause="join"}': "0x20 0+1x30"},
        fires=(30, 45),
        silent=(20, 23),
    ),
    Scenario(
        "ElasticLmRescaleStorm",
        "leases that end for a checkpoint or an evaluation, two a minute",
        {'rescales_total{cause="lease"}': "0+2x60", 'rescales_total{cause="evaluation"}': "0+2x60"},
        silent=(20, 50),
    ),
    Scenario(
        "ElasticLmRescaleStorm",
        "one in two minutes",
        {'rescales_total{cause="failure"}': "0+0.5x60", 'rescales_total{cause="start"}': "0+1x60"},
        silent=(20, 50),
    ),
    Scenario(
        "ElasticLmCheckpointStale",
        "none since step 100, every 50 steps",
        {"step": "0+10x100", "checkpoint_step": "_x10 100x90", "checkpoint_interval_steps": "50x100"},
        fires=(32, 60),
        silent=(15, 29),
    ),
    Scenario(
        "ElasticLmCheckpointStale",
        "none at all",
        {"step": "0+10x100", "checkpoint_interval_steps": "50x100"},
        fires=(25,),
        silent=(10, 20),
    ),
    Scenario(
        "ElasticLmCheckpointStale",
        "the newest is one step old at most",
        {"step": "0+10x100", "checkpoint_step": "_ 0+10x100", "checkpoint_interval_steps": "50x100"},
        silent=(25, 60, 90),
    ),
    Scenario("ElasticLmCheckpointStale", "only one at the end is wanted", {"step": "0+10x100"}, silent=(25, 60, 90)),
    Scenario(
        "ElasticLmCheckpointFailing",
        "three in twenty minutes",
        {"checkpoints_failed_total": "0x20 1x9 2x9 3x99"},
        fires=(41, 70),
        silent=(20, 38, 130),
    ),
    Scenario(
        "ElasticLmCheckpointFailing",
        "two, and one more after more than an hour",
        {"checkpoints_failed_total": "0x20 1x9 2x69 3x60"},
        silent=(20, 45, 79, 105, 130),
    ),
    Scenario(
        "ElasticLmDataStall",
        "twelve seconds of every minute",
        {"data_wait_seconds_total": "0x20 0+12x60"},
        fires=(40, 70),
        silent=(20, 27),
    ),
    Scenario("ElasticLmDataStall", "three of every minute", {"data_wait_seconds_total": "0+3x60"}, silent=(20, 50)),
    Scenario(
        "ElasticLmGoodputLow",
        "good for two hours, then half of the time is lost",
        {
            "tokens_total": "1000+1000x120 121000+500x120",
            "held_worker_seconds_total": "120+120x240",
            "goodput_ratio": "1x120 1-0.00208x120",
        },
        fires=(230,),
        silent=(60, 120, 140),
    ),
    Scenario(
        "ElasticLmGoodputLow",
        "a bad start counts for an hour only",
        {
            "tokens_total": "0x10 0+1000x120",
            "held_worker_seconds_total": "0+120x130",
            "goodput_ratio": "0x10 0.9x120",
        },
        silent=(20, 90, 120),
    ),
    Scenario(
        PEACE,
        "a whole run of two workers, which is done and then gone",
        {
            "steps_total": "0x3 0+10x97",
            "step": "0x3 0+10x97",
            "steps_planned": "970x100",
            "tokens_total": "0x3 0+40000x97",
            "held_worker_seconds_total": "0+120x100",
            "goodput_ratio": "_x4 0.95x97",
            "loss_nats": "_x4 11-0.05x97",
            "world_size": "_x4 2x97",
            "members_held": "0 2x98 0",
            "workers_min": "2x100",
            "workers_max": "2x100",
            "checkpoint_step": "_x15 100x9 200x9 300x9 400x9 500x9 600x9 700x9 800x9 900x9 970x1",
            "checkpoint_interval_steps": "100x100",
            "checkpoints_failed_total": "0x100",
            "step_mismatches_total": "0x100",
            "data_wait_seconds_total": "0+0.5x100",
            'rescales_total{cause="start"}': "0x2 1x98",
            'rescales_total{cause="failure"}': "0x50 1x50",
        },
        ended=(100, "done"),
        gone_at=101,
        silent=(2, 15, 50, 99, 100, 101, 107, 130, 165),
    ),
)  # fmt: skip


def tests() -> dict[str, Any]:
    """The file that `promtool test rules` reads."""
    return {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [_test(scenario) for scenario in SCENARIOS],
    }


def _test(scenario: Scenario) -> dict[str, Any]:
    series = {f'run_info{{run="{RUN}",version="1.0"}}': "1x250", **scenario.series}
    minute, told = scenario.ended or (250, "")
    for verdict in sorted({"done", told} - {""}):
        series[f'run_ended{{run="{RUN}",verdict="{verdict}"}}'] = (
            f"0x{minute - 1} {int(verdict == told)}x{250 - minute}"
        )
    return {
        "name": f"{scenario.alert}: {scenario.story}",
        "interval": "1m",
        "input_series": [
            {"series": _full(name), "values": _until(values, None if "instance=" in name else scenario.gone_at)}
            for name, values in series.items()
        ],
        "alert_rule_test": [
            check
            for alert in ([a.name for a in ALERTS] if scenario.alert == PEACE else [scenario.alert])
            for check in _checks(scenario, alert)
        ],
    }


def _checks(scenario: Scenario, alert: str) -> list[dict[str, Any]]:
    minutes = sorted([*scenario.fires, *scenario.silent])
    return [
        {
            "eval_time": f"{minute}m",
            "alertname": alert,
            "exp_alerts": [_told(scenario)] if minute in scenario.fires else [],
        }
        for minute in minutes
    ]


def _told(scenario: Scenario) -> dict[str, Any]:
    """The alert as it is told."""
    alert = next(alert for alert in ALERTS if alert.name == scenario.alert)
    labels = {"severity": alert.severity, **TARGET, "run": RUN, **scenario.labels}

    def filled(text: str) -> str:
        return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda found: labels[found[1]], text)

    told = {key: filled(text) for key, text in annotations_of(alert).items()}
    return {"exp_labels": labels, "exp_annotations": told}


def _full(name: str) -> str:
    """The series with the target's labels.    Raises: KeyError for a metric that the catalogue does not have."""
    metric, _, labels = name.removesuffix("}").partition("{")
    own = [
        *filter(None, labels.split(",")),
        *(f'{key}="{value}"' for key, value in TARGET.items() if f"{key}=" not in labels),
    ]
    return f"{PREFIX}{by_name()[metric].name}{{{','.join(own)}}}"


def _until(values: str, minute: int | None) -> str:
    """The values up to the minute, then the end."""
    if minute is None:
        return values
    samples: list[str] = []
    for word in values.split():
        samples += _samples(word)
    return " ".join([*samples[:minute], "stale"])


def _samples(word: str) -> list[str]:
    """One word of promtool's notation, sample by sample."""
    found = re.fullmatch(r"(_|[\d.]+|NaN|Inf)([+-][\d.]+)?(?:x(\d+))?", word)
    assert found is not None, word
    if found[1] == "_":
        return ["_"] * int(found[3] or 1)
    count = int(found[3] or 0) + 1
    if found[2] is None:
        return [found[1]] * count
    return [f"{float(found[1]) + number * float(found[2]):g}" for number in range(count)]


if __name__ == "__main__":
    print(yaml_text(tests(), about="Unit tests of the rules: promtool test rules rules_test.yaml"), end="")
