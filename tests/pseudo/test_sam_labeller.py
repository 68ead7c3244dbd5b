import csv
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from loop.config import PseudoConfig
from loop.data.intensity import stretch
from loop.errors import CheckpointError, ShapeError
from loop.masks import from_label_image, from_masks, to_dense
from loop.models.sam import Answers, segment_anything
from loop.models.sam_weights import build_sam, load_sam
from loop.pseudo.base import Tools
from loop.pseudo.sam import SamLabeller, agreement, one_piece, peaks, sam
from loop.rings import Crop, crop_mask
from loop.types import Instances

MODULE = importlib.import_module("loop.pseudo.sam")  # the package also has a function of that name
MINI = Path(__file__).parents[2] / "examples" / "dsb2018-mini"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_sam):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    generator = torch.Generator().manual_seed(3)
    state = {name: torch.randn(v.shape, generator=generator) for name, v in build_sam(small_sam).state_dict().items()}
    for name, value in state.items():  # masks that are steep and differ by prompt, scores within [0, 1]
        value *= 1.0 if name.startswith(("mask_decoder", "prompt_encoder")) else 0.3
        value *= 0.2 if "transformer" in name and "norm" not in name else 1.0
        value *= 9.0 if "output_hypernetworks_mlps" in name and ".layers.2." in name else 1.0
        value *= 0.01 if name.startswith("mask_decoder.iou_prediction_head.layers.2.") else 1.0
    state["mask_decoder.iou_prediction_head.layers.2.bias"] += 0.5
    torch.save(state, path)
    return str(path)


def tools(checkpoint="", **settings):
    config = PseudoConfig(sam={"checkpoint": checkpoint, "points_per_side": 6, **settings})
    return Tools(config, "cpu", lambda _: pytest.fail("not asked for"))


def sam_config(**settings):
    return tools(**settings).config.sam


class Seer:
    """Answers from a label image: a point's whole region, a part of it, and everything."""

    version = "seer-1"

    def __init__(self, labels, side=64):
        self.labels, self.side, self.encoded, self.asked = labels, side, [], []

    def encode(self, image):
        self.encoded.append(image.shape)
        return image[:, :, 0].astype(int)  # the image is the label image, times 10

    def decode(self, embedding, *, points=None, point_labels=None, boxes=None, multimask=True, least=(0, 0)):
        self.asked.append((points, boxes))
        crops = []
        for x, y in np.asarray(points)[:, 0]:
            value = embedding[int(y), int(x)]
            whole = (embedding == value) & (value > 0)
            part = ndimage.binary_erosion(whole, iterations=2)
            crops.append((crop_mask(part), crop_mask(whole), crop_mask(np.ones_like(whole))))
        n = len(crops)
        return Answers(tuple(crops), np.tile(np.float32([0.9, 0.8, 0.99]), (n, 1)), np.full((n, 3), 0.97, np.float32))


def scene(shape=(40, 60), cells=((5, 5, 12, 14), (20, 30, 16, 12))):
    labels = np.zeros(shape, np.int32)
    for value, (y, x, h, w) in enumerate(cells, start=1):
        labels[y : y + h, x : x + w] = value
    return labels


def see(labels, mode, *, hint=None, side=64, **settings):
    seer = Seer(labels, side)
    labeller = SamLabeller("sam", seer, sam_config(mode=mode, **settings))
    image = np.repeat((labels * 10).astype(np.uint8)[:, :, None], 3, axis=2)
    return labeller.propose(image, image_id="a", hint=hint), seer


@pytest.fixture(autouse=True)
def plain_intensities(monkeypatch):
    monkeypatch.setattr(MODULE, "stretch", lambda image, channels, dark_background: image)


def test_peak_is_the_pixel_farthest_from_the_edge():
    labels = np.zeros((30, 40), np.int32)
    labels[2:9, 3:10] = 1  # a 7 x 7 square: its middle pixel is (5, 6)
    labels[20, 5:30] = 2  # a line of one pixel
    labels[15:26, 32:37] = 3
    labels[18:23, 29:37] = 3  # widest where the arms meet
    points = peaks(from_label_image(labels))
    assert points[0].tolist() == [6.5, 5.5]
    assert points[1][1] == 20.5
    row, column = (int(v) for v in points[2][::-1])
    depth = ndimage.distance_transform_edt(labels == 3)
    assert depth[row, column] == depth.max()


def test_agreement_by_hand():
    square = Crop((0, 0, 10, 10), np.ones((10, 10), bool))
    half = Crop((0, 0, 10, 5), np.ones((5, 10), bool))
    apart = Crop((20, 20, 30, 30), np.ones((10, 10), bool))
    assert agreement(square, square) == 1
    assert agreement(square, half) == 0.5 * 0.5
    assert agreement(square, apart) == 0


def test_one_piece_is_the_largest_with_its_holes_filled():
    mask = np.zeros((12, 14), bool)
    mask[1:7, 2:8] = True
    mask[3:5, 4:6] = False
    mask[10:, 12:] = True
    piece = one_piece(Crop((100, 50, 114, 62), mask))
    assert piece.box_xyxy == (102, 51, 108, 57)
    assert piece.mask.all()


def test_prompted_takes_the_mask_that_agrees_with_the_hint():
    labels = scene()
    hint = from_label_image(labels)
    (cells, stability), seer = see(labels, "prompted", hint=hint)
    assert np.array_equal(to_dense(cells), to_dense(hint))
    assert cells.scores.tolist() == pytest.approx([0.8, 0.8])
    assert stability.tolist() == pytest.approx([0.97, 0.97])
    assert cells.source == "pseudo"
    assert cells.model_version == "sam:seer-1"
    assert cells.image_id == "a"
    assert cells.weights.tolist() == [1, 1]
    points, boxes = seer.asked[0]
    assert points.shape == (2, 1, 2)
    assert boxes.tolist() == hint.boxes_xyxy.tolist()


def test_prompted_leaves_out_where_nothing_agrees_and_what_two_hints_share():
    labels = scene()
    wrong = np.zeros_like(labels)
    wrong[34:38, 2:10] = 1  # nothing there
    wrong[5:17, 5:19] = 2
    (cells, _), _ = see(labels, "prompted", hint=from_label_image(wrong))
    assert cells.boxes_xyxy.tolist() == [[5, 5, 19, 17]]
    twice = from_masks([labels == 1, ndimage.binary_erosion(labels == 1)], labels.shape)
    (cells, _), _ = see(labels, "prompted", hint=twice)
    assert cells.boxes_xyxy.tolist() == [[5, 5, 19, 17]]


@pytest.mark.parametrize("hint", [None, Instances.build((40, 60))])
def test_prompted_without_a_hint_proposes_and_costs_nothing(hint):
    (cells, stability), seer = see(scene(), "prompted", hint=hint)
    assert len(cells) == len(stability) == 0
    assert seer.encoded == []


def test_automatic_finds_wholes_and_parts_but_not_everything():
    labels = scene()
    (cells, stability), seer = see(labels, "automatic", points_per_side=12, hint=from_label_image(labels))
    wholes = {tuple(box) for box in from_label_image(labels).boxes_xyxy.tolist()}
    boxes = {tuple(box) for box in cells.boxes_xyxy.tolist()}
    assert wholes <= boxes
    assert len(boxes) == len(cells) == len(stability)
    assert (0, 0, 60, 40) not in boxes
    assert len(seer.encoded) == 1


def test_both_adds_what_the_champion_missed():
    labels = scene()
    hint = from_label_image(np.where(labels == 1, 1, 0).astype(np.int32))
    (cells, stability), seer = see(labels, "both", hint=hint, points_per_side=12)
    boxes = cells.boxes_xyxy.tolist()
    assert boxes[0] == [5, 5, 19, 17]
    assert [30, 20, 42, 36] in boxes
    assert all(box[0] >= 30 for box in boxes[1:])
    assert len(stability) == len(cells)
    assert len(seer.encoded) == 1


def test_modes_say_what_they_need():
    needs = {mode: SamLabeller("sam", Seer(None), sam_config(mode=mode)).needs_hint for mode in ("prompted", "both")}
    assert needs == {"prompted": True, "both": False}


@pytest.mark.parametrize("mode", ["prompted", "automatic"])
def test_large_images_are_seen_in_windows_and_cells_stay_whole(mode):
    cells = [(y, x, 9, 11) for y in range(6, 180, 21) for x in range(6, 150, 23)]
    labels = np.zeros((200, 170), np.int32)
    for value, (y, x, h, w) in enumerate(cells):
        labels[y : y + h, x : x + w] = 1 + value % 20
    pieces = ndimage.label(labels)[0].astype(np.int32)
    hint = from_label_image(pieces)
    (found, _), seer = see(pieces % 20 + (pieces > 0), mode, hint=hint, side=64, points_per_side=24, hsv_filter=False)
    assert len(seer.encoded) > 4
    assert max(max(shape[:2]) for shape in seer.encoded) == 64
    truth = {(tuple(b), m.sum()) for b, m in zip(hint.boxes_xyxy.tolist(), hint.masks, strict=True)}
    seen = {(tuple(b), m.sum()) for b, m in zip(found.boxes_xyxy.tolist(), found.masks, strict=True)}
    assert truth <= seen
    assert mode == "automatic" or truth == seen


def test_limits_of_area():
    tiny = scene(cells=((5, 5, 3, 3), (20, 30, 16, 12)))
    (cells, _), _ = see(tiny, "prompted", hint=from_label_image(tiny))
    assert len(cells) == 1
    huge = scene(cells=((0, 0, 38, 58),))
    (cells, _), _ = see(huge, "prompted", hint=from_label_image(huge))
    assert len(cells) == 0


def test_a_hint_of_another_size_is_refused():
    with pytest.raises(ShapeError, match="the hint of 'a'"):
        see(scene(), "prompted", hint=Instances.build((4, 4)))


def test_colours_of_known_cells_choose_automatic_masks():
    labels = scene(cells=((4, 4, 10, 10), (4, 30, 10, 10), (22, 4, 10, 10), (22, 30, 10, 10)))
    image = np.full((*labels.shape, 3), 255, np.uint8)
    for value, colour in enumerate([(120, 40, 160), (120, 42, 158), (250, 200, 210), (250, 202, 208)], start=1):
        image[labels == value] = colour

    class Blind(Seer):
        def encode(self, image):
            return labels * 10

    known = np.float32([[0.0, -0.75, 0.63]])  # hue 270 deg, saturation 0.75, value 0.63: the two purple squares
    config = sam_config(mode="automatic", points_per_side=12)
    purple = SamLabeller("sam", Blind(labels), config, colours=known).propose(image).instances
    everything = SamLabeller("sam", Blind(labels), sam_config(mode="automatic", points_per_side=12, hsv_filter=False))
    tops = {box[1] < 16 for box in purple.boxes_xyxy.tolist()}
    assert tops == {True}
    assert {box[1] < 16 for box in everything.propose(image).instances.boxes_xyxy.tolist()} == {True, False}
    hint = from_label_image(np.where(labels == 1, 1, 0).astype(np.int32))
    hinted = SamLabeller("sam", Blind(labels), config).propose(image, hint=hint).instances
    assert {box[1] < 16 for box in hinted.boxes_xyxy.tolist()} == {True}


@pytest.mark.parametrize("nms", [0.7, 1.0])
def test_automatic_masks_are_those_of_the_package(checkpoint, small_sam, monkeypatch, nms):
    monkeypatch.setattr(MODULE, "MAX_SHARE", 1.0)
    monkeypatch.setattr(MODULE, "MIN_AREA", 1)
    monkeypatch.setattr(MODULE, "NMS_IOU", nms)
    monkeypatch.setattr(MODULE, "one_piece", lambda crop: crop)
    net = build_sam(small_sam)
    net.load_state_dict(torch.load(checkpoint), assign=True)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    theirs = segment_anything().SamAutomaticMaskGenerator(
        net, points_per_side=6, pred_iou_thresh=0.2, stability_score_thresh=0.5, box_nms_thresh=nms
    )
    expected = theirs.generate(image)
    model = load_sam("vit_b", checkpoint, device="cpu", precision="fp32")
    config = sam_config(mode="automatic", hsv_filter=False)
    ours, stability = SamLabeller("sam", model, config, least=(0.2, 0.5)).propose(image)
    assert len(ours) == len(expected)
    assert len(ours) >= (1 if nms < 1 else 36)
    masks, stabilities = np.stack([r["segmentation"] for r in expected]), [r["stability_score"] for r in expected]
    for mask, stable in zip(to_dense(ours), stability, strict=True):
        overlap = (mask & masks).sum(axis=(1, 2)) / (mask | masks).sum(axis=(1, 2))
        assert overlap.max() > 0.97
        assert stable == pytest.approx(stabilities[overlap.argmax()], abs=0.05)


@pytest.mark.parametrize("mode", ["automatic", "prompted", "both"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1, 1), (1, 400, 3), (60, 50, 1), (130, 90, 3)])
@pytest.mark.parametrize("value", [None, 0])
def test_any_image_with_a_small_sam(checkpoint, mode, shape, value, monkeypatch):
    monkeypatch.setattr(MODULE, "stretch", stretch)
    monkeypatch.setattr(MODULE, "AGREEMENT", 0.0)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, shape, dtype=np.uint8) if value is None else np.full(shape, value, np.uint8)
    labels = np.zeros(shape[:2], np.int32)
    labels[2:12, 0:9], labels[20:40, 20:35], labels[90:120, 60:80] = 1, 2, 3
    hint = from_label_image(labels)
    small = load_sam("vit_b", checkpoint, device="cpu")
    labeller = SamLabeller("sam", small, sam_config(mode=mode, points_per_side=4), least=(0.0, 0.3))
    cells, stability = labeller.propose(image, image_id="x", hint=hint)
    assert cells.shape == shape[:2]
    assert stability.shape == (len(cells),)
    assert ((cells.scores >= 0) & (cells.scores <= 1)).all()
    assert ((stability >= 0) & (stability <= 1)).all()


def test_the_builder_on_real_images(checkpoint, monkeypatch):
    monkeypatch.setattr(MODULE, "stretch", stretch)
    monkeypatch.setattr(MODULE, "ZOOM", 100)
    labeller = sam(tools(checkpoint, mode="both"))
    assert labeller.version.startswith("sam:vit_b-")
    with (MINI / "manifest.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    kinds = {row["modality"]: row for row in rows}
    assert len(kinds) > 2
    for row in kinds.values():
        pixels = np.atleast_3d(np.asarray(Image.open(MINI / row["image"])))[:200, :200]
        hint = from_label_image(np.asarray(Image.open(MINI / row["label"]))[:200, :200].astype(np.int32))
        cells, stability = labeller.propose(pixels, image_id=row["image"], hint=hint)
        again, _ = labeller.propose(pixels, image_id=row["image"], hint=hint)
        assert cells.shape == pixels.shape[:2]
        assert len(stability) == len(cells)
        assert cells.boxes_xyxy.tolist() == again.boxes_xyxy.tolist()


def test_no_checkpoint_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"sam_vit_b_01ec64\.pth is not there.*goes on without SAM"):
        sam(tools())
