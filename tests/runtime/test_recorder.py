"""The recorder of an attempt knows all that earlier ones stored, and those store nothing more."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from elastic_lm.config import RunConfig
from elastic_lm.errors import SupersededError
from elastic_lm.events.log import read
from elastic_lm.events.types import Event, EventKind
from elastic_lm.experiment.rewinds import Rewind
from elastic_lm.experiment.spikes import Spike
from elastic_lm.protocol import Evaluation, Generation, StepRecord
from elastic_lm.run import Run
from elastic_lm.runtime.recorder import Recorder
from elastic_lm.storage import Storage
from tests.solo import Unheard, solo_config, status


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return solo_config(str(tmp_path / "tokens"), str(tmp_path))


class Attempts:
    """Recorders of one run, which end with the test."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.storage = config, Storage.open(config.run_url)
        self.superseded: list[str] = []
        self.mailbox = Unheard()
        self._begun: list[Recorder] = []

    def begin(self, owner_epoch: int, resume_step: int | None = None, rewinds: Sequence[Rewind] = ()) -> Recorder:
        fields = {"resume_step": resume_step, "flops_per_token": None, "config": self.config.model_dump(mode="json")}
        started = Event(EventKind.RUN_STARTED, f"Attempt of owner {owner_epoch}.", fields=fields)
        recorder = Recorder(
            self.config, self.storage, self.mailbox, started,
            owner_epoch=owner_epoch, on_superseded=self.superseded.append, rewinds=rewinds,
        )  # fmt: skip
        self._begun.append(recorder)
        return recorder

    def events(self) -> list[Event]:
        return list(read(self.storage.child("events")))

    def end(self) -> None:
        for recorder in self._begun:
            recorder.close()


@pytest.fixture
def attempts(config: RunConfig) -> Iterator[Attempts]:
    attempts = Attempts(config)
    yield attempts
    attempts.end()


def record(step: int, owner_epoch: int = 1) -> StepRecord:
    times = dict.fromkeys(("step_s", "compute_s", "data_wait_s", "reduce_wait_s", "optimizer_s"), 0.1)
    return StepRecord(step, 2.5, 64, 1e-3, 1.0, 7, 0, Generation(owner_epoch, 1), 1, **times)


def test_attempt_begins_in_the_log_and_is_told(attempts: Attempts) -> None:
    first = attempts.begin(1)
    (started,) = attempts.events()
    assert (started.kind, started.attempt, started.owner_epoch) == (EventKind.RUN_STARTED, 1, 1)
    assert started.time_s > 0
    first.publish(lambda: status(attempts.config), at_once=True)
    assert attempts.mailbox.news[-1] == "0:00:00  Attempt of owner 1."


def test_next_attempt_goes_on_behind_what_is_stored(attempts: Attempts) -> None:
    first = attempts.begin(1)
    first.enter((record(0), record(1)))
    first.close()
    assert first.logged_step == 2
    second = attempts.begin(2)
    assert (second.next_step, second.logged_step) == (2, 2)
    assert second.figures()["loss"] == 2.5
    assert [event.attempt for event in attempts.events()] == [1, 1, 1, 2]


def ended(attempts: Attempts, recorder: Recorder) -> set[str]:
    """The verdicts that the recorder's endpoint tells."""
    recorder.publish(lambda: status(attempts.config), at_once=True)
    address = re.findall(r"http://\S+/metrics", " ".join(attempts.mailbox.news))[-1]
    with urllib.request.urlopen(address, timeout=30) as answer:
        return set(
            re.findall(r'^elastic_lm_run_ended\{.*verdict="(\w+)"\} 1', answer.read().decode(), flags=re.MULTILINE)
        )


def test_next_attempt_is_not_taken_for_one_that_has_ended(config: RunConfig) -> None:
    """Not even by the first scrape, which would raise an alarm."""
    attempts = Attempts(config.replace("metrics.port=0"))
    first = attempts.begin(1)
    first.emit(Event(EventKind.RUN_FINISHED, "It failed.", fields={"verdict": "failed", "reason": "for a test"}))
    assert first.flush()
    assert ended(attempts, first) == {"failed"}
    first.close()
    assert ended(attempts, attempts.begin(2)) == set()
    attempts.end()


def test_attempt_that_another_took_over_from_stores_and_claims_nothing_more(attempts: Attempts) -> None:
    first = attempts.begin(1)
    first.enter((record(0),))  # on its way as the other one begins
    second = attempts.begin(2)
    first.enter((record(1),))
    first.close()
    second.enter(tuple(record(step, 2) for step in range(second.next_step, 3)))
    second.close()
    assert first.logged_step == sum(e.kind is EventKind.STEP_COMMITTED and e.attempt == 1 for e in attempts.events())
    committed = [event for event in attempts.events() if event.kind is EventKind.STEP_COMMITTED]
    assert [event.step for event in committed] == [0, 1, 2]
    assert [event.attempt for event in committed] == sorted(event.attempt for event in committed)
    (told,) = attempts.superseded
    assert "was written by somebody else, who owns the run now" in told


def test_attempt_of_an_outranked_owner_does_not_begin(attempts: Attempts) -> None:
    attempts.begin(2)
    with pytest.raises(SupersededError, match="owner 1 has to end"):
        attempts.begin(1)
    assert [event.owner_epoch for event in attempts.events()] == [2]


def test_steps_that_nobody_can_tell_of_any_more_are_told_as_missing(attempts: Attempts) -> None:
    recorder = attempts.begin(1)
    recorder.enter((record(2), record(3)))
    recorder.skip_to(4)
    recorder.enter((record(4),))
    recorder.close()
    told = [(event.kind, event.step) for event in attempts.events()[1:]]
    assert told == [(EventKind.NOTE, 4), *((EventKind.STEP_COMMITTED, step) for step in (2, 3, 4))]
    assert "2 steps from 0 to 1 are missing in the log" in attempts.events()[1].message


def told_of(attempts: Attempts, attempt: int) -> list[tuple[EventKind, int | None]]:
    return [(event.kind, event.step) for event in attempts.events() if event.attempt == attempt][1:]


def test_log_of_a_fork_begins_at_its_step(attempts: Attempts) -> None:
    recorder = attempts.begin(1, resume_step=4)
    assert (recorder.next_step, recorder.logged_step, recorder.unlogged()) == (4, 4, ())
    recorder.skip_to(4)
    recorder.enter((record(4),))
    recorder.close()
    assert told_of(attempts, 1) == [(EventKind.NOTE, 4), (EventKind.STEP_COMMITTED, 4)]
    assert "begins at step 4" in attempts.events()[1].message


def test_fork_that_is_taken_over_before_anything_is_logged_lacks_nothing(attempts: Attempts) -> None:
    """Its workers tell of all that it has trained, and at its last step no lease comes after that."""
    attempts.begin(1, resume_step=4)
    second = attempts.begin(2, resume_step=4)
    second.enter((record(4), record(5)))
    second.close()
    assert told_of(attempts, 2) == [(EventKind.NOTE, 4), (EventKind.STEP_COMMITTED, 4), (EventKind.STEP_COMMITTED, 5)]
    assert not any("missing" in event.message for event in attempts.events())


def test_attempt_that_goes_on_behind_a_log_does_not_begin_it_anew(attempts: Attempts) -> None:
    first = attempts.begin(1, resume_step=4)
    first.enter((record(4), record(5)))
    first.close()
    second = attempts.begin(2, resume_step=5)
    assert (second.next_step, second.logged_step) == (6, 6)
    second.close()
    assert told_of(attempts, 2) == []


def test_records_that_the_log_lacks_are_those_of_the_last_moment(attempts: Attempts) -> None:
    recorder = attempts.begin(1)
    recorder.enter((record(0), record(1)))
    assert recorder.flush()
    recorder.enter((record(2),))
    assert [r.step for r in recorder.unlogged()] == [2]


def test_evaluations_that_the_log_lacks_are_those_of_the_last_moment(attempts: Attempts) -> None:
    first = attempts.begin(1)
    fields = {"loss": 2.5, "loss_stderr": None, "num_targets": 64, "num_correct": None, "num_bytes": 200}
    first.emit(Event(EventKind.EVALUATED, "Held out.", 10, fields=fields))
    assert [evaluation.step for evaluation in first.unlogged_evaluations()] in ([10], [])  # it may be stored by now
    assert first.flush()
    assert first.unlogged_evaluations() == ()
    assert (first.evaluated, attempts.begin(2).evaluated) == ({10}, {10})


def evaluation(step: int) -> Evaluation:
    return Evaluation(step, 2.5, None, 64, None)


def test_evaluations_that_members_remember_come_before_their_steps_and_once(attempts: Attempts) -> None:
    first = attempts.begin(1)
    records = tuple(record(step) for step in range(4))
    first.enter(records, (evaluation(3), evaluation(2)))
    first.enter(records, (evaluation(2), evaluation(3), evaluation(4)))
    assert first.flush()
    told = [(event.kind, event.step) for event in attempts.events() if event.step is not None]
    steps = EventKind.STEP_COMMITTED
    held_out = EventKind.EVALUATED
    assert told == [(steps, 0), (steps, 1), (held_out, 2), (steps, 2), (held_out, 3), (steps, 3), (held_out, 4)]


def test_steps_that_are_left_out_are_told_and_counted_over_attempts(attempts: Attempts) -> None:
    first = attempts.begin(1)
    first.enter(tuple(replace(record(step), refused=1) for step in range(9)))
    assert first.too_many_left_out is None
    assert first.flush()
    assert sum("was left out: 1 values" in event.message for event in attempts.events()) == 9
    second = attempts.begin(2)
    second.enter((replace(record(9), refused=1),))
    assert second.too_many_left_out is not None and "last 10 steps up to 9 were left out" in second.too_many_left_out
    told = second.too_many_left_out
    second.enter((record(10),))
    assert second.too_many_left_out == told  # whether that step came before somebody looked or after
    assert second.mean_loss(11) == 2.5


def test_held_out_loss_of_the_result_is_of_the_last_step(attempts: Attempts) -> None:
    first = attempts.begin(1)
    first.enter((record(0), record(1)), (evaluation(1),))
    assert first.figures()["held_out_loss"] is None
    first.enter((), (evaluation(2),))
    assert first.figures()["held_out_loss"] == 2.5


# -- spikes ------------------------------------------------------------------------------------------------------------

SPIKES = "spikes={policy: rewind, window_steps: 20, rewind_steps: 5, skip_batches: 10}"


@pytest.fixture
def watched(config: RunConfig) -> Iterator[Attempts]:
    """Of a run that goes back for a spike."""
    attempts = Attempts(config.replace("checkpoint.every_steps=10", SPIKES))
    yield attempts
    attempts.end()


def steps(start: int, stop: int, loss: float = 2.5) -> tuple[StepRecord, ...]:
    return tuple(replace(record(step), loss=loss) for step in range(start, stop))


def spiking(attempts: Attempts) -> tuple[Recorder, Rewind]:
    """An attempt with a spike in steps 30 to 32, which has trained on to 35; and what is to be done about it."""
    recorder = attempts.begin(1)
    recorder.enter(steps(0, 30))
    assert recorder.spike is None
    recorder.enter(steps(30, 33, loss=9.0))
    spike = recorder.spike
    assert spike is not None
    assert (spike.first_step, spike.last_step) == (30, 32)
    recorder.enter(steps(33, 35, loss=9.0))
    return recorder, Rewind.of(spike, attempts.config, number=1)


def test_spike_stays_until_somebody_has_done_something_about_it(watched: Attempts) -> None:
    recorder, rewind = spiking(watched)
    first = recorder.spike
    recorder.enter(steps(35, 60))
    recorder.close()
    second = watched.begin(2)
    assert second.spike == first
    second.close()
    third = watched.begin(3, rewinds=[rewind])
    assert third.spike is None


def test_log_goes_on_from_where_the_run_went_back_to(watched: Attempts) -> None:
    recorder, rewind = spiking(watched)
    recorder.emit(_evaluation_event(20))
    recorder.emit(_evaluation_event(30))
    recorder.close()
    second = watched.begin(2, resume_step=20, rewinds=[rewind])
    assert (second.next_step, second.logged_step, second.spike) == (25, 25, None)
    assert second.evaluated == {20}
    assert second.figures()["held_out_loss"] is None
    second.flush()
    (told,) = [event for event in watched.events() if event.kind is EventKind.REWOUND]
    assert (told.step, told.attempt) == (25, 2)
    assert told.message == f"{rewind}."
    assert told.fields == {
        "number": 1, "cause": "loss", "first_step": 30, "last_step": 32, "left_out": [[25, 35]], "skip": [[25, 35]],
        "num_steps": 10,
    }  # fmt: skip
    second.enter(steps(20, 25))  # as they were
    second.enter(steps(25, 30, loss=2.4))  # other batches
    second.close()
    assert not [event for event in watched.events() if event.kind is EventKind.STEP_MISMATCH]
    third = watched.begin(3, rewinds=[rewind])
    assert (third.next_step, third.spike) == (30, None)
    third.close()
    assert sum(event.kind is EventKind.REWOUND for event in watched.events()) == 1


def test_second_spike_is_found_by_what_came_before_it_in_the_end(watched: Attempts) -> None:
    """Not by what was given up: the losses of the first spike would hide it."""
    recorder, rewind = spiking(watched)
    recorder.close()
    second = watched.begin(2, rewinds=[rewind])
    second.enter(steps(25, 40))
    second.enter(steps(40, 43, loss=9.0))
    assert second.spike is not None and second.spike.first_step == 40
    second.close()
    assert watched.begin(3, rewinds=[rewind]).spike == second.spike


def test_spike_that_was_trained_through_under_other_rules_is_past(config: RunConfig) -> None:
    before = Attempts(config)
    recorder = before.begin(1)
    recorder.enter((*steps(0, 30), *steps(30, 33, loss=9.0), *steps(33, 40)))
    assert recorder.spike is None
    recorder.close()
    after = Attempts(config.replace("checkpoint.every_steps=10", SPIKES))
    now = after.begin(2)
    assert now.spike is None
    now.enter((*steps(40, 60), *steps(60, 63, loss=9.0)))
    assert now.spike is not None and now.spike.first_step == 60
    after.end()
    before.end()


def test_spike_that_was_trained_through_later_is_past(watched: Attempts) -> None:
    """The attempt that found it died; somebody then wanted none of it."""
    spiking(watched)[0].close()
    between = Attempts(watched.config.replace("spikes.policy=ignore"))
    recorder = between.begin(2)
    assert recorder.spike is None
    recorder.enter(steps(35, 60))
    between.end()
    again = Attempts(watched.config)
    assert again.begin(3).spike is None
    again.end()


def test_spike_that_nobody_heeded_because_the_run_was_stopping_is_not_past(config: RunConfig) -> None:
    attempts = Attempts(config.replace("spikes={policy: stop, window_steps: 20}"))
    first = attempts.begin(1)
    first.enter((*steps(0, 30), *steps(30, 33, loss=9.0)))
    first.emit(Event(EventKind.RUN_FINISHED, "It stopped.", fields={"verdict": "stopped", "reason": "SIGTERM"}))
    first.close()
    assert attempts.begin(2).spike is not None
    attempts.end()


def test_steps_that_were_left_out_before_the_place_gone_back_to_count_on(watched: Attempts) -> None:
    recorder = watched.begin(1)
    recorder.enter((*steps(0, 22), *(replace(s, refused=1) for s in steps(22, 30)), *steps(30, 33, loss=9.0)))
    assert recorder.spike is not None
    rewind = Rewind.of(recorder.spike, watched.config, number=1)
    recorder.close()
    second = watched.begin(2, rewinds=[rewind])  # steps 22, 23 and 24 stay
    second.enter(tuple(replace(s, refused=1) for s in steps(25, 31)))
    assert second.too_many_left_out is None
    second.enter((replace(record(31), refused=1),))
    assert second.too_many_left_out is not None and "the last 10 steps up to 31" in second.too_many_left_out


def test_result_of_the_log_is_that_of_the_recorder(watched: Attempts) -> None:
    recorder, rewind = spiking(watched)
    recorder.close()
    second = watched.begin(2, rewinds=[rewind])
    mine = second.figures()["loss"]
    second.emit(Event(EventKind.RUN_FINISHED, "Ends.", step=25, fields={"verdict": "stopped", "reason": "enough"}))
    second.close()
    told = Run.open(watched.config.run_url).result
    assert told is not None and told.metrics["loss"] == mine == 2.5


STOPS = "spikes={policy: stop, window_steps: 20}"


def finished(verdict: str) -> Event:
    return Event(EventKind.RUN_FINISHED, "It ended.", fields={"verdict": verdict, "reason": "it had to"})


def test_spike_that_has_ended_a_run_ends_it_again_until_it_is_accepted(config: RunConfig) -> None:
    """Whoever only begins it again may be nobody: the successor of a coordinator that died behind its verdict, a job's retry."""
    attempts = Attempts(config.replace(STOPS))
    first = attempts.begin(1)
    first.enter((*steps(0, 30), *steps(30, 35, loss=9.0)))
    found = first.spike
    assert found is not None and found.last_step == 32
    assert first.flush()  # and it is killed
    for number in (2, 3):
        again = attempts.begin(number)
        assert again.spike == found
        again.emit(finished("spiked"))
        again.close()
    attempts.end()
    too_little = Attempts(config.replace(STOPS, "spikes.accept_until=32"))
    assert too_little.begin(4).spike == found
    too_little.end()
    accepting = Attempts(config.replace(STOPS, "spikes.accept_until=33"))
    fifth = accepting.begin(5)
    assert fifth.spike is None
    fifth.enter(steps(35, 38, loss=9.0))  # it takes its time
    assert fifth.spike is None
    fifth.enter((*steps(38, 44), *steps(44, 47, loss=20.0)))
    assert fifth.spike is not None and fifth.spike.first_step == 44  # another one
    fifth.emit(finished("spiked"))
    fifth.close()
    assert accepting.begin(6).spike == fifth.spike
    accepting.end()
    both = Attempts(config.replace(STOPS, "spikes.accept_until=47"))
    assert both.begin(7).spike is None
    both.end()
    neither = Attempts(config.replace(STOPS))
    assert neither.begin(8).spike == found  # it is the config that accepts
    neither.end()


@pytest.mark.parametrize("policy", ["skip", "rewind"])
def test_spike_from_which_a_run_could_not_go_back_is_accepted_likewise(policy: str, watched: Attempts) -> None:
    recorder, _ = spiking(watched)
    recorder.emit(finished("spiked"))
    recorder.close()
    config = watched.config.replace(f"spikes.policy={policy}")
    refused = Attempts(watched.config)
    assert refused.begin(2).spike == recorder.spike
    refused.end()
    accepting = Attempts(config.replace("spikes.accept_until=33"))
    third = accepting.begin(3)
    assert third.spike is None
    third.enter((*steps(35, 60), *steps(60, 63, loss=9.0)))
    assert third.spike is not None and third.spike.first_step == 60
    accepting.end()


def test_spike_that_is_accepted_stays_so_when_the_run_goes_back_for_something_else(config: RunConfig) -> None:
    """Back to the middle of it."""
    attempts = Attempts(config.replace(STOPS))
    first = attempts.begin(1)
    first.enter((*steps(0, 30), *steps(30, 33, loss=9.0)))
    first.emit(finished("spiked"))
    first.close()
    accepting = Attempts(config.replace(STOPS, "spikes.accept_until=33"))
    second = accepting.begin(2)
    second.enter(steps(33, 36, loss=9.0))
    rewind = Rewind.of(Spike(36, 36, "poisoned", "not finite"), accepting.config, number=1, floor=34)
    second.close()
    for number in (3, 4):
        again = accepting.begin(number, rewinds=[rewind])
        again.enter(steps(34 if number == 3 else 37, 40, loss=9.0))
        assert again.spike is None
        again.close()
    accepting.end()
    attempts.end()


@pytest.mark.parametrize(("change", "is_past"), [
    ("training.on_nonfinite=skip", False), ("spikes.accept_until=10", True),
    ("training.on_nonfinite=stop", True), ("training.on_nonfinite=rewind", True),
])  # fmt: skip
@pytest.mark.parametrize("verdict", ["poisoned", "stopped"])
def test_steps_left_out_on_end_end_a_run_again_until_they_are_accepted(
    change: str, is_past: bool, verdict: str, config: RunConfig
) -> None:
    config = config.replace("checkpoint.every_steps=10", "training.on_nonfinite=skip")
    attempts = Attempts(config)
    first = attempts.begin(1)
    first.enter((*(replace(s, refused=1) for s in steps(0, 10)), *steps(10, 12)))  # and two while it ends
    told = first.too_many_left_out
    assert told is not None and told.endswith("To train on all the same, resume it with --set spikes.accept_until=10")
    first.emit(finished(verdict))
    first.close()
    attempts.end()
    later = Attempts(config.replace(change))
    assert (later.begin(2).too_many_left_out is None) == is_past
    later.end()


def test_ten_more_steps_left_out_behind_those_that_are_accepted_end_the_run(config: RunConfig) -> None:
    attempts = Attempts(config.replace("training.on_nonfinite=skip", "spikes.accept_until=10"))
    first = attempts.begin(1)
    first.enter(tuple(replace(s, refused=1) for s in steps(0, 19)))
    assert first.too_many_left_out is None
    first.enter(tuple(replace(s, refused=1) for s in steps(19, 20)))
    told = first.too_many_left_out
    assert told is not None and "the last 10 steps up to 19" in told and told.endswith("accept_until=20")
    attempts.end()


def _evaluation_event(step: int) -> Event:
    fields = {"loss": 2.0, "loss_stderr": 0.1, "num_targets": 10, "num_correct": 1, "num_bytes": 40}
    return Event(EventKind.EVALUATED, "Measured.", step, fields=fields)
