from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.acquisition import spaced
from loop.acquisition.batch import QUICK_REASON, choose_batch, first_batch
from loop.errors import ConfigError, InputError, NonFiniteError
from loop.types import Candidate


def pool(sizes, seed=0):
    """Candidates of groups of these sizes; size 1 with name "" makes an image without a group."""
    rng = np.random.default_rng(seed)
    return [
        Candidate(f"{name or 'single'}-{i}", name, float(rng.random()), rng.random(2, dtype=np.float32))
        for name, size in sizes.items()
        for i in range(size)
    ]


def batch(candidates, k=5, share=0.2, seed=0, strategy="uncertain_diverse", used=(), **more):
    return choose_batch(
        candidates,
        k=k,
        control_share=share,
        strategy=strategy,
        rng=np.random.default_rng(seed),
        used_groups=set(used),
        **more,
    )


def group_of(candidates):
    return {c.image_id: c.group or c.image_id for c in candidates}


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 4), min_size=1, max_size=7),
    loose=st.integers(0, 4),
    k=st.integers(0, 20),
    share=st.floats(0, 1),
    used=st.sets(st.integers(0, 6)),
    measuring=st.sets(st.integers(0, 6)),
    seed=st.integers(0, 99),
)
def test_a_group_never_both_teaches_and_measures(sizes, loose, k, share, used, measuring, seed):
    candidates = pool({**{f"g{i}": n for i, n in enumerate(sizes)}, "": loose}, seed)
    used_groups = {f"g{i}" for i in used - measuring}
    control_groups = {f"g{i}" for i in measuring}
    chosen = batch(candidates, k, share, seed, used=used_groups, control_groups=control_groups)
    groups = group_of(candidates)
    assert [s.rank for s in chosen] == list(range(1, len(chosen) + 1))
    assert len({s.image_id for s in chosen}) == len(chosen) == min(k, len(candidates))
    control = {groups[s.image_id] for s in chosen if s.control}
    teaching = {groups[s.image_id] for s in chosen if not s.control}
    assert not control & (teaching | used_groups)
    assert not teaching & control_groups
    assert batch(candidates[::-1], k, share, seed, used=used_groups, control_groups=control_groups) == chosen


def test_the_share_is_met_and_the_control_images_stand_between():
    candidates = pool({"": 40})
    chosen = batch(candidates, k=10, share=0.2)
    assert [s.rank for s in chosen if s.control] == [4, 7]
    assert all("random" in s.reason for s in chosen if s.control)


def test_the_chosen_keep_the_strategys_order():
    candidates = pool({"": 12})
    chosen = [s for s in batch(candidates, k=8, share=0.25) if not s.control]
    uncertainty = {c.image_id: c.uncertainty for c in candidates}
    control = {s.image_id for s in batch(candidates, k=8, share=0.25) if s.control}
    eligible = [c for c in candidates if c.image_id not in control]
    alone = batch(eligible, k=6, share=0.0)
    assert [s.image_id for s in chosen] == [s.image_id for s in alone]
    assert uncertainty[chosen[0].image_id] == max(c.uncertainty for c in eligible)


def test_control_does_not_look_at_uncertainty():
    candidates = [Candidate(f"i{i}", "", i / 10, np.array([i], np.float32)) for i in range(10)]
    drawn = Counter(
        s.image_id for seed in range(2000) for s in batch(candidates, k=5, share=0.2, seed=seed) if s.control
    )
    assert sum(drawn.values()) == 2000
    assert min(drawn.values()) > 140
    assert max(drawn.values()) < 260


def test_a_large_group_is_drawn_as_often_as_its_images():
    candidates = pool({"large": 9, "small": 1, "other": 10})
    drawn = Counter(
        s.image_id.split("-")[0]
        for seed in range(600)
        for s in batch(candidates, k=2, share=0.5, seed=seed)
        if s.control
    )
    assert 200 < drawn["large"] < 340
    assert 10 < drawn["small"] < 60


def test_a_taught_group_gives_no_control():
    candidates = pool({"taught": 6, "fresh": 6})
    for seed in range(20):
        for s in batch(candidates, k=6, share=0.5, seed=seed, used={"taught"}):
            assert s.control == s.image_id.startswith("fresh")


def test_open_images_of_a_measuring_group_only_measure():
    candidates = pool({"measuring": 4, "free": 6, "free2": 6})
    for seed in range(20):
        chosen = batch(candidates, k=6, share=0.5, seed=seed, control_groups={"measuring"})
        assert all(s.control for s in chosen if s.image_id.startswith("measuring"))


def test_one_group_is_all_taught():
    chosen = batch(pool({"only": 8}), k=5, share=0.4)
    assert len(chosen) == 5
    assert not any(s.control for s in chosen)


def test_two_groups_one_teaches_one_measures():
    chosen = batch(pool({"a": 8, "b": 8}), k=6, share=0.5)
    assert len({s.image_id[0] for s in chosen if s.control}) == 1
    assert sum(s.control for s in chosen) == 3


def test_nothing_to_teach_with_is_filled_with_control():
    chosen = batch(pool({"measuring": 5}), k=4, share=0.2, control_groups={"measuring"})
    assert len(chosen) == 4
    assert all(s.control for s in chosen)


def test_more_than_the_pool_gives_the_pool_and_an_empty_pool_nothing():
    assert len(batch(pool({"": 3}), k=10)) == 3
    assert batch([], k=3) == []
    assert batch(pool({"": 3}), k=0) == []


def test_identical_embeddings():
    same = [Candidate(c.image_id, c.group, c.uncertainty, np.zeros(2, np.float32)) for c in pool({"": 9})]
    assert len(batch(same, k=5)) == 5


@pytest.mark.parametrize("strategy", ["random", "uncertain_diverse", "core_set", "typical"])
def test_identical_embeddings_one_group_and_more_than_the_pool(strategy):
    candidates = [Candidate(c.image_id, "only", 0.5, np.ones(3, np.float32)) for c in pool({"": 7})]
    for k in (0, 3, 7, 50):
        chosen = batch(candidates, k=k, share=0.4, strategy=strategy)
        assert len({s.image_id for s in chosen}) == len(chosen) == min(k, 7)
        assert not any(s.control for s in chosen)


def timed(n, seconds):
    """Images of falling uncertainty, each unlike the others, of these seconds."""
    return [
        Candidate(f"i{i:02d}", "", 1 - i / 100, np.eye(n, dtype=np.float32)[i], seconds=float(value))
        for i, value in enumerate(seconds)
    ]


def test_the_quickest_of_the_chosen_come_first_and_the_rest_keeps_its_order():
    candidates = timed(8, [50, 40, 0, 20, 60, 10, 70, 80])
    plain = batch(candidates, k=8, share=0.0)
    quick = batch(candidates, k=8, share=0.0, quick_first=2)
    assert [s.image_id for s in quick][:2] == ["i05", "i03"]
    assert [s.image_id for s in quick][2:] == [s.image_id for s in plain if s.image_id not in ("i05", "i03")]
    assert [s.rank for s in quick] == list(range(1, 9))
    assert [QUICK_REASON in s.reason for s in quick] == [True, True] + [False] * 6
    assert batch(timed(8, [0] * 8), k=8, share=0.0, quick_first=3) == batch(timed(8, [0] * 8), k=8, share=0.0)


def test_control_images_are_not_moved_ahead_and_stay_evenly_between():
    candidates = timed(30, range(1, 31))
    for seed in range(10):
        plain = batch(candidates, k=10, share=0.2, seed=seed)
        quick = batch(candidates, k=10, share=0.2, seed=seed, quick_first=2)
        assert {s.image_id for s in quick if s.control} == {s.image_id for s in plain if s.control}
        assert [s.rank for s in quick if s.control] == [5, 8]
        assert {s.image_id for s in quick} == {s.image_id for s in plain}


def test_near_duplicates_are_not_chosen_together_while_others_are_left():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(5, 6)) * 10
    candidates = [
        Candidate(f"k{i % 5}-{i}", "", 0.9 if i % 5 == 0 else 0.1, (kinds[i % 5] + 1e-4 * i).astype(np.float32))
        for i in range(30)
    ]
    # most uncertain are all of one kind; copies of a kind lie 1e-4 apart, kinds about 30
    kinds_of = [s.image_id[:2] for s in batch(candidates, k=5, share=0.0, strategy="uncertain_diverse")]
    assert sorted(kinds_of) == ["k0", "k1", "k2", "k3", "k4"]


def test_what_keeps_near_duplicates_apart_by_itself_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(spaced, "families", lambda given: asked.append(len(given)) or np.arange(len(given)))
    for strategy, times in (("random", 0), ("celloop", 1), ("uncertain_diverse", 1)):
        asked.clear()
        assert len(batch(pool({"": 9}), k=4, strategy=strategy)) == 4
        assert len(asked) == times


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="quick_first=-1"):
        batch(pool({"": 3}), quick_first=-1)
    with pytest.raises(ConfigError, match=r"nonesuch.*random, .*uncertain_diverse"):
        batch(pool({"": 3}), strategy="nonesuch")
    with pytest.raises(InputError, match=r"control_share=1\.5"):
        batch(pool({"": 3}), share=1.5)
    with pytest.raises(InputError, match="k=-2"):
        batch(pool({"": 3}), k=-2)


def test_nan_is_refused_even_where_it_would_not_be_looked_at():
    candidates = [*pool({"": 3}), Candidate("slide-9", "", float("nan"), np.zeros(2, np.float32))]
    with pytest.raises(NonFiniteError, match="slide-9"):
        batch(candidates, strategy="random")


def test_first_batch_is_random_and_half_control():
    images = [(f"i{i:02d}", "") for i in range(30)]
    chosen = first_batch(images, 12, 0.5, np.random.default_rng(4))
    assert sum(s.control for s in chosen) == 6
    assert not chosen[0].control
    assert all("random" in s.reason for s in chosen)
    assert first_batch(images, 12, 0.5, np.random.default_rng(4)) == chosen
    assert first_batch(images, 12, 0.5, np.random.default_rng(5)) != chosen


def test_first_batch_keeps_groups_on_one_side():
    images = [(f"{g}{i}", g) for g in "abcde" for i in range(4)]
    for seed in range(30):
        chosen = first_batch(images, 12, 0.5, np.random.default_rng(seed))
        sides = {(s.image_id[0], s.control) for s in chosen}
        assert len({group for group, _ in sides}) == len(sides)
        assert sum(s.control for s in chosen) == 6


def test_first_batch_of_a_small_pool():
    chosen = first_batch([("a", ""), ("b", ""), ("c", ""), ("d", "")], 12, 0.5, np.random.default_rng(0))
    assert len(chosen) == 4
    assert sum(s.control for s in chosen) == 2


def test_a_first_batch_by_embeddings_takes_one_of_each_kind_and_its_control_by_chance():
    kinds = {f"i{i:02d}": np.array([10.0 * (i % 3), 1e-3 * i], np.float32) for i in range(30)}
    images = [(image_id, "") for image_id in kinds]
    chosen = first_batch(images, 3, 0.0, np.random.default_rng(0), strategy="core_set", embeddings=kinds)
    assert sorted(int(s.image_id[1:]) % 3 for s in chosen) == [0, 1, 2]
    mixed = [
        first_batch(images, 6, 0.5, np.random.default_rng(seed), strategy="core_set", embeddings=kinds)
        for seed in range(2)
    ]
    by_chance = [first_batch(images, 6, 0.5, np.random.default_rng(seed)) for seed in range(2)]
    for one, other in zip(mixed, by_chance, strict=True):
        assert [s for s in one if s.control] == [s for s in other if s.control]
        assert not any("random" in s.reason for s in one if not s.control)


def test_a_first_batch_names_images_without_an_embedding():
    with pytest.raises(InputError, match=r"1 images.*\(b\)"):
        first_batch([("a", ""), ("b", "")], 2, 0.5, np.random.default_rng(0), embeddings={"a": np.zeros(2, np.float32)})
