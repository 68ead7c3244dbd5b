"""What every labeller in PSEUDO_LABELLERS must hold; those of other packages where the package is installed."""

import json
import sys

import numpy as np
import pytest
import torch

from loop.config import InstanceConfig, ModelConfig, PseudoConfig, SamConfig
from loop.data.synthetic import draw_cells
from loop.errors import CheckpointError, ConfigError
from loop.models import new_net
from loop.models.sam_weights import Architecture, build_sam
from loop.models.segmenter import Segmenter
from loop.pseudo import PSEUDO_LABELLERS, build_labeller
from loop.pseudo.base import Tools

PACKAGES = {
    "sam2": "sam2",
    "cellpose": "cellpose",
    "stardist": "stardist",
    "yolo": "ultralytics",
    "mask_rcnn": "torchvision",
}
HEADS = {"pix2pix": {"heads": ("interior", "border", "distance")}}
SMALL_SAM = Architecture(
    width=32,
    depth=2,
    heads=4,
    mlp_ratio=4,
    image_size=64,
    patch=16,
    window=3,
    global_blocks=(1,),
    embedding=16,
    mask_channels=8,
    masks=4,
    decoder_depth=2,
    decoder_mlp=24,
    iou_depth=3,
    iou_width=12,
)
CELLS = draw_cells(np.random.default_rng(0), (64, 64), 4, image_id="cells")
PICTURES = {
    "colour": CELLS.pixels,
    "grey": np.ascontiguousarray(CELLS.pixels[..., :1]),
    "wide": np.random.default_rng(1).integers(0, 256, (33, 70, 3), dtype=np.uint8),
    "one pixel": np.full((1, 1, 3), 200, np.uint8),
    "one grey pixel": np.full((1, 1, 1), 7, np.uint8),
    "one row": np.arange(40, dtype=np.uint8).reshape(1, 40, 1),
    "black": np.zeros((64, 64, 3), np.uint8),
    "flat": np.full((64, 64, 1), 128, np.uint8),
}


def segmenter(kind):
    name = "unet" if kind == "champion" else kind
    config = ModelConfig(name=name, in_channels=3, base=4, depth=2, width=8, queries=12, **HEADS.get(kind, {}))
    sizes = InstanceConfig(tile=64, min_area=4)
    return Segmenter(new_net(config, 0), config, sizes, device="cpu", precision="fp32", model_version=f"{kind}-v1")


def tools(**settings):
    return Tools(PseudoConfig(max_cells=40, **settings), "cpu", segmenter)


def randomise(net, size=0.3):
    generator = torch.Generator().manual_seed(0)
    for value in net.state_dict().values():
        if value.is_floating_point():
            value.copy_(size * torch.randn(value.shape, generator=generator))


def package(name):
    """The package of a labeller, or the test is skipped with the reason for which it cannot be had."""
    try:
        return __import__(PACKAGES[name])
    except (ImportError, RuntimeError, AttributeError) as error:
        return pytest.skip(f"{PACKAGES[name]} cannot be imported here: {error}")


def sam_settings(folder):
    net = build_sam(SMALL_SAM).to_empty(device="cpu")
    randomise(net)
    torch.save(net.state_dict(), folder / "small.pth")
    return {"sam": SamConfig(checkpoint=str(folder / "small.pth"), mode="both", points_per_side=4)}


def sam2_settings(folder):
    package("sam2")
    return pytest.skip("sam2 reads published weights only, which the tests do not have")


def cellpose_settings(folder):
    package("cellpose")
    from cellpose import models

    if hasattr(models, "Cellpose"):  # Cellpose 3
        from cellpose.resnet_torch import CPnet

        torch.manual_seed(0)
        net = CPnet([2, 32, 64, 128, 256], 3, sz=3, mkldnn=False, max_pool=True, diam_mean=30.0)
    else:  # Cellpose-SAM: its own class around a smaller encoder
        from cellpose import vit
        from segment_anything.build_sam import _build_sam

        def small(checkpoint=None):
            return _build_sam(64, 2, 4, [1], checkpoint)

        vit.sam_model_registry["vit_l"] = small
        torch.manual_seed(0)
        net = vit.CPSAM()
    net.save_model(str(folder / "random"))
    return {"weights": {"cellpose": str(folder / "random")}}


def stardist_settings(folder):
    package("stardist")
    pytest.importorskip("tensorflow", exc_type=ImportError)
    import keras
    from stardist.models import Config2D, StarDist2D

    keras.utils.set_random_seed(0)
    config = Config2D(n_rays=8, grid=(2, 2), unet_n_depth=1, unet_n_filter_base=4, net_conv_after_unet=4)
    model = StarDist2D(config, name="small", basedir=str(folder))
    model.keras_model.save_weights(folder / "small" / "weights_best.h5")
    (folder / "small" / "thresholds.json").write_text(json.dumps({"prob": 0.45, "nms": 0.4}))
    return {"weights": {"stardist": str(folder / "small")}}


def yolo_settings(folder):
    ultralytics = package("yolo")
    torch.manual_seed(0)
    model = ultralytics.YOLO("yolo11n-seg.yaml")
    for layer in model.model.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.bias is not None and layer.out_channels == 80:
            torch.nn.init.zeros_(layer.bias)  # class scores around 0.5, so that there are cells
    model.save(str(folder / "random-seg.pt"))
    return {"weights": {"yolo": str(folder / "random-seg.pt")}}


def mask_rcnn_settings(folder):
    package("mask_rcnn")
    from loop.pseudo.mask_rcnn import new_mask_rcnn

    torch.manual_seed(0)
    torch.save({"for_cells": True, "state": new_mask_rcnn().state_dict()}, folder / "random.pt")
    return {"weights": {"mask_rcnn": str(folder / "random.pt")}}


SETTINGS = {
    **dict.fromkeys(("champion", "seu_net", "sparse_seu_net", "unet", "pix2pix"), lambda folder: {}),
    "sam": sam_settings,
    "sam2": sam2_settings,
    "cellpose": cellpose_settings,
    "stardist": stardist_settings,
    "yolo": yolo_settings,
    "mask_rcnn": mask_rcnn_settings,
}
FOREIGN = pytest.mark.filterwarnings("ignore")  # other people's warnings are theirs
ALL = [pytest.param(name, marks=FOREIGN if name in PACKAGES else ()) for name in PSEUDO_LABELLERS]


@pytest.fixture(scope="module", params=ALL)
def labeller(request, tmp_path_factory):
    settings = SETTINGS[request.param](tmp_path_factory.mktemp(request.param))
    return build_labeller(request.param, tools(**settings))


def same(one, two):
    np.testing.assert_array_equal(one.instances.boxes_xyxy, two.instances.boxes_xyxy)
    np.testing.assert_array_equal(one.instances.scores, two.instances.scores)
    np.testing.assert_array_equal(one.stability, two.stability)
    for left, right in zip(one.instances.masks, two.instances.masks, strict=True):
        np.testing.assert_array_equal(left, right)


def test_every_labeller_is_tried():
    assert set(SETTINGS) == set(PSEUDO_LABELLERS)


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"'magic'.*champion"):
        build_labeller("magic", tools())


def test_a_labeller_has_its_name_a_version_and_says_whether_it_needs_a_hint(labeller, request):
    assert labeller.name == request.node.callspec.params["labeller"]
    assert labeller.version
    assert labeller.needs_hint in (True, False)


@pytest.mark.parametrize("picture", PICTURES)
def test_any_image_gives_cells_of_its_own_size_with_scores_and_stability(labeller, picture):
    image = PICTURES[picture]
    before = image.copy()
    height, width = image.shape[:2]
    hint = CELLS.instances if image.shape[:2] == (64, 64) else CELLS.instances.take([])
    if hint.shape != (height, width):
        hint = type(hint).build((height, width))
    cells, stability = labeller.propose(image, image_id="a", hint=hint)
    assert cells.shape == (height, width)
    assert cells.image_id == "a"
    assert len(cells) <= 4096
    assert all(mask.any() for mask in cells.masks)
    assert cells.scores.dtype == np.float32
    assert ((cells.scores >= 0) & (cells.scores <= 1)).all()
    assert {cells.origin(i) for i in range(len(cells))} <= {("pseudo", labeller.version)}
    assert cells.source == "pseudo"
    assert stability.shape == (len(cells),)
    assert stability.dtype == np.float32
    assert ((stability >= 0) & (stability <= 1)).all()
    np.testing.assert_array_equal(image, before)


def test_the_same_image_gives_the_same_answer_twice(labeller):
    same(*(labeller.propose(CELLS.pixels, image_id="a", hint=CELLS.instances) for _ in range(2)))


def test_without_a_hint_it_proposes_or_says_that_it_needs_one(labeller):
    cells = labeller.propose(CELLS.pixels, image_id="a").instances
    assert not labeller.needs_hint or len(cells) == 0


@pytest.mark.parametrize("name", PACKAGES)
def test_without_its_package_a_labeller_is_refused_and_the_text_says_how_to_get_it(name, monkeypatch, tmp_path):
    for module in {PACKAGES[name], *sys.modules}:
        if module.split(".")[0] == PACKAGES[name]:
            monkeypatch.setitem(sys.modules, module, None)
    weights = {**dict.fromkeys(PACKAGES, str(tmp_path)), "sam2": str(tmp_path / "sam2.1_hiera_tiny.pt")}
    with pytest.raises(ConfigError, match="pip install") as refusal:
        build_labeller(name, tools(weights=weights))
    text = str(refusal.value)
    assert PACKAGES[name] in text
    assert "pseudo.labellers" in text


@FOREIGN
@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "sam2"])
def test_without_weights_a_labeller_is_refused_and_the_text_names_the_setting(name, tmp_path):
    package(name)
    setting = rf"pseudo\.weights\.{name}.*goes on without"
    with pytest.raises(ConfigError, match=setting):
        build_labeller(name, tools())
    with pytest.raises(CheckpointError, match=setting):
        build_labeller(name, tools(weights={name: str(tmp_path / "nothing-here")}))


@FOREIGN
@pytest.mark.parametrize("name", [name for name in PACKAGES if name != "sam2"])
def test_weights_that_cannot_be_read_are_refused_by_name(name, tmp_path):
    package(name)
    path = tmp_path / "broken.pt"
    path.write_bytes(b"this is no network")
    if name == "stardist":
        path = tmp_path
        for file in ("config.json", "weights_best.h5"):
            (path / file).write_text("no network")
    with pytest.raises(CheckpointError, match=rf"pseudo\.weights\.{name}.*goes on without"):
        build_labeller(name, tools(weights={name: str(path)}))
