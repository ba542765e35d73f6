"""Compiled blocks: one graph for all, the same bits whoever computes, nothing compiled twice, and no compiler is told by name."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from elastic_lm.engine import compiled
from elastic_lm.engine.probe import environment, probe
from elastic_lm.engine.spec import EngineSpec, FactorySpec
from elastic_lm.engine.step import Replica
from elastic_lm.errors import ConfigError
from elastic_lm.protocol import LeaseEnd
from elastic_lm.runtime.cluster import wait_for
from tests.engine.members import VOCAB, Cluster, tiny_spec
from tests.engine.test_step import Recorder, Trainee, WithPeers

os.environ.update(compiled.SETTINGS)  # before any test imports torch._inductor
from torch._inductor import config, cpp_builder

CPU = torch.device("cpu")
COLD_S = 240  # to compile with an empty cache on a busy machine; half a minute on an idle one

pytestmark = pytest.mark.timeout(300)  # a cold cache costs half a minute


def spec_of(**changes: Any) -> EngineSpec:
    return tiny_spec(compile=True, **changes)


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Of PyTorch, as they were before."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def recompiles_nothing() -> Iterator[Callable[[], None]]:
    """From when it is called: whatever would compile again fails."""
    yield lambda: torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")


def test_kernels_are_chosen_without_measuring_in_every_thread() -> None:
    """Whenever something was compiled, PyTorch sets it anew: also after the first."""
    for seed in (1, 2):
        torch._dynamo.reset()
        probe(Replica(spec_of(seed=seed)))
        assert config.deterministic and config.compile_threads == 1
    elsewhere: list[bool] = []
    thread = threading.Thread(target=lambda: elsewhere.append(config.deterministic))
    thread.start()
    thread.join()
    assert elsewhere == [True]


def test_all_blocks_share_one_graph_and_parameters_keep_their_names() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    replica = Replica(spec_of())
    assert len(replica.model.blocks) == 2
    probe(replica)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [slot.name for slot in replica.state.slots] == [slot.name for slot in Replica(tiny_spec()).state.slots]


def test_a_compiled_model_learns_what_the_other_does() -> None:
    spec = {"model": tiny_spec().model.__class__(**{**vars(tiny_spec().model), "dropout": 0.0})}
    fused, plain = Trainee(spec_of(**spec)), Trainee(tiny_spec(**spec))
    for _ in range(3):
        ours, theirs = fused.run().record, plain.run().record
        assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-5)
        assert math.isclose(ours.grad_norm, theirs.grad_norm, rel_tol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_assignment_does_not_show_in_the_bits(precision: Any) -> None:
    spec = spec_of(precision=precision)
    alone, first, second = Trainee(spec), Trainee(spec), Trainee(spec)
    expected = alone.run().record
    sent = second.contribution((1, 3, 5))
    assert isinstance(sent, Recorder)
    assert first.run((4, 0, 2), group=WithPeers(sent)).record.same_bits(expected)
    assert first.state.digest() == alone.state.digest()


def test_recomputed_blocks_have_the_same_bits() -> None:
    """With dropout: `recompute` is no part of a run's identity."""
    kept, again = Trainee(spec_of()), Trainee(spec_of(recompute=True))
    for _ in range(2):
        assert again.run().record.same_bits(kept.run().record)
    assert again.state.digest() == kept.state.digest()


def test_nothing_is_compiled_after_the_probe(recompiles_nothing: Callable[[], None]) -> None:
    """In another thread, as a lease is, and with another number of micro-batches."""
    trainee, found = Trainee(spec_of()), list[Any]()
    probe(trainee.replica)

    def lease() -> None:
        compiled.prepare()
        torch.set_num_threads(1)
        recompiles_nothing()
        try:
            found.append(trainee.run().record)
            trainee.contribution((2,))
        except Exception as error:  # noqa: BLE001 - shown by the assertion
            found.append(error)

    thread = threading.Thread(target=lease)
    thread.start()
    thread.join()
    assert [getattr(one, "step", one) for one in found] == [0]


def test_members_that_come_later_have_the_bits_of_one_alone() -> None:
    alone = Trainee(spec_of())
    for _ in range(3):
        alone.run()
    cluster = Cluster(spec_of(), method="spawn")
    try:
        cluster.start("w0", "w1")
        cluster.grant(["w0"], 0, 1)
        assert cluster.report("w0").end is LeaseEnd.COMPLETED
        cluster.grant(["w0", "w1"], 1, 3, source="w0", joiners=("w1",))
        assert {report.end for report in cluster.reports("w0", "w1").values()} == {LeaseEnd.COMPLETED}
        assert {cluster.digest(name) for name in ("w0", "w1")} == {alone.state.digest()}
    finally:
        cluster.close()


def compiles(pid: int) -> bool:
    """A C++ compiler works for this process."""
    return any("cc1plus" in child.name() for child in psutil.Process(pid).children(recursive=True))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_member_frozen_and_killed_while_it_compiles_costs_the_others_nothing_but_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It holds the lock of the machine's cache until its end, which sets the others free, with the same bits."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cluster = Cluster(tiny_spec(compile=True), method="spawn")
    try:
        cluster.start("w0")
        cluster.grant(["w0"], 0, 1)
        frozen = cluster.members["w0"].process
        wait_for(lambda: compiles(frozen.pid), timeout_s=COLD_S, what="w0 compiles")
        os.kill(frozen.pid, signal.SIGSTOP)
        cluster.start("w1", "w2")
        cluster.grant(["w1", "w2"], 0, 2)
        threading.Timer(20, frozen.kill).start()  # as whoever lost patience would
        for name in ("w1", "w2"):
            assert cluster.members[name].pipe.poll(COLD_S), f"no report from {name}"
            assert cluster.report(name).end is LeaseEnd.COMPLETED
        found = {cluster.digest(name) for name in ("w1", "w2")}
    finally:
        cluster.close()
    alone = Trainee(tiny_spec(compile=True))
    for _ in range(2):
        alone.run()
    assert found == {alone.state.digest()}


def test_a_model_of_the_user_is_compiled_whole() -> None:
    model = FactorySpec("tests.engine.user_code:bag", vocab_size=VOCAB, max_tokens=64)
    fused, plain = Trainee(spec_of(model=model)), Trainee(tiny_spec(model=model))
    assert math.isclose(fused.run().record.loss, plain.run().record.loss, rel_tol=1e-5)
    assert fused.replica.model._compiled_call_impl is not None


def test_the_compiler_is_a_part_of_the_environment() -> None:
    assert environment(1, "cpu", compiles=True)["compiler"] == compiled.compiler(CPU) != ""
    assert "compiler" not in environment(1, "cpu")


@pytest.mark.parametrize("command", ["no-such-compiler", "false"])
def test_no_compiler_is_told_with_a_remedy(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: command)
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler on every node.* set training.compile: false"):
        Replica(spec_of())


def test_no_triton_is_told_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compiled, "version", missing)  # a GPU machine has it
    with pytest.raises(ConfigError, match=r"needs Triton.*set training.compile: false"):
        compiled.compiler(torch.device("cuda"))
