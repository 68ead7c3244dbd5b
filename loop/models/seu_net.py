"""SEU-Net: a U-Net whose blocks carry squeeze-and-excitation, with heads for the interior and the border of cells."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from loop.config import ModelConfig
from loop.errors import ShapeError
from loop.models.blocks import ConvBlock


class SEUNet(nn.Module):
    """Image to raw interior and border logits at the image's resolution.

    `stride` is what height and width must be multiples of, `embedding_size` the D of `embed`.

    Source: Prytula 2023, sections 4.2 to 4.2.3. Differs: group instead of batch normalisation, and the heads share
    one decoder.
    """

    heads = ("interior", "border")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.base * 2**level for level in range(config.depth + 1)]
        self.in_channels = config.in_channels
        self.stride = 2**config.depth
        self.embedding_size = widths[-1]
        self.encoder = nn.ModuleList(
            ConvBlock(below, width, config.reduction)
            for below, width in zip([config.in_channels, *widths[:-1]], widths, strict=True)
        )
        self.decoder = nn.ModuleList(
            ConvBlock(widths[level] + widths[level + 1], widths[level], config.reduction)
            for level in reversed(range(config.depth))
        )
        self.head = nn.Conv2d(widths[0], len(self.heads), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Raw logits of the heads.

        Args:
            x: (B, in_channels, H, W) float32 in [0, 1]; H and W are multiples of `stride`.

        Returns:
            (B, 2, H, W): interior (the whole cell) and border.

        Raises:
            ShapeError: another number of channels, or H or W is not a multiple of `stride`.
        """
        return self.decode(self.encode(x))

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features from the finest level, (B, base, H, W), to the coarsest, (B, D, H / stride, W / stride)."""
        self._check(x)
        features = []
        for level, block in enumerate(self.encoder):
            x = block(functional.max_pool2d(x, 2) if level else x * 2 - 1)
            features.append(x)
        return features

    def decode(self, features: list[Tensor]) -> Tensor:
        """Raw logits (B, 2, H, W) from the features of `encode`."""
        x = features[-1]
        for block, skip in zip(self.decoder, reversed(features[:-1]), strict=True):
            x = block(torch.cat([skip, functional.interpolate(x, scale_factor=2.0, mode="nearest")], dim=1))
        logits: Tensor = self.head(x)
        return logits

    def embed(self, x: Tensor) -> Tensor:
        """The global average of the coarsest features, (B, D) float32; `x` as for `forward`."""
        return self.encode(x)[-1].float().mean(dim=(2, 3))

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(f"input is {tuple(x.shape)}; expected (B, {self.in_channels}, H, W)")
        height, width = x.shape[2:]
        if height % self.stride or width % self.stride or not height or not width:
            padded = tuple(max(self.stride, side + -side % self.stride) for side in (height, width))
            raise ShapeError(f"input of {height} x {width} px; expected multiples of {self.stride}: pad to {padded}")
