"""A run that is trained in this process: the real engine, recorder, log and checkpoints, without Ray.

What `fit` leaves behind, in a second: for tests about what is made of a run, not about how its workers come and go.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_lm.checkpoint import store
from elastic_lm.config import CONFIG_FILE, RunConfig
from elastic_lm.data.windows import LocalTokens
from elastic_lm.engine.determinism import make_deterministic
from elastic_lm.engine.lease import Member, run_lease
from elastic_lm.engine.step import Replica, StepRunner
from elastic_lm.events.types import Event, EventKind
from elastic_lm.protocol import Generation, Lease, LeaseEnd, Phase, StepRecord
from elastic_lm.result import RunResult
from elastic_lm.runtime.coordinator import Plan
from elastic_lm.runtime.plan import make_plan
from elastic_lm.runtime.recorder import Recorder
from tests.data.corpora import texts, write_lines

GENERATION = Generation(1, 1)


def solo_corpus(folder: Path) -> str:
    """The address of a corpus of a few thousand tokens."""
    from elastic_lm.data.prepare import PrepareOptions, prepare
    from elastic_lm.storage import Storage

    source = write_lines(folder / "text.jsonl", texts(300))
    prepare([source], Storage.open(f"file://{folder}/tokens"), PrepareOptions(vocab_size=300, block_tokens=257))
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
        self.plan.run_storage.write(CONFIG_FILE, self.plan.config.to_yaml().encode())
        self._recorder = Recorder(
            self.plan.config, self.plan.run_storage, mailbox or Unheard(), resume_step=self.plan.resume_step
        )

    def train(self, until: int | None = None, verdict: str = "done") -> RunResult:
        """To the end, or `until` so many steps are done."""
        plan, last = self.plan, until or self.plan.config.training.steps
        begin, fields = plan.resume_step or 0, {"config": plan.config.model_dump(mode="json")}
        self._emit(EventKind.RUN_STARTED, resume_step=plan.resume_step, flops_per_token=None, **fields)
        self._emit(EventKind.MEMBER_STARTED, member_id="w0", node_id="n0", pid=1)
        self._emit(EventKind.MEMBER_READY, member_id="w0", node_id="n0", startup_s=0.1, environment={"torch": "2"})
        shape = {"members": ["w0"], "start_step": begin, "stop_step": last, "shares": [2], "world_size": 1}
        self._emit(EventKind.LEASE_GRANTED, **shape)
        make_deterministic("cpu", exact=True, threads=1)
        restore = lambda step: store.load(plan.run_storage, step).tensors  # noqa: E731
        member = Member("w0", StepRunner(Replica(plan.spec), LocalTokens(*plan.start_reader.args)), restore)
        slots = tuple(range(plan.spec.micro_batches))
        lease = Lease(GENERATION, ("w0",), None, begin, last, (slots,), restore=plan.resume_step)
        report = run_lease(member, lease, self)
        assert report.end in (LeaseEnd.COMPLETED, LeaseEnd.ENDED_EARLY), report.error
        saved = self._save(member)
        step, reason = member.state.next_step, f"trained {member.state.next_step} steps"
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
        return False

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
