"""Labeller `sam2` against a stub of the package's image predictor."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from loop.config import PseudoConfig
from loop.errors import CheckpointError, ConfigError, NonFiniteError
from loop.masks import from_label_image
from loop.models.sam2 import Sam2
from loop.pseudo.base import Tools
from loop.pseudo.sam2 import sam2


def scene(cells):
    labels = np.zeros((40, 60), np.int32)
    for value, (y, x, h, w) in enumerate(cells, start=1):
        labels[y : y + h, x : x + w] = value
    return labels


def sam2_tools(weights):
    return Tools(PseudoConfig(weights=weights), "cpu", lambda _: pytest.fail("not asked for"))


def test_sam2_says_what_is_missing(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="no weights"):
        sam2(sam2_tools({}))
    with pytest.raises(ConfigError, match="SIZE one of tiny"):
        sam2(sam2_tools({"sam2": "something.pt"}))
    monkeypatch.setitem(sys.modules, "sam2.build_sam", None)
    with pytest.raises(ConfigError, match="needs the package sam2"):
        sam2(sam2_tools({"sam2": "sam2.1_hiera_small.pt"}))


def stub_sam2(monkeypatch, build, score=1.5):
    asked = []

    class Predictor:
        def __init__(self, model):
            assert model.image_size == 64

        def set_image(self, image):
            assert image.shape[2] == 3
            self.shape = image.shape[:2]

        def predict(self, point_coords, point_labels, box=None, *, multimask_output, return_logits):
            assert return_logits
            asked.append((point_coords, box))
            n, per = len(point_coords), 3 if multimask_output else 1
            logits = np.full((n, per, *self.shape), -5, np.float32)
            for i, (x, y) in enumerate(point_coords[:, 0].astype(int)):
                logits[i, :, max(0, y - 4) : y + 4, max(0, x - 4) : x + 4] = 5
            iou = np.full((n, per), score, np.float32)
            return (logits[0], iou[0], None) if n == 1 else (logits, iou, None)  # as the package squeezes

    for name, contents in {
        "sam2": {},
        "sam2.build_sam": {"build_sam2": build},
        "sam2.sam2_image_predictor": {"SAM2ImagePredictor": Predictor},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_sam2_puts_prompts_where_they_are(monkeypatch, tmp_path):
    """The package scales to its side and then adds half a pixel, for points and boxes (its prompt encoder)."""
    asked = stub_sam2(monkeypatch, lambda *_, **__: SimpleNamespace(image_size=64))
    path = tmp_path / "sam2_hiera_tiny.pt"
    path.write_bytes(b"abc")
    model = Sam2(str(path), device="cpu")
    points, boxes = np.array([[[20.5, 10.5]]]), np.array([[16, 6, 24, 14]])
    model.decode(model.encode(np.zeros((40, 60, 3), np.uint8)), points=points, boxes=boxes)
    scale = 64 / np.array([60, 40])
    seen_points, seen_boxes = asked[0]
    np.testing.assert_allclose(seen_points * scale + 0.5, points * scale)
    np.testing.assert_allclose(seen_boxes * np.tile(scale, 2) + 0.5, boxes * np.tile(scale, 2))


def test_sam2_that_gives_no_numbers_is_refused(monkeypatch, tmp_path):
    stub_sam2(monkeypatch, lambda *_, **__: SimpleNamespace(image_size=64), score=np.nan)
    path = tmp_path / "sam2_hiera_tiny.pt"
    path.write_bytes(b"abc")
    labeller = sam2(sam2_tools({"sam2": str(path)}))
    with pytest.raises(NonFiniteError, match="SAM 2"):
        labeller.propose(np.zeros((40, 60, 3), np.uint8), hint=from_label_image(scene(cells=((5, 5, 8, 8),))))


def test_sam2_through_a_stub_of_its_predictor(monkeypatch, tmp_path):
    asked = []

    def build(settings, path, *, device):
        asked.append((settings, Path(path).name, device))
        return SimpleNamespace(image_size=64)

    stub_sam2(monkeypatch, build)
    path = tmp_path / "sam2.1_hiera_base_plus.pt"
    with pytest.raises(CheckpointError, match="is not there"):
        sam2(sam2_tools({"sam2": str(path)}))
    path.write_bytes(b"abc")
    labeller = sam2(sam2_tools({"sam2": str(path)}))
    assert asked == [("configs/sam2.1/sam2.1_hiera_b+.yaml", path.name, "cpu")]
    assert labeller.version == "sam2:sam2.1_hiera_base_plus-ba7816bf"
    hint = from_label_image(scene(cells=((5, 5, 8, 8), (20, 30, 8, 8), (6, 40, 8, 8), (30, 5, 8, 8), (30, 50, 8, 8))))
    cells, stability = labeller.propose(np.zeros((40, 60, 1), np.uint8), hint=hint)
    assert len(cells) == 5
    assert cells.scores.tolist() == [1] * 5
    assert stability.tolist() == [1] * 5


def test_sam2_names_broken_weights(monkeypatch, tmp_path):
    def build(settings, path, *, device):
        raise RuntimeError("missing keys")

    stub_sam2(monkeypatch, build)
    path = tmp_path / "sam2_hiera_tiny.pt"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"configs/sam2/sam2_hiera_t\.yaml: missing keys"):
        sam2(sam2_tools({"sam2": str(path)}))
