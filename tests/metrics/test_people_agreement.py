"""Agreement of two people against numbers worked out by hand."""

import numpy as np
import pytest

from loop.errors import ShapeError
from loop.masks import from_masks
from loop.metrics.agreement import agreement_of, summary_of
from loop.types import Instances

SHAPE = (20, 40)


def boxes(*places: tuple[int, int, int, int]) -> Instances:
    """Cells that fill rows y0..y1 and columns x0..x1."""
    masks = np.zeros((len(places), *SHAPE), np.bool_)
    for mask, (y0, x0, y1, x1) in zip(masks, places, strict=True):
        mask[y0:y1, x0:x1] = True
    return from_masks(list(masks), SHAPE)


# ten by ten cells: the same; shifted by two columns (80 / 120 = 2/3); only the first has the third
FIRST = boxes((0, 0, 10, 10), (0, 14, 10, 24), (0, 28, 10, 38))
SECOND = boxes((0, 0, 10, 10), (0, 16, 10, 26))


def test_three_cells_against_two() -> None:
    found = agreement_of(FIRST, SECOND)
    assert (found.n_first, found.n_second, found.n_pairs, found.count_difference) == (3, 2, 2, 1)
    assert found.f1 == pytest.approx(2 * 2 / 5)
    assert found.mean_iou == pytest.approx((1 + 2 / 3) / 2)
    assert found.pq == pytest.approx((1 + 2 / 3) / 2.5)
    # up to .65 both pairs count, 2 of 3 different cells; above it one of 4
    assert found.ap == pytest.approx((4 * 2 / 3 + 6 * 1 / 4) / 10)


def test_the_two_are_equals() -> None:
    assert agreement_of(SECOND, FIRST)[2:] == agreement_of(FIRST, SECOND)[2:]


def test_scores_and_classes_do_not_count() -> None:
    other = Instances.build(
        SHAPE, FIRST.boxes_xyxy.tolist(), list(FIRST.masks), scores=[0.1, 0.9, 0.5], labels=[0, 1, 0]
    )
    assert agreement_of(FIRST, other) == agreement_of(FIRST, FIRST) == (3, 3, 3, 3.0, 1.0)


@pytest.mark.parametrize(("other", "value"), [(boxes(), 1.0), (SECOND, 0.0)])
def test_no_cells(other: Instances, value: float) -> None:
    found = agreement_of(boxes(), other)
    assert (found.f1, found.pq, found.ap, found.mean_iou) == (value, value, value, None)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ShapeError):
        agreement_of(FIRST, Instances.build((9, 9)))


def test_a_summary_counts_cells_and_averages_images() -> None:
    alike, unlike = agreement_of(FIRST, FIRST), agreement_of(FIRST, SECOND)
    assert summary_of([alike, unlike]) == {
        "f1": pytest.approx(2 * 5 / 11),
        "pq": pytest.approx(2 * (3 + 5 / 3) / 11),
        "mean_iou": pytest.approx((3 + 5 / 3) / 5),
        "ap": pytest.approx((1 + unlike.ap) / 2),
        "count_difference": 0.5,
        "cells": 11,
    }
    assert summary_of([]) == {}
    assert summary_of([agreement_of(boxes(), SECOND)])["mean_iou"] is None
