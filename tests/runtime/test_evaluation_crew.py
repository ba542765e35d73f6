"""The crew of an evaluation, without a cluster: workers that are slow, frozen or without a model, one script for each case.

Time goes on by a second whenever the crew waits.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from elastic_lm.errors import CheckpointError, ConfigError, StorageError
from elastic_lm.evaluate import pieces
from elastic_lm.evaluate.pieces import Answer, Subject
from elastic_lm.runtime import cluster, evaluation_crew, evaluators
from elastic_lm.runtime.demand import Demand, Waiting
from elastic_lm.runtime.evaluators import OnCluster
from elastic_lm.storage import Storage
from tests.solo import solo_config

NEVER = object()  # what a frozen worker answers
MOST_WAITS = 20_000
Script = Callable[["Worker", str, Any], Any]


@dataclass(eq=False)
class Call:
    worker: Worker
    what: str
    about: Any


class Worker:
    """An actor. `number`: it is the number-th that was started, from 0."""

    def __init__(self, number: int, step: int | None = None) -> None:
        self.number, self.step, self.is_killed = number, step, False
        self.locate, self.load, self.answer = (
            SimpleNamespace(remote=lambda about=None, what=what: Call(self, what, about))
            for what in ("locate", "load", "answer")
        )


@dataclass
class FakeRay:
    """What the crew asks of Ray. `script` says what a worker's call comes to: a value, an error, or NEVER."""

    script: Script
    now_s: float = 0.0
    workers: list[Worker] = field(default_factory=list)
    reaped: list[int] = field(default_factory=list)

    def remote(self, actor: type) -> Any:
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._new))

    def _new(self, subject: Subject, pieces: Any) -> Worker:
        self.workers.append(Worker(len(self.workers)))
        return self.workers[-1]

    def put(self, value: Any) -> Any:
        return value

    def wait(self, calls: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        self.now_s += 1.0
        assert self.now_s < MOST_WAITS, "it waits for ever"
        ready = [call for call in calls if not call.worker.is_killed and self._found(call) is not NEVER]
        return ready, []

    def _found(self, call: Call) -> Any:
        if call.what == "locate":
            return self.script(call.worker, "locate", None) or ("node", call.worker.number)
        return self.script(call.worker, call.what, call.about)

    def get(self, call: Call) -> Any:
        found = self._found(call)
        if isinstance(found, BaseException):
            raise found
        return found

    def kill(self, worker: Worker, no_restart: bool) -> None:
        worker.is_killed = True

    def is_initialized(self) -> bool:
        return False

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 2}

    cluster_resources = available_resources

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        assert self.now_s < MOST_WAITS, "it waits for ever"


@contextlib.contextmanager
def connected(num_cpus: float) -> Iterator[str]:
    yield "There is a cluster."


def reap(ray: FakeRay) -> Callable[..., None]:
    return lambda node, pid, title, grace_s: ray.reaped.append(pid)


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], FakeRay, list[str]]]:
    """Answers of an evaluation with this script, the cluster, and what was said."""

    def evaluate(
        script: Script,
        num_workers: int,
        num_pieces: int,
        demand_of: Callable[[FakeRay], Demand] = lambda ray: Demand((), {}),
        num_gpus: int = 0,
        **choices: Any,
    ) -> tuple[list[Any], FakeRay, list[str]]:
        ray, said = FakeRay(script), list[str]()
        monkeypatch.setattr(evaluators, "ray", ray)
        monkeypatch.setattr(evaluation_crew, "ray", ray)
        monkeypatch.setattr(evaluation_crew, "time", ray)
        monkeypatch.setattr(cluster, "connected", connected)
        monkeypatch.setattr(evaluation_crew, "reap", reap(ray))
        monkeypatch.setattr(Demand, "now", lambda besides: demand_of(ray))
        config = solo_config("file:///nowhere", "file:///nowhere").replace(f"workers.num_gpus={num_gpus}")
        subject = Subject(Storage.open("/nowhere"), config)
        monkeypatch.setattr(pieces.standing, "step_of", lambda storage, step: 4 if ray.now_s < 3 else 6)
        crew = OnCluster(num_workers, said.append, **choices)
        return [answer.value for answer in crew(subject, [None] * num_pieces)], ray, said  # type: ignore[list-item]

    return evaluate


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("load", f"Traceback\n{cause}", cause)


def works(worker: Worker, what: str, about: Any) -> Any:
    """In time, with the weights of the step that it is told."""
    if what == "locate":
        return None
    if what == "load":
        worker.step = about
        return f"weights of {about}"
    return Answer(about, worker.step or 0, f"weights of {worker.step}")


def test_worker_that_comes_late_has_the_step_of_the_first_one(evaluated: Any) -> None:
    """A newer checkpoint appears in second 3; one worker dies at its piece and is replaced, another comes then only."""
    steps = set()

    def script(worker: Worker, what: str, about: Any) -> Any:
        if worker.number == 0 and what == "answer" and about == 2:
            return ActorDiedError()
        if what == "answer":
            steps.add((worker.number, worker.step))
        return works(worker, what, about)

    answers, _, _ = evaluated(script, 2, 9)
    assert answers == list(range(9))
    assert steps == {(0, 4), (1, 4), (2, 4)}


def test_worker_with_other_weights_of_the_step_is_done_without(evaluated: Any) -> None:
    def script(worker: Worker, what: str, about: Any) -> Any:
        return "other weights" if (worker.number, what) == (1, "load") else works(worker, what, about)

    answers, ray, said = evaluated(script, 2, 5)
    assert answers == list(range(5)) and len(ray.workers) == 2
    assert any("has no model (the checkpoint of step 4 changed while it was evaluated" in each for each in said)


def test_worker_that_is_frozen_while_it_loads_is_replaced_and_killed(evaluated: Any) -> None:
    def script(worker: Worker, what: str, about: Any) -> Any:
        return NEVER if (worker.number, what) == (0, "load") else works(worker, what, about)

    answers, ray, said = evaluated(script, 1, 3)
    assert answers == [0, 1, 2] and ray.reaped[0] == 0
    assert any("is lost: it has read the weights for 901 s. Another takes its place." in each for each in said)


@pytest.mark.parametrize(("num_workers", "hangs_at"), [(1, {0}), (2, {0, 1}), (2, {0})])
def test_worker_that_is_frozen_with_its_piece_is_told_of_and_its_piece_given_to_another(
    num_workers: int, hangs_at: set[int], evaluated: Any
) -> None:
    """Each worker at a piece of its own, or all at the same one, as the next takes it over from the first."""

    def script(worker: Worker, what: str, about: Any) -> Any:
        is_frozen = worker.number < num_workers and what == "answer" and about in hangs_at
        return NEVER if is_frozen else works(worker, what, about)

    answers, ray, said = evaluated(script, num_workers, 4)
    assert answers == [0, 1, 2, 3]
    assert len(ray.workers) <= 2 * num_workers
    assert any("has been at its piece for" in each and "process 0 on the node node" in each for each in said)
    assert set(ray.reaped) == {worker.number for worker in ray.workers}  # looked after, whoever they are


def test_slow_pieces_alone_call_nobody(evaluated: Any) -> None:
    """Each takes 200 s: the first one tells how long they take."""
    began: dict[int, float] = {}

    def script(worker: Worker, what: str, about: Any) -> Any:
        now_s = evaluation_crew.time.monotonic()
        is_at_it = what == "answer" and now_s - began.setdefault(about, now_s) < 200
        return NEVER if is_at_it else works(worker, what, about)

    answers, ray, said = evaluated(script, 1, 4)
    assert answers == [0, 1, 2, 3] and len(ray.workers) == 1
    assert not any("piece" in each for each in said)


def test_late_worker_that_answers_goes_on_where_nobody_came_instead(evaluated: Any) -> None:
    """The one that was called finds no room; the evaluation does not wait for it."""

    def script(worker: Worker, what: str, about: Any) -> Any:
        if worker.number > 0:
            return NEVER
        late = what == "answer" and about == 0 and evaluation_crew.time.monotonic() < 700
        return NEVER if late else works(worker, what, about)

    answers, ray, _ = evaluated(script, 1, 3)
    assert answers == [0, 1, 2] and len(ray.workers) == 2


def test_worker_without_a_model_ends_nothing_while_another_may_get_it(evaluated: Any) -> None:
    def script(worker: Worker, what: str, about: Any) -> Any:
        if what == "load" and worker.number == 1:
            return NEVER if evaluation_crew.time.monotonic() < 30 else works(worker, what, about)
        return task_error(CheckpointError("it is gone")) if what == "load" else works(worker, what, about)

    answers, ray, said = evaluated(script, 2, 3)
    assert answers == [0, 1, 2] and len(ray.workers) == 2
    assert "A worker of the evaluation has no model (it is gone); the others go on." in said


@pytest.mark.parametrize("cause", [CheckpointError("it is gone"), ConfigError("your model cannot be imported")])
def test_where_nobody_gets_the_model_that_is_the_error(cause: Exception, evaluated: Any) -> None:
    def script(worker: Worker, what: str, about: Any) -> Any:
        return task_error(cause) if what == "load" else works(worker, what, about)

    with pytest.raises(type(cause), match=str(cause)):
        evaluated(script, 3, 3)


def test_where_the_last_one_to_come_never_does_the_error_is_why_the_others_had_no_model(evaluated: Any) -> None:
    def script(worker: Worker, what: str, about: Any) -> Any:
        if worker.number == 1:
            return NEVER
        return task_error(CheckpointError("it is gone")) if what == "load" else works(worker, what, about)

    with pytest.raises(CheckpointError, match="it is gone"):
        evaluated(script, 2, 3, patience_s=20.0)


def test_worker_whose_loading_fails_by_chance_is_replaced(evaluated: Any) -> None:
    """Storage that gives no answer, a GPU without memory. When it never does better, that is the error."""

    def script(worker: Worker, what: str, about: Any) -> Any:
        if what == "load" and worker.number in (0, 1):
            return task_error((StorageError, RuntimeError)[worker.number]("no luck"))
        return works(worker, what, about)

    answers, ray, said = evaluated(script, 1, 3)
    assert answers == [0, 1, 2] and len(ray.workers) == 3
    assert [each for each in said if "lost" in each] == [
        f"A worker of the evaluation is lost: {kind}. Another takes its place."
        for kind in ("StorageError", "RuntimeError")
    ]

    def never(worker: Worker, what: str, about: Any) -> Any:
        return task_error(StorageError("no luck")) if what == "load" else works(worker, what, about)

    with pytest.raises(StorageError, match="no luck"):
        evaluated(never, 2, 3)


# -- a run trains on this machine ------------------------------------------------------------------------------------------


@pytest.fixture
def trains_here() -> Iterator[subprocess.Popen[bytes]]:
    """A process that calls itself as a run's workers do."""
    with subprocess.Popen(["ray::Worker.run_lease", "600"], executable=shutil.which("sleep")) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("num_gpus", "address", "is_refused"),
    [(1, None, True), (1, "10.0.0.1:6379", False), (0, None, False)],
    ids=["a cluster of our own", "one that knows what is free", "no GPU is taken"],
)
def test_gpus_that_a_run_trains_on_are_not_taken_beside_it(
    num_gpus: int,
    address: str | None,
    is_refused: bool,
    trains_here: subprocess.Popen[bytes],
    evaluated: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert trains_here.pid in cluster.training_here()
    monkeypatch.setattr(cluster, "training_here", lambda: [trains_here.pid])  # other tests may train beside this one
    if is_refused:
        with pytest.raises(ConfigError, match=rf"process {trains_here.pid} trains a run on this machine.*RAY_ADDRESS"):
            evaluated(works, 1, 3, num_gpus=num_gpus)
    else:
        assert evaluated(works, 1, 3, num_gpus=num_gpus)[0] == [0, 1, 2]


def test_evaluation_on_gpus_ends_where_a_run_begins_to_train_beside_it(
    evaluated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "training_here", lambda: [4711] if evaluation_crew.time.monotonic() > 9 else [])
    monkeypatch.setattr(evaluation_crew, "time", FakeRay(works))  # before there is one
    with pytest.raises(ConfigError, match="process 4711 trains a run on this machine"):
        evaluated(works, 1, 60, num_gpus=1)


def test_cluster_of_our_own_is_started_where_nobody_trains(evaluated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "training_here", list)
    assert evaluated(works, 1, 3, num_gpus=1)[0] == [0, 1, 2]


# -- a run on the same cluster comes to want a worker -----------------------------------------------------------------------


def on_nodes(worker: Worker, what: str, about: Any) -> Any:
    """Works, one on each node."""
    return (f"n{worker.number}", worker.number) if what == "locate" else works(worker, what, about)


@dataclass
class Claimant:
    """A worker of a run that asks for `cpus` from a second on. It has its place a second after there is room on a node."""

    asks_at_s: float
    cpus: float = 1.0
    avoids: frozenset[str] = frozenset()
    placed_at_s: float | None = None

    def __call__(self, ray: FakeRay) -> Demand:
        left = {f"n{worker.number}" for worker in ray.workers if worker.is_killed} - self.avoids
        if ray.now_s < self.asks_at_s:
            return Demand((), {f"n{number}": {} for number in range(9)})
        if self.placed_at_s is None and left and self.cpus <= 1:
            self.placed_at_s = ray.now_s
        waiting = () if self.placed_at_s is not None else (Waiting("w", {"CPU": self.cpus}, self.avoids),)
        return Demand(waiting, {f"n{number}": {} for number in range(9)})


def test_worker_makes_room_for_one_of_a_run_and_comes_back(evaluated: Any) -> None:
    claimant = Claimant(5)
    answers, ray, said = evaluated(on_nodes, 2, 60, claimant)
    assert answers == list(range(60))
    assert claimant.placed_at_s is not None
    assert claimant.placed_at_s <= claimant.asks_at_s + 3 * evaluation_crew.LOOK_S  # two looks, and its own
    assert len(ray.workers) == 3
    assert said[2:] == [
        "Workers of a run wait for a place: 1 worker of the evaluation leaves, until none waits. 1 of 2 go on.",
        "No worker of a run waits for a place any more: those of the evaluation come back.",
    ]


def test_evaluation_waits_where_all_have_made_room(evaluated: Any) -> None:
    """Nobody is there, and nothing is lost."""
    claimant = Claimant(5)
    answers, ray, said = evaluated(on_nodes, 1, 60, claimant)
    assert answers == list(range(60)) and len(ray.workers) == 2
    assert "leaves, until none waits. 0 of 1 go on." in said[2]


@pytest.mark.parametrize(
    "claimant",
    [Claimant(5, cpus=2.0), Claimant(5, avoids=frozenset(f"n{number}" for number in range(9)))],
    ids=["wants more than a node has", "keeps away from the nodes"],
)
def test_who_waits_in_vain_costs_nobody_its_work(claimant: Claimant, evaluated: Any) -> None:
    answers, ray, said = evaluated(on_nodes, 2, 60, claimant)
    assert answers == list(range(60)) and len(ray.workers) == 2 and len(said) == 2


def test_worker_that_is_seen_to_wait_once_is_starting(evaluated: Any) -> None:
    """Another at each look: each has had its place all the time."""

    def starting(ray: FakeRay) -> Demand:
        return Demand((Waiting(f"{ray.now_s}", {"CPU": 1.0}),), {f"n{number}": {} for number in range(9)})

    answers, ray, _ = evaluated(on_nodes, 2, 60, starting)
    assert answers == list(range(60)) and len(ray.workers) == 2


def test_one_that_reads_the_weights_makes_room_before_one_that_is_at_work(evaluated: Any) -> None:
    def script(worker: Worker, what: str, about: Any) -> Any:
        return NEVER if (worker.number, what) == (1, "load") else on_nodes(worker, what, about)

    answers, ray, _ = evaluated(script, 2, 60, Claimant(5))
    assert answers == list(range(60)) and len(ray.workers) == 3
    assert ray.reaped[0] == 1


def test_those_without_a_place_stand_back_too(evaluated: Any) -> None:
    """They would take what becomes free: the second one of ours has never had a place."""

    def script(worker: Worker, what: str, about: Any) -> Any:
        return NEVER if (worker.number, what) == (1, "locate") else on_nodes(worker, what, about)

    answers, ray, said = evaluated(script, 2, 60, Claimant(5))
    assert answers == list(range(60))
    assert "1 worker of the evaluation leaves, until none waits. 0 of 2 go on." in said[2]
    assert ray.workers[1].is_killed and len(ray.workers) == 4


def test_where_nobody_knows_who_waits_nobody_leaves(evaluated: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails(ray: FakeRay) -> Demand:
        raise RuntimeError("the head is away")

    answers, ray, _ = evaluated(on_nodes, 2, 60, fails)
    assert answers == list(range(60)) and len(ray.workers) == 2
    assert [record.message for record in caplog.records] == [
        "Cannot ask Ray who waits for a place (the head is away): no worker of the evaluation makes room."
    ]
