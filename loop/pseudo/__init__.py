"""Who proposes masks of unlabelled images, by name: `build_labeller(name, tools)` makes one ready."""

from collections.abc import Callable

from loop.errors import ConfigError
from loop.pseudo.base import Labeller, Tools
from loop.pseudo.cellpose import cellpose
from loop.pseudo.mask_rcnn import mask_rcnn
from loop.pseudo.own import own
from loop.pseudo.sam import sam
from loop.pseudo.sam2 import sam2
from loop.pseudo.stardist import stardist
from loop.pseudo.yolo import yolo

PSEUDO_LABELLERS: dict[str, Callable[[Tools], Labeller]] = {
    "champion": own("champion"),
    "seu_net": own("seu_net"),
    "sparse_seu_net": own("sparse_seu_net"),
    "unet": own("unet"),
    "pix2pix": own("pix2pix"),
    "sam": sam,
    "sam2": sam2,
    "cellpose": cellpose,
    "stardist": stardist,
    "yolo": yolo,
    "mask_rcnn": mask_rcnn,
}


def build_labeller(name: str, tools: Tools) -> Labeller:
    """The labeller of that name, its weights loaded.

    Raises:
        ConfigError: no labeller has that name, or the package that it needs is not installed.
        CheckpointError: its weights are missing or damaged.
        StateError: it is a model of the loop of which there is none yet.
    """
    if name not in PSEUDO_LABELLERS:
        known = ", ".join(sorted(PSEUDO_LABELLERS))
        raise ConfigError(f"labeller {name!r} is unknown; choose from {known}")
    return PSEUDO_LABELLERS[name](tools)
