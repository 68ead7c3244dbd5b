from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.acquisition.deal import deal
from loop.errors import InputError, NonFiniteError
from loop.types import Selection

PEOPLE = ["ann", "bob", "cy"]


def batch(n, control=()):
    return [Selection(f"i{i:02d}", i + 1, i in control, "") for i in range(n)]


def dealt(cards, people=PEOPLE, overlap=0.0, seconds=None, seed=0):
    return deal(cards, people, overlap=overlap, seconds=seconds or {}, rng=np.random.default_rng(seed))


@settings(max_examples=100, deadline=None)
@given(
    times=st.lists(st.integers(1, 300), min_size=1, max_size=25),
    n_people=st.integers(1, 4),
)
def test_shares_are_disjoint_and_their_times_differ_by_one_image_at_most(times, n_people):
    people = ["ann", "bob", "cy", "di"][:n_people]
    cards = batch(len(times))
    seconds = {s.image_id: float(t) for s, t in zip(cards, times, strict=True)}
    shares = dealt(cards, people, seconds=seconds)
    assert shares.keys() == seconds.keys()
    assert all(len(who) == 1 for who in shares.values())
    total = {person: 0.0 for person in people}
    for image_id, (person,) in shares.items():
        total[person] += seconds[image_id]
    assert max(total.values()) - min(total.values()) <= max(times)


def test_control_images_are_dealt_evenly():
    cards = batch(12, control={0, 3, 6, 9})
    seconds = {s.image_id: 100.0 if s.control else 10.0 for s in cards}
    shares = dealt(cards, ["ann", "bob"], seconds=seconds)
    controls = Counter(shares[s.image_id][0] for s in cards if s.control)
    assert controls == {"ann": 2, "bob": 2}
    assert Counter(who for (who,) in shares.values()) == {"ann": 6, "bob": 6}


@pytest.mark.parametrize("people", [["ann", "bob"], PEOPLE])
def test_the_planned_share_goes_to_two_different_people(people):
    for seed in range(20):
        shares = dealt(batch(10, control={1, 5}), people, overlap=0.3, seed=seed)
        twice = [who for who in shares.values() if len(who) == 2]
        assert len(twice) == 3
        assert all(first != second for first, second in twice)
        assert set(map(len, shares.values())) == {1, 2}


def test_a_fraction_of_an_image_is_drawn_by_chance_and_each_image_as_often():
    drawn = Counter()
    for seed in range(1000):
        drawn.update(image for image, who in dealt(batch(5), overlap=0.3, seed=seed).items() if len(who) == 2)
    assert 1420 < sum(drawn.values()) < 1580
    assert min(drawn.values()) > 240
    assert max(drawn.values()) < 360


def test_unknown_seconds_count_as_the_others_do():
    cards = batch(4)
    shares = dealt(cards, ["ann", "bob"], seconds={"i00": 100.0, "i01": 0.0, "i02": 100.0})
    assert Counter(who for (who,) in shares.values()) == {"ann": 2, "bob": 2}


def test_nobody_one_person_and_an_empty_batch():
    assert dealt(batch(3), []) == {}
    assert dealt(batch(3), ["ann"], overlap=1.0) == dict.fromkeys(["i00", "i01", "i02"], ("ann",))
    assert dealt([], PEOPLE, overlap=0.5) == {}
    assert all(len(who) == 2 for who in dealt(batch(3), overlap=1.0).values())


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="ann, ann: somebody is named twice"):
        dealt(batch(2), ["ann", "ann"])
    with pytest.raises(InputError, match=r"overlap=1\.5"):
        dealt(batch(2), overlap=1.5)
    with pytest.raises(NonFiniteError, match="i01"):
        dealt(batch(2), seconds={"i01": float("nan")})
