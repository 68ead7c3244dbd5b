"""The budget of corners: what is thinned out, what is not, and what is said of it."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop import masks
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import from_results, to_results
from loop.rings import MIN_POLYGON_IOU, fewer_corners, outlines

SHAPE = (240, 300)
DEFAULT = Interface.parse(label_config())
POLYGONS = Interface.parse(
    '<View><Image name="image" value="$image"/>'
    '<PolygonLabels name="p" toName="image"><Label value="Cell"/></PolygonLabels></View>'
)


def wavy_cells(seed=0, n=12, hole=None):
    """Cells of 8 to 25 px radius with a wavy border, which want many corners; `hole` = the index of one with a hole."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    drawn = []
    for i in range(n):
        (y, x), radius = rng.uniform((30, 30), (SHAPE[0] - 30, SHAPE[1] - 30)), rng.uniform(8, 25)
        angle = np.arctan2(rows - y, columns - x)
        reach = np.hypot(rows - y, columns - x) / (radius * (1 + 0.1 * np.sin(5 * angle)))
        drawn.append((reach <= 1) & (reach > 0.6 if i == hole else True))
    return masks.from_masks(drawn, SHAPE, image_id="plate1")


def corners(results):
    return sum(len(item["value"].get("points", ())) for item in results)


def iou_of_way_back(cells, results):
    back = masks.to_dense(from_results(results, DEFAULT, SHAPE).instances)
    return [(a & b).sum() / (a | b).sum() for a, b in zip(masks.to_dense(cells), back, strict=True)]


def test_without_or_within_the_budget_nothing_changes(caplog):
    cells = wavy_cells()
    plain = to_results(cells, DEFAULT)
    with caplog.at_level(logging.INFO, logger="loop.labelstudio.results"):
        assert to_results(cells, DEFAULT, max_points=0) == plain
        assert to_results(cells, DEFAULT, max_points=corners(plain)) == plain
    assert caplog.text == ""


@given(st.integers(0, 2**32 - 1), st.floats(0.6, 0.95))
@settings(max_examples=20, deadline=None)
def test_the_budget_is_kept_and_no_cell_falls_below_the_floor(seed, share):
    cells = wavy_cells(seed)
    budget = int(share * corners(to_results(cells, DEFAULT)))
    results = to_results(cells, DEFAULT, max_points=budget)
    ious = iou_of_way_back(cells, results)
    assert min(ious) >= MIN_POLYGON_IOU
    least = corners(to_results(cells, DEFAULT, max_points=1))
    assert corners(results) <= max(budget, least)


def test_what_the_budget_cost_is_said(caplog):
    cells = wavy_cells()
    before = corners(to_results(cells, DEFAULT))
    with caplog.at_level(logging.INFO, logger="loop.labelstudio.results"):
        results = to_results(cells, DEFAULT, max_points=int(0.8 * before))
    ious = iou_of_way_back(cells, results)
    said = (
        f"the 12 polygons of image 'plate1' have {corners(results)} corners in place of {before}; "
        f"IoU with the cells {np.mean(ious):.4f} on average, {min(ious):.4f} at least"
    )
    assert [record.getMessage() for record in caplog.records] == [said]
    assert np.mean(ious) < np.mean(iou_of_way_back(cells, to_results(cells, DEFAULT)))


def test_the_floor_wins_over_the_budget_and_what_remains_is_said(caplog):
    cells = wavy_cells()
    with caplog.at_level(logging.WARNING, logger="loop.labelstudio.results"):
        results = to_results(cells, DEFAULT, max_points=10)
    assert min(iou_of_way_back(cells, results)) >= MIN_POLYGON_IOU
    assert f"keep {corners(results)} corners, over the budget of 10" in caplog.text


def test_a_brush_region_costs_no_corners_and_a_ring_below_the_floor_keeps_its_form():
    cells = wavy_cells(hole=3)
    plain, thin = to_results(cells, DEFAULT), to_results(cells, DEFAULT, max_points=1)
    assert [item["type"] for item in thin] == [item["type"] for item in plain]
    assert thin[3] == plain[3]
    assert thin[3]["type"] == "brushlabels"
    holed = to_results(cells, POLYGONS, max_points=1)[3]
    assert holed == to_results(cells, POLYGONS)[3]


def test_the_corners_that_cost_least_go_first():
    cells = wavy_cells()
    rings = outlines(cells.masks, 0.5)
    before = sum(len(ring.points_xy) for ring in rings)
    little, much = (fewer_corners(rings, cells.masks, 0.5, int(share * before)) for share in (0.9, 0.7))
    assert 0.85 * before < sum(len(ring.points_xy) for ring in little) <= 0.9 * before
    assert np.mean([ring.iou for ring in little]) > np.mean([ring.iou for ring in much])
    assert fewer_corners([], [], 0.5, 0) == []


@pytest.mark.parametrize("side", [1, 2, 3])
def test_the_smallest_cells_stay(side):
    cells = masks.from_masks([np.pad(np.ones((side, side), bool), 2)], (side + 4, side + 4))
    assert corners(to_results(cells, DEFAULT, tolerance_px=0.0, max_points=1)) >= 3
