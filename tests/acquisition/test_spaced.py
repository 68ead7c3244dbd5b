import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.acquisition import spaced
from loop.acquisition.spaced import select_spaced
from loop.types import Candidate, Selection


def most_uncertain(candidates, k, rng, *, labelled=()):
    """The k most uncertain, whatever they look like; says how many embeddings it was told of."""
    ordered = sorted(candidates, key=lambda c: (-c.uncertainty, c.image_id))[:k]
    return [Selection(c.image_id, rank, False, f"{len(labelled)}") for rank, c in enumerate(ordered, start=1)]


def candidates_of(kinds, uncertainty=None, group=""):
    """Images of kinds that lie far apart; those of a kind are copies."""
    centres = np.random.default_rng(0).normal(size=(26, 8)) * 10
    return [
        Candidate(
            f"{kind}{i}",
            group,
            1 - i / 100 if uncertainty is None else uncertainty[i],
            centres[ord(kind) - 97].astype(np.float32),
        )
        for i, kind in enumerate(kinds)
    ]


def chosen(candidates, k, **more):
    return select_spaced(most_uncertain, candidates, k, np.random.default_rng(0), **more)


def test_a_second_image_of_a_kind_is_put_aside_for_another_kind():
    found = chosen(candidates_of("aaabbbcd"), 4)
    assert [s.image_id for s in found] == ["a0", "b3", "c6", "d7"]
    assert [s.rank for s in found] == [1, 2, 3, 4]


def test_later_turns_see_what_was_chosen_before_as_labelled():
    labelled = [np.zeros(8, np.float32)]
    assert [s.reason for s in chosen(candidates_of("aaabbbcd"), 3, labelled=labelled)] == ["1", "2", "3"]


def test_where_all_kinds_are_used_up_each_gives_another_in_its_turn():
    assert [s.image_id for s in chosen(candidates_of("aaabbb"), 5)] == ["a0", "b3", "a1", "b4", "a2"]


def test_one_kind_or_one_group_fills_the_batch_in_the_strategys_order():
    for candidates in (candidates_of("aaaaaa"), candidates_of("abcdef", group="slide")):
        plain = most_uncertain(candidates, 4, None)
        assert chosen(candidates, 4) == plain


@settings(max_examples=60, deadline=None)
@given(kinds=st.text("abcdefgh", min_size=1, max_size=14), k=st.integers(0, 16), seed=st.integers(0, 9))
def test_as_many_as_asked_for_and_no_kind_twice_before_all_have_come(kinds, k, seed):
    uncertainty = np.random.default_rng(seed).random(len(kinds))
    found = chosen(candidates_of(kinds, uncertainty), k)
    assert len({s.image_id for s in found}) == len(found) == min(k, len(kinds))
    assert [s.rank for s in found] == list(range(1, len(found) + 1))
    if 2 <= k < len(kinds):
        first = [s.image_id[0] for s in found[: len(set(kinds))]]
        assert len(set(first)) == len(first)


def test_of_a_large_pool_the_first_choice_and_a_sample_are_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spaced, "MOST_COMPARED", 6)
    found = chosen(candidates_of("aaabcdefghijklmnop"), 4)
    assert [s.image_id[0] for s in found][:2] == ["a", "b"]
    assert sum(s.image_id[0] == "a" for s in found) == 1
    assert len(found) == 4
