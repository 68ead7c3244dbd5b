import math

import pytest
import torch

from loop.errors import InputError, NonFiniteError, ShapeError
from loop.losses.sparse import sparse_loss

SURE = 40.0


def discs(size, *centres_radius):
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([(x - cx) ** 2 + (y - cy) ** 2 <= r * r for cx, cy, r in centres_radius])


def random_output(seed=0, batch=2, queries=5, size=8, objectness=True):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.randn(batch, queries, size, size, generator=generator).requires_grad_()
    classes = torch.randn(batch, queries, generator=generator).requires_grad_()
    judged = torch.randn(batch, queries, generator=generator).requires_grad_() if objectness else None
    return masks, classes, judged


CELLS = [discs(16, (4, 4, 3), (11, 10, 4)), torch.zeros(0, 16, 16, dtype=torch.bool)]
WEIGHTS = [torch.ones(2), torch.ones(0)]
EVERYWHERE = torch.ones(2, 1, 16, 16)


def test_a_perfect_output_costs_nothing():
    cells = CELLS[0].repeat_interleave(2, dim=0)[::2]
    masks = torch.full((1, 3, 16, 16), -SURE)
    masks[0, [2, 0]] = torch.where(cells, SURE, -SURE)
    classes = torch.tensor([[SURE, -SURE, SURE]])
    loss = sparse_loss(masks, classes, torch.full((1, 3), SURE), [cells], WEIGHTS[:1], EVERYWHERE[:1])
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_by_hand():
    """One query, one cell on half of a 2 x 2 frame, probability 0.5 everywhere, class probability 0.8, IoU said 0.7."""
    cell = torch.tensor([[[True, True], [False, False]]])
    logits = torch.full((1, 1, 2, 2), 1e-6)
    classes, judged = torch.logit(torch.tensor([[0.8]])), torch.logit(torch.tensor([[0.7]]))
    loss = sparse_loss(
        logits, classes, judged, [cell], [torch.ones(1)], torch.ones(1, 1, 2, 2),
        class_weight=3, mask_dice_weight=5, mask_bce_weight=7, objectness_weight=11,
    )  # fmt: skip
    focal = -0.25 * 0.2**2 * math.log(0.8)
    dice = 1 - 2 * (0.5 + 0.5) / (4 * 0.25 + 2)
    iou = 2 / 4  # cut at 0.5 the mask is the whole frame
    assert loss.item() == pytest.approx(3 * focal + 5 * dice + 7 * math.log(2) + 11 * (0.7 - iou) ** 2, rel=2e-3)


def test_targets_are_averaged_over_the_pixels_of_a_mask():
    cell = torch.zeros(1, 4, 4, dtype=torch.bool)
    cell[0, 0, :3] = True  # half of one mask pixel, a quarter of the next
    logits = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]]])
    only_dice = {"class_weight": 0, "mask_bce_weight": 0, "mask_dice_weight": 1}
    loss = sparse_loss(logits, torch.zeros(1, 1), None, [cell], [torch.ones(1)], torch.ones(1, 1, 4, 4), **only_dice)
    assert loss.item() == pytest.approx(1 - 2 * (0.5 * 0.75) / (4 * 0.25 + 0.25 + 0.0625), rel=2e-3)


def test_the_order_of_queries_and_of_cells_does_not_matter():
    masks, classes, judged = (t.detach() for t in random_output())
    cells = [CELLS[0], discs(16, (8, 8, 5))]
    weights = [torch.tensor([1.0, 0.5]), torch.ones(1)]
    one = sparse_loss(masks, classes, judged, cells, weights, EVERYWHERE)
    order = torch.tensor([3, 0, 4, 2, 1])
    cells, weights = [cells[0].flip(0), cells[1]], [weights[0].flip(0), weights[1]]
    other = sparse_loss(masks[:, order], classes[:, order], judged[:, order], cells, weights, EVERYWHERE)
    assert float(one) == pytest.approx(float(other), rel=1e-6)


@pytest.mark.parametrize("objectness", [False, True])
def test_a_batch_without_cells_has_the_class_loss_alone(objectness):
    masks, classes, judged = random_output(objectness=objectness)
    loss = sparse_loss(masks, classes, judged, [CELLS[1]] * 2, [WEIGHTS[1]] * 2, EVERYWHERE, class_weight=2.0)
    p = classes.detach().double().sigmoid()
    assert loss.item() == pytest.approx(float(2 * (-0.75 * p**2 * (1 - p).log()).sum()), rel=1e-5)
    loss.backward()
    assert bool(torch.isfinite(classes.grad).all())
    assert masks.grad.abs().max() == 0


def test_a_cell_of_weight_zero_teaches_nothing_and_its_query_is_no_background():
    masks = torch.full((1, 2, 16, 16), -3.0)
    masks[0, 0] = torch.where(CELLS[0][0], 3.0, -3.0)
    masks[0, 1] = torch.where(CELLS[0][1], 3.0, -3.0)
    masks.requires_grad_()
    classes = torch.zeros(1, 2, requires_grad=True)
    loss = sparse_loss(masks, classes, None, CELLS[:1], [torch.tensor([0.0, 1.0])], EVERYWHERE[:1])
    loss.backward()
    assert classes.grad[0, 0] == 0
    assert classes.grad[0, 1] < 0
    assert masks.grad[0, 0].abs().max() == 0
    assert masks.grad[0, 1].abs().max() > 0


def test_masks_are_not_compared_where_pixels_have_no_weight():
    weight = EVERYWHERE.clone()
    weight[:, :, 8:] = 0
    masks, classes, judged = random_output(queries=2)
    loss = sparse_loss(masks, classes, judged, CELLS, WEIGHTS, weight, mask_bce_weight=1.0)
    loss.backward()
    assert masks.grad[0, :, 4:].abs().max() == 0
    assert masks.grad[0, :, :4].abs().max() > 0


def test_every_output_has_a_gradient():
    masks, classes, judged = random_output()
    sparse_loss(masks, classes, judged, CELLS, WEIGHTS, EVERYWHERE).backward()
    for output in (masks, classes, judged):
        assert bool(torch.isfinite(output.grad).all())
        assert output.grad.abs().max() > 0


def test_overlapping_cells_are_two_targets():
    cells = discs(16, (6, 8, 5), (10, 8, 5))
    masks = torch.full((1, 4, 16, 16), -SURE)
    masks[0, [1, 3]] = torch.where(cells, SURE, -SURE)
    classes = torch.tensor([[-SURE, SURE, -SURE, SURE]])
    loss = sparse_loss(masks, classes, None, [cells], [torch.ones(2)], EVERYWHERE[:1])
    assert loss.item() == pytest.approx(0, abs=1e-5)


def test_more_cells_than_queries():
    masks, classes, _ = random_output(queries=2)
    crowd = discs(16, (2, 2, 2), (8, 8, 2), (13, 13, 2))
    with pytest.raises(InputError, match="crop 1 of the batch holds 3 cells, the model has 2 queries"):
        sparse_loss(masks, classes, None, [CELLS[1], crowd], [WEIGHTS[1], torch.ones(3)], EVERYWHERE)


def test_nan_is_refused():
    masks, classes, _ = random_output()
    with torch.no_grad():
        classes[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="crop 0"):
        sparse_loss(masks, classes, None, CELLS, WEIGHTS, EVERYWHERE)


def test_targets_of_a_size_that_does_not_fit():
    masks, classes, _ = random_output(size=6)
    with pytest.raises(ShapeError, match=r"\(16, 16\) px, masks on \(6, 6\)"):
        sparse_loss(masks, classes, None, CELLS, WEIGHTS, EVERYWHERE)


def test_a_query_in_ignored_ground_is_not_taken_for_background():
    masks = torch.full((1, 2, 8, 8), -5.0)
    masks[0, 0, :, :4], masks[0, 1, :, 4:] = 5.0, 5.0
    classes = torch.tensor([[0.0, 2.0]])
    weight = torch.ones(1, 1, 8, 8)
    weight[..., 4:] = 0
    none = [torch.zeros((0, 8, 8), dtype=torch.bool)], [torch.zeros(0)]

    def loss(second: float, pixel_weight: torch.Tensor) -> float:
        changed = classes.clone()
        changed[0, 1] = second
        return float(sparse_loss(masks, changed, None, *none, pixel_weight))

    assert loss(2.0, weight) == pytest.approx(loss(-2.0, weight))
    assert loss(2.0, torch.ones(1, 1, 8, 8)) > loss(-2.0, torch.ones(1, 1, 8, 8))
