import numpy as np
import pytest

from loop.acquisition import ACQUISITIONS
from loop.acquisition.base import standing
from loop.acquisition.top_k import by, highest
from loop.errors import InputError
from loop.types import Candidate


def candidate(name, **measures):
    return Candidate(name, "", 0.0, np.zeros(1, np.float32), measures=measures)


def choose(select, given, k):
    return [s.image_id for s in select(given, k, np.random.default_rng(0))]


@pytest.mark.parametrize("measure", ["entropy", "margin", "bald", "disagreement"])
def test_the_highest_of_its_own_measure(measure):
    values = {"a": 0.1, "b": 0.7, "c": 0.3, "d": 0.7}
    others = {"entropy": 0.5, "margin": 0.5, "bald": 0.5, "disagreement": 0.5}
    given = [candidate(name, **{**others, measure: value}) for name, value in values.items()]
    assert choose(ACQUISITIONS[measure], given, 3) == ["b", "d", "c"]


def test_equal_values_go_by_image_id():
    given = [candidate(name, entropy=0.5) for name in "dacb"]
    assert choose(by("entropy"), given, 4) == ["a", "b", "c", "d"]


def test_a_missing_measure_says_what_to_set():
    given = [candidate(name, entropy=0.5) for name in "abcde"]
    with pytest.raises(InputError, match=r"5 of 5 .*'bald'.*'a', 'b', 'c'; set select\.passes: turns"):
        by("bald")(given, 1, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"'margin'.*predict them again"):
        by("margin")(given, 1, np.random.default_rng(0))


def test_the_reason_places_the_image_among_all():
    given = [candidate(f"{i:03d}", bald=i / 100) for i in range(100)]
    chosen = by("bald")(given, 2, np.random.default_rng(0))
    assert chosen[1].reason.endswith("than 98% of 100 open images (bald 0.98)")


def test_standing_in_words():
    values = np.array([0.0, 1.0, 2.0, 3.0])
    assert standing(values, 3, "more uncertain") == "more uncertain than any other of 4 open images"
    assert standing(values, 2, "more uncertain") == "more uncertain than 50% of 4 open images"
    assert standing(np.arange(1000.0), 998, "more uncertain") == "more uncertain than 99% of 1000 open images"
    assert standing(values, 0, "more uncertain") == "not more uncertain than any of 4 open images"
    assert standing(values[:1], 0, "more uncertain") == "the only open image"
    assert "other 2 open images" in standing(np.ones(3), 1, "more uncertain")


def test_highest():
    assert highest(np.array([1.0, 5.0, 5.0, 2.0]), 3) == [1, 2, 3]
    assert highest(np.array([1.0]), 3) == [0]
    assert highest(np.zeros(0), 3) == []


def test_few_of_many_are_counted_where_their_share_would_read_as_nothing():
    values = np.arange(1000.0)
    assert standing(values, 5, "more uncertain") == "more uncertain than 5 of 1000 open images"
    assert standing(values, 500, "more uncertain") == "more uncertain than 50% of 1000 open images"
