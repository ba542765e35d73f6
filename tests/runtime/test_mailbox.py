"""The mailbox keeps commands and news for whoever comes, in order, and there is one per run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
import ray

from elastic_lm.errors import ClusterError
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from elastic_lm.runtime.mailbox import MAX_LINES, Command, Mailbox, create_mailbox, find_mailbox

STOP = Command("stop", {"reason": "enough"})
WAIT_S = 10.0


def play(story: Awaitable[Any]) -> Any:
    return asyncio.run(asyncio.wait_for(story, WAIT_S))  # type: ignore[arg-type]


def test_commands_are_taken_once_and_in_order() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.post(Command("scale", {"min_workers": 1, "max_workers": 2}))
        await mailbox.post(STOP)
        assert (await mailbox.take()).kind == "scale"
        assert await mailbox.take() == STOP

    play(story())


def test_coordinator_that_waits_gets_the_next_command() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        waiting = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)  # it waits now
        await mailbox.post(STOP)
        assert await waiting == STOP

    play(story())


def test_followers_get_every_line_once_from_their_own_cursor() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.publish(["one", "two"], {"step": 1})
        lines, cursor = await mailbox.follow(0, 0)
        assert (lines, cursor) == (["one", "two"], 2)
        await mailbox.publish(["three"], {"step": 2})
        assert await mailbox.follow(cursor, 0) == (["three"], 3)
        assert await mailbox.follow(0, 0) == (["one", "two", "three"], 3)  # somebody who comes later
        assert await mailbox.status() == {"step": 2}

    play(story())


def test_follower_without_news_is_answered_after_its_time() -> None:
    assert play(Mailbox().follow(0, 0.01)) == ([], 0)


def test_all_followers_hear_the_news_at_once() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        waiting = [asyncio.create_task(mailbox.follow(0, 2 * WAIT_S)) for _ in range(3)]
        await asyncio.sleep(0)
        await mailbox.publish(["news"], {})
        assert await asyncio.gather(*waiting) == [(["news"], 1)] * 3

    play(story())


def test_old_lines_make_room_and_cursors_stay_true() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.publish([f"line {n}" for n in range(MAX_LINES)], {})
        await mailbox.publish(["last"], {})
        lines, cursor = await mailbox.follow(0, 0)
        assert (len(lines), lines[0], lines[-1], cursor) == (MAX_LINES, "line 1", "last", MAX_LINES + 1)
        assert await mailbox.follow(MAX_LINES, 0) == (["last"], MAX_LINES + 1)

    play(story())


def test_attempts_are_counted_and_the_same_failure_twice_is_noticed() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        assert await mailbox.begin_attempt() == (1, "it was killed")
        assert not await mailbox.end_attempt("KeyError: 'x'")
        assert await mailbox.begin_attempt() == (2, "KeyError: 'x'")
        assert not await mailbox.end_attempt("KeyError: 'y'")  # another failure
        assert await mailbox.end_attempt("KeyError: 'y'")

    play(story())


@pytest.mark.ray
def test_run_has_one_mailbox_that_anybody_finds_by_its_name(cluster: LocalCluster) -> None:
    mailbox = create_mailbox("mailbox-test")
    try:
        with pytest.raises(ClusterError, match="run mailbox-test is being trained .* choose another name"):
            create_mailbox("mailbox-test")
        ray.get(find_mailbox("mailbox-test").post.remote(STOP), timeout=WAIT_S)
        assert ray.get(mailbox.take.remote(), timeout=WAIT_S) == STOP
    finally:
        ray.kill(mailbox)
    wait_for(lambda: not is_there("mailbox-test"), timeout_s=WAIT_S, what="the mailbox is gone")
    ray.kill(create_mailbox("mailbox-test"))  # the name is free again


@pytest.mark.ray
def test_mailbox_of_no_run_is_a_value_error(cluster: LocalCluster) -> None:
    with pytest.raises(ValueError, match="mailbox-nobody"):
        find_mailbox("nobody")


def is_there(run: str) -> bool:
    try:
        find_mailbox(run)
    except ValueError:
        return False
    return True
