"""What is computed for clicks is computed once, also where it fails."""

import threading
import time

import numpy as np

from backend.sights import _Once
from backend.turns import Rank, Turns


def _together(once, calls):
    """All calls at once, the first one first; what each gave or raised."""
    found = [None] * len(calls)
    begun = threading.Event()
    go_on = threading.Event()

    def work(i):
        def compute(turn):
            begun.set()
            assert go_on.wait(10)
            with turn:
                return calls[i]()

        try:
            found[i] = once.get(("image", "model"), Rank.CLICK, compute)
        except ValueError as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.05)
    go_on.set()
    for thread in threads:
        thread.join()
    return found


def test_who_comes_meanwhile_gets_the_same_object():
    once = _Once(Turns(), 10**6)
    value = np.zeros(3)
    found = _together(once, [lambda: value] + [lambda: np.ones(3)] * 4)
    assert all(given is value for given, _ in found)
    assert [was_there for _, was_there in found] == [False] * 5
    assert once.get(("image", "model"), Rank.CLICK, None)[0] is value


def test_a_failure_is_everybodys_and_the_next_one_tries_again():
    once = _Once(Turns(), 10**6)

    def fail():
        raise ValueError("no image")

    found = _together(once, [fail] + [lambda: np.ones(3)] * 3)
    assert all(isinstance(error, ValueError) for error in found)
    value, was_there = once.get(("image", "model"), Rank.CLICK, lambda turn: np.ones(3))
    assert (value == 1).all()
    assert not was_there


def test_another_image_and_another_model_are_others():
    once = _Once(Turns(), 10**6)
    for key in (("a", "v1"), ("b", "v1"), ("a", "v2")):
        once.get(key, Rank.CLICK, lambda turn, key=key: np.array(list("".join(key))))
    for key in (("a", "v1"), ("b", "v1"), ("a", "v2")):
        value, was_there = once.get(key, Rank.CLICK, None)
        assert was_there
        assert "".join(value) == "".join(key)


def test_what_memory_does_not_hold_is_computed_each_time():
    once = _Once(Turns(), 10)
    calls = []

    def compute(turn):
        calls.append(None)
        return np.zeros(100)

    for _ in range(2):
        once.get(("a", "v1"), Rank.CLICK, compute)
    assert len(calls) == 2
