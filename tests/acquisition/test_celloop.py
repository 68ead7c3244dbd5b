import numpy as np
import pytest

from loop.acquisition import celloop
from loop.types import Candidate


def candidate(name, *embedding, uncertainty=0.5, seconds=0.0, group=""):
    return Candidate(name, group, uncertainty, np.array(embedding, np.float32), seconds=seconds)


def choose(given, k, labelled=()):
    return celloop.select(given, k, np.random.default_rng(0), labelled=[np.array(e, np.float32) for e in labelled])


def ids(chosen):
    return [s.image_id for s in chosen]


def test_few_labels_the_farthest_from_them_first_however_sure_the_model_is():
    given = [
        candidate("near", 1.0, uncertainty=0.9),
        candidate("far", 9.0, uncertainty=0.1),
        candidate("mid", 4.0, uncertainty=0.5),
    ]
    assert ids(choose(given, 3, [[0.0]])) == ["far", "mid", "near"]


def test_many_labels_uncertainty_counts_in_full():
    # distance x share of those no more uncertain: 4 x 3/3, 5 x 1/3, 5.5 x 2/3
    given = [
        candidate("a", 4.0, uncertainty=0.9),
        candidate("b", 5.0, uncertainty=0.1),
        candidate("c", 5.5, uncertainty=0.5),
    ]
    assert ids(choose(given, 1, [[0.0]] * 5)) == ["c"]
    assert ids(choose(given, 1, [[0.0]] * 200)) == ["a"]


def test_of_equally_new_images_the_quick_one_comes_first():
    given = [candidate("slow", -5.0, seconds=240), candidate("quick", 5.0, seconds=60), candidate("x", 0.5, seconds=60)]
    assert ids(choose(given, 3, [[0.0]]))[0] == "quick"


def test_four_times_the_minutes_weigh_as_much_as_half_the_distance():
    # d / m^0.5: 10 / 2 = 5 against 4.9 / 1, then 10 / 2 against 5.1 / 1
    for distance, first in ((4.9, "far"), (5.1, "near")):
        given = [candidate("far", -10.0, seconds=240), candidate("near", distance, seconds=60)]
        assert ids(choose(given, 2, [[0.0]]))[0] == first


def test_near_duplicates_and_one_group_do_not_come_together():
    given = [candidate(f"film{i}", 9.0 + i, group="film") for i in range(4)]
    given += [candidate("b", 2.0), candidate("c", -3.0), candidate("d", -1.0)]
    chosen = ids(choose(given, 4, [[0.0]]))
    assert sum(name.startswith("film") for name in chosen) == 1
    assert len(choose(given, 7, [[0.0]])) == 7


def test_nothing_labelled_and_no_times_still_give_a_batch_with_reasons():
    chosen = choose([candidate(name, float(i)) for i, name in enumerate("abcd")], 3)
    assert len(set(ids(chosen))) == 3
    assert all("not known yet" in s.reason for s in chosen)


def test_reasons_say_what_decided():
    given = [candidate("far", 9.0, uncertainty=0.9, seconds=60), candidate("near", 0.5, uncertainty=0.1, seconds=60)]
    few, many = (choose(given, 1, [[0.0]] * n)[0].reason for n in (3, 200))
    assert few == "unlike anything labelled or chosen before it"
    assert many == "unlike anything labelled or chosen before it; more uncertain than any other of 2 open images"


@pytest.mark.parametrize(("n", "expected"), [(0, 0.0), (50, 0.0), (125, 0.5), (200, 1.0), (500, 1.0)])
def test_trust_rises_in_between(n, expected):
    assert celloop.trust(n) == pytest.approx(expected)
