import json
from dataclasses import replace

import numpy as np
import pytest
from replay_stage import HALF, Killed, Learner, plan, pool_of, sample

from loop.errors import ConfigError, InputError
from loop.replay import engine, jobs
from loop.replay.jobs import ReplayJob, replay
from loop.replay.pool import ReplayData
from loop.replay.summary import summarise

NAMES = ("random", "entropy")


@pytest.fixture
def stage(monkeypatch, tmp_path, inline_pool):
    """A replay in this process, of a pool without pixels and a pretended learner: OUT, a job, and how to play."""
    return Stage(monkeypatch, tmp_path)


class Stage:
    def __init__(self, monkeypatch, root):
        self.data = ReplayData(
            tuple(sample(f"im{i:02d}", i % 7, "ab"[i % 5 == 0]) for i in range(20)),
            (sample("x", 4, "a"), sample("y", 4, "b")),
        )
        self.job = ReplayJob(data=root, plan=plan(rounds=4), strategies=NAMES, seeds=(0, 1))
        self.out = root / "out"
        self.learner = Learner()
        self.opened = []
        self._patch = monkeypatch
        monkeypatch.setattr(jobs, "open_replay", lambda data, **asked: self.opened.append(asked) or self.data)
        monkeypatch.setattr(jobs.torch, "set_num_threads", lambda n: None)

    def play(self, out=None, *, until=10**9, error=None, tell=None, **changes):
        """The document of a replay, and how many models were trained for it; fails after so many where asked to."""
        self.learner = Learner(until, error)
        self._patch.setattr(jobs, "_bench", [])
        self._patch.setattr(engine, "fit", self.learner)
        self._patch.setattr(jobs, "fit", self.learner)
        return replay(replace(self.job, **changes), out or self.out, tell=tell), self.learner.calls

    def round(self, strategy, seed, number):
        return self.out / "rounds" / strategy / f"{seed}-{number}.json"


def test_every_strategy_and_seed_is_played_and_the_first_round_once_for_all(stage):
    document, trained = stage.play()
    assert trained == 1 + 2 * (1 + 2 * 3)
    assert list(document["strategies"]) == list(NAMES)
    for name in NAMES:
        runs = document["strategies"][name]["seeds"]
        assert [run["seed"] for run in runs] == [0, 1]
        for run in runs:
            assert run["images"] == [2, 4, 6, 8]
            chosen = [name for batch in run["chosen"] for name in batch]
            assert len(set(chosen)) == 8
            assert run["cells"] == np.cumsum([sum(int(n[2:]) % 7 for n in b) for b in run["chosen"]]).tolist()
            assert run["seconds"] == sorted(run["seconds"])
    one, other = (document["strategies"][name]["seeds"] for name in NAMES)
    for a, b in zip(one, other, strict=True):
        assert a["chosen"][0] == b["chosen"][0]
        assert a["ap"][0] == b["ap"][0]
    assert one[0]["chosen"][0] != one[1]["chosen"][0]


def test_full_supervision_learns_from_the_whole_pool(stage):
    cells = {"a": 0, "b": 0}
    for s in stage.data.pool:
        cells[s.image.modality] += len(s.instances)
    expected = np.mean([n / (n + HALF) for n in cells.values()])
    document, trained = stage.play(full_seeds=3)
    assert document["full"] == pytest.approx({"ap": expected, "macro_ap": expected})
    assert trained == 3 + 14


def test_the_document_has_what_other_programs_read(stage):
    document = json.loads(json.dumps(summarise(stage.play()[0])))
    assert {"ap", "macro_ap"} <= set(document["full"])
    assert isinstance(document["penalty_matrix"], dict)
    for entry in document["strategies"].values():
        assert {"seeds", "aubc_cells", "aubc_images", "cells_to_90", "cells_to_95"} <= set(entry)
        for run in entry["seeds"]:
            assert {"seed", "images", "cells", "seconds", "ap", "macro_ap"} <= set(run)
            assert {len(run[key]) for key in ("images", "cells", "seconds", "ap", "macro_ap", "corrections")} == {4}


def test_what_to_measure_on_reaches_the_data(stage):
    stage.play(measure="val", modality="a")
    assert {tuple(asked.values()) for asked in stage.opened} == {("val", "a")}


@pytest.mark.parametrize("until", [0, 1, 4, 8, 14])
def test_a_killed_replay_goes_on(stage, tmp_path, until):
    whole, trained = stage.play(tmp_path / "whole")
    with pytest.raises(Killed):
        stage.play(until=until)
    kept = len(list(stage.out.glob("rounds/*/*.json")))
    resumed, more = stage.play()
    assert resumed == whole
    assert more <= trained
    if kept:
        assert more < trained
    assert stage.play() == (whole, 0)


def test_only_missing_rounds_are_played(stage):
    whole, _ = stage.play()
    for place in [("entropy", 0, 0), ("entropy", 0, 2), ("random", 1, 3), ("full", 0, 0)]:
        stage.round(*place).unlink()
    assert stage.play() == (whole, 4)
    for place in [("entropy", 1, 1), ("entropy", 1, 2), ("entropy", 1, 3)]:
        stage.round(*place).unlink()
    assert stage.play() == (whole, 3)
    for name in NAMES:
        stage.round(name, 0, 0).unlink()
    assert stage.play() == (whole, 1)


def test_a_half_written_round_is_no_round(stage):
    whole, _ = stage.play()
    path = stage.round("random", 0, 1)
    path.rename(path.with_suffix(".tmp"))
    path.with_suffix(".tmp").write_text('{"labelled": ')
    assert stage.play() == (whole, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": plan(rounds=4, batch=3)},
        {"plan": plan(rounds=4, start=3)},
        {"plan": plan(rounds=4, unit="cells")},
        {"plan": plan(rounds=4, cost=replace(plan().cost, add_s=6))},
        {"plan": plan(rounds=4, train=plan().train.model_copy(update={"max_steps": 16}))},
        {"measure": "val"},
        {"modality": "a"},
    ],
)
def test_other_settings_in_the_same_folder_are_refused(stage, changes):
    whole, _ = stage.play()
    with pytest.raises(InputError, match=r"out holds a replay of other settings.*--out"):
        stage.play(**changes)
    assert stage.learner.calls == 0
    assert stage.play() == (whole, 0)


def test_strategies_and_seeds_can_be_added(stage, tmp_path):
    whole, _ = stage.play(tmp_path / "whole", strategies=(*NAMES, "emptiest"), seeds=(0, 1, 2))
    assert stage.play()[1] == 15
    assert stage.play(seeds=(0, 1, 2))[1] == 7
    assert stage.play(strategies=(*NAMES, "emptiest"), seeds=(0, 1, 2)) == (whole, 3 * 4)
    fewer, trained = stage.play(strategies=("emptiest",), seeds=(2,))
    assert trained == 0
    assert fewer["strategies"] == {"emptiest": {"seeds": [whole["strategies"]["emptiest"]["seeds"][2]]}}


@pytest.mark.parametrize("first", [1, 2, 3])
def test_rounds_can_be_added(stage, tmp_path, first):
    whole, _ = stage.play(tmp_path / "whole")
    shorter, _ = stage.play(plan=plan(rounds=first))
    assert all(len(run["ap"]) == first for entry in shorter["strategies"].values() for run in entry["seeds"])
    # the round that had been the last is trained once more, to ask it what to label next
    assert stage.play() == (whole, 2 * 2 * (1 + 4 - first))
    assert stage.play(plan=plan(rounds=first)) == (shorter, 0)


def test_rounds_can_be_added_to_a_replay_that_did_not_note_which_was_its_last(stage, tmp_path):
    whole, _ = stage.play(tmp_path / "whole")
    stage.play(plan=plan(rounds=2))
    for path in stage.out.glob("rounds/*/*-*.json"):
        record = json.loads(path.read_text())
        record.pop("last", None)
        path.write_text(json.dumps(record))
    assert stage.play()[0] == whole
    assert stage.play() == (whole, 0)


def test_a_replay_killed_while_rounds_are_added_goes_on(stage, tmp_path):
    whole, _ = stage.play(tmp_path / "whole")
    stage.play(plan=plan(rounds=2))
    with pytest.raises(Killed):
        stage.play(until=5)
    assert stage.play()[0] == whole


def test_an_exhausted_pool_ends_the_curve_for_good(stage):
    stage.data = pool_of({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5})
    document, trained = stage.play(plan=plan(rounds=9))
    for entry in document["strategies"].values():
        assert [run["images"] for run in entry["seeds"]] == [[2, 4, 5], [2, 4, 5]]
    assert trained == 1 + 2 * (1 + 2 * 2)
    summarise(document)
    assert stage.play(plan=plan(rounds=9)) == (document, 0)
    assert stage.play(plan=plan(rounds=12)) == (document, 0)


def test_a_pool_that_is_exhausted_in_the_last_round_of_a_plan(stage):
    stage.data = pool_of({"a": 1, "b": 2, "c": 3, "d": 4})
    short, _ = stage.play(plan=plan(rounds=2))
    assert stage.play(plan=plan(rounds=5))[0] == short
    assert stage.play(plan=plan(rounds=5)) == (short, 0)


def test_progress_is_told(stage):
    told = []
    stage.play(tell=lambda done, total: told.append((done, total)))
    assert {total for _, total in told} == {15}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[0] == (0, 15)
    assert told[-1] == (15, 15)
    assert len({done for done, _ in told}) > 3
    told.clear()
    stage.play(tell=lambda done, total: told.append((done, total)))
    assert told == [(15, 15)]


def test_an_unknown_strategy_is_named_before_the_data_are_read(stage):
    with pytest.raises(ConfigError, match="'entropi' is unknown"):
        stage.play(strategies=("random", "entropi"))
    assert stage.learner.calls == 0
    assert stage.opened == []
    assert not stage.out.exists()


def test_data_that_cannot_be_replayed_are_refused_by_name_and_leave_nothing(stage, monkeypatch):
    def refuse(data, **asked):
        raise InputError("no split")

    monkeypatch.setattr(jobs, "open_replay", refuse)
    with pytest.raises(InputError, match="no split"):
        stage.play()
    assert not stage.out.exists()


def test_a_failing_training_ends_the_replay_with_its_error_and_what_is_kept_stays(stage, tmp_path):
    whole, _ = stage.play(tmp_path / "whole")
    with pytest.raises(InputError, match="image im07 is broken"):
        stage.play(until=6, error=InputError("image im07 is broken"))
    kept = {path: path.read_text() for path in stage.out.glob("rounds/*/*.json")}
    assert kept
    assert stage.play()[0] == whole
    assert {path: path.read_text() for path in kept} == kept


def test_a_start_that_is_too_large_is_refused_before_anything_is_trained(stage):
    with pytest.raises(InputError, match="start=20 images takes the whole pool of 20"):
        stage.play(plan=plan(start=20))
    assert stage.learner.calls == 0
    assert not stage.out.exists()


def test_costs_go_with_the_rounds(stage):
    run = stage.play()[0]["strategies"]["random"]["seeds"][0]
    drawn = [sum(int(name[2:]) % 7 for name in batch) for batch in run["chosen"]]
    assert run["corrections"][0] == drawn[0]
    assert run["seconds"][0] == 2 * 10 + 5 * drawn[0]
    kept = np.array(run["cells"]) - run["corrections"]
    # here what is offered is right, so all that is not drawn is kept
    np.testing.assert_allclose(run["seconds"], 10 * np.array(run["images"]) + kept + 5 * np.array(run["corrections"]))
    assert run["foreground"] == [25 * n for n in run["cells"]]
