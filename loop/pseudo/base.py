"""What a labeller is: pixels in, proposed cells out; and the proposal that it makes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from loop.config import PseudoConfig
from loop.models.segmenter import Segmenter
from loop.types import FloatArray, Instances, UInt8Array


class Proposal(NamedTuple):
    """What a labeller says of an image.

    `instances`: N >= 0 cells with scores in [0, 1], source "pseudo", model_version the labeller's `version`.
    `stability` (N,) float32 in [0, 1]: the share of the looks at the image (flips, turns, thresholds) in which each
    cell was found; 1 where the labeller looks once.
    """

    instances: Instances
    stability: FloatArray


class Labeller(Protocol):
    """One who proposes masks.

    Attributes:
        name: its key in PSEUDO_LABELLERS.
        version: which weights, e.g. "celloop-demo-v3" or "sam:vit_b-ec2df627"; other weights, another version.
        needs_hint: whether it proposes nothing without the champion's cells.
    """

    name: str
    version: str
    needs_hint: bool

    def propose(self, image: UInt8Array, *, image_id: str = "", hint: Instances | None = None) -> Proposal:
        """Cells of an image of any size from 1 x 1 px; none where it sees none.

        Args:
            image: (H, W, C) uint8, C in {1, 3}.
            image_id: goes into the instances and into errors.
            hint: the champion's cells of the same image, for those that are prompted by them.
        """
        ...


@dataclass(frozen=True)
class Tools:
    """What a labeller is built with.

    Attributes:
        config: which weights, how many views, what is dropped.
        device: "auto", "cpu" or "cuda".
        segmenter: the loop's own model of a kind ("champion" or a key of SEGMENTERS); raises StateError where there is
            none yet.
    """

    config: PseudoConfig
    device: str
    segmenter: Callable[[str], Segmenter]
