import numpy as np
import pytest
import torch
from torch.nn import functional

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import Batch
from loop.models import new_net
from loop.models.sparse_seu_net import SparseOutput
from loop.training.criterion import Taught, criterion, lesson_of, taught

HEADS = ("interior", "nuclei", "border", "background", "overlap")
PLAIN = TrainConfig(dice=False)


def lesson(heads=HEADS, n=2, side=8, likely=None, masks=0):
    rng = torch.Generator().manual_seed(0)
    target = (torch.rand(n, len(heads), side, side, generator=rng) > 0.5).float()
    cells = torch.zeros(masks, side, side, dtype=torch.bool)
    cells[:, 1:4, 1:4] = True
    return Taught(target, torch.ones(n, 1, side, side), likely, [cells] * n, [torch.ones(masks)] * n)


def logits_of(truth):
    return torch.randn(truth.target.shape, generator=torch.Generator().manual_seed(1))


def test_the_heads_are_summed_with_their_weights():
    truth = lesson(HEADS[:4])
    logits = logits_of(truth)
    config = TrainConfig(dice=False, interior_weight=1, nuclei_weight=2, border_weight=3, background_weight=5)
    parts = [
        functional.binary_cross_entropy_with_logits(logits[:, k], truth.target[:, k]) for k in range(4)
    ]  # fmt: skip
    expected = parts[0] + 2 * parts[1] + 3 * parts[2] + 5 * parts[3]
    assert float(criterion(logits, truth, HEADS[:4], config)) == pytest.approx(float(expected), rel=1e-5)


def test_the_order_of_the_heads_is_that_of_the_channels():
    truth = lesson(("interior", "border"))
    logits = logits_of(truth)
    swapped = truth._replace(target=truth.target.flip(1))
    one = criterion(logits, truth, ("interior", "border"), PLAIN)
    two = criterion(logits.flip(1), swapped, ("border", "interior"), PLAIN)
    assert float(one) == pytest.approx(float(two), rel=1e-6)


def test_dice_is_added_to_all_heads_but_overlap():
    truth = lesson(("interior", "overlap"))
    logits = logits_of(truth)
    both, without = (criterion(logits, truth, ("interior", "overlap"), c) for c in (TrainConfig(), PLAIN))
    probs, target = logits[:, 0].sigmoid(), truth.target[:, 0]
    dice = 1 - (2 * (probs * target).sum() + 1) / ((probs + target).sum() + 1)
    assert float(both - without) == pytest.approx(float(dice), rel=1e-4)


@pytest.mark.parametrize("use", ["target", "loss"])
def test_the_overlap_map_reaches_the_overlap_head_alone(use):
    config = TrainConfig(overlap_use=use)
    likely = torch.full((2, 1, 8, 8), 0.5)
    for heads, changes in ((("interior", "overlap"), True), (("interior", "border"), False)):
        plain, mapped = lesson(heads), lesson(heads, likely=likely)
        logits = logits_of(plain)
        losses = [float(criterion(logits, truth, heads, config)) for truth in (plain, mapped)]
        assert (losses[0] != losses[1]) == changes


def test_pixels_of_weight_zero_do_not_count():
    truth = lesson(("interior", "border"))
    logits = logits_of(truth)
    counts = truth.weight.clone()
    counts[:, :, :, 4:] = 0
    half = criterion(logits, truth._replace(weight=counts), ("interior", "border"), TrainConfig())
    changed = logits.clone()
    changed[..., 4:] = 9.0
    assert float(half) == float(
        criterion(changed, truth._replace(weight=counts), ("interior", "border"), TrainConfig())
    )


def test_a_sparse_nets_overlap_head_is_added_to_its_masks():
    truth = lesson(("overlap",), masks=2)
    rng = torch.Generator().manual_seed(3)
    masks, classes = torch.randn(2, 5, 4, 4, generator=rng), torch.randn(2, 5, generator=rng)
    dense = logits_of(truth)
    alone = criterion(SparseOutput(masks, classes, None, None), truth, (), TrainConfig())
    with_head = criterion(SparseOutput(masks, classes, None, dense), truth, ("overlap",), TrainConfig())
    head = criterion(dense, truth, ("overlap",), TrainConfig())
    assert float(with_head) == pytest.approx(float(alone + head), rel=1e-6)


def test_what_a_net_is_taught():
    assert lesson_of(new_net(ModelConfig(base=4, depth=2, heads=("border", "interior")))).heads == (
        "border",
        "interior",
    )
    sparse = ModelConfig(name="sparse_seu_net", base=4, depth=2, queries=50, width=8, overlap=True)
    assert (lesson_of(new_net(sparse)).heads, lesson_of(new_net(sparse)).most_cells) == (("overlap",), 45)


def test_a_batch_becomes_tensors():
    arrays = {"image": np.zeros((1, 3, 4, 4), np.float32), "target": np.ones((1, 2, 4, 4), np.float32)}
    batch = Batch(**arrays, weight=np.ones((1, 1, 4, 4), np.float32), masks=(np.ones((3, 4, 4), np.bool_),),
                  mask_weights=(np.ones(3, np.float32),))  # fmt: skip
    truth = taught(batch, torch.device("cpu"))
    assert truth.overlap_map is None
    assert (truth.target.shape, truth.masks[0].shape, truth.masks[0].dtype) == ((1, 2, 4, 4), (3, 4, 4), torch.bool)
    assert truth.mask_weights[0].tolist() == [1, 1, 1]


def test_the_distance_is_taught_by_its_soft_cross_entropy_alone():
    truth = lesson(("interior", "distance"))
    truth = truth._replace(target=torch.rand(truth.target.shape, generator=torch.Generator().manual_seed(2)))
    logits = logits_of(truth)
    parts = [functional.binary_cross_entropy_with_logits(logits[:, k], truth.target[:, k]) for k in range(2)]
    config = TrainConfig(dice=False, distance_weight=3)
    found = float(criterion(logits, truth, ("interior", "distance"), config))
    assert found == pytest.approx(float(parts[0] + 3 * parts[1]), rel=1e-5)
    with_dice = float(criterion(logits, truth, ("interior", "distance"), TrainConfig(distance_weight=3)))
    interior = float(criterion(logits[:, :1], truth._replace(target=truth.target[:, :1]), ("interior",), TrainConfig()))
    assert with_dice == pytest.approx(interior + 3 * float(parts[1]), rel=1e-5)
