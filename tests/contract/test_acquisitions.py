"""What every way of choosing images must hold."""

import numpy as np
import pytest

from loop.acquisition import ACQUISITIONS
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.types import Candidate

ALL = pytest.mark.parametrize("select", ACQUISITIONS.values(), ids=ACQUISITIONS.keys())


def candidates(n, seed=0, dimensions=3):
    rng = np.random.default_rng(seed)
    return [
        Candidate(f"image-{i:02d}", f"g{i % 4}", float(rng.random()), rng.random(dimensions, dtype=np.float32))
        for i in range(n)
    ]


@ALL
@pytest.mark.parametrize("k", [0, 1, 3, 7])
def test_k_distinct_images_ranked_from_one_with_reasons(select, k):
    given = candidates(7)
    chosen = select(given, k, np.random.default_rng(1))
    assert [s.rank for s in chosen] == list(range(1, k + 1))
    assert len({s.image_id for s in chosen}) == k
    assert {s.image_id for s in chosen} <= {c.image_id for c in given}
    assert all(s.reason and not s.control for s in chosen)


@ALL
def test_more_than_the_pool_gives_the_pool(select):
    chosen = select(candidates(3), 9, np.random.default_rng(0))
    assert sorted(s.image_id for s in chosen) == ["image-00", "image-01", "image-02"]


@ALL
def test_an_empty_pool_gives_nothing(select):
    assert select([], 4, np.random.default_rng(0)) == []


@ALL
def test_same_seed_same_answer_whatever_the_order_given(select):
    given = candidates(12)
    one = select(given, 5, np.random.default_rng(3))
    assert select(given[::-1], 5, np.random.default_rng(3)) == one


@ALL
def test_identical_embeddings_are_no_obstacle(select):
    same = [Candidate(c.image_id, c.group, c.uncertainty, np.ones(3, np.float32)) for c in candidates(6)]
    assert len({s.image_id for s in select(same, 4, np.random.default_rng(0))}) == 4


@ALL
def test_a_learnt_embedding_may_be_given(select):
    chosen = select(candidates(6), 3, np.random.default_rng(0), labelled=[np.zeros(3, np.float32)])
    assert len(chosen) == 3


@ALL
@pytest.mark.parametrize("where", ["uncertainty", "embedding"])
def test_nan_is_refused_with_the_image_named(select, where):
    given = candidates(4)
    bad = np.array([0, np.nan, 0], np.float32)
    given[2] = Candidate("well-B3", "", np.nan, given[2].embedding)
    if where == "embedding":
        given[2] = Candidate("well-B3", "", 0.1, bad)
    with pytest.raises(NonFiniteError, match="well-B3"):
        select(given, 2, np.random.default_rng(0))


@ALL
def test_bad_arguments_are_refused(select):
    with pytest.raises(InputError, match="k=-1"):
        select(candidates(2), -1, np.random.default_rng(0))
    with pytest.raises(InputError, match=r"image-00.*twice"):
        select(candidates(2) + candidates(1), 1, np.random.default_rng(0))
    with pytest.raises(ShapeError, match="image-01"):
        select(candidates(1) + candidates(2, dimensions=2)[1:], 1, np.random.default_rng(0))
