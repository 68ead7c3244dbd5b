from collections import Counter

import numpy as np
import pytest

from loop.acquisition import celloop
from loop.acquisition import spaced as spaced_module
from loop.acquisition.spaced import families_of
from loop.errors import InputError
from loop.types import Candidate


def candidate(name, *embedding, uncertainty=0.5, seconds=0.0, group="", foreground=0.2):
    return Candidate(name, group, uncertainty, np.array(embedding, np.float32), seconds=seconds, foreground=foreground)


def choose(given, k, labelled=(), seed=0):
    known = [np.array(e, np.float32) for e in labelled]
    return celloop.select(given, k, np.random.default_rng(seed), labelled=known)


def ids(chosen):
    return [s.image_id for s in chosen]


def two_kinds(common=36, rare=4, **more):
    """Images around 0 and few around 100; each group of its own."""
    places = np.random.default_rng(0).normal(0, 1, common + rare)
    given = [candidate(f"common{i:02d}", places[i], **more) for i in range(common)]
    return given + [candidate(f"rare{i}", 100 + places[common + i], **more) for i in range(rare)]


@pytest.fixture
def few_kinds(monkeypatch):
    monkeypatch.setattr(celloop, "KINDS", 2)


def test_a_rare_kind_gets_the_root_of_its_size(few_kinds):
    # 36 and 4 images: shares by the roots 6 and 2, so 6 of 8 and 2 of 8
    kinds = Counter(name[:4] for name in ids(choose(two_kinds(), 8)))
    assert kinds == {"comm": 6, "rare": 2}


def test_what_is_labelled_counts_towards_its_kind(few_kinds):
    # sizes 41 and 4 with the labelled: 5 / 41^0.5 = 0.78; the rare kind is behind until it has 2 (2 / 2 = 1)
    chosen = ids(choose(two_kinds(), 2, [[0.0]] * 5))
    assert [name[:4] for name in chosen] == ["rare", "rare"]


def test_a_kind_that_is_used_up_leaves_its_turns_to_the_others(few_kinds):
    chosen = ids(choose(two_kinds(common=10, rare=2), 12))
    assert len(set(chosen)) == 12


def test_within_a_kind_fuller_images_are_more_likely_and_empty_ones_not_left_out(monkeypatch):
    monkeypatch.setattr(celloop, "KINDS", 1)
    given = [
        candidate(name, float(i), foreground=f) for i, (name, f) in enumerate(zip("abc", (0.6, 0.3, 0.0), strict=True))
    ]
    first = Counter(ids(choose(given, 1, seed=seed))[0] for seed in range(3000))
    # 0.66 x foreground / 0.9 + 0.34 / 3
    for name, chance in (("a", 0.553), ("b", 0.333), ("c", 0.113)):
        assert first[name] / 3000 == pytest.approx(chance, abs=0.03)


def test_with_many_labels_the_uncertain_and_quick_are_drawn(monkeypatch):
    monkeypatch.setattr(celloop, "KINDS", 1)
    given = [
        candidate("sure", 0.0, uncertainty=0.1, seconds=60, foreground=0.9),
        candidate("slow", 1.0, uncertainty=0.5, seconds=240),
        candidate("quick", 2.0, uncertainty=0.6, seconds=60),
    ]
    first = Counter(ids(choose(given, 1, [[float(i % 3)] for i in range(200)], seed))[0] for seed in range(3000))
    weights = np.array([(1 / 3) ** 4, (2 / 3) ** 4 / 2, 1.0])
    for name, share in zip(("sure", "slow", "quick"), weights / weights.sum(), strict=True):
        assert first[name] / 3000 == pytest.approx(0.66 * share + 0.34 / 3, abs=0.03)


def test_near_duplicates_and_one_group_wait_until_there_is_nothing_else(monkeypatch):
    monkeypatch.setattr(celloop, "KINDS", 1)
    given = [candidate(f"film{i}", 9.0 + i, group="film") for i in range(4)]
    given += [candidate("b", 2.0), candidate("c", -3.0), candidate("d", -1.0)]
    for seed in range(20):
        chosen = ids(choose(given, 4, seed=seed))
        assert sum(name.startswith("film") for name in chosen) == 1
    assert len(choose(given, 7)) == 7


def test_a_time_that_is_known_for_some_only_is_refused_by_name():
    with pytest.raises(InputError, match="'b'"):
        choose([candidate("a", 0.0, seconds=60), candidate("b", 1.0)], 1)


def test_reasons_say_what_stands_for_what_and_later_how_unsure_the_model_is(few_kinds):
    early = choose(two_kinds(), 2)
    assert sorted(s.reason for s in early) == [
        f"one of {size} images that look alike, of which none is labelled or chosen yet" for size in (36, 4)
    ]
    late = choose(two_kinds(), 1, [[0.0]] * 200)[0].reason
    assert "one of 4 images that look alike, of which none is labelled or chosen yet; " in late
    assert "no more uncertain or less so than the other 39 open images" in late
    assert late.endswith("how long the images take is not known yet")


@pytest.mark.parametrize(("n", "expected"), [(0, 0.0), (50, 0.0), (125, 0.5), (200, 1.0), (500, 1.0)])
def test_trust_rises_in_between(n, expected):
    assert celloop.trust(n) == pytest.approx(expected)


def test_families_of_a_large_pool_still_join_groups(monkeypatch):
    monkeypatch.setattr(spaced_module, "MOST_COMPARED", 3)
    given = [candidate(f"i{i}", float(i), group="a" if i % 2 else "") for i in range(10)]
    family = families_of(given, np.random.default_rng(0))
    assert len({int(family[i]) for i in range(1, 10, 2)}) == 1
    assert len(set(family.tolist())) >= 4
    assert len(families_of([], np.random.default_rng(0))) == 0
