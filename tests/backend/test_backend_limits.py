"""The bucket of clicks and the lanes, without a network."""

import asyncio
import gc
import threading
import time
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import BusyError, TooManyClicksError
from backend.limits import MAX_KNOWN, ClickRate, Lane, clicker


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def _taken(rate, who="a"):
    try:
        rate.take(who)
    except TooManyClicksError:
        return False
    return True


def test_a_burst_then_a_steady_rate():
    clock = Clock()
    rate = ClickRate(2.0, 3, clock=clock)
    assert [_taken(rate) for _ in range(5)] == [True, True, True, False, False]
    with pytest.raises(TooManyClicksError, match="2 clicks a second") as caught:
        rate.take("a")
    assert caught.value.retry_after_s == pytest.approx(0.5)
    clock.now = 0.5
    assert [_taken(rate) for _ in range(2)] == [True, False]
    clock.now = 100.0
    assert [_taken(rate) for _ in range(4)] == [True, True, True, False]


def test_people_have_their_own_buckets_and_only_so_many_are_remembered():
    rate = ClickRate(1.0, 1, clock=Clock())
    assert _taken(rate, "a")
    assert not _taken(rate, "a")
    for n in range(MAX_KNOWN):
        assert _taken(rate, str(n))
    assert len(rate._left) == MAX_KNOWN
    assert _taken(rate, "a")


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60), st.floats(0.1, 5), st.integers(1, 6))
def test_never_more_than_burst_plus_rate_times_time(pauses, per_s, burst):
    clock = Clock()
    rate, times = ClickRate(per_s, burst, clock=clock), []
    for pause in pauses:
        clock.now += pause
        if _taken(rate):
            times.append(clock.now)
    for i, begin in enumerate(times):
        for n, end in enumerate(times[i:], start=1):
            assert n <= burst + per_s * (end - begin) + 1e-6


@pytest.mark.parametrize(
    ("drafts", "expected"),
    [
        ([], "project 3 task 7"),
        ([{"id": 1, "user": "ann@example.org"}], "user ann@example.org"),
        ([{"id": 1, "user": None}, {"id": 2}, {"user": 5}], "user 5"),
        ([{"user": "x" * 900}], "user " + "x" * 200),
    ],
)
def test_who_clicks(drafts, expected):
    assert clicker(3, 7, drafts) == expected


@pytest.fixture
def lane():
    made = Lane("tests", 2, 1)
    yield made
    made.shutdown(wait=True, cancel_futures=True)


def test_a_lane_gives_what_the_call_gives(lane):
    async def work():
        assert await lane.run(lambda: 5, start_s=1, end_s=1) == 5
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 / 0, start_s=1, end_s=1)
        with pytest.raises(TimeoutError, match="of the call"):
            await lane.run(_own_timeout, start_s=1, end_s=1)
        assert [await lane.run(lambda: 5, start_s=1, end_s=1) for _ in range(9)] == [5] * 9

    asyncio.run(work())


def _own_timeout():
    raise TimeoutError("of the call")


def test_a_full_lane_refuses_at_once_and_recovers(lane):
    release = threading.Event()

    async def work():
        held = [asyncio.create_task(lane.run(lambda: release.wait(10), start_s=5, end_s=5)) for _ in range(3)]
        await asyncio.sleep(0)
        begin = time.perf_counter()
        with pytest.raises(BusyError, match="3 requests"):
            await lane.run(lambda: 1, start_s=5, end_s=5)
        assert time.perf_counter() - begin < 1
        release.set()
        assert await asyncio.gather(*held) == [True] * 3
        assert await lane.run(lambda: 1, start_s=5, end_s=5) == 1

    asyncio.run(work())


def test_who_waits_too_long_is_told_and_never_run(lane):
    release, ran = threading.Event(), []

    async def work():
        held = [asyncio.create_task(lane.run(lambda: release.wait(10), start_s=9, end_s=9)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match=r"no free thread within 0\.1 s"):
            await lane.run(lambda: ran.append(1), start_s=0.1, end_s=9)
        release.set()
        await asyncio.gather(*held)

    asyncio.run(work())
    assert ran == []


def test_a_call_that_hangs_keeps_its_place_but_not_the_caller(lane, caplog):
    release = threading.Event()

    def hangs():
        release.wait(10)
        raise ValueError("too late for anybody")

    async def work():
        for _ in range(2):
            with pytest.raises(BusyError, match=r"not done after 0\.1 s"):
                await lane.run(hangs, start_s=0.05, end_s=0.1)
        waiting = asyncio.create_task(lane.run(lambda: 1, start_s=5, end_s=5))
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="3 requests"):
            await lane.run(lambda: 1, start_s=5, end_s=5)
        release.set()
        assert await waiting == 1

    asyncio.run(work())
    assert caplog.records == []


def test_a_closed_lane_refuses():
    lane = Lane("tests", 1, 0)
    lane.shutdown(wait=True, cancel_futures=True)
    for _ in range(2):
        with pytest.raises(BusyError, match="shutting down"):
            asyncio.run(lane.run(lambda: 1, start_s=1, end_s=1))


def test_a_request_that_is_given_up_is_not_kept_until_a_thread_is_free(lane):
    class Request:
        """As large as a body may be."""

    release = threading.Event()

    async def work():
        held = [asyncio.create_task(lane.run(lambda: release.wait(10), start_s=9, end_s=9)) for _ in range(2)]
        await asyncio.sleep(0)
        request = Request()
        kept = weakref.ref(request)
        with pytest.raises(BusyError):
            await lane.run(lambda request=request: request, start_s=0.05, end_s=9)
        del request
        gc.collect()
        assert kept() is None
        release.set()
        await asyncio.gather(*held)

    asyncio.run(work())
