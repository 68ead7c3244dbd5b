"""One region of Label Studio's: what kind it is, which cell or area it holds, and whether a person changed it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from loop.errors import InputError, LabelError, NonFiniteError
from loop.labelstudio.interface import Interface
from loop.labelstudio.rle import decode_brushes
from loop.labelstudio.shapes import READERS, number
from loop.rings import Crop
from loop.types import BoolArray, Origin

# What a region covers, None where that is nothing, or why it cannot be read.
Pixels = Crop | InputError | NonFiniteError | None


class Cell(NamedTuple):
    """What one region holds: pixels, class index, score in [0, 1], names that the config lacks, its origin."""

    crop: Crop
    label: int
    score: float
    unknown_labels: tuple[str, ...]
    origin: Origin = Origin("human")


def read_pixels(regions: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> list[Pixels]:
    """What each region covers of the image of (H, W) `shape`; brush regions are decoded together."""
    values = [(i, region.get("value")) for i, region in enumerate(regions) if kind_of(region) == "brush"]
    brushes = {i: value.get("rle", ()) for i, value in values if isinstance(value, dict)}
    found: dict[int, Pixels] = dict(zip(brushes, decode_brushes(list(brushes.values()), shape), strict=True))
    return [found[i] if i in found else _read(region, shape) for i, region in enumerate(regions)]


def _read(region: Mapping[str, Any], shape: tuple[int, int]) -> Pixels:
    """What one region covers, by the reader of its kind; None where it is of no kind that holds a cell."""
    reader = READERS.get(kind_of(region))
    try:
        return None if reader is None else reader(value_of(region), shape)
    except (InputError, NonFiniteError) as error:
        return error


def _covered(pixels: Pixels) -> Crop:
    """The pixels of a region that covers some; raises what is wrong with another."""
    if isinstance(pixels, InputError | NonFiniteError):
        raise pixels
    if pixels is None:
        raise LabelError("it covers no pixel of the image")
    return pixels


def read_cell(region: Mapping[str, Any], interface: Interface, pixels: Pixels) -> Cell:
    """One region as a cell, with what `read_pixels` found; its label is 0 where the config lacks the region's.

    Raises:
        LabelError, ShapeError, NonFiniteError: it holds no cell; the text says why.
    """
    if interface.control(str(region.get("from_name"))) is None:
        raise LabelError(f"the label config has no control {region.get('from_name')!r}")
    kind, value = kind_of(region), value_of(region)
    if kind not in READERS:
        raise LabelError(f"it holds no cell; expected one of {', '.join(READERS)}")
    names = label_names(value, kind)
    if not names and len(interface.labels) > 1:
        raise LabelError(f"it has no label; expected one of {', '.join(interface.labels)}")
    crop = _covered(pixels)
    unknown = tuple(name for name in names if name not in (*interface.labels, interface.doubtful, interface.done))
    label = interface.labels.index(names[0]) if names and names[0] in interface.labels and not unknown else 0
    score = 1.0 if region.get("score") is None else number(region, "score")
    return Cell(crop, label, min(max(score, 0.0), 1.0), unknown)


def is_done_area(region: Mapping[str, Any], interface: Interface) -> bool:
    """True where a region says that everything inside it is labelled: no cell."""
    if not interface.done or kind_of(region) not in READERS or not isinstance(region.get("value"), dict):
        return False
    control = interface.control(str(region.get("from_name")))
    names = label_names(value_of(region), kind_of(region)) or (list(control.labels) if control else [])
    return names[:1] == [interface.done]


def add_area(pixels: Pixels, done: BoolArray) -> None:
    """Adds what `read_pixels` found of a done area to `done` (H, W) bool, in place.

    Raises:
        LabelError, ShapeError: it is damaged, or covers no pixel of the image.
    """
    crop = _covered(pixels)
    x0, y0, x1, y1 = crop.box_xyxy
    done[y0:y1, x0:x1] |= crop.mask


def origin_of(
    region: Mapping[str, Any], cell: Cell, before: Mapping[str, Any] | None, interface: Interface, started_from: str
) -> Origin:
    """Where a person's cell comes from; `before` is what was offered under the same id, None where nothing was."""
    stated = region.get("origin")
    if stated not in ("prediction", "prediction-changed"):
        return Origin("human")
    if stated == "prediction-changed" or (before is not None and not _same(region, cell, before, interface)):
        return Origin("human-edited", started_from)
    return Origin("human-accepted", started_from)


def _same(region: Mapping[str, Any], cell: Cell, before: Mapping[str, Any], interface: Interface) -> bool:
    """Whether a region holds the pixels and the class of the one that was offered."""
    if region.get("value") == before.get("value"):
        return True
    height, width = int(region["original_height"]), int(region["original_width"])
    try:
        old = read_cell(before, interface, *read_pixels([before], (height, width)))
    except (InputError, NonFiniteError):
        return False
    same_place = old.crop.box_xyxy == cell.crop.box_xyxy and np.array_equal(old.crop.mask, cell.crop.mask)
    return same_place and old.label == cell.label


def is_prompt(region: Mapping[str, Any], interface: Interface) -> bool:
    """True for hints to a model: keypoints, and what smart tools drew."""
    control = interface.control(str(region.get("from_name")))
    return kind_of(region) == "keypoint" or (control is not None and control.takes_prompts)


def kind_of(region: Mapping[str, Any]) -> str:
    """The region's shape: its type in lower case without "labels"."""
    return str(region.get("type", "")).lower().removesuffix("labels")


def value_of(region: Mapping[str, Any]) -> Mapping[str, Any]:
    """The region's `value`; LabelError where it is no object."""
    value = region.get("value")
    if not isinstance(value, dict):
        raise LabelError(f"its value is a {type(value).__name__}; expected an object")
    return value


def label_names(value: Mapping[str, Any], kind: str) -> list[str]:
    """The labels that a region's value carries, by what its control is called or as smart tools send them.

    Raises:
        LabelError: they are no list.
    """
    names = value.get(f"{kind}labels") or value.get("labels") or []
    if not isinstance(names, list):
        raise LabelError(f"its labels are {str(names)[:60]!r}; expected a list of names")
    return [str(name) for name in names]


def name_of(region: Mapping[str, Any]) -> str:
    """How errors call the region."""
    return f"region {region.get('id')!r} of type {region.get('type')!r}"


def check_frame(region: Mapping[str, Any], shape: tuple[int, int], image_id: str) -> None:
    """Refuses a region of another frame.

    Raises:
        LabelError: it was drawn on an image of another or unknown size than (H, W) `shape`, or on a turned one.
    """
    drawn = (region.get("original_width"), region.get("original_height"))
    if drawn != (shape[1], shape[0]):
        raise LabelError(
            f"{name_of(region)} was drawn on an image of {drawn[0]} x {drawn[1]} px; image {image_id!r} has"
            f" {shape[1]} x {shape[0]} px: send original_width and original_height, and check that the task shows the"
            " right image"
        )
    if region.get("image_rotation"):
        raise LabelError(
            f"{name_of(region)} was drawn on image {image_id!r} turned by {region['image_rotation']} degrees; expected"
            " 0: draw it again on the upright image"
        )
