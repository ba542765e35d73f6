"""Failpoints: what the text says is what fires, once, in the member it names; text that says nothing is refused."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elastic_lm import failpoints
from elastic_lm.errors import ConfigError
from elastic_lm.failpoints import ACTIONS, NAMES, InjectedError, arm, hit, parse

PACKAGE = Path(failpoints.__file__).parent


@pytest.fixture(autouse=True)
def disarmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with nothing armed and leaves nothing armed."""
    monkeypatch.setattr(failpoints, "_armed", [])


def fires(name: str, step: int | None = None) -> bool:
    try:
        hit(name, step)
    except InjectedError:
        return True
    return False


# -- grammar ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_name_goes_with_every_action(name: str, action: str) -> None:
    member, entry = parse(f"w2:{name}@7={action}:1.5")
    assert (member, entry.name, entry.step, entry.action) == ("w2", name, 7, action)
    assert (entry.seconds, entry.file) == ((0.0, "1.5") if action == "wait" else (1.5, ""))


def test_star_stands_for_any_member_and_any_step() -> None:
    member, entry = parse("*:save@*=kill")
    assert (member, entry.step, entry.seconds) == ("*", None, 0.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kill",
        "w1:save@3",  # no action
        "w1:save=kill",  # no step
        "w1=kill",
        "save@3=kill:now",  # seconds that are no number
        "w1:save@three=kill",
        "w1:save@1.5=kill",
        "w1:save@=kill",
        "w1:save@1=kill=kill",
        "w1:save@1@2=kill",
    ],
)
def test_text_of_another_form_is_refused_with_the_form_and_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value) == (f"failpoint {text!r} is not MEMBER:NAME@STEP=ACTION, e.g. w2:optimizer.middle@7=kill")


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("w1:lunch@3=kill")
    assert str(caught.value) == f"failpoint 'w1:lunch@3=kill': unknown name 'lunch'; known: {', '.join(NAMES)}"


@pytest.mark.parametrize("text", ["w1:save@3=explode", "w1:save@3=", "w1:save@3=:2"])
def test_unknown_action_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    action = text.partition("=")[2].partition(":")[0]
    assert str(caught.value) == (
        f"failpoint {text!r}: unknown action {action!r}; known: kill, freeze, raise, exit, delay, hold, wait"
    )


@pytest.mark.parametrize(
    "text",
    [
        ":save@3=kill",  # no member
        "w1:save@-1=kill",  # no such step
        "w1:save@3=delay:-1",
        "w1:save@3=delay:nan",
        "w1:save@3=hold:inf",
        "w1:save@3=delay",  # for how long?
        "w1:save@3=wait",  # for what?
    ],
)
def test_text_that_can_never_do_what_it_says_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text)


def test_every_name_is_a_place_in_the_code_and_every_place_has_a_name() -> None:
    places = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="failpoints"), attr="hit"), args=[first, *_]):
                    places |= {leaf.value for leaf in ast.walk(first) if isinstance(leaf, ast.Constant)}
    assert places == set(NAMES)


# -- arming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("member_id", "expected"), [("w1", True), ("w2", False), ("w11", False), ("", False)], ids=str)
def test_entry_fires_only_in_the_member_it_names(member_id: str, expected: bool) -> None:
    arm(["w1:save@3=raise"], member_id)
    assert fires("save", 3) is expected


@pytest.mark.parametrize("member_id", ["w1", "w2", "anything"])
def test_star_fires_in_every_member(member_id: str) -> None:
    arm(("*:save@3=raise",), member_id)
    assert fires("save", 3)


@pytest.mark.parametrize(("name", "step"), [("save", 2), ("save", 4), ("save", None), ("step.end", 3)])
def test_entry_does_not_fire_elsewhere(name: str, step: int | None) -> None:
    arm(["w1:save@3=raise"], "w1")
    assert not fires(name, step)
    assert fires("save", 3)


@pytest.mark.parametrize("step", [0, 12, None])
def test_star_for_the_step_fires_at_any_step_and_at_none(step: int | None) -> None:
    arm(["w1:warm_up@*=raise"], "w1")
    assert fires("warm_up", step)


@pytest.mark.parametrize("at", ["3", "*"])
def test_entry_fires_once(at: str) -> None:
    arm([f"w1:save@{at}=raise"], "w1")
    assert [fires("save", 3) for _ in range(3)] == [True, False, False]


def test_entry_that_stands_twice_fires_twice() -> None:
    arm(["w1:save@3=raise", "w1:save@3=raise"], "w1")
    assert [fires("save", 3) for _ in range(3)] == [True, True, False]


def test_one_hit_fires_one_entry_in_their_order() -> None:
    arm(["w1:save@*=raise", "w1:save@3=delay:0"], "w1")
    assert [fires("save", 3), fires("save", 3), fires("save", 3)] == [True, False, False]
    arm(["w1:save@3=delay:0", "w1:save@*=raise"], "w1")
    assert [fires("save", 3), fires("save", 3), fires("save", 3)] == [False, True, False]


def test_second_arming_adds_to_the_first() -> None:
    arm(["w1:save@3=raise"], "w1")
    arm(["w1:save@4=raise"], "w1")
    assert fires("save", 4)
    assert fires("save", 3)


def test_unarmed_place_does_nothing() -> None:
    assert [fires(name, 0) for name in NAMES] == [False] * len(NAMES)


def test_bad_text_among_good_ones_is_refused_even_for_another_member() -> None:
    with pytest.raises(ConfigError, match="unknown name 'lunch'"):
        arm(["w1:save@3=raise", "w2:lunch@3=raise"], "w1")


# -- actions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, None])
def test_raise_raises_with_place_and_step(step: int | None) -> None:
    arm(["w1:save@*=raise"], "w1")
    with pytest.raises(InjectedError) as caught:
        hit("save", step)
    assert str(caught.value) == f"injected at save, step {step}"


def test_injected_error_stands_for_a_bug_not_for_one_of_our_errors() -> None:
    assert InjectedError.__mro__[1] is RuntimeError


def test_delay_sleeps_for_as_long_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    arm(["w1:save@3=delay:2.5"], "w1")
    hit("save", 3)
    hit("save", 3)
    assert slept == [2.5]


def test_wait_ends_when_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            (tmp_path / "go-on").touch()

    monkeypatch.setattr(time, "sleep", sleep)
    arm([f"w1:save@*=wait:{tmp_path}/go-on", "w1:save@4=raise"], "w1")
    hit("save", 3, lambda: len(slept) == 2)
    assert len(slept) == 2  # cancelled, and still armed
    hit("save", 3)
    assert len(slept) == 3
    with pytest.raises(InjectedError):  # it holds nothing else back
        hit("save", 4)
    assert len(slept) == 3


def test_hold_lets_no_other_thread_run() -> None:
    longest_s = 0.0
    running, ended = threading.Event(), threading.Event()

    def watch() -> None:
        nonlocal longest_s
        last_s = time.monotonic()
        over = False
        while not over:
            over = ended.is_set()  # looks at the clock once more afterwards: the end may come inside the hold
            now_s = time.monotonic()
            longest_s, last_s = max(longest_s, now_s - last_s), now_s
            running.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert running.wait(timeout=30)
    arm(["w1:save@3=hold:0.3"], "w1")
    hit("save", 3)
    ended.set()
    watcher.join()
    assert longest_s >= 0.3  # a lower bound: no load of the machine can make it smaller


@pytest.mark.parametrize(("action", "ends_with"), [("kill", -signal.SIGKILL), ("exit", 1)])
def test_kill_and_exit_end_the_process_without_a_word(action: str, ends_with: int) -> None:
    program = f"""
import atexit
from elastic_lm import failpoints
atexit.register(print, "said goodbye")
failpoints.arm(["w1:save@3={action}"], "w1")
failpoints.hit("save", 3)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, cwd=PACKAGE.parent)
    assert (ended.returncode, ended.stdout, ended.stderr) == (ends_with, b"", b"")


def test_freeze_stops_the_process_until_it_is_continued() -> None:
    program = """
from elastic_lm import failpoints
failpoints.arm(["w1:save@3=freeze"], "w1")
failpoints.hit("save", 3)
print("thawed")
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=PACKAGE.parent)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == b"thawed\n"
    finally:
        process.kill()
        process.wait()
