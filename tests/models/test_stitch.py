import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.preprocess import Window, tiles
from loop.data.synthetic import draw_cells
from loop.errors import InputError, ShapeError
from loop.masks import from_masks, to_dense
from loop.metrics.instance import evaluate
from loop.metrics.matching import areas, iou_matrix
from loop.models.dihedral import apply_instances, invert_instances
from loop.models.stitch import fuse, merge_windows
from loop.rings import crop_mask
from loop.types import Instances

SHAPE = (40, 100)
LEFT, RIGHT = Window(0, 0, 40, 60), Window(0, 40, 40, 100)  # they share columns 40 to 60
FOUR = tiles((100, 100), 60, 20)
seeds = st.integers(0, 2**32 - 1)


def _cells(*boxes, shape=SHAPE, scores=None):
    """Filled rectangles (y0, x0, y1, x1)."""
    return from_masks([_box(*box, shape=shape) for box in boxes], shape, scores=scores)


def _box(y0, x0, y1, x1, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def _cut(cells, window):
    """What a perfect network finds in a window: the true cells as far as they lie inside."""
    shape = (window.y1 - window.y0, window.x1 - window.x0)
    boxes, masks, kept = [], [], []
    for i, (box, mask) in enumerate(zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True)):
        x0, y0 = box[:2]
        left, top = max(x0, window.x0), max(y0, window.y0)
        part = mask[max(top - y0, 0) : max(window.y1 - y0, 0), max(left - x0, 0) : max(window.x1 - x0, 0)]
        crop = crop_mask(part) if part.size else None
        if crop is not None:
            a, b, c, d = crop.box_xyxy
            dx, dy = left - window.x0, top - window.y0
            boxes.append((a + dx, b + dy, c + dx, d + dy))
            masks.append(crop.mask)
            kept.append(i)
    found = cells.take(kept)
    return Instances.build(
        shape, boxes, masks, scores=found.scores, labels=found.labels, weights=found.weights, image_id=cells.image_id
    )


def _merged(truth, windows=(LEFT, RIGHT), **settings):
    return merge_windows(truth.shape, ((window, _cut(truth, window)) for window in windows), **settings)


def _assert_same_cells(got, expected):
    """The same masks, in whatever order."""
    assert len(got) == len(expected)
    iou = iou_matrix(got, expected)
    rows, cols = np.nonzero(iou == 1)
    assert sorted(rows.tolist()) == sorted(cols.tolist()) == list(range(len(expected)))


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [(5, 5, 15, 15)],  # in the left window alone
        [(5, 42, 15, 58)],  # whole in both
        [(5, 30, 15, 50)],  # whole on the left, cut on the right
        [(5, 50, 15, 70)],  # whole on the right, cut on the left
        [(5, 58, 15, 61)],  # two columns on the left
        [(5, 30, 15, 41), (20, 59, 30, 70)],  # a single column in the other window
        [(5, 20, 15, 80)],  # larger than the overlap, cut in both
        [(0, 0, 40, 100)],  # fills the image
        [(10, 0, 12, 100)],  # long and thin
        [(0, 0, 3, 3), (37, 97, 40, 100), (0, 45, 5, 55)],  # at the image's own edges
        [(5, 20, 25, 80), (15, 30, 35, 90)],  # an overlapping pair, both larger than the overlap
        [(5, 42, 20, 55), (12, 45, 30, 58)],  # an overlapping pair, both whole twice
        [(5, 20, 35, 80), (15, 45, 20, 55)],  # a small cell on a large one
        [(5, 20, 35, 80), (15, 36, 20, 44), (25, 56, 30, 64)],  # small cells on a large one, each cut once
        [(5, 30, 15, 50), (15, 30, 25, 50), (25, 50, 35, 70)],  # touching side by side
    ],
)
def test_two_windows_give_the_cells_of_the_whole(boxes):
    _assert_same_cells(_merged(_cells(*boxes)), _cells(*boxes))


@pytest.mark.parametrize(
    "box",
    [(45, 45, 55, 55), (35, 35, 50, 50), (35, 50, 50, 65), (50, 50, 65, 65), (35, 35, 65, 65), (10, 10, 90, 90)],
)
def test_a_cell_where_four_windows_meet(box):
    truth = _cells(box, (2, 2, 8, 8), shape=(100, 100))
    assert len(FOUR) == 4
    _assert_same_cells(_merged(truth, FOUR), truth)


def test_bent_cells_whose_arms_a_window_sees_apart():
    u = _box(5, 20, 10, 80) | _box(25, 20, 30, 80) | _box(5, 20, 30, 30)  # open to the right
    left = from_masks([u[:, :60]], (40, 60))
    arms = from_masks([_box(5, 40, 10, 80)[:, 40:], _box(25, 40, 30, 80)[:, 40:]], (40, 60), scores=[0.5, 0.5])
    for parts in ([(LEFT, left), (RIGHT, arms)], [(RIGHT, arms), (LEFT, left)]):
        _assert_same_cells(merge_windows(SHAPE, parts), from_masks([u], SHAPE))


def test_different_cells_at_one_place_stay_apart():
    # in the shared columns they have 60 px of 260 in common, and neither lies in the other
    left, right = _cells((5, 30, 15, 56), shape=(40, 60)), _cells((10, 4, 20, 30), shape=(40, 60))
    got = merge_windows(SHAPE, [(LEFT, left), (RIGHT, right)])
    _assert_same_cells(got, _cells((5, 30, 15, 56), (10, 44, 20, 70)))
    assert len(merge_windows(SHAPE, [(LEFT, left), (RIGHT, right)], agreement=0.2)) == 1


def test_the_better_partner_wins_over_the_first():
    # two cells that agree with each other as well: IoU 7/13 across, 1 with themselves
    boxes = [(5, 42, 15, 58), (8, 42, 18, 58)]
    for order in ([0, 1], [1, 0]):
        parts = [(LEFT, _cut(_cells(*boxes), LEFT)), (RIGHT, _cut(_cells(*boxes), RIGHT).take(order))]
        _assert_same_cells(merge_windows(SHAPE, parts), _cells(*boxes))


def test_of_two_whole_views_the_one_farther_from_its_edge_is_taken():
    near = _cells((5, 44, 15, 55), shape=(40, 60), scores=[0.9])  # 5 px from the left window's inner edge
    far = _cells((5, 7, 16, 15), shape=(40, 60), scores=[0.4])  # 7 px from the right one's
    got = merge_windows(SHAPE, [(LEFT, near), (RIGHT, far)])
    _assert_same_cells(got, _cells((5, 47, 16, 55)))
    assert got.scores.tolist() == pytest.approx([0.4])


def test_at_equal_distance_the_better_score_is_taken():
    one = _cells((5, 45, 15, 55), shape=(40, 60), scores=[0.4])
    other = _cells((5, 5, 16, 15), shape=(40, 60), scores=[0.9])
    assert merge_windows(SHAPE, [(LEFT, one), (RIGHT, other)]).scores.tolist() == pytest.approx([0.9])


def test_a_union_scores_the_mean_weighted_by_area_and_keeps_the_largest_pieces_label():
    def part(box, score, label, weight):
        mask = np.ones((box[3] - box[1], box[2] - box[0]), bool)
        return Instances.build((40, 60), [box], [mask], scores=[score], labels=[label], weights=[weight])

    left, right = part((20, 0, 60, 10), 0.9, 1, 2), part((0, 0, 60, 10), 0.4, 3, 5)
    got = merge_windows(SHAPE, [(LEFT, left), (RIGHT, right)])
    assert got.scores.tolist() == pytest.approx([(0.9 * 400 + 0.4 * 600) / 1000])
    assert (got.labels.tolist(), got.weights.tolist()) == ([3], [5])
    assert got.boxes_xyxy.tolist() == [[20, 0, 100, 10]]


def test_a_cut_piece_that_no_other_window_confirms_goes_where_another_sees_the_place():
    nothing = from_masks([], (40, 60))
    stump = _cells((5, 0, 15, 10), shape=(40, 60))  # columns 40 to 50: whole in view on the left
    assert len(merge_windows(SHAPE, [(LEFT, nothing), (RIGHT, stump)])) == 0
    long = _cells((5, 0, 15, 30), shape=(40, 60))  # columns 40 to 70: the left window cuts it too
    assert len(merge_windows(SHAPE, [(LEFT, nothing), (RIGHT, long)])) == 1
    free = _cells((5, 5, 15, 15), shape=(40, 60))  # not cut: found once, kept
    assert len(merge_windows(SHAPE, [(LEFT, nothing), (RIGHT, free)])) == 1


def test_a_piece_that_ends_just_before_the_edge_counts_as_cut():
    short = _cells((5, 1, 15, 10), shape=(40, 60))
    nothing = from_masks([], (40, 60))
    assert len(merge_windows(SHAPE, [(LEFT, nothing), (RIGHT, short)])) == 0
    assert len(merge_windows(SHAPE, [(LEFT, nothing), (RIGHT, short)], edge_px=1)) == 1


def test_loose_boxes_and_empty_masks():
    masks = [_box(5, 42, 15, 50)[:, :60], np.zeros((5, 5), bool)]
    loose = Instances.build((40, 60), [(0, 0, 60, 40), (0, 0, 5, 5)], masks)
    got = merge_windows(SHAPE, [(LEFT, loose), (RIGHT, _cells((5, 2, 15, 10), shape=(40, 60)))])
    assert got.boxes_xyxy.tolist() == [[42, 5, 50, 15]]


def test_one_window_gives_its_cells_back_with_their_origin():
    cells = draw_cells(np.random.default_rng(0), (64, 80), n=4, touching=True, image_id="a").instances
    got = merge_windows((64, 80), [(Window(0, 0, 64, 80), cells)])
    np.testing.assert_array_equal(to_dense(got), to_dense(cells))
    assert (got.image_id, got.source) == ("a", "human")


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(0, 8), st.integers(24, 40), st.integers(10, 16))
def test_drawn_cells_come_back_exactly(seed, n, tile, overlap):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(40, 90)), int(rng.integers(40, 90)))
    masks = []
    for _ in range(n):
        canvas = np.zeros(shape, np.uint8)
        centre = (int(rng.integers(0, shape[1])), int(rng.integers(0, shape[0])))
        axes = (int(rng.integers(3, 25)), int(rng.integers(3, 12)))
        cv2.ellipse(canvas, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        masks.append(canvas.astype(bool))
    truth = from_masks(masks, shape)
    twins = np.triu(iou_matrix(truth, truth), 1)
    if twins.max(initial=0) < 0.3:
        _assert_same_cells(_merged(truth, tiles(shape, tile, overlap)), truth)


def _mosaic(rng, side=2048, piece=256):
    """Drawn pieces glued together, long thin and large cells over them, and cells where four windows meet."""
    drawn = [draw_cells(rng, (piece, piece), n=9, touching=i % 2 == 0).instances for i in range(8)]
    boxes, masks = [], []
    for y in range(0, side, piece):
        for x in range(0, side, piece):
            cells = apply_instances(int(rng.integers(8)), drawn[rng.integers(8)])
            boxes += (cells.boxes_xyxy + np.array([x, y, x, y])).tolist()
            masks += cells.masks
    corners = [(w.x1 - 64, w.y1 - 64) for w in tiles((side, side), 512, 128) if max(w.x1, w.y1) < side]
    blobs = [(x + dx, y + dy, 45, 45) for x, y in corners for dx, dy in ((0, 0), (45, 20))]  # overlapping pairs
    blobs += [(*rng.integers(0, side, 2).tolist(), 170, 90) for _ in range(20)]
    blobs += [(*rng.integers(0, side, 2).tolist(), 250, 8) for _ in range(20)]
    for x, y, a, b in blobs:
        canvas = np.zeros((side, side), np.uint8)
        cv2.ellipse(canvas, (x, y), (a, b), float(rng.uniform(0, 180)), 0, 360, 1, -1)
        crop = crop_mask(canvas.astype(bool))
        boxes.append(crop.box_xyxy)
        masks.append(crop.mask)
    return Instances.build((side, side), boxes, masks, scores=rng.random(len(masks), np.float32))


def _noisy(cells):
    """Each cell eroded by a pixel, as it is, and dilated by one: three sets in the same order."""
    height, width = cells.shape
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    sets = ([], [], [])
    for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True):
        padded = np.pad(mask, 1).astype(np.uint8)
        inside = (slice(max(1 - y0, 0), y1 - y0 + 2 - max(y1 + 1 - height, 0)),)
        inside += (slice(max(1 - x0, 0), x1 - x0 + 2 - max(x1 + 1 - width, 0)),)
        box = (max(x0 - 1, 0), max(y0 - 1, 0), min(x1 + 1, width), min(y1 + 1, height))
        smaller = cv2.erode(padded, cross, borderValue=0)
        for found, version in zip(sets, (smaller, padded, cv2.dilate(padded, cross)), strict=True):
            kept = version if version.any() else padded
            found.append((box, kept[inside].astype(bool)))
    return [
        Instances.build(cells.shape, [b for b, _ in found], [m for _, m in found], scores=cells.scores)
        for found in sets
    ]


def _draw(rng, versions):
    """One version for each cell, at random."""
    some = versions[0]
    masks = [versions[v].masks[i] for i, v in enumerate(rng.integers(0, 3, len(some)).tolist())]
    return Instances.build(some.shape, some.boxes_xyxy, masks, scores=some.scores)


@pytest.fixture(scope="module")
def mosaic():
    return _mosaic(np.random.default_rng(7))


@pytest.mark.parametrize("noise", ["before the cut", "after the cut"])
def test_a_tiled_mosaic_is_as_good_as_its_cells_uncut(noise, mosaic):
    """AP within half a point: means of three draws of noise, as a single draw moves it by a quarter of a point."""
    rng, truth = np.random.default_rng(7), mosaic
    versions = _noisy(truth)

    def found(window):
        if noise == "before the cut":
            return _cut(_draw(rng, versions), window)
        return _draw(rng, _noisy(_cut(truth, window)))

    tiled, uncut = [], []
    for _ in range(3):
        windows = tiles(truth.shape, 512, 128)
        got = merge_windows(truth.shape, ((window, found(window)) for window in windows))
        assert len(got) == len(truth)
        tiled.append(evaluate([(got, truth)]))
        uncut.append(evaluate([(_draw(rng, versions), truth)]))
    for key, limit in (("ap", 0.005), ("ap50", 0.001), ("f1", 1e-9)):
        assert np.mean([one[key] for one in tiled]) == pytest.approx(np.mean([one[key] for one in uncut]), abs=limit)


def test_a_cell_that_some_window_sees_whole_is_one_windows_mask_bit_for_bit():
    rng = np.random.default_rng(3)
    truth = _cells((40, 40, 60, 60), (5, 5, 20, 30), (70, 45, 80, 55), shape=(100, 100))
    versions = _noisy(truth)
    got = merge_windows(
        truth.shape, [(window, _cut(_draw(rng, versions), window)) for window in tiles((100, 100), 70, 40)]
    )
    assert len(got) == 3
    iou = np.maximum.reduce([iou_matrix(got, version) for version in versions])
    np.testing.assert_array_equal(iou.max(axis=1), 1)


def test_refusals_of_windows():
    cells = from_masks([], (40, 60))
    with pytest.raises(InputError, match="no windows"):
        merge_windows(SHAPE, [])
    with pytest.raises(ShapeError, match="leaves the image"):
        merge_windows(SHAPE, [(Window(0, 50, 40, 110), cells)])
    with pytest.raises(ShapeError, match=r"expected \(40, 50\)"):
        merge_windows(SHAPE, [(Window(0, 50, 40, 100), cells)])
    for wrong in ({"agreement": 0}, {"agreement": 1.1}, {"edge_px": 0}):
        with pytest.raises(InputError, match="expected 0 < agreement"):
            merge_windows(SHAPE, [(LEFT, cells)], **wrong)


def test_the_majority_of_passes_makes_the_mask():
    passes = [_cells((5, 10, 15, end), scores=[score]) for end, score in ((20, 0.9), (22, 0.6), (24, 0.3))]
    got = fuse(passes)
    assert got.boxes_xyxy.tolist() == [[10, 5, 22, 15]]
    assert areas(got).tolist() == [120]
    assert got.scores.tolist() == pytest.approx([0.6])


def test_at_a_tie_the_best_scored_pass_decides():
    passes = [_cells((5, 10, 15, 20), scores=[0.5]), _cells((5, 12, 15, 24), scores=[0.7])]
    got = fuse(passes)
    assert got.boxes_xyxy.tolist() == [[12, 5, 24, 15]]
    assert got.scores.tolist() == pytest.approx([0.6])
    passes = [passes[0], passes[1], _cells((5, 11, 15, 20)), _cells((5, 11, 15, 22), scores=[0.1])]
    # columns 11 to 20 are in three or four passes, 20 to 22 in two; the surest pass ends at 20
    assert fuse(passes).boxes_xyxy.tolist() == [[11, 5, 20, 15]]


def test_a_cell_found_once_in_eight_passes_scores_an_eighth():
    passes = [_cells((5, 5, 15, 15), scores=[0.8])] * 7 + [_cells((5, 5, 15, 15), (20, 50, 30, 60), scores=[0.8, 0.8])]
    got = fuse(passes)
    assert got.scores.tolist() == pytest.approx([0.8, 0.1])
    assert len(fuse(passes, min_votes=2)) == 1


def test_overlapping_cells_stay_two_through_the_passes():
    one, other = (5, 10, 15, 30), (5, 15, 15, 35)  # IoU 0.6 with each other
    passes = [_cells(one, other), _cells(other, one), _cells(one, other)]
    _assert_same_cells(fuse(passes), _cells(one, other))


def test_chains_of_passes():
    def chain(spans, scores):
        return fuse([_cells((0, a, 5, b), scores=[score]) for (a, b), score in zip(spans, scores, strict=True)])

    # IoU 0.5 from each to the next; columns 20 to 40 are in three passes
    got = chain([(0, 40), (20, 40), (20, 60), (40, 60)], [0.2, 0.1, 0.1, 0.9])
    assert got.boxes_xyxy.tolist() == [[20, 0, 60, 5]]  # 40 to 60 are in two of four, as the surest pass has it
    assert got.scores.tolist() == pytest.approx([1.3 / 4])
    # no pixel is in more than three of eight: the surest pass stands for all
    spans = [(10 * i, 10 * i + 30) for i in range(8)]
    assert chain(spans, [0.1] * 5 + [0.9] + [0.1] * 2).boxes_xyxy.tolist() == [[50, 0, 80, 5]]


def test_one_pass_and_passes_without_cells():
    cells = _cells((5, 5, 15, 15), (5, 10, 15, 20), scores=[0.9, 0.4])
    np.testing.assert_array_equal(to_dense(fuse([cells])), to_dense(cells))
    np.testing.assert_allclose(fuse([cells]).scores, cells.scores)
    assert len(fuse([_cells()] * 3)) == 0
    np.testing.assert_allclose(fuse([_cells(), cells]).scores, [0.45, 0.2])


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 5))
def test_equal_passes_give_the_cells_of_one(seed, n):
    cells = draw_cells(np.random.default_rng(seed), (48, 64), n=4, touching=True).instances
    turned = [invert_instances(k, apply_instances(k, cells)) for k in range(n)]
    got = fuse(turned)
    np.testing.assert_array_equal(to_dense(got), to_dense(cells))
    np.testing.assert_allclose(got.scores, cells.scores)


def test_more_cells_than_one_band_of_the_comparison():
    rng = np.random.default_rng(5)
    corners = [(y, x) for y in range(0, 200, 8) for x in range(0, 200, 8)]  # 625
    cells = [_cells(*((y, x, y + 6, x + 6) for y, x in rng.permutation(corners)), shape=(200, 200)) for _ in range(2)]
    got = fuse(cells)
    _assert_same_cells(got, cells[0])
    np.testing.assert_array_equal(got.scores, 1)


def test_refusals_of_passes():
    with pytest.raises(InputError, match="0 passes"):
        fuse([])
    for wrong in ({"min_votes": 0}, {"min_votes": 2}, {"agreement": 0}):
        with pytest.raises(InputError, match="1 <= min_votes <= passes"):
            fuse([_cells()], **wrong)
    with pytest.raises(ShapeError, match="one shape"):
        fuse([_cells(), from_masks([], (5, 5))])
