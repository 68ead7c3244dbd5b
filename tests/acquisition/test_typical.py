from collections import Counter

import numpy as np

from loop.acquisition import typical
from loop.acquisition.typical import by_typicality, select
from loop.types import Candidate


def blob(name, n, centre, seed, spread=1.0):
    rng = np.random.default_rng(seed)
    points = np.array(centre) + spread * rng.normal(size=(n, 2))
    return [Candidate(f"{name}{i:02d}", "", 0.0, p.astype(np.float32)) for i, p in enumerate(points)]


POOL = blob("large", 30, (0, 0), 0) + blob("middle", 20, (100, 0), 1) + blob("small", 8, (0, 100), 2)


def kinds(chosen):
    return [s.image_id[:-2] for s in chosen]


def test_one_of_each_kind_the_largest_first():
    assert kinds(select(POOL, 3, np.random.default_rng(0))) == ["large", "middle", "small"]


def test_a_labelled_kind_comes_last():
    labelled = [np.zeros(2, np.float32)]
    chosen = select(POOL, 3, np.random.default_rng(0), labelled=labelled)
    # four clusters: one kind is split, and the cluster with the labelled image is not asked
    assert {"middle", "small"} <= set(kinds(chosen))
    two_kinds = [c for c in POOL if not c.image_id.startswith("small")]
    chosen = select(two_kinds, 1, np.random.default_rng(0), labelled=labelled)
    assert kinds(chosen) == ["middle"]


def test_the_middle_of_a_cluster_is_more_typical_than_its_rim():
    # four neighbours each: 0 has them at 0.5, 0.5, 1, 1 (mean 0.75); 0.5 at 0.5, 0.5, 1, 1.5; the ends are last
    points = np.array([[-3], [-2], [-1], [-0.5], [0], [0.5], [1], [2], [3]], dtype=float)
    order = by_typicality(points, np.arange(9))
    assert order[0] == 4
    assert order[-2:].tolist() == [0, 8]


def test_typicality_as_by_brute_force():
    points = np.random.default_rng(3).normal(size=(31, 4))
    members = np.arange(0, 31, 2)
    own = points[members]
    away = np.sort(np.linalg.norm(own[:, None] - own, axis=2), axis=1)[:, 1 : 1 + len(members) // 2].mean(axis=1)
    assert by_typicality(points, members).tolist() == members[np.argsort(away)].tolist()


def test_more_images_than_clusters_go_round_by_what_is_taken():
    copies = [Candidate(f"{x}{i}", "", 0.0, np.array([x], np.float32)) for x in range(3) for i in range(4)]
    chosen = [s.image_id[0] for s in select(copies, 9, np.random.default_rng(0))]
    assert [sorted(chosen[start : start + 3]) for start in (0, 3, 6)] == [["0", "1", "2"]] * 3


def test_uncertainty_is_not_looked_at():
    other = [Candidate(c.image_id, "", i / 9, c.embedding) for i, c in enumerate(POOL)]
    one, two = (select(pool, 5, np.random.default_rng(0)) for pool in (POOL, other))
    assert one == two


def test_reasons_count_what_looks_alike():
    chosen = select(POOL, 3, np.random.default_rng(0))
    assert chosen[0].reason == "the most typical of 30 images that look alike, of which none is labelled or chosen yet"
    lone = [*POOL, Candidate("odd00", "", 0.0, np.array([-300, -300], np.float32))]
    reasons = {s.image_id: s.reason for s in select(lone, 4, np.random.default_rng(0))}
    assert reasons["odd00"] == "looks like no other image, open or labelled"
    assert Counter(kinds(select(lone, 4, np.random.default_rng(0)))).most_common(1)[0][1] == 1


def test_of_a_large_cluster_a_sample_is_compared_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(typical, "MOST_COMPARED", 10)
    points = np.linspace(-1, 1, 35)[:, None] ** 3
    members = np.arange(35)
    order = by_typicality(points, members)
    # every fourth is compared: 0, 4, .. 32; the densest is 16, next to the middle
    assert order[:9].tolist() == [int(i) for i in members[::4][by_typicality(points[::4], np.arange(9))]]
    assert order[0] == 16
    assert order[9:].tolist() == [i for i in range(35) if i % 4]
    pool = [Candidate(f"{i:02d}", "", 0.0, points[i].astype(np.float32)) for i in range(35)]
    assert len({s.image_id for s in select(pool, 30, np.random.default_rng(0))}) == 30
