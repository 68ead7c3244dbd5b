import numpy as np

from loop.acquisition import random, uncertain_diverse
from loop.acquisition.base import standardised
from loop.types import Candidate


def candidate(name, uncertainty, *embedding):
    return Candidate(name, "", uncertainty, np.array(embedding, np.float32))


def ids(chosen):
    return [s.image_id for s in chosen]


def choose(given, k, **more):
    return uncertain_diverse.select(given, k, np.random.default_rng(0), **more)


def test_the_most_uncertain_first_then_the_far_before_its_near_copy():
    given = [candidate("a", 0.9, 0.0), candidate("a-copy", 0.89, 0.001), candidate("far", 0.5, 10.0)]
    assert ids(choose(given, 3)) == ["a", "far", "a-copy"]


def test_by_hand_on_a_line():
    # positions 0, 1, 4; the standardised distances keep these ratios. After "a": b = 0.8 x 1/4, c = 0.3 x 4/4.
    given = [candidate("a", 1.0, 0.0), candidate("b", 0.8, 1.0), candidate("c", 0.3, 4.0)]
    assert ids(choose(given, 2)) == ["a", "c"]
    given[2] = candidate("c", 0.1, 4.0)
    assert ids(choose(given, 2)) == ["a", "b"]


def test_identical_embeddings_go_by_uncertainty_then_by_id():
    given = [candidate("x", 0.2, 1, 1), candidate("z", 0.5, 1, 1), candidate("y", 0.5, 1, 1), candidate("w", 0.4, 1, 1)]
    assert ids(choose(given, 4)) == ["y", "z", "w", "x"]


def test_what_has_taught_already_is_kept_away_from():
    # with 5 known: first 0.9 x 5, known 0.8 x 0, new 0.7 x 10; then first 0.9 x 5
    given = [candidate("first", 0.9, 0.0), candidate("known", 0.8, 5.0), candidate("new", 0.7, -5.0)]
    assert ids(choose(given, 2)) == ["first", "known"]
    assert ids(choose(given, 2, labelled=[np.array([5.0], np.float32)])) == ["new", "first"]


def test_uncertainty_zero_everywhere_still_gives_k():
    given = [candidate(name, 0.0, i) for i, name in enumerate("abcd")]
    assert len(set(ids(choose(given, 3)))) == 3


def test_reasons_are_words_with_numbers():
    given = [candidate("a", 0.9, 0.0), candidate("b", 0.5, 9.0), candidate("c", 0.1, 1.0)]
    chosen = choose(given, 2)
    assert "least sure" in chosen[0].reason
    assert "0.900" in chosen[0].reason
    assert "33% of 3 open images" in chosen[1].reason
    assert "unlike" in chosen[1].reason


def test_a_dimension_on_a_large_scale_does_not_decide_alone():
    own, others = standardised(np.array([[0.0, 1000.0], [2.0, 3000.0]]), [np.array([1.0, 2000.0], np.float32)])
    np.testing.assert_allclose(own, [[-1, -1], [1, 1]])
    np.testing.assert_allclose(others, [[0, 0]], atol=1e-12)


def test_a_constant_dimension_becomes_zero_for_all():
    own, others = standardised(np.array([[0.0, 7.0], [2.0, 7.0]]), [np.array([1.0, 9.0], np.float32)])
    np.testing.assert_allclose(own[:, 1], 0)
    np.testing.assert_allclose(others[:, 1], 0)


def test_random_is_uniform():
    given = [candidate(name, 0.1 * i, 0.0) for i, name in enumerate("abcde")]
    rng = np.random.default_rng(0)
    first = [random.select(given, 2, rng)[0].image_id for _ in range(2000)]
    counts = np.array([first.count(name) for name in "abcde"])
    assert counts.min() > 320
    assert counts.max() < 480
