"""The mailbox keeps commands and news for whoever comes, in order, and there is one per run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
import ray

from elastic_lm.errors import ClusterError
from elastic_lm.monitor.progress import News
from elastic_lm.runtime.cluster import LocalCluster, wait_for
from elastic_lm.runtime.mailbox import MAX_NEWS, Attempt, Command, Mailbox, create_mailbox, find_mailbox

STOP = Command("stop", {"reason": "enough"})
WAIT_S = 60.0
HERE, THERE = ("node-1", 7), ("node-2", 7)


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


ONE, TWO, THREE = News("one"), News("two", "bad"), News("three")


def test_followers_get_all_news_once_from_their_own_cursor_and_the_status() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.publish([ONE, TWO], {"step": 1})
        assert await mailbox.follow(0, 0) == ([ONE, TWO], 2, {"step": 1})
        await mailbox.publish([THREE], {"step": 2})
        assert await mailbox.follow(2, 0) == ([THREE], 3, {"step": 2})
        assert await mailbox.follow(0, 0) == ([ONE, TWO, THREE], 3, {"step": 2})  # somebody who comes later
        assert await mailbox.status() == {"step": 2}

    play(story())


def test_follower_without_news_is_answered_after_its_time() -> None:
    assert play(Mailbox().follow(0, 0.01)) == ([], 0, {})


@pytest.mark.parametrize("news", [[ONE], []], ids=["news", "a status alone"])
def test_all_followers_hear_of_a_publication_at_once(news: list[News]) -> None:
    async def story() -> None:
        mailbox = Mailbox()
        waiting = [asyncio.create_task(mailbox.follow(0, 2 * WAIT_S)) for _ in range(3)]
        await asyncio.sleep(0)
        await mailbox.publish(news, {"step": 1})
        assert await asyncio.gather(*waiting) == [(news, len(news), {"step": 1})] * 3

    play(story())


def test_old_news_makes_room_and_cursors_stay_true() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.publish([News(f"line {n}") for n in range(MAX_NEWS)], {})
        await mailbox.publish([THREE], {})
        news, cursor, _ = await mailbox.follow(0, 0)
        assert (len(news), news[0], news[-1], cursor) == (MAX_NEWS, News("line 1"), THREE, MAX_NEWS + 1)
        assert await mailbox.follow(MAX_NEWS, 0) == ([THREE], MAX_NEWS + 1, {})

    play(story())


def test_attempts_are_counted_and_the_same_failure_twice_is_noticed() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        assert await mailbox.begin_attempt(HERE) == Attempt(1, 1, "it was killed", None)
        assert not await mailbox.end_attempt("KeyError: 'x'")
        assert await mailbox.begin_attempt(THERE) == Attempt(2, 2, "KeyError: 'x'", HERE)
        assert not await mailbox.end_attempt("KeyError: 'y'")  # another failure
        assert await mailbox.end_attempt("KeyError: 'y'")

    play(story())


def test_attempts_that_get_somewhere_count_anew() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        assert await mailbox.begin_attempt(HERE) == Attempt(1, 1, "it was killed", None)
        await mailbox.publish([], {"step": 3})
        await mailbox.end_attempt("KeyError: 'x'")
        assert await mailbox.begin_attempt(HERE) == Attempt(2, 1, "it was killed", HERE)
        assert not await mailbox.end_attempt("KeyError: 'x'")  # not for the second time in a row
        assert await mailbox.begin_attempt(HERE) == Attempt(3, 2, "KeyError: 'x'", HERE)

    play(story())


def test_successor_gets_what_was_not_taken_and_what_still_holds() -> None:
    small, large = (Command("scale", {"min_workers": 1, "max_workers": size}) for size in (2, 4))
    drain = Command("drain", {"member_id": "w1"})

    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.begin_attempt(HERE)
        await mailbox.post(small)
        await mailbox.post(large)
        assert [await mailbox.take(), await mailbox.take()] == [small, large]
        waiting = asyncio.create_task(mailbox.take())  # by a coordinator that dies now
        await asyncio.sleep(0)
        await mailbox.begin_attempt(HERE)
        await mailbox.post(drain)
        await mailbox.post(STOP)
        assert [await mailbox.take(), await mailbox.take()] == [large, drain]
        seen_to = asyncio.create_task(mailbox.take())
        assert await seen_to == STOP
        await mailbox.begin_attempt(HERE)
        assert [await mailbox.take(), await mailbox.take()] == [large, STOP]
        assert not waiting.done()
        waiting.cancel()

    play(story())


def test_command_that_was_taken_and_not_seen_to_is_the_successors() -> None:
    drains = [Command("drain", {"member_id": name}) for name in ("w1", "w2", "w3")]

    async def story() -> None:
        mailbox = Mailbox()
        for drain in drains:
            await mailbox.post(drain)
        assert [await mailbox.take("a"), await mailbox.take("a")] == drains[:2]  # the first is seen to
        await mailbox.hand_over()
        await mailbox.hand_over()  # once more, before anybody has taken it
        assert [await mailbox.take("b"), await mailbox.take("b")] == drains[1:]
        waiting = asyncio.create_task(mailbox.take("b"))
        await asyncio.sleep(0)
        await mailbox.hand_over()
        await mailbox.post(STOP)
        assert await mailbox.take("c") == STOP  # nothing else is left
        waiting.cancel()

    play(story())


def test_successor_is_told_who_was_leaving() -> None:
    leaving = {"w0": None, "w1": "drain", "w2": "preemption", "w3": "resize"}  # of the latter two it hears otherwise

    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.begin_attempt(HERE)
        await mailbox.post(Command("drain", {"node_id": "n"}))
        await mailbox.take()
        await mailbox.publish([], {"members": {name: {"leaving": cause} for name, cause in leaving.items()}})
        waiting = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        await mailbox.begin_attempt(THERE)
        await mailbox.post(STOP)
        assert [await mailbox.take(), await mailbox.take()] == [Command("drain", {"member_id": "w1"}), STOP]
        waiting.cancel()

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


def test_commands_between_two_coordinators_of_one_process_are_the_second_ones() -> None:
    drain = Command("drain", {"node_id": "n"})

    async def story() -> None:
        mailbox = Mailbox()
        earlier = asyncio.create_task(mailbox.take("a"))
        await asyncio.sleep(0)
        await mailbox.hand_over()  # it ends, and nobody is there yet
        await mailbox.post(drain)
        await asyncio.sleep(0)
        assert not earlier.done()
        assert await mailbox.take("b") == drain
        assert await mailbox.take("a") is None
        await mailbox.post(STOP)
        assert await mailbox.take("b") == STOP
        earlier.cancel()

    play(story())


def test_earlier_coordinator_takes_nothing_from_its_successor() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        await mailbox.post(STOP)
        assert await mailbox.take("a") == STOP
        later = asyncio.create_task(mailbox.take("b"))
        await asyncio.sleep(0)
        assert await later == STOP  # it holds until further notice
        assert await mailbox.take("a") is None

    play(story())


def test_going_back_and_forth_is_no_progress() -> None:
    async def story() -> None:
        mailbox = Mailbox()
        counted = []
        for number in range(6):
            counted.append((await mailbox.begin_attempt(HERE)).number_in_vain)
            await mailbox.publish([], {"step": 45 - number % 2})
        assert counted == [1, 1, 2, 3, 4, 5]
        await mailbox.publish([], {"step": 20, "num_rewinds": 1})
        assert (await mailbox.begin_attempt(HERE)).number_in_vain == 1

    play(story())
