import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from loop.data.overlap_maps import overlap_map, overlap_mask
from loop.errors import ConfigError, LabelError, ShapeError
from loop.masks import from_masks, to_dense
from loop.types import Instances

KINDS = ("v0", "v1", "v2", "v3", "v4")
SHAPE = (72, 96)
TOLERANCE = 1e-5  # float32 distances against float64


def cells_and_nuclei(seed, n, shape=SHAPE):
    """Ellipses that overlap often, some cut by the frame; a nucleus in the middle of each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    cells, nuclei = [], []
    for _ in range(n):
        cy, cx = rng.uniform(2, shape[0] - 3), rng.uniform(2, shape[1] - 3)
        ry, rx = rng.uniform(5, 16, 2)
        reach = np.hypot((y - cy) / ry, (x - cx) / rx)
        cells.append(reach <= 1)
        nuclei.append(reach <= 0.35)
    return from_masks(cells, shape), from_masks(nuclei, shape)


def far(mask):
    return ndimage.distance_transform_edt(~mask) if mask.any() else np.full(mask.shape, np.inf)


def second_smallest(distances):
    if len(distances) < 2:
        return np.full(SHAPE, np.inf)
    return np.sort(np.stack(distances), axis=0)[1]


def brute_force(kind, cells, nuclei):
    """One full-frame transform for every cell; all formulas written out again, in float64."""
    masks, seeds = to_dense(cells), to_dense(nuclei)
    count = masks.sum(axis=0)
    r = float(np.median([np.sqrt(mask.sum() / np.pi) for mask in masks]))
    share = {}
    own = np.zeros(SHAPE)
    for mask, seed in zip(masks, seeds, strict=True):
        distance = np.where(mask, far(seed & mask), 0)
        own = np.maximum(own, distance / distance.max())
    share["v0"] = np.where(seeds.any(axis=0), 0, own)
    share["v1"] = np.maximum(0, 1 - second_smallest([far(seed) for seed in seeds]) / (2 * r))
    share["v2"] = np.maximum(0, 1 - far(count > 1) / r)
    share["v3"] = np.maximum(share["v1"], share["v2"])
    borders = [mask & ~ndimage.binary_erosion(mask, border_value=1) for mask in masks]
    nearest = np.where(count > 1, 0, second_smallest([far(border) for border in borders]))
    share["v4"] = np.where(count > 0, np.maximum(0, 1 - np.log(1 + nearest) / np.log(1 + r)), 0)
    return 0.1 + 0.9 * share[kind]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.sampled_from(KINDS))
def test_every_map_is_the_brute_force_one(seed, n, kind):
    cells, nuclei = cells_and_nuclei(seed, n)
    if kind == "v0":  # the brute force gives each cell its own nucleus; drawn in the middle, it is the cell's as a rule
        cells, nuclei = cells.take([0]), nuclei.take([0])
    np.testing.assert_allclose(
        overlap_map(kind, cells, nuclei), brute_force(kind, cells, nuclei), rtol=0, atol=TOLERANCE
    )


def test_v0_of_cells_that_overlap_at_their_rims_is_the_brute_force_one():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    centres = ((25, 20), (30, 42), (52, 30))
    cells = from_masks([np.hypot(y - a, x - b) <= 14 for a, b in centres], SHAPE)
    nuclei = from_masks([np.hypot(y - a, x - b) <= 4 for a, b in centres], SHAPE)
    expected = brute_force("v0", cells, nuclei)
    np.testing.assert_allclose(overlap_map("v0", cells, nuclei), expected, rtol=0, atol=TOLERANCE)
    shuffled = nuclei.take([2, 0, 1])
    np.testing.assert_allclose(overlap_map("v0", cells, shuffled), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_cells_are_the_brute_force_ones(kind):
    cells, nuclei = cells_and_nuclei(7, 100)
    if kind != "v0":
        np.testing.assert_allclose(
            overlap_map(kind, cells, nuclei), brute_force(kind, cells, nuclei), rtol=0, atol=TOLERANCE
        )
    found = overlap_map(kind, cells, nuclei)
    assert (found.shape, found.dtype) == (SHAPE, np.float32)
    assert found.min() >= np.float32(0.1)
    assert found.max() <= 1


def test_v4_by_hand_on_two_touching_strips():
    strips = np.zeros((2, 3, 10), bool)
    strips[0, 1, :5] = strips[1, 1, 5:] = True
    cells = from_masks(list(strips), (3, 10))
    r = math.sqrt(5 / math.pi)
    touching = 0.1 + 0.9 * (1 - math.log(2) / math.log(1 + r))  # one px from the neighbour's border
    expected = np.full((3, 10), 0.1)
    expected[1, 4] = expected[1, 5] = touching
    np.testing.assert_allclose(overlap_map("v4", cells), expected, atol=1e-6)


def test_v2_by_hand():
    masks = np.zeros((2, 1, 12), bool)
    masks[0, 0, :7] = masks[1, 0, 5:] = True
    found = overlap_map("v2", from_masks(list(masks), (1, 12)))
    r = math.sqrt(7 / math.pi)
    distance = np.array([5, 4, 3, 2, 1, 0, 0, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(found[0], 0.1 + 0.9 * np.maximum(0, 1 - distance / r), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_near_cells_give_more_than_far_ones_and_overlaps_most(kind):
    def largest(gap):
        y, x = np.mgrid[:60, :120]
        centres = (40, 40 + 24 + gap)
        cells = from_masks([np.hypot(y - 30, x - c) <= 12 for c in centres], (60, 120))
        nuclei = from_masks([np.hypot(y - 30, x - c) <= 4 for c in centres], (60, 120))
        return overlap_map(kind, cells, nuclei)

    overlapping, touching, apart = largest(-8), largest(1), largest(30)
    if kind != "v0":  # v0 does not look at neighbours
        assert overlapping.max() >= touching.max() >= apart.max()
        assert overlapping.max() > apart.max() + 0.2
    middle, nucleus = overlapping[30, 48], overlapping[30, 40]
    assert middle > nucleus


@pytest.mark.parametrize("kind", KINDS)
def test_no_cells_give_the_floor(kind):
    none = Instances.build((9, 7))
    np.testing.assert_array_equal(overlap_map(kind, none, none), np.full((9, 7), 0.1, np.float32))


@pytest.mark.parametrize("kind", ["v1", "v2", "v3", "v4"])
@pytest.mark.parametrize("whole", [False, True])
def test_one_cell_has_nobody_to_overlap_with(kind, whole):
    mask = np.ones((20, 20), bool)
    mask[0] = whole
    nucleus = np.zeros((20, 20), bool)
    nucleus[8:12, 8:12] = True
    found = overlap_map(kind, from_masks([mask], (20, 20)), from_masks([nucleus], (20, 20)))
    np.testing.assert_array_equal(found, np.full((20, 20), 0.1, np.float32))


def test_v0_of_one_cell_filling_the_frame_rises_from_the_nucleus_to_the_far_corner():
    nucleus = np.zeros((20, 20), bool)
    nucleus[3, 3] = True
    found = overlap_map("v0", from_masks([np.ones((20, 20), bool)], (20, 20)), from_masks([nucleus], (20, 20)))
    assert found[3, 3] == np.float32(0.1)
    assert found[19, 19] == 1
    assert found[3, 19] == pytest.approx(0.1 + 0.9 * 16 / math.hypot(16, 16), abs=1e-6)


def test_v0_of_a_cell_without_nucleus_starts_at_its_deepest_pixel():
    mask = np.zeros((15, 15), bool)
    mask[2:13, 2:13] = True
    found = overlap_map("v0", from_masks([mask], (15, 15)), Instances.build((15, 15)))
    assert found[7, 7] == np.float32(0.1)
    assert found[2, 2] == 1
    assert found[0, 0] == np.float32(0.1)


def test_a_cell_of_one_pixel():
    mask = np.zeros((5, 5), bool)
    mask[2, 2] = True
    one = from_masks([mask], (5, 5))
    for kind in KINDS:
        np.testing.assert_array_equal(overlap_map(kind, one, one), np.full((5, 5), 0.1, np.float32))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 8))
def test_overlap_mask_counts_cells(seed, n):
    cells, _ = cells_and_nuclei(seed, n)
    np.testing.assert_array_equal(overlap_mask(cells), to_dense(cells).sum(axis=0) > 1)


def test_refusals():
    cells, nuclei = cells_and_nuclei(0, 3)
    for kind in ("v0", "v1", "v3"):
        with pytest.raises(LabelError, match="made from nuclei and none are given"):
            overlap_map(kind, cells, None)
        with pytest.raises(ShapeError, match="both must be of the same image"):
            overlap_map(kind, cells, Instances.build((5, 5)))
    for kind in ("v2", "v4"):
        assert overlap_map(kind, cells, None).max() > 0.1
    with pytest.raises(ConfigError, match="expected one of v0, v1, v2, v3, v4"):
        overlap_map("v5", cells, nuclei)
