"""The pieces that segmenters are put together from."""

import torch
from torch import Tensor, nn
from torch.nn import functional


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
    """`n_convs` times (3x3 convolution, group normalisation, ReLU), then squeeze-and-excitation.

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
        self.excite = SqueezeExcite(out_channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H, W)."""
        y: Tensor = self.excite(self.convs(x))
        return y


def initialise(net: nn.Module, generator: torch.Generator) -> None:
    """Draws the weights of all convolutions and linear layers anew (He et al. 2015), in place, from `generator`."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
