"""torchvision's Mask R-CNN as a labeller, where torchvision can be imported; trained by loop/training/mask_rcnn.py."""

from typing import Any

import numpy as np
import torch
from torch import nn

from loop.data.intensity import stretch
from loop.masks import from_masks
from loop.models.runtime import resolve_device, to_input
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.pseudo.foreign import importing, loading, seen_once, version_of, weights_path
from loop.types import Instances, UInt8Array

NAME = "mask_rcnn"
MOST = 500  # cells an image: each is held as a full-size float mask for the moment
LOWEST = 0.1  # cells of a lower score are not proposed; the calibration decides on the others
ANCHORS_PX = (8, 16, 32, 64, 128)


class MaskRcnnLabeller:
    """Masks of a two-class Mask R-CNN; the score is the detection's, stability 1. Memory: N x H x W x 4 bytes.

    Source: He et al. 2017, torchvision's maskrcnn_resnet50_fpn and _v2. Differs: see `new_mask_rcnn`.
    """

    name = NAME
    needs_hint = False

    def __init__(self, net: nn.Module, version: str, *, device: str = "auto") -> None:
        """Takes a trained network, which is moved to the device and put into evaluation mode."""
        self._device = resolve_device(device)
        self._net = net.to(self._device).eval()
        self.version = version

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        """As `Labeller.propose`; the image is stretched and put on a dark background first."""
        pixels = torch.from_numpy(to_input(stretch(image, 3))).to(self._device)
        with torch.inference_mode():
            found = self._net([pixels])[0]
        cells = from_masks(
            list(found["masks"][:, 0].cpu().numpy() > 0.5),
            (image.shape[0], image.shape[1]),
            scores=np.clip(found["scores"].cpu().numpy(), 0, 1),
            image_id=image_id,
            source="pseudo",
            model_version=self.version,
        )
        return seen_once(cells)


def new_mask_rcnn(*, v2: bool = False, for_cells: bool = True, most: int = MOST) -> nn.Module:
    """A Mask R-CNN of two classes, background and cell, with random weights from torch's global generator.

    Args:
        v2: maskrcnn_resnet50_fpn_v2 instead of maskrcnn_resnet50_fpn.
        for_cells: anchors of 8 to 128 px on the image as it is; else torchvision's of 32 to 512 px on the image scaled
            to 800 px, as networks trained outside celloop expect.
        most: cells an image gives at most.

    Raises:
        ConfigError: torchvision cannot be imported, or does not fit torch.
    """
    with importing(NAME, "torchvision"):
        from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
        from torchvision.models.detection.rpn import AnchorGenerator
    build = maskrcnn_resnet50_fpn_v2 if v2 else maskrcnn_resnet50_fpn
    options: dict[str, Any] = {"box_score_thresh": LOWEST, "box_detections_per_img": most}
    if for_cells:
        options["rpn_anchor_generator"] = AnchorGenerator(
            tuple((size,) for size in ANCHORS_PX), ((0.5, 1.0, 2.0),) * len(ANCHORS_PX)
        )
        options["_skip_resize"] = True
    net: nn.Module = build(weights=None, weights_backbone=None, num_classes=2, **options)
    return net


def mask_rcnn(tools: Tools) -> Labeller:
    """Mask R-CNN from the file in pseudo.weights.mask_rcnn.

    The file is one of loop/training/mask_rcnn.py, or a bare two-class state dict of maskrcnn_resnet50_fpn or its _v2.

    Raises:
        ConfigError: torchvision cannot be imported, or no file is set.
        CheckpointError: the file is not there, or holds no such state dict.
    """
    with importing(NAME, "torchvision"):
        import torchvision.models.detection  # noqa: F401
    path = weights_path(tools.config, NAME, "a state dict of a two-class Mask R-CNN")
    with loading(NAME, str(path)):
        stored = torch.load(path, map_location="cpu", weights_only=True)
        for_cells = bool(stored.get("for_cells", False))
        state = stored["state"] if for_cells else stored
        v2 = "roi_heads.box_head.fc6.weight" not in state
        net = new_mask_rcnn(v2=v2, for_cells=for_cells, most=min(MOST, tools.config.max_cells))
        net.load_state_dict(state)
    return MaskRcnnLabeller(net, version_of(NAME, path), device=tools.device)
