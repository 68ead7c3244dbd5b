import json

import numpy as np
import pytest
from typer.testing import CliRunner

import flows.simulate
from flows.cli.main import app
from flows.simulate import SimulateReport
from loop.data.store import write_label_image, write_png


@pytest.fixture
def data(tmp_path):
    """Four labelled images without splits."""
    for number in range(4):
        write_png(np.full((40, 40), number, np.uint8), tmp_path / "data" / "images" / f"im{number}.png")
        write_label_image(np.eye(40, dtype=np.int32), tmp_path / "data" / "labels" / f"im{number}.png")
    return tmp_path / "data"


def call(data, *more):
    return CliRunner().invoke(app, ["simulate", "--data", str(data), "--out", str(data.parent / "out"), *more])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--strategy", "random,entropi"], "'entropi' is unknown; choose from "),
        (["--strategy", ","], "no strategy to replay; name some"),
        (["--strategy", "random", "--seeds", "0"], "0 seeds"),
        (["--strategy", "random", "--full-seeds", "0"], "0 full trainings"),
        (["--strategy", "random", "--start", "0"], "start=0"),
        (["--strategy", "random", "--rounds", "0"], "rounds=0"),
        (["--strategy", "random", "--window", "7"], "windows of 7 px"),
        (["--strategy", "random", "--steps", "0"], "max_steps"),
        (["--strategy", "random"], "give manifest.csv a column split"),
        (["--strategy", "random", "--modality", "pink"], "0 labelled images of modality pink"),
        (["--strategy", "random", "--config", "nowhere.yaml"], "cannot read the config nowhere.yaml"),
    ],
)
def test_bad_usage_says_what_is_wrong(data, given, text):
    done = call(data, *given, "--json")
    assert done.exit_code == 2
    assert text in json.loads(done.stdout)["error"]
    done = call(data, *given)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert text in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.output


def test_a_folder_that_is_not_there(data):
    done = call(data / "nowhere", "--strategy", "random", "--json")
    assert done.exit_code == 2
    assert "does not exist" in json.loads(done.stdout)["error"]


@pytest.mark.parametrize(
    "given", [[], ["--strategy", "random", "--unit", "minutes"], ["--strategy", "a", "--seeds", "x"]]
)
def test_what_the_command_line_itself_refuses(data, given):
    done = call(data, *given)
    assert done.exit_code == 2
    assert "Traceback" not in done.output


@pytest.fixture
def asked(monkeypatch):
    """What reaches the flow; nothing is replayed."""
    given = {}

    def simulate_folder(data, out, asked, **named):
        given.update(data=data, out=out, asked=asked, **named)
        named["tell"]("images", 1, 1)
        named["tell"]("replay", 3, 3)
        return SimulateReport(str(out), ("replay.json",), "| strategy |\n|---|\n| random |", {"strategies": {}})

    monkeypatch.setattr(flows.simulate, "simulate_folder", simulate_folder)
    return given


def test_json_is_one_document_and_progress_goes_elsewhere(data, asked):
    done = call(data, "--strategy", "random", "--json")
    assert done.exit_code == 0
    document = json.loads(done.stdout)
    assert document == {
        "strategies": {},
        "table": "| strategy |\n|---|\n| random |",
        "files": ["replay.json"],
    }
    assert "replaying (trainings): 3 of 3" in done.stderr
    shown = call(data, "--strategy", "random")
    assert shown.exit_code == 0
    assert "random" in shown.stdout
    assert "written: replay.json" in shown.stdout


def test_what_is_given_reaches_the_flow(data, asked):
    more = "--strategy random,core_set --strategy random --start 3 --batch 4 --unit cells --rounds 6 --seeds 7"
    more += " --measure val --modality pink --window 64 --steps 9 --full-seeds 2 --workers 1"
    assert call(data, *more.split()).exit_code == 0
    assert vars(asked["asked"]) == {
        "strategies": ("random", "core_set"),
        "start": 3,
        "batch": 4,
        "rounds": 6,
        "seeds": 7,
        "unit": "cells",
        "measure": "val",
        "modality": "pink",
        "window": 64,
        "full_seeds": 2,
    }
    assert (asked["workers"], asked["overrides"], asked["config"]) == (1, {"train.max_steps": 9}, None)
