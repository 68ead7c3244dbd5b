"""`celloop simulate` without its trainings: what is written, kept, refused."""

import json
import shutil

import numpy as np
import pytest

import flows.simulate
from flows.simulate import COMPACT, Asked, simulate_folder
from loop.data.store import write_label_image, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError, InputError
from loop.masks import to_label_image
from loop.replay import engine, jobs
from loop.replay.engine import Model
from loop.replay.plots import write_plots
from loop.types import Candidate
from loop.uncertainty.measures import FROM_ONE_LOOK


@pytest.fixture
def fits(monkeypatch, inline_pool):
    """The plans of all trainings, none of which happens: the score is a function of the taught cells."""
    plans = []

    def fit(bench, taught, seed, *, times=1.0, look=True):
        plans.append(bench.plan)
        cells = sum(len(bench.pool[name].instances) for name in taught)
        seen = {
            name: Candidate(name, "", 0.1, np.zeros(2, np.float32), measures=dict.fromkeys(FROM_ONE_LOOK, 0.1))
            for name in bench.pool
        }
        offered = {name: s.instances.take([]) for name, s in bench.pool.items()}
        return Model({"ap": cells / 100, "macro_ap": cells / 100}, offered, seen)

    for room in (engine, jobs):
        monkeypatch.setattr(room, "fit", fit)
    monkeypatch.setattr(jobs.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(jobs, "_start", fresh(monkeypatch, jobs._start))
    monkeypatch.setattr(flows.simulate, "write_plots", lambda document, out: [])
    return plans


def fresh(monkeypatch, start):
    def begin(job):
        monkeypatch.setattr(jobs, "_bench", [])
        start(job)

    return begin


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    rows = ["image,split,modality"]
    for number in range(10):
        pixels, cells = draw_cells(np.random.default_rng(number), (48, 64), 2 + number % 4)
        write_png(pixels, root / "images" / f"im{number}.png")
        write_label_image(to_label_image(cells), root / "labels" / f"im{number}.png")
        rows.append(f"im{number}.png,{'test' if number > 7 else 'pool'},{'ab'[number % 2]}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


def asked(*strategies, **changes):
    given = {"start": 2, "batch": 2, "rounds": 2, "seeds": 2, "window": 32}
    return Asked(strategies or ("random", "foreground_random"), **(given | changes))


def test_what_is_written(data, tmp_path, fits, monkeypatch):
    monkeypatch.setattr(flows.simulate, "write_plots", write_plots)
    told = []
    report = simulate_folder(
        data, tmp_path / "out", asked(), tell=lambda step, done, total: told.append((step, done, total))
    )
    out = tmp_path / "out"
    assert report.out == str(out)
    assert {"replay.json", "table.md"} < set(report.files)
    assert any(name.endswith(".png") for name in report.files)
    assert all((out / name).stat().st_size > 0 for name in report.files)
    document = json.loads((out / "replay.json").read_text())
    assert document == json.loads(json.dumps(report.document))
    assert {"full", "strategies", "penalty_matrix", "settings", "notes"} <= set(document)
    for name, entry in document["strategies"].items():
        assert {"seeds", "aubc_cells", "aubc_images", "cells_to_90", "cells_to_95"} <= set(entry)
        assert name in (out / "table.md").read_text()
        for run in entry["seeds"]:
            assert {"seed", "images", "cells", "seconds", "ap", "macro_ap"} <= set(run)
    assert document["settings"]["asked"]["seeds"] == 2
    assert document["settings"]["train"]["max_steps"] == COMPACT["train.max_steps"]
    assert told[:10] == [("images", i, 10) for i in range(1, 11)]
    assert {step for step, _, _ in told[10:]} == {"replay"}
    assert told[-1] == ("replay", 7, 7)
    assert not list(out.rglob("*.tmp"))


def test_windows_or_whole_images(data, tmp_path, fits):
    simulate_folder(data, tmp_path / "a", asked())
    assert len(list((tmp_path / "a" / "windows" / "32" / "images").iterdir())) == 10
    simulate_folder(data, tmp_path / "b", asked(window=0))
    assert not (tmp_path / "b" / "windows").exists()


def test_nothing_is_trained_again_and_more_can_be_asked(data, tmp_path, fits):
    out = tmp_path / "out"
    first = simulate_folder(data, out, asked()).document
    trained = len(fits)
    assert simulate_folder(data, out, asked()).document == first
    assert len(fits) == trained == 7
    more = simulate_folder(data, out, asked("random", "foreground_random", "core_set", seeds=3, rounds=3)).document
    assert more["strategies"]["random"]["seeds"][0]["cells"][:2] == first["strategies"]["random"]["seeds"][0]["cells"]
    assert [len(run["ap"]) for run in more["strategies"]["core_set"]["seeds"]] == [3, 3, 3]


def test_settings_that_are_not_given_are_the_compact_ones(data, tmp_path, fits):
    simulate_folder(data, tmp_path / "out", asked(), overrides={"train.max_steps": None})
    assert {plan.train.max_steps for plan in fits} == {COMPACT["train.max_steps"]}
    assert {plan.model.base for plan in fits} == {COMPACT["model.base"]}
    simulate_folder(data, tmp_path / "other", asked(), overrides={"train.max_steps": 30})
    assert fits[-1].train.max_steps == 30


def test_settings_of_a_file_replace_the_compact_ones(data, tmp_path, fits):
    (tmp_path / "loop.yaml").write_text("model: {name: unet, base: 8}\ntrain: {max_steps: 5}\neffort: {add_s: 99}\n")
    simulate_folder(data, tmp_path / "out", asked(), config=tmp_path / "loop.yaml")
    assert (fits[0].model.base, fits[0].train.max_steps, fits[0].cost.add_s) == (8, 5, 99)


def test_other_settings_in_the_same_folder_are_refused(data, tmp_path, fits):
    simulate_folder(data, tmp_path / "out", asked())
    for changed in (asked(batch=3), asked(start=3), asked(unit="cells"), asked(modality="a")):
        with pytest.raises(InputError, match="other settings"):
            simulate_folder(data, tmp_path / "out", changed)


def test_other_images_in_the_same_folder_are_refused(data, tmp_path, fits):
    out = tmp_path / "out"
    whole = simulate_folder(data, out, asked()).document
    with pytest.raises(InputError, match="windows of another size"):
        simulate_folder(data, out, asked(window=40))
    shutil.copytree(data, tmp_path / "copy")
    assert simulate_folder(tmp_path / "copy", out, asked()).document == whole
    labels = np.zeros((48, 64), np.int32)
    write_label_image(labels, tmp_path / "copy" / "labels" / "im0.png")
    with pytest.raises(InputError, match="other images"):
        simulate_folder(tmp_path / "copy", out, asked())
    assert simulate_folder(data, out, asked()).document == whole


def test_after_a_refusal_the_folder_can_be_mended(data, tmp_path, fits):
    out, manifest = tmp_path / "out", (data / "manifest.csv").read_text()
    (data / "manifest.csv").write_text(manifest.replace("test", "val"))
    with pytest.raises(InputError, match=r"\(split test\)"):
        simulate_folder(data, out, asked())
    (data / "manifest.csv").write_text(manifest)
    simulate_folder(data, out, asked())


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        (Asked(()), InputError, "no strategy to replay"),
        (asked("random", "entropi"), ConfigError, "'entropi' is unknown"),
        (asked(seeds=0), InputError, "0 seeds and 1 full"),
        (asked(full_seeds=0), InputError, "2 seeds and 0 full"),
        (asked(start=0), InputError, "start=0"),
        (asked(batch=-1), InputError, "batch=-1"),
        (asked(rounds=0), InputError, "rounds=0"),
        (asked(window=16), InputError, "windows of 16 px"),
        (asked(window=-1), InputError, "windows of -1 px"),
        (asked(start=8), InputError, "takes the whole pool of 8 images"),
        (asked(measure="val"), InputError, r"\(split val\)"),
        (asked(modality="c"), InputError, "0 labelled images of modality c"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_anything_is_trained(data, tmp_path, fits, changed, error, text):
    with pytest.raises(error, match=text):
        simulate_folder(data, tmp_path / "out", changed)
    assert fits == []


def test_a_misspelt_setting_or_measure_is_refused(data, tmp_path, fits):
    with pytest.raises(ConfigError, match="step"):
        simulate_folder(data, tmp_path / "out", asked(), overrides={"train.step": 3})
    with pytest.raises(ConfigError, match="'bald'"):
        simulate_folder(data, tmp_path / "out", asked(), overrides={"select.measure": "bald"})
    assert not (tmp_path / "out").exists()


def test_a_half_written_document_does_not_replace_a_whole_one(data, tmp_path, fits, monkeypatch):
    out = tmp_path / "out"
    simulate_folder(data, out, asked())
    before = (out / "replay.json").read_text()

    def broken(document):
        raise OSError("no space")

    monkeypatch.setattr(flows.simulate, "table", broken)
    with pytest.raises(OSError, match="no space"):
        simulate_folder(data, out, asked(seeds=3))
    assert (out / "replay.json").read_text() == before
