import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.measure import regionprops

from loop.errors import InputError, ShapeError
from loop.masks import from_masks
from loop.metrics.typical import FLOORS, Typical, fit_typical, touches_edge
from loop.types import Instances

SHAPE = (80, 120)


def disc(row, column, radius, shape=SHAPE):
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def bar(height, width):
    mask = np.zeros(SHAPE, bool)
    mask[20 : 20 + height, 20 : 20 + width] = True
    return mask


CELL = disc(40, 30, 10)
CLUMP = CELL | disc(40, 50, 10)
SLIVER = bar(2, 40)


def image(masks):
    return from_masks(masks, SHAPE)


def discs(radius, n):
    return [image([disc(40, 60, radius)]) for _ in range(n)]


def test_of_equal_discs_median_and_spread_are_known():
    found = fit_typical(discs(10, 12))
    assert found.cells == 12
    assert found.median == pytest.approx((math.log(CELL.sum()), 1.0, 0.0), abs=1e-6)
    assert found.spread == FLOORS
    np.testing.assert_allclose(found.of([CELL]), [1.0])


def test_middle_and_spread_by_hand():
    # bars 1 x w: ln area = ln w, solidity 1, elongation = ln(w): second moments (w^2 - 1 + 1) / 12 and 1 / 12
    widths = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    found = fit_typical([image([bar(1, width)]) for width in widths])
    logs = np.log(widths)
    spread = 1.4826 * np.median(np.abs(logs - math.log(7)))
    assert found.median == pytest.approx((math.log(7), 1, math.log(7)))
    assert found.spread == pytest.approx((spread, FLOORS[1], spread))


def test_a_few_odd_labels_move_nothing():
    plain, spoilt = fit_typical(discs(10, 20)), fit_typical([*discs(10, 20), *discs(1, 2), *discs(35, 2)])
    assert spoilt.median == plain.median


def test_typicality_by_hand():
    typical = Typical((math.log(100), 0.9, 0.5), (0.5, 0.05, 0.25), 50)
    square = bar(10, 10)  # ln area as the median, solidity above it, elongation 0: two spreads below
    np.testing.assert_allclose(typical.of([square]), [1 / (1 + 4 / 3)])
    np.testing.assert_allclose(typical.of([square], cut=[True]), [1.0])


def test_a_disc_is_more_typical_than_a_clump_and_a_clump_more_than_a_sliver():
    spread = fit_typical([image([disc(40, 60, radius)]) for radius in (8, 9, 9, 10, 10, 10, 10, 11, 11, 12)])
    cell, clump, sliver = spread.of([CELL, CLUMP, SLIVER])
    assert cell > 0.9
    assert 2 * clump < cell
    assert 0 < sliver < clump


def test_an_organelle_is_less_typical_than_its_cell_and_a_cell_at_the_edge_may_be_small():
    typical = fit_typical(discs(10, 12))
    organelle = disc(40, 30, 3)
    assert typical.of([organelle])[0] < 0.2
    assert typical.of([organelle], cut=[True])[0] == pytest.approx(1)
    assert typical.of([disc(40, 60, 30)], cut=[True])[0] < 0.2


def test_nothing_is_impossible():
    typical = fit_typical(discs(10, 12))
    np.testing.assert_array_less(0, typical.of([np.ones((2000, 3000), bool), np.eye(500, dtype=bool)]))


def test_no_masks_and_empty_ones():
    typical = fit_typical(discs(10, 12))
    assert typical.of([]).shape == (0,)
    with pytest.raises(ShapeError, match="empty"):
        typical.of([CELL, np.zeros((4, 4), bool)])
    with pytest.raises(ShapeError, match="one flag"):
        typical.of([CELL], cut=[True, False])


def test_the_frame_of_a_mask_does_not_matter():
    typical = fit_typical(discs(9, 12))
    (x0, y0, x1, y1) = image([CLUMP]).boxes_xyxy[0]
    np.testing.assert_allclose(typical.of([CLUMP]), typical.of([CLUMP[y0:y1, x0:x1]]))


def test_under_ten_cells_nothing_is_typical():
    assert fit_typical([]) is None
    assert fit_typical(discs(10, 9)) is None
    assert fit_typical([image([]), *discs(10, 9)]) is None
    empty = Instances.build(SHAPE, [(0, 0, 3, 3)], [np.zeros((3, 3), bool)])
    assert fit_typical([empty, *discs(10, 9)]) is None


def test_cells_that_the_edge_cuts_do_not_count_unless_there_are_too_few_others():
    cut = [image([disc(0, 60, 10)]) for _ in range(11)]
    assert fit_typical([*discs(10, 10), *cut]).cells == 10
    assert fit_typical([*discs(10, 9), *cut]).cells == 20
    assert touches_edge(image([CELL, disc(0, 60, 5), disc(79, 60, 5), disc(40, 0, 5), disc(40, 119, 5)])).tolist() == [
        False,
        True,
        True,
        True,
        True,
    ]


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))).filter(np.any))
def test_size_and_elongation_are_those_of_scikit_image(mask):
    typical = Typical((0.0, 1.0, 0.0), (1.0, 1e9, 1e9), 10)
    region = regionprops(mask.astype(int))[0]
    np.testing.assert_allclose(typical.of([mask]), 1 / (1 + np.log(region.area) ** 2 / 3))
    longer, shorter = ((axis / 4) ** 2 + 1 / 12 for axis in (region.axis_major_length, region.axis_minor_length))
    shape_only = Typical((0.0, 1.0, 0.0), (1e9, 1e9, 1.0), 10)  # a pixel's own second moment is 1 / 12
    np.testing.assert_allclose(shape_only.of([mask]), 1 / (1 + (0.5 * np.log(longer / shorter)) ** 2 / 3), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8))).filter(np.any))
def test_solidity_counts_the_pixels_of_the_hull(mask):
    typical = Typical((0.0, 1.0, 0.0), (1e9, 1.0, 1e9), 10)
    rows, columns = np.nonzero(mask)
    points = np.stack([columns, rows], axis=1)

    def outside(x, y):  # some line through two pixels, or through one, parts (x, y) from all of them
        for a in points:
            for b in points:
                step = b - a
                sides = step[0] * (points[:, 1] - a[1]) - step[1] * (points[:, 0] - a[0])
                own = step[0] * (y - a[1]) - step[1] * (x - a[0])
                if step.any() and (sides >= 0).all() and own < 0:
                    return True
        low, high = points.min(axis=0), points.max(axis=0)
        return not (low[0] <= x <= high[0] and low[1] <= y <= high[1])

    hull = sum(not outside(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]))
    np.testing.assert_allclose(typical.of([mask]), 1 / (1 + (1 - mask.sum() / hull) ** 2 / 3))


def test_a_document_comes_back_through_json():
    typical = fit_typical([*discs(10, 8), *discs(12, 5)])
    assert Typical.from_document(json.loads(json.dumps(typical.to_document()))) == typical


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("cells"),
        lambda d: d.pop("solidity"),
        lambda d: d.update(cells=0),
        lambda d: d.update(cells="many"),
        lambda d: d.update(log_area=3),
        lambda d: d["log_area"].update(median=None),
        lambda d: d["log_area"].update(median=math.nan),
        lambda d: d["elongation"].update(spread=0),
        lambda d: d["elongation"].update(spread=math.inf),
    ],
)
def test_a_damaged_document_is_refused(damage):
    document = fit_typical(discs(10, 12)).to_document()
    damage(document)
    with pytest.raises(InputError, match="typical cells"):
        Typical.from_document(document)
