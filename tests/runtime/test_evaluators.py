"""Evaluation over a cluster: the bits of one process, whatever happens to its workers."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray

from elastic_lm.config import RunConfig
from elastic_lm.data.prepare import PrepareOptions, prepare
from elastic_lm.errors import CheckpointError, ClusterError, ConfigError
from elastic_lm.evaluate import held_out, likelihood
from elastic_lm.run import Run
from elastic_lm.runtime.cluster import NAMESPACE, LocalCluster, wait_for
from elastic_lm.runtime.evaluators import OnCluster
from elastic_lm.storage import Storage
from tests.data.corpora import texts, write_lines
from tests.evaluate.test_pieces import FAILING, PROMPTS, results, tasks_of
from tests.evaluate.test_tasks import write
from tests.faults.harness import processes_titled
from tests.solo import Solo, solo_config

pytestmark = pytest.mark.ray

WAIT_S = 180.0
PAUSE_S = 0.1  # of a scorer


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with a checkpoint, whose corpus holds text out."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = PrepareOptions(vocab_size=300, block_tokens=257, held_out=0.1)
    prepare([write_lines(folder / "text.jsonl", texts(300))], Storage.open(f"file://{folder}/tokens"), options)
    config = solo_config(f"file://{folder}/tokens", f"file://{folder}")
    assert Solo(config).train().verdict == "done"
    return config


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there are some for each worker: the driver alone makes them."""
    monkeypatch.setattr(held_out, "PIECE_TOKENS", 64)
    monkeypatch.setattr(likelihood, "PIECE_TOKENS", 64)


def half(text: str) -> float:
    """A scorer that takes its time, for a worker to be caught at it."""
    time.sleep(PAUSE_S)
    return 0.5


def slow_task(folder: Path, times: int = 4) -> str:
    return write(folder, PROMPTS * times, name="slow", kind="safety", scorer=f"{__name__}:half", max_new_tokens=1)


def long_task(folder: Path) -> str:
    """Two workers need ten seconds for it: both come to it, and whoever takes the place of one."""
    return slow_task(folder, 4 * math.ceil(200 / len(PROMPTS) / 4))


def nothing_is_left(cluster: LocalCluster) -> bool:
    return not processes_titled(cluster, "ray::Evaluator")


def test_bits_are_those_of_one_process_also_when_workers_are_killed_and_hang(
    cluster: LocalCluster, evaluated: RunConfig, tmp_path: Path
) -> None:
    names = [*tasks_of(tmp_path, "causal"), slow_task(tmp_path)]
    expected = results(evaluated, names)
    said: list[str] = []
    assert results(evaluated, names, OnCluster(2, said.append)) == expected
    assert "Evaluating with 2 workers of 1 CPU each, as the run's have; free now: 6 CPUs." in said
    wait_for(lambda: nothing_is_left(cluster), timeout_s=WAIT_S, what="the workers' end")

    hit: list[int] = []

    def kill_one_and_freeze_one() -> bool:
        for pid in set(processes_titled(cluster, "ray::Evaluator.answer")) - set(hit):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, (signal.SIGKILL, signal.SIGSTOP)[len(hit)])
                hit.append(pid)
            if len(hit) == 2:
                return True
        return False

    said.clear()
    with ThreadPoolExecutor(1) as pool:
        evaluating = pool.submit(results, evaluated, names, OnCluster(2, said.append))
        wait_for(lambda: kill_one_and_freeze_one() or evaluating.done(), timeout_s=WAIT_S, what="two workers to hit")
        assert evaluating.result(WAIT_S) == expected
    assert len(hit) == 2
    lost = re.compile(r"A worker of the evaluation is lost: Actor(Died|Unavailable)Error\. Another takes its place\.")
    assert any(map(lost.fullmatch, said))
    wait_for(lambda: nothing_is_left(cluster), timeout_s=WAIT_S, what="the end of the frozen one, too")


def test_what_a_user_is_to_correct_is_told_as_by_one_process(
    cluster: LocalCluster, evaluated: RunConfig, tmp_path: Path
) -> None:
    safety = write(tmp_path, PROMPTS, name="safety", kind="safety", scorer=FAILING, max_new_tokens=3)
    told = []
    for answerer in (None, OnCluster(2)):
        with pytest.raises(ConfigError, match="no model of harm for") as caught:
            results(evaluated, [safety], *([answerer] if answerer else []))
        told.append(str(caught.value))
    assert told[0] == told[1]
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 5"):
        list(Run.open(evaluated).evaluate(step=5, workers=2))


def test_cluster_that_gives_no_worker_is_told_with_its_resources(cluster: LocalCluster, evaluated: RunConfig) -> None:
    """A run's workers hold all CPUs, or there never were as many."""
    large = evaluated.replace("workers.num_cpus=3")
    message = "came within 1 s: each asks for 3 CPUs, as the run's workers do; the cluster has 6 CPUs, of which .* are free; wait"
    with pytest.raises(ClusterError, match=message):
        results(large, ["held_out"], OnCluster(2, patience_s=1.0))
    wait_for(lambda: nothing_is_left(cluster), timeout_s=WAIT_S, what="the workers' end")


class Claimant:
    """In the place of a run's worker: an actor of elastic-lm that asks for a whole node."""

    def here(self) -> bool:
        return True


def test_workers_make_room_for_those_of_a_run_and_go_on_when_there_is_room_again(
    cluster: LocalCluster, evaluated: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two on two of three nodes, and then three who ask for a node each: nobody of the evaluation is left for that long."""
    names, said = [long_task(tmp_path), "held_out"], list[str]()
    monkeypatch.setattr(f"{__name__}.PAUSE_S", 0.0)  # in this process
    expected = results(evaluated, names)
    options = {"num_cpus": 2, "namespace": NAMESPACE, "lifetime": "detached", "scheduling_strategy": "SPREAD"}
    actor = ray.remote(Claimant)
    claimants = []
    with ThreadPoolExecutor(1) as pool:
        evaluating = pool.submit(results, evaluated, names, OnCluster(2, said.append))
        at_work = lambda: len(processes_titled(cluster, "ray::Evaluator.answer")) == 2  # noqa: E731
        wait_for(lambda: at_work() or evaluating.done(), timeout_s=WAIT_S, what="two workers at work")
        try:
            claimants = [actor.options(**options, name=f"claimant-{number}").remote() for number in range(3)]
            ray.get([claimant.here.remote() for claimant in claimants], timeout=WAIT_S)
            assert not evaluating.done() and nothing_is_left(cluster)
        finally:
            for claimant in claimants:
                ray.kill(claimant)
        assert evaluating.result(WAIT_S) == expected
    told = [sentence for sentence in said if "wait" in sentence]
    assert told[-1] == "No worker of a run waits for a place any more: those of the evaluation come back."
    assert any(sentence.endswith("until none waits. 0 of 2 go on.") for sentence in told)
    wait_for(lambda: nothing_is_left(cluster), timeout_s=WAIT_S, what="the workers' end")


def test_worker_that_finds_no_checkpoint_any_more_is_done_without(
    cluster: LocalCluster, evaluated: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the run deletes old ones while it trains. When nobody has the model, that is the error."""
    names, folder, said = [long_task(tmp_path), "held_out"], Storage.open(evaluated.run_url), list[str]()
    monkeypatch.setattr(f"{__name__}.PAUSE_S", 0.0)  # in this process
    expected = results(evaluated, names)
    at_work: set[int] = set()

    def both_have_it() -> bool:
        at_work.update(processes_titled(cluster, "ray::Evaluator.answer"))
        return len(at_work) == 2

    with ThreadPoolExecutor(1) as pool:
        evaluating = pool.submit(results, evaluated, names, OnCluster(2, said.append))
        wait_for(lambda: both_have_it() or evaluating.done(), timeout_s=WAIT_S, what="two workers with the model")
        for path in folder.list("checkpoints/"):
            folder.delete(path)
        os.kill(min(at_work), signal.SIGKILL)
        assert evaluating.result(WAIT_S) == expected
    assert any("A worker of the evaluation has no model (the run in" in sentence for sentence in said)
    with pytest.raises(CheckpointError, match="has no complete checkpoint yet"):
        results(evaluated, names, OnCluster(2))
