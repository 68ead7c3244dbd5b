"""Networks by name: `new_net(config, seed)` builds one with fresh weights."""

from collections.abc import Callable

import torch
from torch import nn

from loop.config import ModelConfig
from loop.errors import ConfigError
from loop.models.blocks import initialise
from loop.models.pix2pix import Pix2Pix
from loop.models.seu_net import SEUNet
from loop.models.sparse_seu_net import SparseSEUNet
from loop.models.unet import UNet

SEGMENTERS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "pix2pix": Pix2Pix,
    "seu_net": SEUNet,
    "sparse_seu_net": SparseSEUNet,
    "unet": UNet,
}


def new_net(config: ModelConfig, seed: int = 0) -> nn.Module:
    """The network that `config` names, its weights drawn from `seed` alone; no global generator decides them.

    Raises:
        ConfigError: no network has that name.
    """
    if config.name not in SEGMENTERS:
        raise ConfigError(f"model.name={config.name!r} is unknown; choose from {', '.join(sorted(SEGMENTERS))}")
    net = SEGMENTERS[config.name](config)
    initialise(net, torch.Generator().manual_seed(seed))
    start: Callable[[], None] | None = getattr(net, "start", None)
    if start is not None:
        start()
    return net
