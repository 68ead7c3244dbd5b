"""The pieces that segmenters are put together from."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from loop.errors import ShapeError


class SqueezeExcite(nn.Module):
    """Scales each channel by a number in (0, 1) that the global averages of all channels decide.

    Source: Hu et al. 2019 (Squeeze-and-Excitation Networks), as in Prytula 2023, section 4.2.1.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        squeezed = max(channels // reduction, 4)
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        weights = functional.adaptive_avg_pool2d(x, 1)
        weights = torch.sigmoid(self.excite(functional.relu(self.squeeze(weights))))
        return x * weights


class ConvBlock(nn.Module):
    """`n_convs` times (3x3 convolution, group normalisation, ReLU), then squeeze-and-excitation (`reduction` 0: none).

    Group normalisation with one group: batch statistics over few, mixed images made training collapse, and one
    group is the fastest of its kind on a CPU.
    """

    def __init__(self, in_channels: int, out_channels: int, reduction: int, n_convs: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(n_convs):
            layers += [
                nn.Conv2d(out_channels if i else in_channels, out_channels, 3, padding=1, bias=False),
                nn.GroupNorm(1, out_channels),
                nn.ReLU(inplace=True),
            ]
        self.convs = nn.Sequential(*layers)
        self.excite = SqueezeExcite(out_channels, reduction) if reduction else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        y: Tensor = self.excite(self.convs(x))
        return y


class Encoder(nn.Module):
    """The way down: a block at full resolution, then `depth` times halved and doubled in channels."""

    def __init__(self, in_channels: int, widths: list[int], reduction: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.stride = 2 ** (len(widths) - 1)
        self.blocks = nn.ModuleList(
            ConvBlock(below, width, reduction) for below, width in zip([in_channels, *widths[:-1]], widths, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Features from the finest level, (B, widths[0], H, W), to the coarsest, (B, widths[-1], H/stride, W/stride).

        Args:
            x: (B, in_channels, H, W) float32 in [0, 1]; H and W are multiples of `stride`.

        Raises:
            ShapeError: another number of channels, or H or W is not a multiple of `stride`.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ShapeError(f"input is {tuple(x.shape)}; expected (B, {self.in_channels}, H, W)")
        height, width = x.shape[2:]
        if height % self.stride or width % self.stride or not height or not width:
            padded = tuple(max(self.stride, side + -side % self.stride) for side in (height, width))
            raise ShapeError(f"input of {height} x {width} px; expected multiples of {self.stride}: pad to {padded}")
        features = []
        for level, block in enumerate(self.blocks):
            x = block(functional.max_pool2d(x, 2) if level else x * 2 - 1)
            features.append(x)
        return features


class Decoder(nn.Module):
    """The way up: doubled in size, joined with the features of the same level on the way down, through a block."""

    def __init__(self, widths: list[int], reduction: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ConvBlock(widths[level] + widths[level + 1], widths[level], reduction)
            for level in reversed(range(len(widths) - 1))
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        """(B, widths[0], H, W) from what an `Encoder` gives."""
        x = features[-1]
        for block, skip in zip(self.blocks, reversed(features[:-1]), strict=True):
            x = block(torch.cat([skip, functional.interpolate(x, scale_factor=2.0, mode="nearest")], dim=1))
        return x


class LevelDropout(nn.Module):
    """Blanks whole feature maps of the two coarsest levels at random, in training mode alone.

    The random numbers come from torch's global generator, which a training starts anew at each step. With a share of 0
    it does nothing; it has no weights, so checkpoints of networks with and without it are alike.

    Source: Gal and Ghahramani 2016; Tompson et al. 2015 (whole maps); the coarsest levels as in Kendall et al. 2015
    (Bayesian SegNet), who drop single values.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Dropout2d(share) for _ in range(2)) if share else nn.ModuleList()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """What an `Encoder` gives, the coarsest level last, to the same shapes."""
        kept = len(features) - len(self.levels)
        return [*features[:kept], *(drop(x) for drop, x in zip(self.levels, features[kept:], strict=True))]


def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Draws the weights of all convolutions and linear layers anew (He et al. 2015), in place, from `generator`."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
