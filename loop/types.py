"""The nouns that every stage speaks: frozen, plain, without behaviour that needs a library beyond numpy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from loop.errors import ShapeError

BoolArray = npt.NDArray[np.bool_]
UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

Source = Literal["human", "human-accepted", "human-edited", "model", "pseudo"]


class Origin(NamedTuple):
    """Where one cell comes from.

    `source`: drawn by a person, accepted or edited by one, or made by a model, as a pre-label or to teach. `by` names
    the model or labeller that it came from, with its version, as "celloop-demo-v3" or "sam:vit_b-ec2df627"; "" for a
    cell that a person drew.
    """

    source: Source
    by: str = ""


@dataclass(frozen=True)
class ImageRef:
    """One image of a dataset: where it lies and what is known of it without its pixels.

    `image_id` is the file's stem and unique in a project. `sha256` is the hash of the file's bytes (hex).
    `group` names the slide, well or patient: a group never spans two splits; empty = a group of its own.
    `height` and `width` are those of the upright image (EXIF orientation applied), in px.
    `low`, `high` are the raw intensities that became 0 and 255 (0 and 255 for 8-bit images).
    """

    image_id: str
    path: Path
    sha256: str
    height: int
    width: int
    channels: int
    group: str = ""
    split: str = ""
    modality: str = ""
    label_path: Path | None = None
    low: float = 0.0
    high: float = 255.0
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Instances:
    """N cells of one image as boxes with cropped masks; they may overlap. Memory grows with the cells' area.

    Attributes:
        shape: (H, W) of the image, px.
        boxes_xyxy: (N, 4) int32, x0, y0, x1, y1 in px, x1 and y1 exclusive, inside the image, tight or not.
        masks: N arrays (y1 - y0, x1 - x0) bool.
        scores: (N,) float32 in [0, 1]; 1 for a person's cells.
        labels: (N,) int32, index into the label names of the project (0 = the first).
        weights: (N,) float32 >= 0, how much each cell teaches; 1 for a person's cells.
        image_id: the image's stem, or "".
        source: who drew them, where `origins` is empty.
        model_version: registry version of the model that drew them, or "".
        origins: N origins where they are not all of `source`, else ().

    N may be 0. Nothing here is mutated after construction.
    """

    shape: tuple[int, int]
    boxes_xyxy: IntArray
    masks: tuple[BoolArray, ...]
    scores: FloatArray
    labels: IntArray
    weights: FloatArray
    image_id: str = ""
    source: Source = "human"
    model_version: str = ""
    origins: tuple[Origin, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.masks)
        sizes = {
            **({"origins": len(self.origins)} if self.origins else {}),
            "boxes_xyxy": len(self.boxes_xyxy),
            "scores": len(self.scores),
            "labels": len(self.labels),
            "weights": len(self.weights),
        }
        wrong = {name: size for name, size in sizes.items() if size != n}
        if wrong:
            raise ShapeError(f"{n} masks but {wrong}: give one entry for each mask")
        height, width = self.shape
        for i, (box, mask) in enumerate(zip(self.boxes_xyxy, self.masks, strict=True)):
            x0, y0, x1, y1 = (int(v) for v in box)
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                raise ShapeError(
                    f"box {i} is {(x0, y0, x1, y1)}; expected 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
                )
            if mask.shape != (y1 - y0, x1 - x0):
                raise ShapeError(f"mask {i} is {mask.shape}; its box asks for {(y1 - y0, x1 - x0)}")

    def __len__(self) -> int:
        return len(self.masks)

    def origin(self, i: int) -> Origin:
        """Where cell `i` comes from."""
        return self.origins[i] if self.origins else Origin(self.source, self.model_version)

    @classmethod
    def build(
        cls,
        shape: tuple[int, int],
        boxes_xyxy: Sequence[Sequence[int]] | IntArray = (),
        masks: Sequence[BoolArray] = (),
        *,
        scores: Sequence[float] | FloatArray | None = None,
        labels: Sequence[int] | IntArray | None = None,
        weights: Sequence[float] | FloatArray | None = None,
        image_id: str = "",
        source: Source = "human",
        model_version: str = "",
        origins: Sequence[Origin] = (),
    ) -> "Instances":
        """Instances with the usual defaults filled in: score 1, label 0, weight 1; none at all is allowed."""
        n = len(masks)
        return cls(
            shape=(int(shape[0]), int(shape[1])),
            boxes_xyxy=np.asarray(boxes_xyxy, dtype=np.int32).reshape(-1, 4),
            masks=tuple(np.asarray(m, dtype=np.bool_) for m in masks),
            scores=np.ones(n, np.float32) if scores is None else np.asarray(scores, np.float32),
            labels=np.zeros(n, np.int32) if labels is None else np.asarray(labels, np.int32),
            weights=np.ones(n, np.float32) if weights is None else np.asarray(weights, np.float32),
            image_id=image_id,
            source=source,
            model_version=model_version,
            origins=tuple(origins),
        )

    def take(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> "Instances":
        """The instances at `indices`, in that order; everything else unchanged."""
        keep = np.asarray(indices, dtype=np.int64).reshape(-1)
        return Instances(
            shape=self.shape,
            boxes_xyxy=self.boxes_xyxy[keep],
            masks=tuple(self.masks[int(i)] for i in keep),
            scores=self.scores[keep],
            labels=self.labels[keep],
            weights=self.weights[keep],
            image_id=self.image_id,
            source=self.source,
            model_version=self.model_version,
            origins=tuple(self.origins[int(i)] for i in keep) if self.origins else (),
        )


class Sample(NamedTuple):
    """One image to learn from or to be measured on.

    `nuclei` where they are labelled. `known` (H, W) bool: where the labels are complete; elsewhere nothing is taught,
    neither cell nor background; None = everywhere.
    """

    image: ImageRef
    instances: Instances
    nuclei: Instances | None = None
    known: BoolArray | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """An open image as the acquisition sees it.

    Attributes:
        image_id: the image's stem.
        group: its slide, well or patient; "" = a group of its own.
        uncertainty: >= 0, higher = ask a person sooner; strategies refuse NaN (NonFiniteError), it never comes last.
        embedding: (D,) float32; like images lie near each other.
        n_cells: the predicted number of cells.
        foreground: share of the frame that lies in predicted cells, in [0, 1].
        seconds: how long a person is expected to correct the image; 0 = not known.
        measures: further uncertainties by name (loop/uncertainty), each >= 0 and higher = ask sooner.
    """

    image_id: str
    group: str
    uncertainty: float
    embedding: FloatArray
    n_cells: int = 0
    foreground: float = 0.0
    seconds: float = 0.0
    measures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """One chosen image: its place in the batch (1 = first), whether it is a control draw, and why, in plain words."""

    image_id: str
    rank: int
    control: bool
    reason: str
