"""The adapters' own work, on what the packages are known to answer; the packages themselves: tests/contract."""

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from loop.config import PseudoConfig
from loop.errors import CheckpointError
from loop.masks import to_dense
from loop.pseudo.base import Tools
from loop.pseudo.cellpose import CellposeLabeller, cellpose
from loop.pseudo.mask_rcnn import MaskRcnnLabeller
from loop.pseudo.stardist import StarDistLabeller
from loop.pseudo.yolo import YoloLabeller, yolo

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


class Answers:
    """Stands for a package's model: notes what it was asked, and gives what it was told to."""

    def __init__(self, answer, **attributes):
        self.answer = answer
        self.asked = []
        self.__dict__.update(attributes)

    def eval(self, image, **options):
        self.asked.append((image, options))
        return self.answer(image)

    predict_instances = predict = eval


def flows_of(labels, logits):
    return labels.squeeze(), [None, None, logits.squeeze()], None


def test_cellpose_scores_a_cell_by_the_mean_sigmoid_of_its_logits():
    labels = np.zeros((20, 30), np.uint16)
    labels[2:4, 5:7], labels[10:12, 10:20] = 1, 4
    logits = np.full((20, 30), -3, np.float32)
    logits[2:4, 5:7] = 0
    logits[10:12, 10:15], logits[10:12, 15:20] = np.log(9), np.log(4)
    found = (
        CellposeLabeller(Answers(lambda image: flows_of(labels, logits)), "v", colour=False).propose(IMAGE).instances
    )
    np.testing.assert_allclose(found.scores, [0.5, (0.9 + 0.8) / 2], rtol=1e-6)
    np.testing.assert_array_equal(to_dense(found), [labels == 1, labels == 4])


def test_cellpose_3_sees_grey_and_estimates_the_diameter_where_it_can():
    model = Answers(lambda image: flows_of(np.zeros(image.shape, int), np.zeros(image.shape)))
    assert len(CellposeLabeller(model, "v", colour=False).propose(IMAGE).instances) == 0
    image, options = model.asked[0]
    np.testing.assert_allclose(image, IMAGE.mean(axis=2), rtol=1e-6)
    assert options == {"channels": [0, 0], "diameter": None}


@pytest.mark.parametrize("channels", [1, 3])
def test_cellpose_sam_sees_the_colours_there_are(channels):
    model = Answers(lambda image: flows_of(np.zeros(image.shape[:2], int), np.zeros(image.shape[:2])))
    CellposeLabeller(model, "v", colour=True).propose(IMAGE[..., :channels])
    image, options = model.asked[0]
    np.testing.assert_array_equal(image, IMAGE if channels == 3 else IMAGE[..., 0])
    assert options == ({"channel_axis": -1} if channels == 3 else {})


def test_cellpose_gets_a_tiny_image_continued_and_its_cells_come_back_cropped():
    model = Answers(lambda image: flows_of(np.ones(image.shape, int), np.zeros(image.shape)))
    found = CellposeLabeller(model, "v", colour=False).propose(IMAGE[:1, :3]).instances
    assert model.asked[0][0].shape == (16, 16)
    assert found.shape == (1, 3)
    np.testing.assert_array_equal(to_dense(found), np.ones((1, 1, 3), bool))


def test_stardist_takes_each_cells_own_probability_also_when_others_are_covered():
    labels = np.zeros((20, 30), np.int32)
    labels[0:2, 0:2], labels[5:9, 5:9] = 1, 3
    answer = labels, {"prob": np.array([0.7, 0.5, 0.9], np.float32)}
    model = Answers(lambda image: answer, config=SimpleNamespace(n_channel_in=1))
    found = StarDistLabeller(model, "v", device=nullcontext).propose(IMAGE).instances
    np.testing.assert_allclose(found.scores, [0.7, 0.9])
    np.testing.assert_array_equal(to_dense(found), [labels == 1, labels == 3])


@pytest.mark.parametrize(("wanted", "axes", "shape"), [(1, "YX", (20, 30)), (3, "YXC", (20, 30, 3))])
@pytest.mark.parametrize("channels", [1, 3])
def test_stardist_gets_the_channels_that_its_model_was_trained_on(wanted, axes, shape, channels):
    answer = np.zeros((20, 30), np.int32), {"prob": np.zeros(0)}
    model = Answers(lambda image: answer, config=SimpleNamespace(n_channel_in=wanted))
    StarDistLabeller(model, "v", device=nullcontext).propose(IMAGE[..., :channels])
    image, options = model.asked[0]
    assert image.shape == shape
    assert options["axes"] == axes
    assert options["predict_kwargs"] == {"verbose": 0}


def test_stardist_gets_the_1st_and_the_99_8th_percentile_at_0_and_1():
    ramp = np.linspace(0, 250, 1001).round().astype(np.uint8).reshape(7, 143, 1)
    answer = np.zeros((7, 143), np.int32), {"prob": np.zeros(0)}
    model = Answers(lambda image: answer, config=SimpleNamespace(n_channel_in=1))
    StarDistLabeller(model, "v", device=nullcontext).propose(ramp)
    image = model.asked[0][0]
    low, high = np.percentile(ramp, 1), np.percentile(ramp, 99.8)
    np.testing.assert_allclose(image, (ramp[..., 0] - low) / (high - low), atol=1e-6)


def yolo_answer(masks, scores):
    data = None if masks is None else SimpleNamespace(data=torch.tensor(masks, dtype=torch.float32))
    return [SimpleNamespace(masks=data, boxes=SimpleNamespace(conf=torch.tensor(scores)))]


def test_yolo_gives_blue_first_and_keeps_masks_with_their_scores():
    masks = np.zeros((3, 20, 30))
    masks[0, 1:3, 1:3], masks[2, 5:9, 5:9] = 1, 1  # the one between is empty and goes, with its score
    model = Answers(lambda image: yolo_answer(masks, [0.9, 0.5, 0.25]))
    found = YoloLabeller(model, "v", device="cpu", max_cells=7).propose(IMAGE).instances
    np.testing.assert_array_equal(to_dense(found), masks[[0, 2]] > 0)
    np.testing.assert_allclose(found.scores, [0.9, 0.25])
    image, options = model.asked[0]
    np.testing.assert_array_equal(image, IMAGE[..., [2, 1, 0]])
    assert (options["device"], options["max_det"], options["retina_masks"]) == ("cpu", 7, True)


def test_yolo_without_masks_gives_no_cells_and_grey_becomes_three_channels():
    model = Answers(lambda image: yolo_answer(None, []))
    assert len(YoloLabeller(model, "v", device="cpu", max_cells=7).propose(IMAGE[..., :1]).instances) == 0
    np.testing.assert_array_equal(model.asked[0][0], IMAGE[..., [0, 0, 0]])


class Detector(nn.Module):
    def forward(self, images):
        (image,) = images
        assert image.shape == (3, 20, 30)
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        assert not self.training
        masks = torch.zeros(2, 1, 20, 30)
        masks[0, 0, 2:5, 2:5], masks[1, 0, 3:9, 3:9] = 0.6, 0.4
        return [{"masks": masks, "scores": torch.tensor([0.8, 0.3]), "boxes": torch.zeros(2, 4)}]


def test_mask_rcnn_cuts_masks_at_one_half():
    found = MaskRcnnLabeller(Detector(), "v", device="cpu").propose(IMAGE[..., :1]).instances
    expected = np.zeros((20, 30), bool)
    expected[2:5, 2:5] = True
    np.testing.assert_array_equal(to_dense(found), expected[None])
    np.testing.assert_allclose(found.scores, [0.8])


def tools(**weights):
    return Tools(PseudoConfig(weights=weights), "cpu", lambda kind: None)


@pytest.mark.filterwarnings("ignore")
def test_cellpose_3_by_a_built_in_name_estimates_the_diameter(tmp_path, monkeypatch):
    models = pytest.importorskip("cellpose.models", exc_type=Exception)
    if not hasattr(models, "Cellpose"):
        pytest.skip("Cellpose 4 has no size model")
    from cellpose.resnet_torch import CPnet

    torch.manual_seed(0)
    CPnet([2, 32, 64, 128, 256], 3, sz=3, diam_mean=30.0).save_model(str(tmp_path / "cyto3"))
    size = {"A": np.zeros(256), "smean": np.zeros(256), "diam_mean": 30.0, "ymean": np.log(0.5)}
    np.save(tmp_path / "size_cyto3.npy", size)
    monkeypatch.setattr(models, "MODEL_DIR", tmp_path)
    labeller = cellpose(tools(cellpose="cyto3"))
    assert labeller.version.startswith("cellpose:cyto3-")
    scales = []
    spied = labeller._model.cp.eval

    def spy(*given, **options):
        scales.append(options.get("rescale"))
        return spied(*given, **options)

    monkeypatch.setattr(labeller._model.cp, "eval", spy)
    labeller.propose(IMAGE)
    assert scales == [None, pytest.approx(2), None]  # the size model says 15 px; networks are taught at 30


@pytest.mark.filterwarnings("ignore")
def test_yolo_says_its_licence_and_refuses_a_network_without_masks(tmp_path, caplog):
    ultralytics = pytest.importorskip("ultralytics", exc_type=Exception)
    ultralytics.YOLO("yolo11n.yaml").save(str(tmp_path / "boxes.pt"))
    with caplog.at_level(logging.WARNING, "loop.pseudo.yolo"), pytest.raises(CheckpointError, match=r"'detect'.*-seg"):
        yolo(tools(yolo=str(tmp_path / "boxes.pt")))
    assert "AGPL-3.0" in caplog.text
