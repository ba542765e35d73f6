"""Held-out text is measured while workers come and go: the same bits as of one worker, and training does not notice."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import pytest

from elastic_lm.data.manifest import Manifest
from elastic_lm.events.types import EventKind
from elastic_lm.protocol import Evaluation
from elastic_lm.runtime.cluster import LocalCluster
from elastic_lm.runtime.recorder import evaluation_of
from elastic_lm.storage import Storage
from tests.faults.harness import AT_ONCE, Run, assert_same_bits
from tests.faults.oracle import evaluations
from tests.faults.test_failpoints import assert_lost

pytestmark = pytest.mark.ray

STEPS, EVERY = 35, 10
CONTROL = {"backoff_base_s": 0.1, "start_timeout_s": 15.0, **AT_ONCE}


def evaluated(run: Run) -> dict[int, Evaluation]:
    """Every step's evaluation in the log; a step comes once."""
    found = [evaluation_of(event) for event in run.events() if event.kind is EventKind.EVALUATED]
    assert len({evaluation.step for evaluation in found}) == len(found)
    return {evaluation.step: evaluation for evaluation in found}


@pytest.mark.parametrize(
    "failpoints",
    [
        ["w1:evaluate@20=kill"],
        ["w0:evaluate@35=kill"],  # everything is trained
        pytest.param(["w2:evaluate@20=freeze"], marks=pytest.mark.thorough),
        pytest.param(["w0:evaluate@10=kill", "w1:evaluate@20=kill", "w2:evaluate@30=exit"], marks=pytest.mark.thorough),
    ],
    ids="+".join,
)
def test_fault_in_an_evaluation_keeps_its_bits_and_those_of_training(
    failpoints: list[str], start: Callable[..., Run], cluster: LocalCluster
) -> None:
    run = start(
        steps=STEPS,
        failpoints=failpoints,
        workers={"min": 3, "max": 3},
        checkpoint={"every_steps": 20},
        evaluation={"every": EVERY},
        control=CONTROL,
    )
    assert_same_bits(run, run.result())
    assert_lost(failpoints, run)
    assert evaluated(run) == evaluations(run.config)


def test_evaluation_that_fails_is_left_out(start: Callable[..., Run], cluster: LocalCluster) -> None:
    run = start(
        steps=STEPS, failpoints=["w1:evaluate@20=raise"], evaluation={"every": EVERY}, workers={"min": 2, "max": 2}
    )
    assert_same_bits(run, run.result())
    expected = evaluations(run.config)
    assert evaluated(run) == {step: found for step, found in expected.items() if step != 20}
    told = [event.message for event in run.events() if "is left out" in event.message]
    assert len(told) == 1 and told[0].startswith("The evaluation at step 20 is left out: w1: InjectedError")
    assert run.count(EventKind.MEMBER_LOST) == 0


def test_masked_model_is_evaluated_in_any_world(start: Callable[..., Run], cluster: LocalCluster) -> None:
    run = start(steps=12, objective={"name": "masked"}, evaluation={"every": 10}, workers={"min": 2, "max": 3})
    assert_same_bits(run, run.result())
    assert evaluated(run) == evaluations(run.config)


def test_damaged_held_out_text_does_not_end_the_run(
    start: Callable[..., Run], cluster: LocalCluster, corpus: str, tmp_path: Path
) -> None:
    tokens = f"{tmp_path}/tokens"
    shutil.copytree(urlparse(corpus).path, tokens)
    damage_held_out(tokens)
    run = start(
        steps=12, tokens=tokens, objective={"name": "masked"}, evaluation={"every": 10}, workers={"min": 2, "max": 2}
    )
    assert_same_bits(run, run.result())
    told = [event.message for event in run.events() if "is left out" in event.message]
    assert len(told) == 2 and all("checksum" in sentence for sentence in told)


def damage_held_out(tokens: str) -> None:
    """Flip a byte of its first block."""
    part = Manifest.load(Storage.open(tokens)).held_out_part()
    path, block = part.blocks[0]
    with open(os.path.join(tokens, path), "r+b") as shard:
        shard.seek(block.offset)
        byte = shard.read(1)
        shard.seek(block.offset)
        shard.write(bytes([byte[0] ^ 1]))
