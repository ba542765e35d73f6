"""A run that is trained in this process: the real engine, recorder, log and checkpoints, without Ray.

What `fit` leaves behind, in a second: for tests about what is made of a run, not about how its workers come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elastic_lm.checkpoint import store
from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.engine.determinism import make_deterministic
from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.events.types import Event, EventKind
from elastic_lm.protocol import Generation, Lease, LeaseEnd, Phase, StepRecord
from elastic_lm.result import RunResult
from elastic_lm.runtime import trainer
from elastic_lm.runtime.coordinator import Plan
from elastic_lm.runtime.mailbox import Mailbox
from elastic_lm.runtime.plan import make_plan
from elastic_lm.runtime.recorder import Recorder
from tests.data.corpora import texts, write_lines
from tests.faults.oracle import member_of

GENERATION = Generation(1, 1)


def solo_corpus(folder: Path, held_out: float = 0.005) -> str:
    """The address of a corpus of a few thousand tokens."""
    from elastic_lm.data.prepare import PrepareOptions, prepare
    from elastic_lm.storage import Storage

    source = write_lines(folder / "text.jsonl", texts(300))
    options = PrepareOptions(vocab_size=300, block_tokens=257, held_out=held_out)
    prepare([source], Storage.open(f"file://{folder}/tokens"), options)
    return f"file://{folder}/tokens"


def solo_config(tokens: str, storage: str, name: str = "solo", *, steps: int = 6, **changes: Any) -> RunConfig:
    """A run of the smallest model that takes milliseconds a step."""
    parts: dict[str, Any] = {
        "model": {"num_layers": 1, "num_heads": 1, "width": 16},
        "batch": {"micro_batches": 2, "micro_batch_size": 1, "sequence_length": 32},
        "metrics": {"port": None},
    }
    return RunConfig(
        name=name, storage=storage, data={"tokens": tokens}, training={"steps": steps}, **{**parts, **changes}
    )


class Unheard:
    """A mailbox that nobody reads: what is told to it is kept."""

    def __init__(self) -> None:
        self.news: list[str] = []
        self.publish = self

    def remote(self, news: list[Any], status: dict[str, Any]) -> None:
        self.news += [piece.text for piece in news]


class Solo:
    """One attempt of a run, by one worker: what the coordinator and its worker do, in their order."""

    def __init__(self, config: RunConfig, mailbox: Any = None) -> None:
        self.plan: Plan = make_plan(config)
        self._stopping: str | None = None
        self.plan.run_storage.write(CONFIG_FILE, self.plan.config.to_yaml().encode())
        step, fields = self.plan.resume_step, {"config": self.plan.config.model_dump(mode="json")}
        begun = Event(
            EventKind.RUN_STARTED,
            "run_started happened.",
            fields={"resume_step": step, "flops_per_token": None, **fields},
        )
        self._recorder = Recorder(self.plan.config, self.plan.run_storage, mailbox or Unheard(), begun)
        self._recorder.skip_to(step or 0)

    def stop(self, reason: str) -> None:
        """After the running step. From any thread."""
        self._stopping = reason

    def train(self, until: int | None = None) -> RunResult:
        """To the end, or until so many steps are done, or until it is told to stop."""
        plan, last = self.plan, until or self.plan.config.training.steps
        begin = plan.resume_step or 0
        self._emit(EventKind.MEMBER_STARTED, member_id="w0", node_id="n0", pid=1)
        self._emit(EventKind.MEMBER_READY, member_id="w0", node_id="n0", startup_s=0.1, environment={"torch": "2"})
        shape = {"members": ["w0"], "start_step": begin, "stop_step": last, "shares": [2], "world_size": 1}
        self._emit(EventKind.LEASE_GRANTED, **shape)
        make_deterministic("cpu", exact=True, threads=1)
        restore = lambda step, on_part: store.load(plan.run_storage, step).tensors  # noqa: E731
        member = member_of(plan, restore)
        slots = tuple(range(plan.spec.micro_batches))
        lease = Lease(GENERATION, ("w0",), None, begin, last, (slots,), restore=plan.resume_step)
        report = run_lease(member, lease, self)
        assert report.end in (LeaseEnd.COMPLETED, LeaseEnd.ENDED_EARLY), report.error
        saved = self._save(member)
        step = member.state.next_step
        verdict = "done" if step == plan.config.training.steps else "stopped"
        reason = f"trained {step} steps" if verdict == "done" else self._stopping or "enough"
        self._emit(EventKind.RUN_FINISHED, step=step, verdict=verdict, reason=reason)
        digest = {name: saved[name] for name in ("state", "weights")}
        result = RunResult(verdict, reason, step, self._recorder.figures(), saved["url"], digest)
        self._recorder.publish(lambda: {**status(plan.config), "verdict": verdict}, at_once=True)
        self._recorder.close()
        return result

    def die(self) -> None:
        """What has been told is stored; there is no checkpoint and no verdict."""
        self._recorder.close()

    def _save(self, member: Member) -> dict[str, str]:
        state, config = member.state, self.plan.config
        digest = {"state": state.digest(), "weights": state.weights_digest()}
        identity = {"fingerprint": config.identity_fingerprint(), "config": config.model_dump(mode="json")}
        info = store.save(self.plan.run_storage, state.next_step, state.tensors(), {**identity, "digest": digest})
        self._emit(EventKind.CHECKPOINT_SAVED, step=state.next_step, seconds=0.1)
        return {"url": info.url, **digest}

    def _emit(self, kind: EventKind, *, step: int | None = None, **fields: Any) -> None:
        self._recorder.emit(Event(kind, f"{kind} happened.", step, str(GENERATION), fields))

    # -- what the engine asks and tells ------------------------------------------------------------------------------

    def cancelled(self) -> bool:
        return False

    def wants_end(self) -> bool:
        return self._stopping is not None

    def report(self, phase: Phase) -> None:
        """Nobody waits."""

    def committed(self, record: StepRecord, micro_batch_s: float | None) -> None:
        self._recorder.enter((record,))
        self._recorder.publish(lambda: status(self.plan.config))


def status(config: RunConfig) -> dict[str, Any]:
    """What control would say."""
    member = {"state": "active", "pid": 1, "node_id": "n0"}
    limits = {"min_workers": config.workers.min, "max_workers": config.workers.max}
    return {"members": {"w0": member}, "world_size": 1, "mode": "leased", **limits}


# -- under `fit` -----------------------------------------------------------------------------------------------------


class LocalMailbox:
    """The real mailbox in a thread of this process, called as an actor is: `mailbox.post.remote(command)`."""

    def __init__(self) -> None:
        self._mailbox, self._loop = Mailbox(), asyncio.new_event_loop()
        self.killed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="mailbox", daemon=True)
        self._thread.start()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._mailbox, name)
        return SimpleNamespace(remote=lambda *given: asyncio.run_coroutine_threadsafe(method(*given), self._loop))

    def kill(self) -> None:
        self.killed = True
        asyncio.run_coroutine_threadsafe(self._cancel_all(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _cancel_all(self) -> None:
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


def train_solo(config: RunConfig, mailbox: Any, token: str, folder: str) -> RunResult:
    """In the place of Ray Train: one attempt in this thread, which a word in the mailbox stops."""
    solo = Solo(config, mailbox)

    def told(command: Any) -> None:
        if not command.cancelled():
            solo.stop(command.result().arguments["reason"])

    mailbox.take.remote().add_done_callback(told)
    return solo.train()


@contextlib.contextmanager
def without_ray(run_trainer: Any = train_solo) -> Iterator[list[LocalMailbox]]:
    """`fit` trains in this process. Yields: the mailboxes that it makes."""
    mailboxes: list[LocalMailbox] = []

    @contextlib.contextmanager
    def connected(min_cpus: float) -> Iterator[str]:
        yield "Using this process."

    def create_mailbox(run: str) -> LocalMailbox:
        mailboxes.append(LocalMailbox())
        return mailboxes[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "run_trainer", run_trainer)
        patch.setattr(trainer, "FOLLOW_S", 0.1)
        patch.setattr(trainer, "create_mailbox", create_mailbox)
        patch.setattr(trainer.cluster, "connected", connected)
        ray = SimpleNamespace(get=lambda future: future.result(), kill=lambda mailbox: mailbox.kill())
        patch.setattr(trainer, "ray", ray)
        yield mailboxes
