"""Every record reaches whoever listens, in lines that it takes, whatever breaks between."""

from __future__ import annotations

import queue
import threading
from dataclasses import replace

from elastic_lm.protocol import Generation, Heartbeat
from elastic_lm.runtime.lifeline import MAX_LINE_BYTES, Lifeline, LifelineServer, encode
from elastic_lm.runtime.pulse import BEAT_RECORDS, TOLD_AGAIN, Pulse
from tests.runtime.test_ledger import record

WAIT_S = 20


def pulse_of(num_records: int) -> Pulse:
    pulse = Pulse("w0")
    for step in range(num_records):
        pulse.tell(record(step))
    return pulse


def steps(beat: Heartbeat) -> list[int]:
    return [told.step for told in beat.records]


def test_records_are_told_once_and_in_order() -> None:
    pulse = pulse_of(2)
    assert steps(pulse.beat()) == [0, 1]
    pulse.tell(record(2))
    assert [steps(pulse.beat()), steps(pulse.beat())] == [[2], []]


def test_many_records_go_in_lines_that_a_coordinator_takes() -> None:
    pulse = pulse_of(BEAT_RECORDS + 3)
    beat = pulse.beat()
    assert len(beat.records) == BEAT_RECORDS and len(encode(beat)) < MAX_LINE_BYTES / 2
    assert steps(pulse.beat()) == [BEAT_RECORDS, BEAT_RECORDS + 1, BEAT_RECORDS + 2]


def test_new_connection_hears_again_what_the_broken_one_was_told_and_then_the_rest() -> None:
    pulse = pulse_of(2)
    pulse.beat()
    pulse.tell(record(2))
    pulse.tell_again()
    assert [steps(pulse.beat()), steps(pulse.beat())] == [[0, 1, 2], []]


def test_steps_of_earlier_generations_than_the_first_are_told_neither_anew_nor_again() -> None:
    pulse = pulse_of(2)
    pulse.beat()
    pulse.tell(record(2))
    pulse.first_generation = Generation(1, 0)
    pulse.tell_again()
    pulse.tell(record(3))  # of the step that was under way
    pulse.tell(replace(record(2), generation=Generation(1, 1)))
    assert [(told.step, told.generation) for told in pulse.beat().records] == [(2, Generation(1, 1))]


def test_what_is_told_again_is_bounded() -> None:
    pulse = pulse_of(TOLD_AGAIN + 10)
    while steps(pulse.beat()):
        pass
    pulse.tell_again()
    told: list[int] = []
    while new := steps(pulse.beat()):
        told += new
    assert told == list(range(10, TOLD_AGAIN + 10))


def test_cut_lifeline_loses_no_record() -> None:
    """The server drops the connection once, with a beat in it that nobody has read."""
    deaf, heard = threading.Event(), queue.Queue[int]()

    def on_beat(beat: Heartbeat) -> None:
        if not deaf.is_set():
            deaf.set()
            raise ValueError("as if the connection had been cut before this line was read")
        for told in beat.records:
            heard.put(told.step)

    server = LifelineServer(
        "127.0.0.1", "secret", on_beat=on_beat, on_connected=lambda member: None, on_lost=lambda member: None
    )
    pulse = pulse_of(3)
    lifeline = Lifeline(server.address, "secret", "w0", pulse.beat, interval_s=0.01, on_connected=pulse.tell_again)
    assert [heard.get(timeout=WAIT_S) for _ in range(3)] == [0, 1, 2]
    lifeline.close()
    server.close()
