"""What a training does with labels and images that are odd or wrong."""

import numpy as np
import pytest
import tifffile

from loop.config import ModelConfig, TrainConfig
from loop.data.store import read_image, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ImageError, LabelError, ShapeError
from loop.models.segmenter import Segmenter
from loop.training.trainer import train
from loop.types import ImageRef, Instances, Sample

DENSE = ModelConfig(base=4, depth=2)
SPARSE = ModelConfig(name="sparse_seu_net", base=4, depth=2, queries=40, width=8)
BOTH = pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
QUICK = TrainConfig(max_steps=3, crop=32, batch=2, device="cpu")


def silent(step, values):
    return None


def sample_of(directory, pixels, cells, name="a", nuclei=None):
    write_png(pixels, directory / f"{name}.png")
    return Sample(ImageRef(name, directory / f"{name}.png", "", *cells.shape, 3), cells, nuclei)


def check(sample, model, config=QUICK):
    trained = train([sample], model, config, log=silent, validation=[sample])
    assert trained.steps == config.max_steps
    assert np.isfinite(trained.losses).all()
    assert all(0 <= value <= 1 for value in trained.validation.values())
    segmenter = Segmenter(trained.net, model, trained.instances, device="cpu")
    assert segmenter.predict(read_image(sample.image.path).pixels).instances.shape == sample.instances.shape


@BOTH
@pytest.mark.parametrize("value", [None, 0, 90])
def test_labels_all_background_on_an_image_and_on_one_of_one_colour(tmp_path, model, value):
    pixels, none = draw_cells(np.random.default_rng(0), (48, 40), 0)
    check(sample_of(tmp_path, pixels if value is None else np.full_like(pixels, value), none), model)


@BOTH
@pytest.mark.parametrize("shape", [(48, 40), (1, 1)])
def test_a_cell_that_fills_the_frame(tmp_path, model, shape):
    cells = Instances.build(shape, [(0, 0, shape[1], shape[0])], [np.ones(shape, np.bool_)])
    check(sample_of(tmp_path, np.full((*shape, 3), 90, np.uint8), cells), model)


@BOTH
def test_a_thousand_cells_in_a_crop(tmp_path, model):
    corners = [(x, y) for y in range(0, 125, 4) for x in range(0, 125, 4)]
    cells = Instances.build((128, 128), [(x, y, x + 3, y + 3) for x, y in corners], [np.ones((3, 3), np.bool_)] * 1024)
    pixels = np.zeros((128, 128, 3), np.uint8)
    for x, y in corners:
        pixels[y : y + 3, x : x + 3] = 200
    config = TrainConfig(**{**QUICK.model_dump(), "crop": 128, "batch": 1})
    check(sample_of(tmp_path, pixels, cells), model, config)


def test_heads_without_labels_are_refused_by_name(tmp_path):
    pixels, cells = draw_cells(np.random.default_rng(0), (48, 48), 4)
    sample = sample_of(tmp_path, pixels, cells)
    with pytest.raises(LabelError, match="head nuclei is asked for, but 1 of 1 images"):
        train([sample], ModelConfig(base=4, depth=2, heads=("interior", "nuclei")), QUICK, log=silent)
    with pytest.raises(LabelError, match="overlap head is asked for, but no two cells overlap"):
        train([sample], ModelConfig(base=4, depth=2, heads=("interior", "overlap")), QUICK, log=silent)
    with pytest.raises(LabelError, match="overlap head"):
        train([sample], ModelConfig(**{**SPARSE.model_dump(), "overlap": True}), QUICK, log=silent)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_in_an_image_file_is_refused_by_name(tmp_path, bad):
    pixels, cells = draw_cells(np.random.default_rng(0), (48, 48), 4)
    values = pixels[:, :, 0].astype(np.float32)
    values[3, 4] = bad
    tifffile.imwrite(tmp_path / "hot.tif", values)
    sample = Sample(ImageRef("hot", tmp_path / "hot.tif", "", 48, 48, 1), cells)
    with pytest.raises(ImageError, match=r"hot\.tif.*NaN or infinity in 1 places"):
        train([sample], DENSE, QUICK, log=silent)


def test_cells_of_another_size_and_a_truncated_image_are_refused_by_name(tmp_path):
    pixels, cells = draw_cells(np.random.default_rng(0), (48, 48), 4)
    sample = sample_of(tmp_path, pixels[:40], cells, "short")
    with pytest.raises(ShapeError, match="short: the image is"):
        train([sample], DENSE, QUICK, log=silent)
    path = sample.image.path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageError, match=r"short\.png"):
        train([sample], DENSE, QUICK, log=silent)
