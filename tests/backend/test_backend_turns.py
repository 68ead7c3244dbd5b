import threading
import time

import numpy as np
import pytest

from backend.errors import BusyError
from backend.turns import Rank, Turns


def _start(target):
    thread = threading.Thread(target=target)
    thread.start()
    return thread


def test_only_one_at_a_time():
    turns, inside, most = Turns(), 0, 0

    def work():
        nonlocal inside, most
        for rank in (Rank.BATCH, Rank.CLICK, Rank.BATCH):
            with turns.take(rank):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    for thread in [_start(work) for _ in range(8)]:
        thread.join()
    assert most == 1


def test_a_click_goes_before_batches_that_wait_longer(eventually):
    turns, order = Turns(), []
    held, release = threading.Event(), threading.Event()

    def holder():
        with turns.take(Rank.BATCH):
            held.set()
            release.wait(5)

    def waiter(name, rank):
        with turns.take(rank):
            order.append(name)

    threads = [_start(holder)]
    assert held.wait(5)
    threads += [_start(lambda name=f"batch {i}": waiter(name, Rank.BATCH)) for i in range(4)]
    time.sleep(0.05)
    threads.append(_start(lambda: waiter("click", Rank.CLICK)))
    eventually(lambda: turns.waiting(Rank.CLICK) == 1)
    release.set()
    for thread in threads:
        thread.join()
    assert order[0] == "click"
    assert len(order) == 5


def test_a_click_waits_for_one_image_of_a_batch_not_for_all():
    turns, begun = Turns(), threading.Event()
    done_before_click = 0
    images_done = 0

    def batch():
        nonlocal images_done
        for _ in range(20):
            with turns.take(Rank.BATCH):
                begun.set()
                time.sleep(0.01)
            images_done += 1

    thread = _start(batch)
    assert begun.wait(5)
    with turns.take(Rank.CLICK):
        done_before_click = images_done
    thread.join()
    assert done_before_click <= 2


def test_an_error_inside_gives_the_turn_back():
    turns = Turns()
    for rank in (Rank.CLICK, Rank.BATCH):
        try:
            with turns.take(rank):
                raise ValueError
        except ValueError:
            pass
    with turns.take(Rank.BATCH):
        assert turns.waiting(Rank.CLICK) == 0


def _waits(turns, rank, order, name, eventually):
    """A thread that waits in a rank; returns when it does."""
    before = turns.waiting(rank)

    def work():
        with turns.take(rank):
            order.append(name)

    thread = _start(work)
    eventually(lambda: turns.waiting(rank) == before + 1)
    return thread


def test_higher_ranks_go_first_and_within_a_rank_who_came_first(eventually):
    turns, order = Turns(quiet_s=0), []
    with turns.take(Rank.BATCH):
        threads = [
            _waits(turns, rank, order, f"{rank.name} {i}", eventually)
            for i in range(2)
            for rank in (Rank.AHEAD, Rank.BATCH, Rank.OPEN, Rank.CLICK)
        ]
    for thread in threads:
        thread.join()
    assert order == [f"{rank.name} {i}" for rank in sorted(Rank) for i in range(2)]


def test_who_gives_way_lets_only_higher_ranks_go_first_and_then_goes_on(eventually):
    turns, order = Turns(), []
    with turns.take(Rank.BATCH) as turn:
        threads = [_waits(turns, Rank.BATCH, order, "another batch", eventually)]
        turn.give_way()
        order.append("first piece")
        threads += [_waits(turns, rank, order, rank.name, eventually) for rank in (Rank.OPEN, Rank.CLICK)]
        turn.give_way()
        order.append("second piece")
    for thread in threads:
        thread.join()
    assert order == ["first piece", "CLICK", "OPEN", "second piece", "another batch"]


def test_a_click_gives_way_to_nobody(eventually):
    turns, order = Turns(), []
    with turns.take(Rank.CLICK) as turn, turns.beside():
        threads = [_waits(turns, rank, order, rank.name, eventually) for rank in (Rank.OPEN, Rank.CLICK)]
        turn.give_way()
        assert order == []
    for thread in threads:
        thread.join()


def test_work_that_a_click_waits_for_becomes_a_click(eventually):
    turns, order = Turns(quiet_s=60), []
    with turns.beside():
        pass
    wanted = turns.take(Rank.AHEAD)

    def ahead():
        with wanted:
            order.append("wanted")

    with turns.take(Rank.BATCH):
        threads = [_start(ahead), _waits(turns, Rank.OPEN, order, "open", eventually)]
        eventually(lambda: turns.waiting(Rank.AHEAD) == 1)
        wanted.hurry(Rank.CLICK)
        wanted.hurry(Rank.BATCH)
        assert turns.waiting(Rank.CLICK) == 1
    for thread in threads:
        thread.join(5)
    assert order == ["wanted", "open"]


def test_people_who_click_all_the_time_do_not_stop_a_batch():
    turns = Turns()
    with turns.beside():
        begin = time.monotonic()
        with turns.take(Rank.OPEN):
            assert time.monotonic() - begin < 0.2
        with turns.take(Rank.BATCH):
            assert 0.24 <= time.monotonic() - begin < 5


def test_while_a_click_is_answered_beside_no_batch_begins_a_piece(eventually):
    turns, order = Turns(), []
    with turns.beside():
        threads = [_waits(turns, Rank.BATCH, order, "batch", eventually)]
        with turns.take(Rank.CLICK):
            order.append("click")
        time.sleep(0.02)
        assert order == ["click"]
    for thread in threads:
        thread.join(5)
    assert order == ["click", "batch"]


def test_ahead_begins_when_nobody_has_clicked_for_a_while():
    turns = Turns(quiet_s=0.2)
    with turns.beside():
        pass
    begin = time.monotonic()
    with turns.take(Rank.BATCH):
        pass
    assert time.monotonic() - begin < 0.15
    with turns.take(Rank.AHEAD) as turn:
        assert time.monotonic() - begin >= 0.2
        with turns.beside():
            pass
        again = time.monotonic()
        turn.give_way()
        assert time.monotonic() - again >= 0.19


def test_ahead_ends_when_the_backend_stops_wherever_it_is(eventually):
    turns, faults = Turns(quiet_s=60), []

    def ahead():
        try:
            with turns.take(Rank.AHEAD):
                pass
        except BusyError as error:
            faults.append(error)

    with turns.beside():
        pass
    thread = _start(ahead)
    eventually(lambda: turns.waiting(Rank.AHEAD) == 1)
    turns.stop()
    thread.join(5)
    assert len(faults) == 1
    assert turns.waiting(Rank.AHEAD) == 0
    other = Turns()
    with other.take(Rank.AHEAD) as turn:
        other.stop()
        with pytest.raises(BusyError):
            turn.give_way()
    with other.take(Rank.BATCH) as turn:
        turn.give_way()


def test_the_moment_at_which_clicks_have_been_quiet_for_long_enough_is_not_missed(monkeypatch):
    turns, times, waited = Turns(quiet_s=1.0), [10.0], []

    def clock():  # a wait that ends early, then 0.1 ms at each look: the second one is past the moment
        times.append(times[-1] + 1e-4)
        return times[-1]

    def wait(seconds=None):
        waited.append(seconds)
        assert seconds is not None, "it would wait for ever"
        times.append(times[-1] + seconds)

    monkeypatch.setattr("backend.turns.time.monotonic", clock)
    monkeypatch.setattr(turns._changed, "wait", wait)
    for early in np.linspace(0, 1e-3, 50):
        turns._last_click = times[-1] - 1.0 + early
        with turns.take(Rank.AHEAD):
            pass
    assert all(waited)
