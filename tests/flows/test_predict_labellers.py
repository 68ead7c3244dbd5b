"""`celloop predict --labeller`: one labeller, several fused, and what is missing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flows import finders
from flows.cli.main import app
from flows.finders import labeller_finder
from flows.folders import predict_folder, train_folder
from loop.config import LoopConfig, load_config
from loop.data.store import write_label_image, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError, ImageError, InputError
from loop.masks import to_label_image
from loop.pseudo.base import Proposal, Tools
from loop.types import Instances, UInt8Array

TINY: dict[str, Any] = {
    "model.base": 4,
    "model.depth": 2,
    "train.max_steps": 2,
    "train.crop": 32,
    "train.batch": 2,
    "train.device": "cpu",
    "train.compile": "off",
    "instances.tile": 64,
    "instances.overlap": 16,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for number in range(2):
        pixels, cells = draw_cells(np.random.default_rng(number), (40, 48), 3)
        write_png(pixels, root / "images" / f"a{number}.png")
        write_label_image(to_label_image(cells), root / "labels" / f"a{number}.png")
    return root


@pytest.fixture(scope="module")
def model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "champion-v1"
    train_folder(data, out, load_config(None, TINY), lambda step, values: None)
    return out


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["predict", *map(str, arguments), "--device", "cpu", "--json"])


def test_one_labeller_and_the_ensemble_by_the_command_line(data: Path, model: Path, tmp_path: Path) -> None:
    given = ("--model", model, "--images", data, "--format", "coco,labels")
    for name, asked in {"one": ["champion"], "two": ["champion,seu_net"], "all": ["ensemble"]}.items():
        reply = run(*given, "--out", tmp_path / name, "--labeller", *asked)
        assert reply.exit_code == 0, reply.output
        assert json.loads(reply.stdout)["images"] == 2
        assert (tmp_path / name / "coco.json").exists()
    reply = run(*given, "--out", tmp_path / "again", "--labeller", "champion", "--labeller", "seu_net")
    assert json.loads(reply.stdout)["images"] == 2


def test_what_is_missing_is_said(data: Path, model: Path, tmp_path: Path) -> None:
    given = ("--images", data, "--out", tmp_path)
    for arguments, text in {
        ("--model", model, "--labeller", "sma"): "unknown labeller sma; choose from",
        ("--model", model, "--labeller", "sparse_seu_net"): "labeller sparse_seu_net needs a trained model and --model",
        ("--labeller", "champion"): "labeller champion needs a trained model and there is no --model",
        (
            "--labeller",
            "champion",
            "--tta",
            8,
        ): "--tta 8 is for a model alone; how often labellers look",
        (): "give the folder of a model, or a labeller that needs none",
    }.items():
        reply = run(*given, *arguments)
        assert reply.exit_code == 2
        assert text in json.loads(reply.stdout)["error"]


def test_the_settings_may_name_models_of_other_kinds(data: Path, model: Path) -> None:
    config = load_config(None, {"pseudo.weights": {"seu_net": str(model)}})
    find = labeller_finder(["seu_net"], config, model=None, device="cpu")
    assert find(np.zeros((40, 48, 3), np.uint8), "a").shape == (40, 48)


class Made:
    """Proposes a square, or fails."""

    needs_hint = False

    def __init__(self, name: str, *, fails: bool = False, n: int = 1) -> None:
        self.name, self.version, self.fails, self.n = name, f"{name}-v1", fails, n

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        if self.fails:
            raise RuntimeError("the kernel died")
        boxes, masks = [(0, 0, 10, 10)] * self.n, [np.ones((10, 10), bool)] * self.n
        cells = Instances.build((40, 48), boxes, masks, scores=[0.8] * self.n, source="pseudo")
        return Proposal(cells, np.full(self.n, 0.5, np.float32))


def hire(monkeypatch: pytest.MonkeyPatch, *found: Made) -> None:
    known = {labeller.name: labeller for labeller in found}
    monkeypatch.setattr(finders, "PSEUDO_LABELLERS", known)

    def build(name: str, tools: Tools) -> Made:
        return known[name]

    monkeypatch.setattr(finders, "build_labeller", build)


def test_fused_cells_say_how_far_the_labellers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    hire(monkeypatch, Made("a"), Made("b"), Made("c", n=0))
    find = labeller_finder(["a", "b", "c"], LoopConfig(), model=None, device="cpu")
    cells = find(np.zeros((40, 48, 3), np.uint8), "i")
    assert len(cells) == 1
    assert cells.scores[0] == pytest.approx(0.8 * 0.5 * 2 / 3)


def test_one_that_fails_is_left_out_and_the_only_one_costs_the_image(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hire(monkeypatch, Made("a"), Made("b", fails=True), Made("c", n=3000))
    black = np.zeros((40, 48, 3), np.uint8)
    assert len(labeller_finder(["a", "b", "c"], LoopConfig(), model=None, device="cpu")(black, "i")) == 1
    assert "labeller b is left out for i: the kernel died" in caplog.text
    assert "labeller c is left out for i: it proposes 3000 cells" in caplog.text
    with pytest.raises(ImageError, match="labeller b failed: the kernel died"):
        labeller_finder(["b"], LoopConfig(), model=None, device="cpu")(black, "i")
    with pytest.raises(ImageError, match="every labeller failed"):
        labeller_finder(["b", "c"], LoopConfig(), model=None, device="cpu")(black, "i")
    done = predict_folder(None, data, tmp_path, ["labels"], labellers=["b"])
    assert (done.images, len(done.problems)) == (0, 2)


def test_one_that_is_prompted_needs_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = Made("sam")
    blind.needs_hint = True
    hire(monkeypatch, blind)
    with pytest.raises(InputError, match="sam is prompted by a model's cells; give its folder with --model"):
        labeller_finder(["sam"], LoopConfig(), model=None, device="cpu")
    with pytest.raises(ConfigError, match="unknown labeller nobody; choose from sam, ensemble"):
        labeller_finder(["nobody"], LoopConfig(), model=None, device="cpu")
