import numpy as np
import pytest

from loop.acquisition.per_minute import minutes, select
from loop.errors import InputError
from loop.types import Candidate


def candidate(name, uncertainty, seconds):
    return Candidate(name, "", uncertainty, np.zeros(1, np.float32), seconds=seconds)


def choose(given, k=9):
    return select(given, k, np.random.default_rng(0))


def test_uncertainty_for_each_minute_by_hand():
    # 0.9 / 3 min = 0.3; 0.4 / 0.5 min = 0.8; 0.3 / 1 min = 0.3 (equal: by id); 0.1 / 0.1 min = 1
    given = [candidate("c", 0.9, 180), candidate("b", 0.4, 30), candidate("d", 0.3, 60), candidate("a", 0.1, 6)]
    assert [s.image_id for s in choose(given)] == ["a", "b", "c", "d"]


def test_without_times_the_uncertainty_alone_and_it_says_so():
    chosen = choose([candidate("a", 0.2, 0), candidate("b", 0.7, 0)])
    assert [s.image_id for s in chosen] == ["b", "a"]
    assert all("not known yet" in s.reason for s in chosen)
    assert "more uncertain than any other of 2 open images" in chosen[0].reason


def test_times_of_some_only_are_refused_by_name():
    given = [candidate(name, 0.5, 0.0 if name in "bcde" else 9.0) for name in "abcdef"]
    with pytest.raises(InputError, match=r"4 of 6 .*'b', 'c', 'd'; estimate"):
        choose(given)


def test_the_reason_has_the_minutes():
    chosen = choose([candidate("a", 0.4, 90), candidate("b", 0.1, 90)], 1)
    assert chosen[0].reason == (
        "more to learn for each minute of work than any other of 2 open images: uncertainty 0.4, about 1.5 minutes"
    )


def test_minutes():
    assert minutes([]) is None
    np.testing.assert_allclose(minutes([candidate("a", 0, 30), candidate("b", 0, 90)]), [0.5, 1.5])
