"""When labelling more is no longer worth it: successive models agree, the budget is spent, an hour brings little."""

from collections.abc import Sequence

from loop.errors import InputError, ShapeError
from loop.metrics.matching import iou_matrix, match
from loop.metrics.paired import Interval
from loop.types import Instances

STABLE_F1, STABLE_ROUNDS = 0.9, 3


def agreement(before: Sequence[Instances], after: Sequence[Instances]) -> float:
    """How far two models find the same cells in the same images: mean F1 of cells matched at IoU 0.5, in [0, 1].

    Args:
        before: cells of the one model, one entry an image.
        after: cells of the other, of the same images in the same order. Where both find none they agree (1).

    Raises:
        InputError: no images.
        ShapeError: the two are not of the same length, or an image has two sizes.

    Source: Bloodgood & Vijay-Shanker, CoNLL 2009, stabilising predictions on a stop set. Differs: F1 in place of
    Cohen's kappa, which it becomes where most of what could be found is background (Hripcsak & Rothschild, JAMIA 12,
    2005); whatever is not a cell cannot be counted here.
    """
    if len(before) != len(after):
        raise ShapeError(f"{len(before)} images of one model, {len(after)} of the other; give the same images to both")
    if not before:
        raise InputError("no images to compare two models on; give at least one")
    shares = []
    for one, other in zip(before, after, strict=True):
        pairs = len(match(iou_matrix(one, other), 0.5))
        shares.append(2 * pairs / (len(one) + len(other)) if len(one) + len(other) else 1.0)
    return sum(shares) / len(shares)


def is_stable(agreements: Sequence[float], *, threshold: float = STABLE_F1, rounds: int = STABLE_ROUNDS) -> bool:
    """Whether the last `rounds` agreements of successive models all reach `threshold`; False while there are fewer.

    Args:
        agreements: in [0, 1], the oldest first.
        threshold: in [0, 1].
        rounds: at least 1.

    Raises:
        InputError: `rounds` is below 1.

    Source: Bloodgood & Vijay-Shanker, CoNLL 2009, section 3: three in a row. Differs: their threshold is a kappa of
    0.99 for a classifier that is trained to its optimum; networks trained from scratch for a fixed time differ more.
    """
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; give at least 1, such as 3")
    return len(agreements) >= rounds and min(agreements[-rounds:]) >= threshold


def is_budget_spent(minutes: float, budget: float | None) -> bool:
    """Whether people have worked for `budget` minutes; never where there is no budget (None)."""
    return budget is not None and minutes >= budget


def gain_an_hour(gain: Interval, seconds: float) -> Interval | None:
    """The gain in score for each hour of people's work, where it takes `seconds`; None where that is not known (0).

    Raises:
        InputError: `seconds` is below 0.
    """
    if seconds < 0:
        raise InputError(f"the work takes {seconds} s; give at least 0")
    if seconds == 0:
        return None
    hours = seconds / 3600
    return Interval(gain.mean / hours, gain.low / hours, gain.high / hours)
