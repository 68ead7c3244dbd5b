"""Segment Anything: an image is encoded once, then points and boxes are answered by masks. Arrays in, arrays out.

The only importer of segment_anything, which needs four functions of torchvision. Where torchvision is missing or does
not import beside the torch at hand, `batched_nms`, `box_area`, `resize` and `to_pil_image` below stand in for them.
Weights are read by loop/models/sam_weights.py.

Source: Kirillov et al. 2023, "Segment Anything" (arXiv:2304.02643); package segment-anything 1.0.
"""

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from loop.errors import CheckpointError, NonFiniteError, ShapeError
from loop.models.runtime import autocast, resolve_device
from loop.models.sam_steps import Multimask, Pause, decode_prompts, encode_pixels
from loop.models.upscaling import axis, windows
from loop.rings import Crop, crop_mask
from loop.types import FloatArray, UInt8Array

PROMPTS_A_BATCH = {"cpu": 2, "cuda": 64}
"""More at once cost more time each on a CPU: benchmarks/bench_sam.py."""
STABILITY_OFFSET = 1.0
_IMPORT = Lock()


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Which boxes stay, best first, when each drops the worse ones of its category that overlap it too far.

    Args:
        boxes: (N, 4) x0, y0, x1, y1.
        scores: (N,).
        idxs: (N,) categories.
        iou_threshold: a box of a higher IoU than this with a better one goes.

    Returns:
        (K,) int64 indices by descending score; K is 0 only where N is.

    Source: torchvision.ops.boxes.batched_nms.
    """
    areas = box_area(boxes)
    order = torch.argsort(scores, descending=True, stable=True)
    kept = []
    while len(order):
        best, rest = order[0], order[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[rest, :2])
        high = torch.minimum(boxes[best, 2:], boxes[rest, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        iou = shared / (areas[best] + areas[rest] - shared)
        order = rest[~((iou > iou_threshold) & (idxs[best] == idxs[rest]))]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64, device=boxes.device)


def box_area(boxes: Tensor) -> Tensor:
    """(N,) areas of boxes (N, 4) x0, y0, x1, y1. Source: torchvision.ops.boxes.box_area."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def to_pil_image(pic: UInt8Array) -> Image.Image:
    """(H, W, C) uint8, C in {1, 3}, as a PIL image. Source: torchvision.transforms.functional.to_pil_image."""
    return Image.fromarray(pic[:, :, 0] if pic.shape[2] == 1 else pic)


def resize(img: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at `size` (H, W), bilinear. Source: torchvision.transforms.functional.resize of a PIL image."""
    return img.resize((size[1], size[0]), Image.Resampling.BILINEAR)


@cache
def segment_anything() -> ModuleType:
    """The package segment_anything, with stand-ins where torchvision does not import.

    The stand-ins are in sys.modules only while the package is imported: nobody else finds a torchvision there.
    """
    with _IMPORT:
        return _import_package()


def _import_package() -> ModuleType:
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
    try:
        importlib.import_module("torchvision.ops.boxes")
        importlib.import_module("torchvision.transforms.functional")
    except (ImportError, RuntimeError, OSError, AttributeError):  # missing, or built for another torch
        _forget_torchvision()
        sys.modules.update(_stand_ins())
        try:
            return importlib.import_module("segment_anything")
        finally:
            _forget_torchvision()
            sys.modules.update(before)
    return importlib.import_module("segment_anything")


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _stand_ins() -> dict[str, ModuleType]:
    contents: dict[str, dict[str, Any]] = {
        "torchvision": {},
        "torchvision.ops": {},
        "torchvision.ops.boxes": {"batched_nms": batched_nms, "box_area": box_area},
        "torchvision.transforms": {},
        "torchvision.transforms.functional": {"resize": resize, "to_pil_image": to_pil_image},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        module.__dict__.update(contents[name])
    return modules


@dataclass(frozen=True, eq=False)
class Embedding:
    """An encoded image, to be asked again and again.

    Attributes:
        features: (1, C, h, w) float32 on the device, about 4 MB.
        shape: (H, W) of the image, px.
        seen: (H', W') of the image as the network saw it, px.
    """

    features: Tensor
    shape: tuple[int, int]
    seen: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """What the features take, bytes."""
        return self.features.numel() * self.features.element_size()

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What `Sam.embedding` takes back: features (1, C, h, w) float16, shape and seen (2,) int64.

        Half of the memory. A logit of the masks moves by less than it does when the encoder runs in bfloat16.

        Raises:
            NonFiniteError: a feature is NaN or beyond the range of float16 (65504).
        """
        features = self.features.to(device="cpu", dtype=torch.float16).numpy()
        if not np.isfinite(features).all():
            raise NonFiniteError("the embedding holds NaN or numbers beyond float16; use other weights")
        return {"features": features, "shape": np.array(self.shape), "seen": np.array(self.seen)}


class Answers(NamedTuple):
    """What SAM answers to P prompts, M masks each: 3 from part to whole, or 1.

    `crops`: P x M, None where the mask is empty or was not wanted. `scores` (P, M) float32 in [0, 1]: the IoU that SAM
    expects. `stability` (P, M) float32 in [0, 1]: the IoU of the masks at logits above 1 and above -1; 0 where the mask
    was not wanted.
    """

    crops: tuple[tuple[Crop | None, ...], ...]
    scores: FloatArray
    stability: FloatArray


def _go_on() -> None:
    """Nobody else is waiting."""


class Sam:
    """A loaded SAM. Calls do not change it, so one may serve several threads."""

    def __init__(self, net: nn.Module, *, version: str, device: str = "auto", precision: str = "auto") -> None:
        """Takes segment_anything's network, moved to the device; `version` names its weights."""
        self.version = version
        self.device = resolve_device(device)
        self.precision = precision
        self._net: Any = net.to(self.device).eval()

    @property
    def side(self) -> int:
        """The longer side at which the network sees an image, px."""
        return int(self._net.image_encoder.img_size)

    @cached_property
    def _places(self) -> Tensor:
        """(1, C, h, w): where each place of an embedding is, the same for all images and prompts."""
        with torch.inference_mode():
            places: Tensor = self._net.prompt_encoder.get_dense_pe()
        return places

    def encode(self, image: UInt8Array, *, pause: Pause | None = None) -> Embedding:
        """The image as SAM's decoder takes it; the costly part.

        Args:
            image: (H, W, C) uint8, C in {1, 3}, any size from 1 x 1 px.
            pause: called in this thread between the encoder's steps (ViT-B: some 140 times), so that it may wait while
                something more urgent runs; it runs no network itself. What it raises ends the call.

        Raises:
            ShapeError: the image is of another shape.
            NonFiniteError: the network gave NaN or infinity.
        """
        if image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
            raise ShapeError(f"the image is {image.shape}; expected (H, W, 1) or (H, W, 3) with at least one pixel")
        transforms = _transforms()
        height, width = image.shape[:2]
        seen = self._seen(height, width)
        colour = np.ascontiguousarray(np.broadcast_to(image, (height, width, 3)))
        pixels = np.array(transforms.resize(transforms.to_pil_image(colour), seen))
        tensor = self._net.preprocess(torch.from_numpy(pixels).to(self.device).permute(2, 0, 1).float())[None]
        with torch.inference_mode(), autocast(self.device, self.precision):
            features = encode_pixels(self._net.image_encoder, tensor, pause or _go_on).float()
        if not bool(torch.isfinite(features).all()):
            raise NonFiniteError("SAM's encoder gave NaN or infinity; use fp32, or other weights")
        return Embedding(features, (height, width), seen)

    def embedding(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Embedding:
        """The embedding that `Embedding.to_arrays` gave, of an image that these weights encoded; on the device.

        Raises:
            CheckpointError: the features are missing or of another network than this.
            ShapeError: the image's size is missing or does not go with the size at which the network sees it.
            NonFiniteError: the features hold NaN or infinity.
        """
        prompts = self._net.prompt_encoder
        expected = (1, prompts.embed_dim, *prompts.image_embedding_size)
        features = np.asarray(arrays.get("features", np.empty(0)))
        if features.shape != expected or features.dtype.kind != "f":
            given = f"features are {features.dtype} {features.shape}"
            raise CheckpointError(f"{given}; {self.version} gives numbers of {expected}; encode the image again")
        sizes = [np.asarray(arrays.get(name, np.empty(0))) for name in ("shape", "seen")]
        (height, width), seen = (
            tuple(a.tolist()) if a.shape == (2,) and a.dtype.kind in "iu" else (0, 0) for a in sizes
        )
        if min(height, width) < 1 or seen != self._seen(height, width):
            expected_sizes = "the (H, W) of an image and that at which the network sees it"
            raise ShapeError(f"shape={sizes[0]}, seen={sizes[1]}; expected {expected_sizes}; encode the image again")
        if not np.isfinite(features).all():
            raise NonFiniteError("the features hold NaN or infinity; encode the image again")
        return Embedding(torch.from_numpy(features.astype(np.float32)).to(self.device), (height, width), seen)

    def _seen(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = _transforms().ResizeLongestSide.get_preprocess_shape(height, width, self.side)
        return max(1, rows), max(1, columns)

    def decode(
        self,
        embedding: Embedding,
        *,
        points: npt.ArrayLike | None = None,
        point_labels: npt.ArrayLike | None = None,
        boxes: npt.ArrayLike | None = None,
        multimask: Multimask = True,
        least: tuple[float, float] = (0.0, 0.0),
    ) -> Answers:
        """The masks that P prompts ask for; each prompt has points, a box, or both.

        Args:
            embedding: from `encode`.
            points: (P, K, 2) x, y px; the centre of pixel (r, c) is (c + 0.5, r + 0.5).
            point_labels: (P, K), 1 = inside, 0 = outside; all inside by default.
            boxes: (P, 4) x0, y0, x1, y1 px, ends exclusive.
            multimask: three masks a prompt; else one, better where a prompt leaves no doubt; "all": the three and then
                that one, at hardly any cost.
            least: masks of a lower score or stability are not wanted.

        Raises:
            ShapeError: neither points nor boxes, or another shape.
        """
        prompts = _prompts(points, point_labels, boxes)
        scale = np.array(embedding.seen[::-1], np.float64) / embedding.shape[::-1]
        count = len(next(iter(prompts.values())))
        batch = PROMPTS_A_BATCH[self.device.type]
        crops: list[tuple[Crop | None, ...]] = []
        scores, stability = [], []
        with torch.inference_mode():
            for i in range(0, count, batch):
                logits, iou = self._ask(embedding, {k: v[i : i + batch] for k, v in prompts.items()}, scale, multimask)
                found, stable = self._masks(logits, iou, embedding, least)
                crops += [tuple(found[j : j + iou.shape[1]]) for j in range(0, len(found), iou.shape[1])]
                scores.append(iou.clamp(0, 1).cpu().numpy())
                stability.append(stable.reshape(iou.shape))
        several = self._net.mask_decoder.num_mask_tokens - (multimask != "all")
        empty = np.zeros((0, several if multimask else 1), np.float32)
        return Answers(tuple(crops), np.concatenate([empty, *scores]), np.concatenate([empty, *stability]))

    def _ask(
        self,
        embedding: Embedding,
        prompts: Mapping[str, npt.NDArray[Any]],
        scale: npt.NDArray[Any],
        multimask: Multimask,
    ) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (P, M, h, w) and the expected IoU (P, M) of a batch."""

        def seen(xy: npt.NDArray[Any]) -> Tensor:  # the network itself adds half a pixel of its own
            return torch.from_numpy(xy * np.tile(scale, xy.shape[-1] // 2) - 0.5).float().to(self.device)

        points = None
        if "points" in prompts:
            points = (seen(prompts["points"]), torch.from_numpy(prompts["labels"]).to(self.device))
        boxes = seen(prompts["boxes"]) if "boxes" in prompts else None
        sparse, dense = self._net.prompt_encoder(points=points, boxes=boxes, masks=None)
        with autocast(self.device, self.precision):  # not the prompts: bfloat16 would move a point by several px
            image = (embedding.features, self._places, dense[:1])
            logits, iou = decode_prompts(self._net.mask_decoder, image, sparse, multimask=multimask)
        logits, iou = logits.float(), iou.float()
        if not bool(torch.isfinite(logits).all() and torch.isfinite(iou).all()):
            raise NonFiniteError("SAM's decoder gave NaN or infinity; use other weights")
        return logits, iou

    def _masks(
        self, logits: Tensor, iou: Tensor, embedding: Embedding, least: tuple[float, float]
    ) -> tuple[list[Crop | None], FloatArray]:
        """Crops and stability of the masks that reach `least`, of all P x M in order."""
        flat = logits.flatten(0, 1)
        crops: list[Crop | None] = [None] * len(flat)
        stability = np.zeros(len(flat), np.float32)
        wanted = torch.nonzero(iou.flatten().clamp(0, 1) >= least[0]).flatten().tolist()
        rows, columns = (
            axis(flat.shape[i + 1], self.side, embedding.seen[i], embedding.shape[i], flat.device) for i in (0, 1)
        )
        for k, (top, left, fine) in zip(wanted, windows(flat[wanted], rows, columns, -STABILITY_OFFSET), strict=True):
            high, low = (int(torch.count_nonzero(fine > offset)) for offset in (STABILITY_OFFSET, -STABILITY_OFFSET))
            stability[k] = high / max(1, low)
            if stability[k] >= least[1] and (crop := crop_mask((fine > 0).cpu().numpy())) is not None:
                x0, y0, x1, y1 = crop.box_xyxy
                crops[k] = Crop((x0 + left, y0 + top, x1 + left, y1 + top), crop.mask)
        return crops, stability


def _transforms() -> ModuleType:
    return importlib.import_module(f"{segment_anything().__name__}.utils.transforms")


def _prompts(
    points: npt.ArrayLike | None, labels: npt.ArrayLike | None, boxes: npt.ArrayLike | None
) -> dict[str, npt.NDArray[Any]]:
    prompts: dict[str, npt.NDArray[Any]] = {}
    if points is not None:
        prompts["points"] = np.asarray(points, np.float64)
        prompts["labels"] = np.ones(prompts["points"].shape[:2], np.int64)
        if labels is not None:
            prompts["labels"] = np.asarray(labels, np.int64)
    if boxes is not None:
        prompts["boxes"] = np.asarray(boxes, np.float64)
    shapes = {name: array.shape for name, array in prompts.items()}
    p, k = (*shapes.get("points", (*shapes.get("boxes", ()), 0)), 0, 0)[:2]
    expected = {"points": (p, k, 2), "labels": (p, k), "boxes": (p, 4)}
    if not prompts or any(shape != expected[name] for name, shape in shapes.items()):
        raise ShapeError(f"prompts are {shapes}; expected points (P, K, 2) with labels (P, K), boxes (P, 4), or both")
    return prompts
