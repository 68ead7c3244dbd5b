import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loop.data.decode import MAX_BYTES
from loop.data.folder import (
    NUCLEI_KEY,
    open_folder,
    read_labels,
    read_nuclei,
    read_sample,
)
from loop.data.store import (
    label_shape,
    read_label_image,
    read_label_layers,
    write_label_image,
    write_label_layers,
    write_png,
)
from loop.errors import ImageError, InputError, LabelError
from loop.masks import from_layers, from_masks, to_dense, to_layers
from loop.types import Instances

SHAPE = (12, 16)


def _square(y0, x0, y1, x1):
    mask = np.zeros(SHAPE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


# Two cells that overlap in 2 x 2 px, and a third one apart from both.
CELLS = [_square(1, 1, 6, 6), _square(4, 4, 9, 9), _square(8, 12, 11, 15)]


def _layers():
    layers = np.zeros((2, *SHAPE), np.uint16)
    layers[0][CELLS[0]] = 7
    layers[0][CELLS[2]] = 3
    layers[1][CELLS[1]] = 500
    return layers


@pytest.fixture
def folder(tmp_path):
    for stem in ("a", "b"):
        write_png(np.zeros(SHAPE, np.uint8), tmp_path / "images" / f"{stem}.png")
    write_label_layers(_layers(), tmp_path / "labels" / "a.tif")
    write_label_image(np.zeros(SHAPE, np.int32), tmp_path / "labels" / "b.png")
    return tmp_path


def test_overlapping_cells_of_a_folder_are_kept_whole(folder):
    a, b = open_folder(folder).images
    cells = read_labels(a)
    assert (cells.image_id, cells.source, cells.shape) == ("a", "human", SHAPE)
    np.testing.assert_array_equal(to_dense(cells), [CELLS[2], CELLS[0], CELLS[1]])  # values 3, 7, 500
    assert len(read_labels(b)) == 0


def test_one_page_is_read_as_a_label_image(tmp_path):
    values = np.random.default_rng(0).integers(0, 70_000, (9, 13)).astype(np.uint32)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="minisblack")
    layers = read_label_layers(tmp_path / "a.tif")
    assert (layers.shape, layers.dtype) == ((1, 9, 13), np.uint32)
    np.testing.assert_array_equal(layers[0], read_label_image(tmp_path / "a.tif"))
    write_label_image(np.eye(4, dtype=np.int32), tmp_path / "b.png")
    layers = read_label_layers(tmp_path / "b.png")
    assert layers.dtype == np.uint16
    np.testing.assert_array_equal(layers, np.eye(4)[None])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.tuples(st.integers(1, 5), st.integers(1, 5)))
def test_layers_survive_the_disk(tmp_path_factory, seed, n, shape):
    rng = np.random.default_rng(seed)
    highest = rng.choice([1, 200, 80_000])
    layers = rng.integers(0, highest + 1, (n, *shape)).astype(np.uint32) * n
    layers[layers > 0] += np.arange(n).repeat(shape[0] * shape[1]).reshape(layers.shape)[layers > 0].astype(np.uint32)
    path = tmp_path_factory.mktemp("layers") / "deeper" / "a.tif"
    write_label_layers(layers, path)
    back = read_label_layers(path)
    assert back.dtype == (np.uint16 if layers.max() <= 65535 else np.uint32)
    np.testing.assert_array_equal(back, layers)
    assert label_shape(path) == shape
    assert [p.name for p in path.parent.iterdir()] == ["a.tif"]


def _written(path, how):
    layers = _layers()
    if how == "pillow":
        first, second = (Image.fromarray(layer) for layer in layers)
        first.save(path, save_all=True, append_images=[second])
    elif how == "one series each":
        with tifffile.TiffWriter(path) as file:
            for layer in layers:
                file.write(layer, photometric="minisblack")
    elif how == "imagej":
        tifffile.imwrite(path, layers, imagej=True, metadata={"axes": "ZYX"})
    elif how == "big, other byte order":
        tifffile.imwrite(path, layers, photometric="minisblack", bigtiff=True, byteorder=">")
    else:
        tifffile.imwrite(path, layers, photometric="minisblack", tile=(16, 16), compression="lzw")
    return path


WAYS = ("pillow", "one series each", "imagej", "big, other byte order", "tiles")


@pytest.mark.parametrize("how", WAYS)
def test_layers_that_other_programs_write(tmp_path, how):
    np.testing.assert_array_equal(read_label_layers(_written(tmp_path / "a.tif", how)), _layers())


@pytest.mark.parametrize("how", [*WAYS, "ours"])
@pytest.mark.parametrize("share", [0.97, 0.75, 0.5, 0.3])
def test_a_truncated_tiff_of_layers_is_never_read_as_fewer(folder, how, share):
    path = folder / "labels" / "a.tif"
    whole = (path if how == "ours" else _written(path, how)).read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=r"a\.tif.*truncated"):
        read_label_layers(path)
    opened = open_folder(folder)
    assert opened.images[0].label_path is None
    assert "truncated" in opened.problems[0].reason


def test_a_value_on_two_pages_is_named(folder):
    layers = _layers()
    layers[1][0, 0] = 7
    tifffile.imwrite(folder / "labels" / "a.tif", layers, photometric="minisblack")
    with pytest.raises(LabelError, match=r"a\.tif: value 7 lies on more than one page"):
        read_label_layers(folder / "labels" / "a.tif")
    assert [p.reason for p in open_folder(folder).problems if "value 7 lies" in p.reason]
    with pytest.raises(LabelError, match=r"b\.tif: value 7 lies"):
        write_label_layers(layers, folder / "b.tif")


def test_pages_that_are_no_layers(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(np.zeros((4, 6), np.uint16), metadata=None)
        file.write(np.zeros((4, 7), np.uint16), metadata=None)
    with pytest.raises(LabelError, match=r"differ in size \(4 x 6, 4 x 7 px\)"):
        read_label_layers(path)
    tifffile.imwrite(path, np.zeros((2, 8, 9, 3), np.uint8), photometric="rgb")
    with pytest.raises(LabelError, match=r"\(8, 9, 3\), as colours are"):
        read_label_layers(path)
    tifffile.imwrite(path, np.full((2, 8, 9), 0.5, np.float32), photometric="minisblack")
    with pytest.raises(LabelError, match="fractions"):
        read_label_layers(path)
    tifffile.imwrite(path, _layers(), photometric="minisblack", extratags=[(274, "H", 1, 6, True)])
    with pytest.raises(LabelError, match="orientation"):
        read_label_layers(path)
    tifffile.imwrite(path, np.zeros((8, 9, 3), np.uint8), photometric="rgb")
    with pytest.raises(LabelError, match="one plane"):
        read_label_layers(path)


def test_pages_too_large_to_hold(tmp_path, monkeypatch):
    write_label_layers(_layers(), tmp_path / "a.tif")
    assert MAX_BYTES > 2**30
    monkeypatch.setattr("loop.data.store.MAX_BYTES", 1000)
    with pytest.raises(LabelError, match="2 pages of"):
        read_label_layers(tmp_path / "a.tif")


WRONG = [np.zeros((3, 4)), np.zeros((0, 3, 4)), np.full((1, 2, 2), -1), np.full((1, 2, 2), 2**31)]


@pytest.mark.parametrize("layers", [array.astype(np.int64) for array in WRONG])
def test_what_cannot_be_written_as_layers(tmp_path, layers):
    with pytest.raises(LabelError, match=r"expected \(L, H, W\)"):
        write_label_layers(layers, tmp_path / "a.tif")


def test_a_reduced_copy_is_no_layer(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(_layers()[0], metadata=None)
        file.write(_layers()[0][::2, ::2], metadata=None, subfiletype=1)
    assert read_label_layers(tmp_path / "a.tif").shape == (1, *SHAPE)


def test_to_layers_by_hand():
    layers = to_layers(from_masks(CELLS, SHAPE))
    assert (layers.shape, layers.dtype) == ((2, *SHAPE), np.uint16)
    np.testing.assert_array_equal(layers[0], 1 * CELLS[0] + 3 * CELLS[2])
    np.testing.assert_array_equal(layers[1], 2 * CELLS[1])
    np.testing.assert_array_equal(to_layers(Instances.build((3, 4))), np.zeros((1, 3, 4)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 7))
def test_overlapping_cells_survive_layers(seed, n):
    rng = np.random.default_rng(seed)
    cells = from_masks([rng.random((6, 7)) < rng.uniform(0, 0.9) for _ in range(n)], (6, 7), scores=rng.random(n))
    layers = to_layers(cells)
    assert len(layers) <= max(1, len(cells))
    back = from_layers(layers, image_id="x", source="model", scores=cells.scores)
    np.testing.assert_array_equal(to_dense(back), to_dense(cells))
    np.testing.assert_array_equal(back.scores, cells.scores)
    assert (back.image_id, back.source) == ("x", "model")


def test_more_cells_than_16_bits_number():
    many = 65_536
    one = np.ones((1, 1), bool)
    cells = Instances.build((1, 1), np.tile([[0, 0, 1, 1]], (many, 1)), [one] * many, image_id="x")
    with pytest.raises(LabelError, match="'x' has 65536 cells"):
        to_layers(cells)


def test_nuclei_lie_beside_the_labels(folder):
    write_label_layers(np.stack([2 * CELLS[0], CELLS[1]]), folder / "nuclei" / "a.tif")
    a, b = open_folder(folder).images
    assert a.extra == {NUCLEI_KEY: str(folder / "nuclei" / "a.tif")}
    assert b.extra == {}
    nuclei = read_nuclei(a)
    assert (nuclei.image_id, nuclei.source) == ("a", "human")
    np.testing.assert_array_equal(to_dense(nuclei), [CELLS[1], CELLS[0]])
    assert read_nuclei(b) is None
    sample = read_sample(a)
    assert sample.image is a
    assert (len(sample.instances), len(sample.nuclei)) == (3, 2)
    assert read_sample(b).nuclei is None
    write_label_image(np.zeros(SHAPE, np.int32), folder / "nuclei" / "b.png")
    assert len(read_sample(open_folder(folder).images[1]).nuclei) == 0
    assert [ref.extra for ref in open_folder(folder, labels=False).images] == [{}, {}]


def test_nuclei_that_do_not_fit_are_named_and_their_images_kept(folder):
    write_label_image(np.ones((5, 6), np.int32), folder / "nuclei" / "a.png")
    (folder / "nuclei" / "b.png").write_bytes(b"")
    write_label_image(np.ones((5, 6), np.int32), folder / "nuclei" / "lost.png")
    opened = open_folder(folder)
    assert [(ref.extra, ref.label_path is None) for ref in opened.images] == [({}, False)] * 2
    reasons = {problem.path.name: problem.reason for problem in opened.problems}
    assert "5 x 6 px, its image a.png 12 x 16" in reasons["a.png"]
    assert "kept without nuclei" in reasons["a.png"]
    assert "empty" in reasons["b.png"]
    assert "no image of that name" in reasons["lost.png"]
    write_label_image(np.ones(SHAPE, np.int32), folder / "nuclei" / "a.tif")
    with pytest.raises(InputError, match="two nuclei have the same name"):
        open_folder(folder)


def test_nuclei_that_changed_since_the_folder_was_opened(folder):
    write_label_image(np.ones(SHAPE, np.int32), folder / "nuclei" / "a.png")
    ref = open_folder(folder).images[0]
    write_label_image(np.ones((5, 6), np.int32), folder / "nuclei" / "a.png")
    with pytest.raises(LabelError, match="5 x 6 px"):
        read_sample(ref)


def test_a_cell_that_fills_the_frame_and_an_image_of_one_pixel(tmp_path):
    for stem, shape in (("full", (9, 9)), ("pixel", (1, 1))):
        write_png(np.full(shape, 90, np.uint8), tmp_path / "images" / f"{stem}.png")
        write_label_image(np.ones(shape, np.int32), tmp_path / "labels" / f"{stem}.png")
    full, pixel = (read_sample(ref).instances for ref in open_folder(tmp_path).images)
    assert (full.boxes_xyxy.tolist(), int(full.masks[0].sum())) == ([[0, 0, 9, 9]], 81)
    assert (pixel.shape, pixel.boxes_xyxy.tolist()) == ((1, 1), [[0, 0, 1, 1]])
    np.testing.assert_array_equal(to_layers(pixel), [[[1]]])
