import cv2
import numpy as np
import pytest
import torch

from loop.config import PseudoConfig, TrainConfig
from loop.data.dataset import Batch
from loop.data.synthetic import draw_cells
from loop.errors import InputError
from loop.pseudo.base import Tools
from loop.pseudo.mask_rcnn import mask_rcnn
from loop.training.mask_rcnn import _lesson, _share, train_mask_rcnn
from loop.types import ImageRef, Sample


def sample(folder):
    drawn = draw_cells(np.random.default_rng(0), (64, 64), 4)
    path = folder / "a.png"
    cv2.imwrite(str(path), drawn.pixels)
    return Sample(ImageRef("a", path, "", 64, 64, 3), drawn.instances)


def test_boxes_are_tight_with_exclusive_ends_and_cells_of_no_weight_are_left_out():
    masks = np.zeros((3, 32, 32), bool)
    masks[0, 2:5, 10:20] = masks[1, 0:9, 0:9] = masks[2, 31, 31] = True
    empty = np.zeros((0, 32, 32), bool)
    image = np.zeros((2, 3, 32, 32), np.float32)
    batch = Batch(
        image,
        image,
        image,
        masks=(masks, empty),
        mask_weights=(np.array([1, 0, 0.5], np.float32), np.zeros(0, np.float32)),
    )
    images, (first, second) = _lesson(batch, torch.device("cpu"))
    assert len(images) == 2
    assert first["boxes"].tolist() == [[10, 2, 20, 5], [31, 31, 32, 32]]
    assert first["labels"].tolist() == [1, 1]
    np.testing.assert_array_equal(first["masks"].numpy(), masks[[0, 2]])
    assert second["boxes"].shape == (0, 4)
    assert second["masks"].shape == (0, 32, 32)


def test_the_rate_rises_then_falls_towards_zero():
    shares = [_share(step, 100) for step in range(1, 101)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == pytest.approx(shares[9], rel=0.01)
    assert shares[9:] == sorted(shares[9:], reverse=True)
    assert 0 < shares[-1] < 0.001


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(InputError, match="steps=0"):
        train_mask_rcnn([sample(tmp_path)], tmp_path / "net.pt", TrainConfig(), steps=0)


@pytest.mark.filterwarnings("ignore")
def test_what_it_trains_is_a_labeller(tmp_path):
    pytest.importorskip("torchvision", exc_type=Exception)
    steps = []
    config = TrainConfig(crop=64, batch=1, device="cpu", elastic=0)
    before = torch.random.get_rng_state()
    file = train_mask_rcnn(
        [sample(tmp_path)], tmp_path / "net.pt", config, steps=2, log=lambda step, losses: steps.append((step, losses))
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [step for step, _ in steps] == [1, 2]
    assert {"loss_mask", "loss_classifier"} <= set(steps[0][1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "net.pt"]
    settings = PseudoConfig(weights={"mask_rcnn": str(file)}, max_cells=20)
    labeller = mask_rcnn(Tools(settings, "cpu", lambda kind: None))
    assert labeller.version.startswith("mask_rcnn:net-")
    assert labeller.propose(np.zeros((30, 40, 3), np.uint8)).instances.shape == (30, 40)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("v2", [False, True])
def test_a_bare_state_dict_from_elsewhere_is_read_with_torchvisions_own_anchors(tmp_path, v2):
    detection = pytest.importorskip("torchvision.models.detection", exc_type=Exception)
    build = detection.maskrcnn_resnet50_fpn_v2 if v2 else detection.maskrcnn_resnet50_fpn
    torch.save(build(weights=None, weights_backbone=None, num_classes=2).state_dict(), tmp_path / "other.pt")
    settings = PseudoConfig(weights={"mask_rcnn": str(tmp_path / "other.pt")})
    net = mask_rcnn(Tools(settings, "cpu", lambda kind: None))._net
    assert net.rpn.anchor_generator.sizes[0] == (32,)
    assert net.transform.min_size == (800,)
