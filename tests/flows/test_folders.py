import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from flows.cli.folders import _metrics
from flows.folders import evaluate_folders, write_label_image
from loop.data import store
from loop.errors import InputError, LabelError, OverlapError
from loop.masks import from_label_image, from_masks
from loop.types import Instances, IntArray


def labels(shape: tuple[int, int] = (16, 16)) -> IntArray:
    drawn = np.zeros(shape, np.int32)
    drawn[1:6, 1:6] = 1
    drawn[8:14, 8:14] = 300
    return drawn


def test_bare_folders_of_png_and_tif(tmp_path: Path) -> None:
    (tmp_path / "gt").mkdir()
    Image.fromarray(labels().astype(np.uint16)).save(tmp_path / "gt" / "a.tif")
    store.write_label_image(labels(), tmp_path / "gt" / "b.png")
    write_label_image(tmp_path / "pred", "a", from_label_image(labels()))
    write_label_image(tmp_path / "pred", "b", from_label_image(labels()))
    figures = evaluate_folders(tmp_path / "pred", tmp_path / "gt")
    assert (figures["n_images"], figures["n_gt"], figures["f1"]) == (2, 4, 1.0)
    assert figures["missing"] == {"n": 0, "images": []}


def test_images_without_prediction_are_named_within_the_measured_split(tmp_path: Path) -> None:
    rows = ["image,split"]
    for split, count in (("test", 13), ("train", 2)):
        for number in range(count):
            stem = f"{split}{number:02d}"
            store.write_png(np.zeros((16, 16), np.uint8), tmp_path / "gt" / "images" / f"{stem}.png")
            store.write_label_image(labels(), tmp_path / "gt" / "labels" / f"{stem}.png")
            rows.append(f"{stem}.png,{split}")
    (tmp_path / "gt" / "manifest.csv").write_text("\n".join(rows) + "\n")
    write_label_image(tmp_path / "pred" / "labels", "test00", from_label_image(labels()))
    figures = evaluate_folders(tmp_path / "pred", tmp_path / "gt")
    assert figures["n_images"] == 1
    assert figures["missing"] == {"n": 12, "images": [f"test{number:02d}" for number in range(1, 11)]}
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "out.txt").open("w"))
    console.print(_metrics(figures))
    text = console.export_text()
    console.file.close()
    assert "12 images of the truth have no prediction and are not measured: test01," in text


def test_label_images_of_two_sizes_are_refused(tmp_path: Path) -> None:
    store.write_label_image(labels((16, 20)), tmp_path / "gt" / "a.png")
    write_label_image(tmp_path / "pred", "a", from_label_image(labels()))
    with pytest.raises(LabelError, match=r"16 x 16 px, .*a\.png 16 x 20"):
        evaluate_folders(tmp_path / "pred", tmp_path / "gt")


def test_two_endings_of_one_stem_and_no_common_stem_are_refused(tmp_path: Path) -> None:
    write_label_image(tmp_path / "pred", "a", from_label_image(labels()))
    store.write_label_image(labels(), tmp_path / "gt" / "b.png")
    with pytest.raises(InputError, match="stems must be equal"):
        evaluate_folders(tmp_path / "pred", tmp_path / "gt")
    Image.fromarray(labels().astype(np.uint16)).save(tmp_path / "gt" / "b.tif")
    with pytest.raises(InputError, match="two label images"):
        evaluate_folders(tmp_path / "pred", tmp_path / "gt")


def test_scores_are_written_beside_the_label_image(tmp_path: Path) -> None:
    masks = [labels() == 1, labels() == 300]
    write_label_image(tmp_path, "a", from_masks(masks, (16, 16), source="model", scores=[0.25, 0.75]))
    assert json.loads((tmp_path / "a.scores.json").read_text()) == {"1": 0.25, "2": 0.75}
    assert np.unique(store.read_label_image(tmp_path / "a.png")).tolist() == [0, 1, 2]


def test_more_cells_than_16_bits_can_number_are_refused(tmp_path: Path) -> None:
    many = 65_536
    one = np.ones((1, 1), bool)
    cells = Instances(
        shape=(1, 1),
        boxes_xyxy=np.tile(np.array([[0, 0, 1, 1]], np.int32), (many, 1)),
        masks=(one,) * many,
        scores=np.ones(many, np.float32),
        labels=np.zeros(many, np.int32),
        weights=np.ones(many, np.float32),
    )
    with pytest.raises(OverlapError, match="use --format coco"):
        write_label_image(tmp_path, "a", cells)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"1": "high"}', '{"1": null}'])
def test_scores_that_are_none_are_refused(tmp_path: Path, text: str) -> None:
    write_label_image(tmp_path / "pred", "a", from_label_image(labels()))
    (tmp_path / "pred" / "a.scores.json").write_text(text)
    store.write_label_image(labels(), tmp_path / "gt" / "a.png")
    with pytest.raises(LabelError, match=r"a\.scores\.json cannot be read"):
        evaluate_folders(tmp_path / "pred", tmp_path / "gt")
