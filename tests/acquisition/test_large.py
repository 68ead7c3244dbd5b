import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.acquisition import large, uncertain_diverse
from loop.acquisition.base import standardised
from loop.acquisition.large import select_large
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.types import Candidate


def plain(embeddings, uncertainty, k, labelled=()):
    """The rule as it reads: all distances to each new centre, differences of coordinates, nothing put off."""
    points, centres = standardised(embeddings, labelled)
    distance = np.full(len(points), np.inf)
    for centre in centres:
        distance = np.minimum(distance, np.linalg.norm(points - centre, axis=1))
    uncertainty = np.asarray(uncertainty, np.float64)
    left, rows = np.ones(len(points), bool), []
    for step in range(min(k, len(points))):
        value = uncertainty / max(uncertainty.max(), 1e-12) * (distance if step or len(centres) else 0.0 * points[:, 0])
        row = int(np.lexsort((-uncertainty, -np.where(left, value, -np.inf)))[0])
        rows.append(row)
        left[row] = False
        distance = np.minimum(distance, np.linalg.norm(points - points[row], axis=1))
    return rows


def pool(n, d=8, kinds=12, seed=0, copies=0.2):
    """Clusters of unequal size, each with its level of uncertainty, and exact copies of some rows."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(kinds, n, p=rng.dirichlet(np.full(kinds, 0.5)))
    points = (rng.normal(0, 3, (kinds, d))[kind] + rng.normal(0, 0.4, (n, d))).astype(np.float32)
    uncertainty = rng.random(kinds)[kind] * rng.random(n)
    copied = rng.permutation(n)[: int(copies * n)]
    points[copied] = points[rng.permutation(n)[: len(copied)]]
    return points, uncertainty


@pytest.fixture
def small_steps(monkeypatch):
    """Few rows and centres at a time, so that a small pool goes through everything that a large one does."""
    monkeypatch.setattr(large, "_FRONT", 16)
    monkeypatch.setattr(large, "_CHUNK", 64)
    monkeypatch.setattr(large, "_CENTRES", 8)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n_labelled", [0, 21])
def test_the_answer_is_that_of_the_plain_rule(seed, n_labelled, small_steps):
    points, uncertainty = pool(1000, seed=seed)
    labelled = np.random.default_rng(seed).normal(0, 3, (n_labelled, 8)).astype(np.float32)
    chosen = select_large(points, uncertainty, 120, labelled=labelled)
    assert chosen.rows.tolist() == plain(points, uncertainty, 120, labelled)


def test_the_answer_is_that_of_the_plain_rule_at_the_real_sizes():
    points, uncertainty = pool(6000, d=32, seed=3)
    assert select_large(points, uncertainty, 40).rows.tolist() == plain(points, uncertainty, 40)


def test_with_equal_uncertainties_it_is_k_centre(small_steps):
    points, _ = pool(600, seed=4, copies=0)
    ones = np.ones(600)
    assert select_large(points, ones, 60).rows.tolist() == plain(points, ones, 60)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(0, 45), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_coarse_numbers_with_many_ties(n, k, n_labelled, seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 3, (n, 2)).astype(np.float32)
    uncertainty = rng.integers(0, 3, n) / 2
    labelled = rng.integers(0, 3, (n_labelled, 2)).astype(np.float32)
    chosen = select_large(points, uncertainty, k, labelled=labelled)
    rows = chosen.rows.tolist()
    assert len(set(rows)) == len(rows) == min(k, n)
    # ties may be broken by rounding: each choice is as good as the best there was
    own, known = standardised(points, labelled)
    for step, row in enumerate(rows):
        if step == 0 and not n_labelled:
            assert row == int(np.argmax(uncertainty))
            continue
        before = np.concatenate([known, own[rows[:step]]])
        distance = np.linalg.norm(own[:, None] - before[None], axis=2).min(axis=1)
        left = np.setdiff1d(np.arange(n), rows[:step])
        assert uncertainty[row] * distance[row] >= (uncertainty * distance)[left].max() - 1e-6


def test_ties_go_by_uncertainty_then_by_row(small_steps):
    points = np.ones((100, 3), np.float32)
    uncertainty = np.r_[np.full(50, 0.2), np.full(50, 0.7)]
    assert select_large(points, uncertainty, 60).rows.tolist() == [*range(50, 100), *range(10)]
    assert select_large(points, np.zeros(100), 3).rows.tolist() == [0, 1, 2]


def test_spread_is_the_share_of_the_largest_distance():
    # standardised distances keep the ratios of 0, 1, 4
    points, uncertainty = np.array([[0.0], [1.0], [4.0]], np.float32), [1.0, 0.8, 0.3]
    chosen = select_large(points, uncertainty, 3)
    assert chosen.rows.tolist() == [0, 2, 1]
    np.testing.assert_allclose(chosen.spread, [0, 1, 0.25])


def test_uncertain_diverse_chooses_the_same():
    points, uncertainty = pool(300, seed=5)
    given_ = [Candidate(f"{i:04d}", "", float(u), p) for i, (p, u) in enumerate(zip(points, uncertainty, strict=True))]
    labelled = list(pool(9, seed=6)[0])
    chosen = uncertain_diverse.select(given_, 25, np.random.default_rng(0), labelled=labelled)
    rows = select_large(points, uncertainty, 25, labelled=labelled).rows
    assert [int(s.image_id) for s in chosen] == rows.tolist()


def test_a_memory_map_will_do(tmp_path):
    points, uncertainty = pool(500)
    np.save(tmp_path / "pool.npy", points)
    mapped = np.load(tmp_path / "pool.npy", mmap_mode="r")
    assert select_large(mapped, uncertainty, 9).rows.tolist() == select_large(points, uncertainty, 9).rows.tolist()


def test_a_dimension_far_from_zero_keeps_its_digits():
    points, uncertainty = pool(400, copies=0)
    moved = points.astype(np.float64) * [1e-3, *[1.0] * 7] + [0, 1e6, *[0.0] * 6]
    assert select_large(moved, uncertainty, 30).rows.tolist() == select_large(points, uncertainty, 30).rows.tolist()


def test_nothing_to_choose_and_more_than_there_is():
    points, uncertainty = pool(5)
    assert select_large(points, uncertainty, 0).rows.shape == (0,)
    assert select_large(np.zeros((0, 4), np.float32), [], 3).rows.shape == (0,)
    assert sorted(select_large(points, uncertainty, 99).rows.tolist()) == [0, 1, 2, 3, 4]
    assert select_large(points[:1], uncertainty[:1], 1).spread.tolist() == [0]


def test_what_cannot_be_used_is_refused_by_row():
    points, uncertainty = pool(50)
    with pytest.raises(InputError, match="k=-1"):
        select_large(points, uncertainty, -1)
    with pytest.raises(ShapeError, match=r"\(N, D\)"):
        select_large(points, uncertainty[:-1], 3)
    with pytest.raises(ShapeError, match="8 numbers"):
        select_large(points, uncertainty, 3, labelled=np.zeros((2, 4), np.float32))
    with pytest.raises(NonFiniteError, match="labelled"):
        select_large(points, uncertainty, 3, labelled=np.full((2, 8), np.nan, np.float32))
    wrong = uncertainty.copy()
    wrong[7] = np.nan
    with pytest.raises(NonFiniteError, match="row 7"):
        select_large(points, wrong, 3)
    wrong[7] = -0.1
    with pytest.raises(InputError, match="row 7"):
        select_large(points, wrong, 3)
    points[31, 2] = np.inf
    with pytest.raises(NonFiniteError, match="row 31"):
        select_large(points, uncertainty, 3)
