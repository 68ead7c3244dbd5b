import numpy as np

from loop.acquisition import clusters
from loop.acquisition.clusters import k_means
from loop.acquisition.weighted_kmeans import select
from loop.types import Candidate


def candidate(name, uncertainty, x):
    return Candidate(name, "", uncertainty, np.array([x], np.float32))


def ids(chosen):
    return [s.image_id for s in chosen]


def test_the_weighted_centre_decides_which_image_is_nearest():
    # the plain centre of 0, 4, 10 is 4.7: "b"; with weights 1, 1, 20 it is 9.3: "c"
    given = [candidate("a", 0.05, 0.0), candidate("b", 0.05, 4.0), candidate("c", 1.0, 10.0)]
    assert ids(select(given, 1, np.random.default_rng(0))) == ["c"]
    even = [candidate(c.image_id, 0.5, float(c.embedding[0])) for c in given]
    assert ids(select(even, 1, np.random.default_rng(0))) == ["b"]


def test_the_heaviest_cluster_first():
    given = [candidate(f"quiet{i}", 0.1, i / 10) for i in range(7)]
    given += [candidate(f"loud{i}", 0.9, 50 + i / 10) for i in range(3)]
    assert ids(select(given, 2, np.random.default_rng(0))) == ["loud1", "quiet3"]


def test_copies_follow_by_uncertainty():
    given = [candidate("a", 0.2, 0.0), candidate("b", 0.9, 0.0), candidate("c", 0.5, 0.0), candidate("d", 0.1, 5.0)]
    chosen = ids(select(given, 4, np.random.default_rng(0)))
    assert set(chosen[:2]) == {"a", "d"}
    assert chosen[2:] == ["b", "c"]


def test_reasons_count_the_cluster():
    given = [candidate("a", 0.2, 0.0), candidate("b", 0.9, 0.1), candidate("c", 0.5, 9.0)]
    reasons = {s.image_id: s.reason for s in select(given, 2, np.random.default_rng(0))}
    assert reasons["b"].startswith("more uncertain than any other of 3 open images (uncertainty 0.9)")
    assert reasons["b"].endswith("in the middle of 2 that look alike")
    assert "looks like no other" in reasons["c"]


def test_k_means_finds_blobs_and_never_an_empty_cluster():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(20, 2)) + centre for centre in ((0, 0), (40, 0), (0, 40))])
    labels, centres = k_means(points, 3, np.random.default_rng(1))
    assert [len(set(labels[part])) for part in (slice(0, 20), slice(20, 40), slice(40, 60))] == [1, 1, 1]
    for cluster in range(3):
        np.testing.assert_allclose(centres[cluster], points[labels == cluster].mean(axis=0))
    twins = np.repeat([[0.0, 0], [1, 1]], 5, axis=0)
    labels, centres = k_means(twins, 7, np.random.default_rng(1))
    assert sorted(np.bincount(labels)) == [5, 5]
    assert len(centres) == 2


def test_places_that_differ_by_less_than_rounding_raise_no_warning():
    points = np.array([[1e8], [1e8 + 2e-8], [1e8 + 4e-8], [0.0]])
    labels, centres = k_means(points, 4, np.random.default_rng(0))
    assert labels.max() + 1 == len(centres) <= 4


def test_one_cluster_has_the_weighted_mean():
    labels, centres = k_means(np.array([[0.0], [4.0]]), 1, np.random.default_rng(0), np.array([3.0, 1.0]))
    assert labels.tolist() == [0, 0]
    np.testing.assert_allclose(centres, [[1.0]])


def test_mini_batches_for_large_pools(monkeypatch):
    monkeypatch.setattr(clusters, "LARGE", 50)
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(40, 2)) + centre for centre in ((0, 0), (90, 0), (0, 90))])
    labels, _ = k_means(points, 3, np.random.default_rng(1))
    assert sorted(np.bincount(labels)) == [40, 40, 40]
    again, _ = k_means(points, 3, np.random.default_rng(1))
    np.testing.assert_array_equal(labels, again)
