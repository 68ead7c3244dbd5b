import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_stage import HALF, Learner, plan, pool_of, squares

from loop.acquisition import ACQUISITIONS
from loop.errors import ConfigError, InputError
from loop.replay import engine
from loop.replay.controls import CONTROLS
from loop.replay.engine import Bench, Labelled, Model, begin, play
from loop.types import Candidate, Instances

TWELVE = {f"im{i:02d}": 1 + i % 5 for i in range(12)}


@pytest.fixture
def learner(monkeypatch):
    stands = Learner()
    monkeypatch.setattr(engine, "fit", stands)
    return stands


def bench_of(cells=None, **changes):
    return Bench(pool_of(cells or TWELVE), plan(**changes))


def test_all_strategies_of_a_seed_begin_alike_and_seeds_do_not(learner):
    bench = bench_of(start=4)
    first = begin(bench, 3)
    assert begin(bench_of(start=4), 3) == first
    assert len(first.taught) == 4
    assert set(first.taught) <= set(TWELVE)
    assert len({begin(bench, seed).taught for seed in range(8)}) > 4
    played = play(bench, 3, 0, first, ["random", "entropy", "emptiest"])
    assert played.labelled == first
    for following in played.following.values():
        assert following.taught == first.taught + following.chosen
        assert len(following.chosen) == 2
    assert learner.calls == 1


def test_the_pool_does_not_depend_on_the_order_of_its_files(learner):
    turned = Bench(pool_of(dict(reversed(TWELVE.items()))), plan())
    assert begin(turned, 1) == begin(bench_of(), 1)


def test_drawn_from_nothing_every_cell_is_added(learner):
    bench = bench_of({"a": 3, "b": 3, "c": 3}, start=2)
    first = begin(bench, 0)
    assert first.cells == first.corrections == 6
    assert first.seconds == 2 * 10 + 6 * 5
    assert first.foreground == 6 * 25


def test_costs_by_hand(monkeypatch):
    """Of three cells one is offered as it is, one moved, one not at all; and one that is none."""
    truth = squares(3)
    moved = truth.boxes_xyxy[1] + [0, 1, 0, 1]  # 20 of 30 px shared: IoU 0.667, reshaped
    wrong = [40, 40, 45, 45]
    offer = Instances.build(truth.shape, [truth.boxes_xyxy[0], moved, wrong], [np.ones((5, 5), bool)] * 3)

    def fit(bench, taught, seed, *, times=1.0, look=True):
        seen = {name: Candidate(name, "", 0.0, np.zeros(1, np.float32)) for name in bench.pool}
        return Model({"ap": 0.5}, dict.fromkeys(bench.pool, offer), seen)

    monkeypatch.setattr(engine, "fit", fit)
    bench = bench_of({"a": 3, "b": 3, "c": 3}, start=1, batch=1)
    first = begin(bench, 0)
    after = play(bench, 0, 0, first, ["random"]).following["random"]
    assert after.seconds - first.seconds == 10 + 1 + 2 + 3 + 5
    assert after.corrections - first.corrections == 3
    assert (after.cells, after.foreground) == (6, 150)


def test_a_batch_of_images(learner):
    bench = bench_of(start=3, batch=5)
    after = play(bench, 0, 0, begin(bench, 0), ["emptiest"]).following["emptiest"]
    rest = sorted(set(TWELVE) - set(begin(bench, 0).taught), key=lambda name: (TWELVE[name], name))
    assert list(after.chosen) == rest[:5]


def test_a_batch_of_cells_ends_with_the_image_in_which_it_is_full(learner):
    cells = {"z": 4, "a": 1, "b": 2, "c": 5, "d": 9, "e": 9}
    bench = bench_of(cells, unit="cells", start=4, batch=3)
    # round 1 may have 4 + 3 cells: a and b make it just full
    after = play(bench, 0, 0, Labelled(("z",), ("z",), cells=4), ["emptiest"]).following["emptiest"]
    assert (after.chosen, after.cells) == (("a", "b"), 7)
    # round 2 may have 10: c goes 2 beyond
    after = play(bench, 0, 1, after, ["emptiest"]).following["emptiest"]
    assert (after.chosen, after.cells) == (("c",), 12)


def test_what_was_too_much_counts_against_the_next_batch_but_one_cell_is_always_asked_for(learner):
    cells = {"z": 9, "a": 0, "b": 2, "c": 5}
    bench = bench_of(cells, unit="cells", start=4, batch=2)
    after = play(bench, 0, 0, Labelled(("z",), ("z",), cells=9), ["emptiest"]).following["emptiest"]
    assert (after.chosen, after.cells) == (("a", "b"), 11)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=4, max_size=25), st.integers(1, 15), st.integers(1, 15), st.integers(0, 5))
def test_batches_of_cells_are_full_and_no_fuller(numbers, start, batch, seed):
    cells = {f"im{i:02d}": n for i, n in enumerate(numbers)}
    bench = bench_of(cells, unit="cells", start=start, batch=batch, rounds=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "fit", Learner())
        try:
            labelled = begin(bench, seed)
        except InputError:
            assert sum(numbers) - max(numbers) < start
            return
        before = 0
        for number in range(4):
            room = max(1, start + number * batch - before)
            sizes = [cells[name] for name in labelled.chosen]
            assert sum(sizes[:-1]) < room
            assert sum(sizes) >= room or len(labelled.taught) == len(cells)
            assert len(set(labelled.taught)) == len(labelled.taught)
            before = labelled.cells
            assert before == sum(cells[name] for name in labelled.taught)
            labelled = play(bench, seed, number, labelled, ["random"]).following["random"]
            if labelled is None:
                return


def test_an_exhausted_pool_is_the_end_and_no_error(learner):
    bench = bench_of({"a": 1, "b": 1, "c": 1, "d": 1}, start=1, batch=2, rounds=9)
    after = play(bench, 0, 0, begin(bench, 0), ["random"]).following["random"]
    after = play(bench, 0, 1, after, ["random"]).following["random"]
    assert len(after.chosen) == 1
    played = play(bench, 0, 2, after, ["random", "true_error"])
    assert played.following == {"random": None, "true_error": None}
    assert played.figures["ap"] == 4 / (4 + HALF)


def test_after_the_last_round_nobody_is_asked(monkeypatch):
    looks = []

    class Asked(Learner):
        def __call__(self, *given, look=True, **named):
            looks.append(look)
            return super().__call__(*given, look=look, **named)

    monkeypatch.setattr(engine, "fit", Asked())
    bench = bench_of(rounds=2)
    after = play(bench, 0, 0, begin(bench, 0), ["random"]).following["random"]
    assert play(bench, 0, 1, after, ["random"]).following == {"random": None}
    assert looks == [True, False]


@pytest.mark.parametrize("unit", ["images", "cells"])
@pytest.mark.parametrize("name", [*ACQUISITIONS, *CONTROLS])
def test_every_strategy_gives_the_same_again(learner, name, unit):
    bench = bench_of(unit=unit, start=4, batch=4)
    first = begin(bench, 2)
    played = [play(bench, 2, 0, first, [name]).following[name] for _ in range(2)]
    assert played[0] == played[1]
    chosen = played[0].chosen
    assert chosen
    assert len(set(chosen)) == len(chosen)
    assert not set(chosen) & set(first.taught)


@pytest.mark.parametrize("name", ["entropy", "margin", "true_error", "emptiest"])
def test_strategies_without_chance_choose_the_same_with_every_seed(learner, name):
    bench = bench_of()
    first = begin(bench, 0)
    assert len({play(bench, seed, 0, first, [name]).following[name].chosen for seed in range(4)}) == 1


@pytest.mark.parametrize("name", ["random", "foreground_random", "shuffled"])
def test_strategies_of_chance_choose_anew_with_every_seed_and_round(learner, name):
    bench = bench_of(batch=4, rounds=9)
    first = begin(bench, 0)
    found = {
        play(bench, seed, number, first, [name]).following[name].chosen for seed in range(3) for number in range(3)
    }
    assert len(found) > 4


def test_the_order_of_strategies_changes_nothing(learner):
    bench = bench_of()
    first = begin(bench, 0)
    one = play(bench, 0, 0, first, ["random", "shuffled", "entropy"]).following
    other = play(bench, 0, 0, first, ["entropy", "shuffled", "random"]).following
    assert one == other


def test_an_unknown_strategy_is_named_before_anything_is_trained(learner):
    bench = bench_of()
    with pytest.raises(ConfigError, match=r"'entropi' is unknown; choose from .*emptiest.*entropy.*true_error"):
        play(bench, 0, 0, begin(bench, 0), ["random", "entropi"])
    assert learner.calls == 0


@pytest.mark.parametrize(("unit", "start"), [("images", 12), ("images", 99), ("cells", 35), ("cells", 999)])
def test_a_start_that_takes_the_whole_pool_is_refused(unit, start):
    with pytest.raises(InputError, match=rf"start={start} {unit} takes the whole pool of 12"):
        begin(bench_of(unit=unit, start=start), 0)


@pytest.mark.parametrize("name", ["start", "batch", "rounds"])
def test_a_plan_of_nothing_is_refused(name):
    with pytest.raises(InputError, match=f"{name}=0"):
        plan(**{name: 0})


def test_a_measure_that_the_looks_do_not_give_is_refused():
    with pytest.raises(ConfigError, match=r"'bald'.*turns or dropout"):
        plan(measure="bald")
    with pytest.raises(ConfigError, match=r"'entropi'"):
        plan(measure="entropi", passes="turns")
    assert plan(measure="bald", passes="turns").measure == "bald"


def test_a_plan_is_not_changed_by_playing(learner):
    bench = bench_of()
    before = dataclasses.asdict(bench.plan)
    play(bench, 5, 0, begin(bench, 5), ["random"])
    assert dataclasses.asdict(bench.plan) == before
