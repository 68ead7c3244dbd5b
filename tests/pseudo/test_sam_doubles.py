"""Which of SAM's many masks say something new; no table of all pairs of cells is made."""

import importlib
import tracemalloc

import numpy as np
import pytest

from loop.metrics.matching import areas, intersections, iou_matrix
from loop.types import Instances

MODULE = importlib.import_module("loop.pseudo.sam")  # the package also has a function of that name


def scattered(n, seed, shape=(600, 600)):
    """Squares at random places, some on top of one another, with scores that tie."""
    rng = np.random.default_rng(seed)
    corners, side = rng.integers(0, 560, (n, 2)), rng.integers(8, 30, n)
    boxes = np.concatenate([corners, corners + side[:, None]], axis=1)
    return Instances.build(shape, boxes, [np.ones((s, s), bool) for s in side], scores=rng.integers(0, 5, n) / 5)


def test_of_doubles_the_best_stays_as_a_table_of_all_pairs_says():
    cells = scattered(700, 0)
    cells = MODULE._added(cells, cells.take(range(0, 700, 3)))  # none is new: half of each is covered
    assert len(cells) == 700
    near = Instances.build(cells.shape, cells.boxes_xyxy - [1, 0, 1, 0] * (cells.boxes_xyxy[:, :1] > 0), cells.masks)
    both = Instances.build(
        cells.shape,
        np.concatenate([cells.boxes_xyxy, near.boxes_xyxy]),
        [*cells.masks, *near.masks],
        scores=np.concatenate([cells.scores, np.flip(cells.scores)]),
    )
    iou = iou_matrix(both, both)
    expected = []
    for i in np.argsort(-both.scores, kind="stable"):
        if all(iou[i, j] <= MODULE.NMS_IOU for j in expected):
            expected.append(int(i))
    assert len(expected) < 1000
    assert MODULE._best(both) == sorted(expected)


def test_what_is_new_is_what_a_table_of_all_pairs_says():
    cells, more = scattered(300, 1), scattered(500, 2)
    shared = intersections(more, cells)
    smaller = np.minimum(areas(more)[:, None], areas(cells)[None])
    new = np.flatnonzero((shared <= MODULE.COVERED * smaller).all(axis=1))
    assert 0 < len(new) < 500
    found = MODULE._added(cells, more)
    assert found.boxes_xyxy.tolist() == [*cells.boxes_xyxy.tolist(), *more.boxes_xyxy[new].tolist()]


@pytest.mark.parametrize("compare", [lambda cells: MODULE._best(cells), lambda cells: MODULE._added(cells, cells)])
def test_memory_does_not_grow_with_the_square_of_the_cells(compare):
    cells = scattered(1400, 3)
    tracemalloc.start()
    compare(cells)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1400 * 1400 * 8  # not even one table
