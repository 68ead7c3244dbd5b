"""Networks by name: `SEGMENTERS[config.name](config)` builds one with fresh weights."""

from collections.abc import Callable

from torch import nn

from loop.config import ModelConfig
from loop.models.seu_net import SEUNet

SEGMENTERS: dict[str, Callable[[ModelConfig], nn.Module]] = {"seu_net": SEUNet}
