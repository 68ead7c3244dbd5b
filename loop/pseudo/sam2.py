"""Labeller `sam2`: the modes of `sam` (loop/pseudo/sam.py) with Segment Anything 2."""

from loop.errors import ConfigError
from loop.models.sam2 import Sam2
from loop.pseudo.base import Tools
from loop.pseudo.sam import SamLabeller


def sam2(tools: Tools) -> SamLabeller:
    """The labeller `sam2`; mode, grid and filter are those of `pseudo.sam`, the weights are `pseudo.weights.sam2`.

    Raises:
        ConfigError: the package sam2 is not installed, or no weights are named.
        CheckpointError: the weights are missing or broken.
    """
    checkpoint = tools.config.weights.get("sam2", "")
    if not checkpoint:
        raise ConfigError("labeller sam2 has no weights; set pseudo.weights.sam2 to a file like sam2.1_hiera_small.pt")
    return SamLabeller("sam2", Sam2(checkpoint, device=tools.device), tools.config.sam)
