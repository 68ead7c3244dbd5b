import numpy as np
import pytest
from hypothesis import given as given_
from hypothesis import settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from loop.acquisition.base import standardised
from loop.acquisition.near import apart, families
from loop.errors import NonFiniteError
from loop.types import Candidate


def candidate(name, *embedding, group=""):
    return Candidate(name, group, 0.0, np.array(embedding, np.float32))


def scattered(n, dimensions=8, seed=0):
    rng = np.random.default_rng(seed)
    return [candidate(f"i{i:03d}", *rng.normal(size=dimensions)) for i in range(n)]


def partition(numbers):
    return {frozenset(np.flatnonzero(numbers == f).tolist()) for f in set(numbers.tolist())}


def test_scattered_images_are_no_relatives():
    assert len(set(families(scattered(80)).tolist())) == 80


def test_a_copy_and_a_near_copy_are_relatives():
    pool = scattered(40)
    base = pool[7].embedding
    pool += [candidate("copy", *base), candidate("shifted", *(base + 0.05))]
    numbers = families(pool)
    assert numbers[7] == numbers[40] == numbers[41]
    assert len(set(numbers.tolist())) == 40
    only_copies = families(pool, distance=0)
    assert only_copies[7] == only_copies[40] != only_copies[41]


def test_one_group_is_one_family_and_hangs_together_with_its_copies():
    pool = scattered(30)
    pool += [
        candidate("a", 9, 9, 9, 9, 9, 9, 9, 9, group="well"),
        candidate("b", -9, 9, 9, 9, 9, 9, 9, 9, group="well"),
    ]
    pool += [candidate("c", *pool[31].embedding, group="other")]
    numbers = families(pool)
    assert numbers[30] == numbers[31] == numbers[32]
    assert len(set(numbers.tolist())) == 31


def test_a_group_named_like_an_image_is_not_that_image():
    pool = [candidate("a", 0.0), candidate("b", 5.0, group="a"), candidate("c", 20.0, group="a")]
    assert len(set(families(pool).tolist())) == 2


def test_frames_of_a_film_do_not_make_the_usual_distance_small():
    rng = np.random.default_rng(1)
    film = [candidate(f"film{i}", *(np.full(6, 5.0) + 1e-3 * rng.normal(size=6)), group="film") for i in range(60)]
    pool = [*film, *scattered(20, 6)]
    twin = candidate("twin", *(pool[65].embedding + 0.02))
    numbers = families([*pool, twin])
    assert numbers[65] == numbers[-1]
    assert len(set(numbers.tolist())) == 21


def test_as_by_brute_force():
    rng = np.random.default_rng(2)
    pool = [candidate(f"{i:03d}", *rng.normal(size=2)) for i in range(60)]
    points, _ = standardised(np.stack([c.embedding for c in pool]))
    away = cdist(points, points)
    near = away < 0.8 * np.median(np.sort(away, axis=1)[:, 1])
    family = list(range(60))
    for _ in range(60):
        family = [min(family[j] for j in range(60) if near[i, j]) for i in range(60)]
    assert partition(families(pool, distance=0.8)) == partition(np.array(family))


def test_numbers_follow_the_image_whatever_the_order_given():
    pool = [*scattered(12), candidate("copy", *scattered(12)[3].embedding)]
    numbers = dict(zip([c.image_id for c in pool], families(pool).tolist(), strict=True))
    order = np.random.default_rng(0).permutation(13)
    shuffled = [pool[int(i)] for i in order]
    assert dict(zip([c.image_id for c in shuffled], families(shuffled).tolist(), strict=True)) == numbers
    assert numbers["copy"] == 0


def test_small_and_odd_pools():
    assert families([]).tolist() == []
    assert families(scattered(1)).tolist() == [0]
    assert families(scattered(2)).tolist() == [0, 1]
    assert families([candidate("a", 1, 2), candidate("b", 1, 2), candidate("c", 1, 2)]).tolist() == [0, 0, 0]
    assert families([candidate(n, i, group="one") for i, n in enumerate("abc")]).tolist() == [0, 0, 0]
    with pytest.raises(NonFiniteError, match="'x'"):
        families([candidate("x", np.nan)])


def test_apart_by_hand():
    ranked = ["a", "b", "c", "d", "e", "f"]
    of = np.array([0, 0, 1, 0, 2, 1])
    assert apart(ranked, of, 3) == ["a", "c", "e"]
    assert apart(ranked, of, 5) == ["a", "c", "e", "b", "f"]
    assert apart(ranked, of, 99) == ["a", "c", "e", "b", "f", "d"]
    assert apart(ranked, of, 0) == []
    assert apart([], np.zeros(0, np.intp), 4) == []


def test_one_family_fills_the_batch():
    assert apart(["a", "b", "c"], np.zeros(3, np.intp), 2) == ["a", "b"]


@settings(max_examples=100, deadline=None)
@given_(of=st.lists(st.integers(0, 5), max_size=20), k=st.integers(0, 25))
def test_apart_is_distinct_full_and_repeats_no_family_before_it_must(of, k):
    ranked = [f"i{i}" for i in range(len(of))]
    chosen = apart(ranked, np.array(of, np.intp), k)
    assert len(set(chosen)) == len(chosen) == min(k, len(of))
    families_chosen = [of[int(image_id[1:])] for image_id in chosen]
    n = min(k, len(set(of)))
    assert len(set(families_chosen[:n])) == n
