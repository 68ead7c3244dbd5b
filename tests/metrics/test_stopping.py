"""When to stop, on cells and numbers worked out by hand."""

import numpy as np
import pytest

from loop.errors import InputError, ShapeError
from loop.metrics.paired import Interval
from loop.metrics.stopping import agreement, gain_an_hour, is_budget_spent, is_stable
from loop.types import Instances


def squares(*corners: tuple[int, int]) -> Instances:
    boxes = [(x, y, x + 4, y + 4) for x, y in corners]
    return Instances.build((32, 32), boxes, [np.ones((4, 4), bool)] * len(boxes))


def test_agreement_by_hand() -> None:
    one, other = squares((0, 0), (10, 10), (20, 20)), squares((0, 0), (11, 10))
    # (11, 10) shares 12 of 20 px with (10, 10), IoU 0.6: 2 pairs of 3 and 2 cells.
    assert agreement([one], [other]) == pytest.approx(4 / 5)
    assert agreement([other], [one]) == pytest.approx(4 / 5)
    assert agreement([one, squares()], [other, squares()]) == pytest.approx(0.9)
    assert agreement([squares()], [one]) == 0
    assert agreement([one], [one]) == 1


def test_agreement_needs_the_same_images() -> None:
    with pytest.raises(ShapeError, match="2 images of one model, 1 of the other"):
        agreement([squares(), squares()], [squares()])
    with pytest.raises(InputError, match="no images"):
        agreement([], [])


@pytest.mark.parametrize(
    ("agreements", "stable"),
    [([], False), ([0.95, 0.95], False), ([0.2, 0.9, 0.95, 0.92], True), ([0.95, 0.95, 0.89], False)],
)
def test_three_in_a_row_are_stable(agreements: list[float], stable: bool) -> None:
    assert is_stable(agreements) is stable


def test_other_thresholds_and_none_at_all() -> None:
    assert is_stable([0.6], threshold=0.5, rounds=1)
    with pytest.raises(InputError, match="rounds is 0"):
        is_stable([], rounds=0)


def test_the_budget() -> None:
    assert is_budget_spent(60, 60)
    assert not is_budget_spent(59.9, 60)
    assert not is_budget_spent(1e9, None)


def test_gain_an_hour() -> None:
    assert gain_an_hour(Interval(0.01, 0.0, 0.03), 1800) == pytest.approx((0.02, 0.0, 0.06))
    assert gain_an_hour(Interval(0.01, 0.0, 0.03), 0) is None
    with pytest.raises(InputError, match="-1 s"):
        gain_an_hour(Interval(0.01, 0.0, 0.03), -1)
