"""Train, predict and evaluate on small folders: splits, layers, resuming, and input that is hardly an image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from typer.testing import CliRunner

import flows.finders
import flows.folders
from flows.cli.main import app
from flows.folders import STATE, evaluate_folders, predict_folder, train_folder
from loop.config import LoopConfig, load_config
from loop.data.folder import read_labels
from loop.data.store import describe, read_image, read_label_layers, write_label_image, write_label_layers, write_png
from loop.data.synthetic import draw_cells
from loop.errors import CheckpointError, ConfigError, InputError
from loop.masks import from_masks, to_dense, to_label_image
from loop.training.checkpoint import load_checkpoint
from loop.types import Instances, Sample

TINY: dict[str, Any] = {
    "model.base": 4,
    "model.depth": 2,
    "train.max_steps": 2,
    "train.crop": 32,
    "train.batch": 2,
    "train.device": "cpu",
    "train.validations": 1,
    "train.compile": "off",
    "instances.tile": 64,
    "instances.overlap": 16,
}


def tiny(**settings: Any) -> LoopConfig:
    return load_config(None, {**TINY, **settings})


def silent(step: int, values: dict[str, float]) -> None:
    """Nothing is kept."""


def draw(root: Path, splits: dict[str, str], groups: dict[str, str] | None = None) -> Path:
    rows = ["image,group,split"]
    for number, (stem, split) in enumerate(splits.items()):
        pixels, cells = draw_cells(np.random.default_rng(number), (40, 48), 3)
        write_png(pixels, root / "images" / f"{stem}.png")
        write_label_image(to_label_image(cells), root / "labels" / f"{stem}.png")
        rows.append(f"{stem}.png,{(groups or {}).get(stem, '')},{split}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that learnt next to nothing."""
    root = tmp_path_factory.mktemp("model")
    train_folder(draw(root / "data", {"a": ""}), root / "out", tiny(), silent)
    return root / "out"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Sample]]:
    """What the trainer was given."""
    given: dict[str, list[Sample]] = {}
    real = flows.folders.train

    def spy(samples: list[Sample], *rest: Any, validation: list[Sample], **named: Any) -> Any:
        given.update(samples=samples, validation=validation)
        return real(samples, *rest, validation=validation, **named)

    monkeypatch.setattr(flows.folders, "train", spy)
    return given


def ids(samples: list[Sample]) -> list[str]:
    return [sample.image.image_id for sample in samples]


def test_val_only_validates_and_test_is_not_touched(tmp_path: Path, seen: dict[str, list[Sample]]) -> None:
    splits = {"a": "pool", "b": "train", "c": "", "v": "val", "w": "val", "x": "test", "l": "pool", "m": "val"}
    data = draw(tmp_path / "data", splits, {"l": "slide", "m": "slide"})
    write_label_image(np.eye(40, 48, dtype=np.int32), data / "nuclei" / "a.png")
    told: list[dict[str, float]] = []
    done = train_folder(data, tmp_path / "out", tiny(), lambda step, values: told.append(values))
    assert ids(seen["samples"]) == ["a", "b", "c"]
    assert ids(seen["validation"]) == ["v", "w"]
    assert [sample.nuclei is not None for sample in seen["samples"]] == [True, False, False]
    assert (done.images, done.validation_images, done.steps) == (3, 2, 2)
    assert (done.model, done.device) == ("seu_net", "cpu")
    assert done.validation is not None
    assert 0 <= done.validation["ap"] <= 1
    assert ["slide" in problem for problem in done.problems] == [True]
    assert any("validation_ap" in values for values in told)
    assert not (tmp_path / "out" / STATE).exists()
    assert load_checkpoint(tmp_path / "out").meta["extra"] == {"validation": done.validation}


def test_without_validation_images_the_thresholds_are_those_of_the_config(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {"a": "pool", "x": "test"})
    done = train_folder(data, tmp_path / "out", tiny(**{"instances.seed": 0.33}), silent)
    assert (done.validation, done.validation_images) == (None, 0)
    assert load_checkpoint(tmp_path / "out").instance_config.seed == 0.33


def test_only_validation_images_are_nothing_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no labelled image to learn from"):
        train_folder(draw(tmp_path / "data", {"v": "val", "x": "test"}), tmp_path / "out", tiny(), silent)


class Killed(BaseException):
    """Stands for a process that dies."""


def test_a_killed_training_goes_on_only_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loop.training.trainer.STORE_EVERY_S", 0.0)
    data, out = draw(tmp_path / "data", {"a": "pool"}), tmp_path / "out"

    def die_at_20(step: int, values: dict[str, float]) -> None:
        if step == 20:
            raise Killed

    def kill() -> None:
        with pytest.raises(Killed):
            train_folder(data, out, tiny(**{"train.max_steps": 30}), die_at_20)
        assert (out / STATE).is_dir()

    def steps_told(steps: int, *, resume: bool) -> list[int]:
        told: list[int] = []
        train_folder(data, out, tiny(**{"train.max_steps": steps}), lambda step, _: told.append(step), resume=resume)
        assert not (out / STATE).exists()
        return told

    kill()
    assert not (out / "model.json").exists()
    assert min(steps_told(30, resume=True)) > 20
    kill()
    assert steps_told(30, resume=False) == [10, 20, 30]
    assert steps_told(30, resume=True) == [10, 20, 30]
    kill()
    with pytest.raises(CheckpointError, match="other settings"):
        steps_told(31, resume=True)


def test_a_folder_named_state_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "out" / STATE / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(InputError, match="holds no training"):
        train_folder(draw(tmp_path / "data", {"a": ""}), tmp_path / "out", tiny(), silent)
    assert mine.read_text() == "mine"


def test_labels_all_background_teach_and_are_measured(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {"a": "pool", "v": "val"})
    for stem in ("a", "v"):
        write_label_image(np.zeros((40, 48), np.int32), data / "labels" / f"{stem}.png")
    done = train_folder(data, tmp_path / "out", tiny(), silent)
    assert done.images == 1
    write_label_layers(np.zeros((1, 40, 48), np.uint16), tmp_path / "pred" / "a.tif")
    figures = evaluate_folders(tmp_path / "pred", data)
    assert (figures["ap"], figures["n_gt"], figures["n_pred"]) == (1.0, 0, 0)


def test_a_cell_that_fills_the_frame_and_an_image_of_one_pixel(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for stem, shape in (("full", (40, 48)), ("pixel", (1, 1))):
        write_png(np.full((*shape, 3), 90, np.uint8), data / "images" / f"{stem}.png")
        write_label_image(np.ones(shape, np.int32), data / "labels" / f"{stem}.png")
    done = train_folder(data, tmp_path / "out", tiny(), silent)
    assert done.images == 2
    predicted = predict_folder(tmp_path / "out", data, tmp_path / "pred", ["labels", "layers", "coco"], device="cpu")
    assert (predicted.images, predicted.problems) == (2, ())
    assert read_label_layers(tmp_path / "pred" / "layers" / "pixel.tif").shape[1:] == (1, 1)
    assert evaluate_folders(data / "labels", data)["ap"] == 1.0


@pytest.mark.parametrize("axes", ["CYX", "YXS", "ZYX"])
def test_eight_planes_for_a_model_of_three_channels(tmp_path: Path, model: Path, axes: str) -> None:
    planes = np.random.default_rng(0).integers(0, 256, (8, 20, 30), dtype=np.uint8)
    path = tmp_path / "images" / "a.tif"
    path.parent.mkdir()
    if axes == "YXS":
        tifffile.imwrite(path, np.moveaxis(planes, 0, -1), photometric="minisblack", planarconfig="contig")
    else:
        tifffile.imwrite(path, planes, imagej=True, metadata={"axes": axes})
    first_three, deepest = np.moveaxis(planes[:3], 0, -1), planes.max(0)[:, :, None]
    np.testing.assert_array_equal(read_image(path).pixels, deepest if axes == "ZYX" else first_three)
    done = predict_folder(model, tmp_path, tmp_path / "out", ["layers"], device="cpu")
    assert (done.images, done.problems) == (1, ())


def overlapping() -> Instances:
    first, second, third = np.zeros((3, 40, 48), bool)
    first[2:20, 2:20] = True
    second[2:20, 10:30] = True
    third[25:35, 5:15] = True
    return from_masks([first, second, third], (40, 48), scores=[0.9, 0.5, 0.7], source="model")


def test_layers_keep_what_labels_lose(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(tmp_path / "data", {"a": ""})
    (data / "labels" / "a.png").unlink()
    layers = np.zeros((2, 40, 48), np.uint16)
    for layer, mask, value in zip((0, 1, 0), to_dense(overlapping()), (10, 20, 30), strict=True):
        layers[layer][mask] = value
    write_label_layers(layers, data / "labels" / "a.tif")

    class Sees:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def predict(self, pixels: Any, image_id: str) -> Any:
            return type("Prediction", (), {"instances": overlapping()})

    monkeypatch.setattr(flows.finders, "Segmenter", Sees)
    out = tmp_path / "out"
    predict_folder(model, data, out, ["labels", "layers"], device="cpu")
    assert json.loads((out / "layers" / "a.scores.json").read_text()) == {"1": 0.9, "2": 0.5, "3": 0.7}
    whole, flat = evaluate_folders(out, data), evaluate_folders(out / "labels", data)
    assert whole["read"] == {"pred": str(out / "layers"), "gt": str(data)}
    assert flat["read"] == {"pred": str(out / "labels"), "gt": str(data)}
    assert (whole["ap"], whole["n_gt"], whole["n_pred"]) == (1.0, 3, 3)
    assert flat["ap"] < 1
    ref = describe(data / "images" / "a.png", label_path=out / "layers" / "a.tif")
    np.testing.assert_array_equal(to_dense(read_labels(ref)), to_dense(overlapping()))


def test_an_unknown_model_and_an_unknown_format_name_the_known_ones(tmp_path: Path, model: Path) -> None:
    data = draw(tmp_path / "data", {"a": ""})
    with pytest.raises(ConfigError, match=r"'resnet'.*seu_net"):
        train_folder(data, tmp_path / "out", tiny(**{"model.name": "resnet"}), silent)
    with pytest.raises(InputError, match="unknown format yolo; choose from labels, layers, coco, labelstudio"):
        predict_folder(model, data, tmp_path / "out", ["yolo"], device="cpu")
    with pytest.raises(InputError, match="--tta 3; choose 1, 2, 4 or 8"):
        predict_folder(model, data, tmp_path / "out", ["labels"], tta=3, device="cpu")


def test_flips_and_turns_are_taken_from_the_call(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(tmp_path / "data", {"a": ""})
    used = []

    class Sees:
        def __init__(self, net: Any, model_config: Any, instances: Any, **kwargs: Any) -> None:
            used.append(instances.tta)

        def predict(self, pixels: Any, image_id: str) -> Any:
            return type("Prediction", (), {"instances": overlapping()})

    monkeypatch.setattr(flows.finders, "Segmenter", Sees)
    predict_folder(model, data, tmp_path / "out", ["labels"], tta=4, device="cpu")
    predict_folder(model, data, tmp_path / "out", ["labels"], device="cpu")
    assert used == [4, 1]


def test_a_truncated_tiff_of_layers_is_no_truth(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {"a": "pool", "b": "pool"})
    path = data / "labels" / "a.tif"
    write_label_layers(np.stack([np.full((40, 48), 1), np.full((40, 48), 2)]), path)
    (data / "labels" / "a.png").unlink()
    path.write_bytes(path.read_bytes()[:-20])
    done = train_folder(data, tmp_path / "out", tiny(), silent)
    assert done.images == 1
    assert ["truncated" in problem for problem in done.problems] == [True]
    with pytest.raises(InputError, match="truncated"):
        evaluate_folders(data / "labels", data / "labels")


def invoke(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line_says_what_was_trained(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {"a": "pool", "v": "val"})
    (tmp_path / "tiny.yaml").write_text(
        "model: {base: 4, depth: 2}\ninstances: {tile: 64, overlap: 16}\n"
        "train: {crop: 32, batch: 2, validations: 1, compile: 'off'}\n"
    )
    given = ("--data", data, "--config", tmp_path / "tiny.yaml", "--max-steps", "2", "--device", "cpu")
    result = invoke("train", *given, "--out", tmp_path / "out", "--model", "unet", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["model"], document["device"], document["steps"]) == ("unet", "cpu", 2)
    assert document["loss"] > 0
    assert set(document["validation"]) >= {"ap"}
    shown = invoke("train", *given, "--out", tmp_path / "out2", "--resume").stdout
    for word in ("seu_net", "cpu", "steps", "minutes", "validation ap", "1, and 1 to validate"):
        assert word in shown
    assert invoke("train", *given, "--out", tmp_path / "out3", "--model", "resnet").exit_code == 2


def test_the_command_line_shows_the_errors(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {"a": "", "b": ""})
    result = invoke("evaluate", "--pred", data / "labels", "--gt", data, "--errors", "--json")
    assert result.exit_code == 0, result.output
    errors = json.loads(result.stdout)["errors"]
    assert [errors[kind] for kind in ("missed", "invented", "merged", "split")] == [0, 0, 0, 0]
    assert errors["with_true_masks"]["ap"] == errors["as_predicted"]["ap"] == 1.0
    shown = invoke("evaluate", "--pred", data / "labels", "--gt", data, "--errors").stdout
    assert "best matched only" in shown
    assert "cells: 0 missed, 0 invented, 0 merged, 0 split" in shown
    assert "errors" not in json.loads(invoke("evaluate", "--pred", data / "labels", "--gt", data, "--json").stdout)
