"""What every way of choosing images must hold."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loop.acquisition import ACQUISITIONS
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.types import Candidate

ALL = pytest.mark.parametrize("select", ACQUISITIONS.values(), ids=ACQUISITIONS.keys())

MEASURES = ("entropy", "entropy_sum", "entropy_top", "entropy_foreground", "entropy_cells", "margin", "doubtful_cells")
SEVERAL_LOOKS = ("bald", "disagreement")
NEEDS = {"entropy": "entropy", "margin": "margin", "bald": "bald", "disagreement": "disagreement"}
NEEDS["power_entropy"] = "entropy"


def candidates(n, seed=0, dimensions=3):
    rng = np.random.default_rng(seed)
    return [
        Candidate(
            f"image-{i:02d}",
            f"g{i % 4}",
            float(rng.random()),
            rng.random(dimensions, dtype=np.float32),
            n_cells=int(rng.integers(9)),
            foreground=float(rng.random()),
            seconds=float(rng.uniform(5, 90)),
            measures={name: float(rng.random()) for name in MEASURES + SEVERAL_LOOKS},
        )
        for i in range(n)
    ]


def ids(chosen):
    return [s.image_id for s in chosen]


def without_measure(candidate, name):
    return replace(candidate, measures={key: value for key, value in candidate.measures.items() if key != name})


@ALL
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_k_distinct_images_ranked_from_one_with_reasons(select, k):
    given = candidates(7)
    chosen = select(given, k, np.random.default_rng(1))
    assert [s.rank for s in chosen] == list(range(1, k + 1))
    assert len({s.image_id for s in chosen}) == k
    assert {s.image_id for s in chosen} <= {c.image_id for c in given}
    assert all(s.reason and not s.control for s in chosen)
    assert all(type(s.image_id) is str and type(s.rank) is int for s in chosen)


@ALL
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    places=st.lists(st.integers(0, 3), min_size=1, max_size=14),
    numbers=st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1, max_size=3),
    k=st.integers(0, 16),
    n_labelled=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_distinct_and_complete_for_pools_full_of_ties(select, places, numbers, k, n_labelled, seed):
    pool = [
        Candidate(
            f"{i}",
            "",
            numbers[i % len(numbers)],
            np.array([place, place % 2, 7.0], np.float32),
            foreground=numbers[i % len(numbers)],
            measures=dict.fromkeys(MEASURES + SEVERAL_LOOKS, numbers[i % len(numbers)]),
        )
        for i, place in enumerate(places)
    ]
    labelled = [np.array([i, i % 2, 7.0], np.float32) for i in range(n_labelled)]
    chosen = select(pool, k, np.random.default_rng(seed), labelled=labelled)
    assert len(set(ids(chosen))) == len(chosen) == min(k, len(pool))
    assert [s.rank for s in chosen] == list(range(1, len(chosen) + 1))
    assert all(s.reason and "nan" not in s.reason for s in chosen)
    assert select(pool[::-1], k, np.random.default_rng(seed), labelled=labelled) == chosen


@ALL
def test_more_than_the_pool_gives_the_pool(select):
    chosen = select(candidates(3), 9, np.random.default_rng(0))
    assert sorted(s.image_id for s in chosen) == ["image-00", "image-01", "image-02"]


@ALL
def test_an_empty_pool_gives_nothing(select):
    assert select([], 4, np.random.default_rng(0)) == []
    assert select([], 4, np.random.default_rng(0), labelled=[np.zeros(3, np.float32)]) == []


@ALL
def test_same_seed_same_answer_whatever_the_order_given(select):
    given = candidates(40)
    labelled = [np.zeros(3, np.float32), np.ones(3, np.float32)]
    one = select(given, 9, np.random.default_rng(3), labelled=labelled)
    shuffled = [given[int(i)] for i in np.random.default_rng(8).permutation(40)]
    assert select(given, 9, np.random.default_rng(3), labelled=labelled) == one
    assert select(given[::-1], 9, np.random.default_rng(3), labelled=labelled) == one
    assert select(shuffled, 9, np.random.default_rng(3), labelled=labelled) == one


@ALL
def test_identical_embeddings_are_no_obstacle(select):
    same = [replace(c, embedding=np.full(3, 0.1, np.float32)) for c in candidates(6)]
    assert len(set(ids(select(same, 4, np.random.default_rng(0))))) == 4
    assert len(set(ids(select(same, 4, np.random.default_rng(0), labelled=[same[0].embedding])))) == 4


@ALL
def test_all_candidates_in_one_group(select):
    one_well = [replace(c, group="well-A1") for c in candidates(9)]
    assert len(set(ids(select(one_well, 5, np.random.default_rng(0))))) == 5


@ALL
def test_nothing_to_tell_images_apart(select):
    blank = [
        Candidate(f"i{i}", "", 0.0, np.zeros(2, np.float32), measures=dict.fromkeys(MEASURES + SEVERAL_LOOKS, 0.0))
        for i in range(5)
    ]
    assert len(set(ids(select(blank, 3, np.random.default_rng(0))))) == 3


@ALL
def test_a_learnt_embedding_may_be_given(select):
    chosen = select(candidates(6), 3, np.random.default_rng(0), labelled=[np.zeros(3, np.float32)])
    assert len(chosen) == 3


@ALL
@pytest.mark.parametrize("where", ["uncertainty", "foreground", "seconds", "measures", "embedding"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_refused_with_the_image_named(select, where, value):
    given = candidates(4)
    bad = {
        "embedding": np.array([0, value, 0], np.float32),
        "measures": {**given[2].measures, "entropy_top": value},
    }
    given[2] = replace(given[2], image_id="well-B3", **{where: bad.get(where, value)})
    with pytest.raises(NonFiniteError, match="well-B3"):
        select(given, 2, np.random.default_rng(0))


@ALL
@pytest.mark.parametrize(
    ("where", "value"), [("uncertainty", -0.1), ("foreground", 1.2), ("foreground", -0.2), ("seconds", -1.0)]
)
def test_numbers_out_of_range_are_refused_with_the_image_named(select, where, value):
    given = candidates(4)
    given[1] = replace(given[1], **{where: value})
    with pytest.raises(InputError, match=rf"{where} of image 'image-01' is {value}; expected 0"):
        select(given, 2, np.random.default_rng(0))


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_a_missing_score_is_named_where_it_is_needed_and_no_matter_where_it_is_not(name):
    given = candidates(9)
    for measure in MEASURES + SEVERAL_LOOKS:
        lacking = [without_measure(c, measure) if i in (1, 3, 5, 7) else c for i, c in enumerate(given)]
        if NEEDS.get(name) == measure:
            with pytest.raises(InputError, match=rf"4 of 9 .*{measure}.*'image-01', 'image-03', 'image-05'; "):
                ACQUISITIONS[name](lacking, 3, np.random.default_rng(0))
        else:
            whole = ACQUISITIONS[name](given, 3, np.random.default_rng(0))
            assert ACQUISITIONS[name](lacking, 3, np.random.default_rng(0)) == whole


@ALL
def test_bad_arguments_are_refused(select):
    with pytest.raises(InputError, match="k=-1"):
        select(candidates(2), -1, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"image-00.*twice"):
        select(candidates(2) + candidates(1), 1, np.random.default_rng(0))
    with pytest.raises(ShapeError, match="image-01"):
        select(candidates(1) + candidates(2, dimensions=2)[1:], 1, np.random.default_rng(0))


@ALL
def test_bad_labelled_embeddings_are_refused(select):
    with pytest.raises(ShapeError, match=r"labelled image 1 .*\(5,\).*\(3,\)"):
        select(candidates(3), 1, np.random.default_rng(0), labelled=[np.zeros(3, np.float32), np.zeros(5, np.float32)])
    with pytest.raises(NonFiniteError, match="labelled image 0"):
        select(candidates(3), 1, np.random.default_rng(0), labelled=[np.array([0, np.nan, 0], np.float32)])
