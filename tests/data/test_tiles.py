import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loop.data import store
from loop.data.decode import decode, kind_of
from loop.data.preprocess import Window
from loop.data.synthetic import draw_cells
from loop.data.tiles import cut, cut_from, tile_id, write_tiles
from loop.errors import ImageError, InputError
from loop.masks import from_masks, to_dense
from loop.metrics.matching import iou_matrix
from loop.models.stitch import merge_windows

RNG = np.random.default_rng(5)
DEEP = RNG.integers(0, 65535, (50, 70), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)
seeds = st.integers(0, 2**32 - 1)
numbers = st.integers(1, 200)


@settings(max_examples=200, deadline=None)
@given(numbers, numbers, numbers, st.integers(0, 70))
def test_own_parts_are_the_image_and_windows_show_a_halo_around_them(height, width, side, halo):
    tiles = cut((height, width), side, halo)
    covered = np.zeros((height, width), int)
    for tile in tiles:
        y0, x0, y1, x1 = tile.own
        covered[y0:y1, x0:x1] += 1
        assert 0 < y1 - y0 <= side
        assert 0 < x1 - x0 <= side
        assert tile.window == (max(y0 - halo, 0), max(x0 - halo, 0), min(y1 + halo, height), min(x1 + halo, width))
    assert (covered == 1).all()
    heights, widths = ({t.own[i + 2] - t.own[i] for t in tiles} for i in (0, 1))
    assert max(heights) - min(heights) <= 1
    assert max(widths) - min(widths) <= 1
    assert len({(t.row, t.column) for t in tiles}) == len(tiles) == -(-height // side) * -(-width // side)


@pytest.mark.parametrize(("shape", "side", "halo"), [((0, 5), 3, 1), ((5, 5), 0, 1), ((5, 5), 3, -1)])
def test_numbers_out_of_their_range_are_refused(shape, side, halo):
    with pytest.raises(InputError, match="expected at least 1 px"):
        cut(shape, side, halo)


def test_the_id_of_a_tile_tells_what_it_was_cut_from():
    tile = cut((100, 2000), 100, 0)[11]
    assert tile_id("a.t0001", tile) == "a.t0001.t0000-0011"
    assert cut_from("a.t0001.t0000-0011") == "a.t0001"
    assert cut_from(cut_from(tile_id(tile_id("b", tile), tile))) == "b"


# Tiles, drawn in by people who see what there is, stitched back.


def _seen(cells, window):
    """The true cells as far as a tile's window shows them."""
    dense = to_dense(cells)[:, window.y0 : window.y1, window.x0 : window.x1]
    return from_masks([mask for mask in dense if mask.any()], (window.y1 - window.y0, window.x1 - window.x0))


def _stitched(truth, side, halo):
    return merge_windows(
        truth.shape, ((tile.window, _seen(truth, tile.window)) for tile in cut(truth.shape, side, halo))
    )


def _assert_same(got, expected):
    assert len(got) == len(expected)
    rows, columns = np.nonzero(iou_matrix(got, expected) == 1)
    assert sorted(rows.tolist()) == sorted(columns.tolist()) == list(range(len(expected)))


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(16, 90), st.integers(16, 90), st.integers(0, 14), st.booleans(), st.integers(20, 50))
def test_cells_smaller_than_the_halo_come_back_exactly(seed, height, width, n, touching, side):
    try:
        truth = draw_cells(np.random.default_rng(seed), (height, width), n, touching).instances
    except InputError:
        return
    sizes = truth.boxes_xyxy[:, 2:] - truth.boxes_xyxy[:, :2]
    _assert_same(_stitched(truth, side, halo=int(sizes.max(initial=8)) + 3), truth)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(12, 40), st.integers(2, 10))
def test_overlapping_cells_of_any_size_come_back_exactly(seed, n, side, halo):
    """Boxes and discs that may be longer than three tiles; a window that shows two alike cannot tell them apart."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:64, :100]
    masks = []
    for _ in range(n):
        y, x = rng.integers(0, 64), rng.integers(0, 100)
        tall, wide = rng.integers(2, 60, 2) / 2
        inside = (abs(rows - y) <= tall) & (abs(columns - x) <= wide)
        masks.append(inside if rng.random() < 0.5 else ((rows - y) / tall) ** 2 + ((columns - x) / wide) ** 2 <= 1)
    truth = from_masks(masks, (64, 100))
    for tile in cut(truth.shape, side, halo):
        seen = _seen(truth, tile.window)
        if (np.triu(iou_matrix(seen, seen), 1) > 0.5).any():
            return
    _assert_same(_stitched(truth, side, halo), truth)


@pytest.mark.parametrize("box", [(40, 5, 50, 295), (2, 2, 298, 298), (95, 95, 105, 205), (0, 98, 300, 103)])
def test_a_cell_across_three_tiles_and_more_stays_one(box):
    mask = np.zeros((300, 300), bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    small = np.zeros((300, 300), bool)
    small[45:49, 99:110] = True
    truth = from_masks([mask, small], (300, 300))
    assert len(cut(truth.shape, 100, 16)) == 9
    _assert_same(_stitched(truth, 100, 16), truth)


LEFT, RIGHT = (tile.window for tile in cut((40, 200), 100, 20))
"""They show columns 0 to 120 and 80 to 200; the seam is at 100."""


def _boxes(*boxes):
    """Rectangles (x0, x1) of rows 10 to 20 in a tile of 40 x 120 px."""
    masks = np.zeros((len(boxes), 40, 120), bool)
    for mask, (x0, x1) in zip(masks, boxes, strict=True):
        mask[10:20, x0:x1] = True
    return from_masks(list(masks), (40, 120))


def _columns(left, right):
    merged = merge_windows((40, 200), [(LEFT, left), (RIGHT, right)])
    return sorted((int(x0), int(x1)) for x0, _, x1, _ in merged.boxes_xyxy)


def test_where_neighbours_disagree_a_cell_that_one_of_them_saw_whole_counts():
    assert _columns(_boxes((85, 95)), _boxes()) == [(85, 95)]
    assert _columns(_boxes((105, 115)), _boxes()) == [(105, 115)]
    assert _columns(_boxes(), _boxes((25, 35))) == [(105, 115)]


def test_where_neighbours_disagree_a_piece_at_an_edge_that_the_other_saw_whole_and_left_out_does_not_count():
    assert _columns(_boxes((110, 120)), _boxes()) == []
    assert _columns(_boxes(), _boxes((0, 10))) == []


def test_of_two_outlines_that_of_the_tile_counts_in_which_the_cell_lies_deeper():
    assert _columns(_boxes((86, 96)), _boxes((5, 15))) == [(86, 96)]
    assert _columns(_boxes((104, 114)), _boxes((25, 35))) == [(105, 115)]


# Files


@pytest.mark.parametrize(
    ("array", "options", "suffix"),
    [
        (DEEP, {"photometric": "minisblack", "tile": (16, 16)}, ".tif"),
        (DEEP.astype(np.float32) / 3, {"photometric": "minisblack"}, ".tif"),
        (DEEP.astype(np.int32) * -5, {"photometric": "minisblack"}, ".tif"),
        (np.stack([DEEP, DEEP // 2]), {"photometric": "minisblack", "metadata": {"axes": "CYX"}}, ".tif"),
        (np.dstack([DEEP, DEEP // 2, DEEP // 3]), {"photometric": "rgb"}, ".tif"),
        (np.stack([DEEP, DEEP // 2, DEEP // 3]), {"photometric": "minisblack", "metadata": {"axes": "ZYX"}}, ".tif"),
        (COLOUR, {"photometric": "rgb"}, ".png"),
        (COLOUR[:, :, 0], {"photometric": "minisblack", "byteorder": ">"}, ".png"),
        (np.moveaxis(COLOUR, -1, 0)[:2], {"photometric": "minisblack", "metadata": {"axes": "CYX"}}, ".tif"),
    ],
)  # fmt: skip
def test_a_tile_holds_the_raw_pixels_of_its_window(tmp_path, array, options, suffix):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, array, **options)
    data = path.read_bytes()
    expected = decode(data, kind_of(data))
    windows = {tile_id("a", tile): tile.window for tile in cut((50, 70), 30, 5)}
    assert len(windows) == 6
    made = write_tiles(path, tmp_path / "tiles", windows)
    assert made.keys() == windows.keys()
    for name, (y0, x0, y1, x1) in windows.items():
        tile = made[name]
        assert tile.path == tmp_path / "tiles" / f"{name}{suffix}"
        assert tile.sha256 == store.file_sha256(tile.path)
        data = tile.path.read_bytes()
        found = decode(data, kind_of(data))
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected[y0:y1, x0:x1])
    assert write_tiles(path, tmp_path / "again", windows) == {
        name: (tmp_path / "again" / tile.path.name, tile.sha256) for name, tile in made.items()
    }


def test_a_tile_of_a_tile_is_that_part_of_the_whole(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    (outer,) = write_tiles(tmp_path / "a.png", tmp_path, {"a.t": Window(10, 20, 40, 60)}).values()
    (inner,) = write_tiles(outer.path, tmp_path, {"a.t.t": Window(5, 5, 20, 30)}).values()
    np.testing.assert_array_equal(np.asarray(Image.open(inner.path)), COLOUR[15:30, 25:50])


def test_an_image_that_has_changed_or_cannot_be_read_is_named(tmp_path):
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: .* is no part of an image of \(50, 70\)"):
        write_tiles(tmp_path / "a.png", tmp_path, {"x": Window(0, 0, 60, 70)})
    with pytest.raises(ImageError, match="gone"):
        write_tiles(tmp_path / "gone.png", tmp_path, {"x": Window(0, 0, 5, 5)})
    assert not (tmp_path / "x.png").exists()
