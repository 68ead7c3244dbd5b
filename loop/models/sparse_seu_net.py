"""SparseSEU-Net: a U-Net that gives a set of masks, one a query, without boxes and without a watershed."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loop.config import ModelConfig
from loop.models.blocks import ConvBlock, Encoder

N_CONVS = 4
N_CONVS_BELOW = 2
PLACES = 5
PRIOR = 0.01
RADIUS = 1.0


class SparseOutput(NamedTuple):
    """What the net says about B images with N queries: raw logits, float32.

    Attributes:
        masks: (B, N, H / mask_stride, W / mask_stride).
        classes: (B, N), whether the query found a cell.
        objectness: (B, N), the IoU that the query expects of its mask, or None.
        dense: (B, len(heads), H, W), the overlap head, or None.
    """

    masks: Tensor
    classes: Tensor
    objectness: Tensor | None
    dense: Tensor | None


class SparseSEUNet(nn.Module):
    """Image to N masks with a class each, through an encoder and decoder with squeeze-and-excitation.

    From the decoder's features a mask and an instance branch fork, each of four times (3x3 convolution, group
    normalisation, ReLU). With `levels: single` they fork once, at the masks' resolution; with `multi` at every level of
    the decoder, where each branch takes the decoder's features, the skip connection of that level and what the same
    branch gave one level below, doubled in size. Figure 4.13 is read so that the lowest fork is at the first level
    above the bottleneck and that the branches meet only in the `InstanceHead`; below the last level they have two
    convolutions each, where the text gives no number. With `overlap` a second decoder predicts where cells overlap;
    its features join those of the first before the last fork.

    `heads` are the names of the channels of `dense`, `stride` is what height and width must be multiples of,
    `embedding_size` the D of `embed`, `queries` the N. Windows at inference should be of the training crop's size: the
    net knows where in the frame it looks. After a fresh draw of all weights `start` must be called.

    Source: Prytula 2023, sections 4.5 and 5.7. Differs: coordinates join the features in front of the branches (as in
    SparseInst, Cheng et al. 2022) and in the `InstanceHead`; masks are predicted `mask_stride` times smaller.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.base * 2**level for level in range(config.depth + 1)]
        last = int(math.log2(config.mask_stride))
        self.heads: tuple[str, ...] = ("overlap",) if config.overlap else ()
        self.in_channels = config.in_channels
        self.stride = 2**config.depth
        self.embedding_size = widths[-1]
        self.queries = config.queries
        self.mask_stride = config.mask_stride
        self.multi = config.levels == "multi"
        self.encoder = Encoder(config.in_channels, widths, config.reduction)
        levels = list(reversed(range(last, config.depth)))
        self.decoder = nn.ModuleList(_up_block(widths, level, config.reduction) for level in levels)
        forks = levels if self.multi else [last]
        self.forks = nn.ModuleList(
            _Fork(
                widths[level] * (1 + self.multi + (config.overlap and level == last)) + 2,
                config.width,
                N_CONVS if level == last else N_CONVS_BELOW,
                first=level == forks[0],
            )
            for level in forks
        )
        self.head = InstanceHead(config.width, config.queries, objectness=config.objectness)
        sides = reversed(range(config.depth)) if config.overlap else []
        self.side_decoder = nn.ModuleList(_up_block(widths, level, config.reduction) for level in sides)
        self.overlap = nn.Conv2d(widths[0], 1, 1) if config.overlap else None

    def start(self) -> None:
        """Puts the weights that must not be random in place; changes the net."""
        self.head.start()
        if self.overlap is not None:
            nn.init.constant_(self.overlap.bias, prior_logit(PRIOR))  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> SparseOutput:
        """All masks, classes and maps.

        Args:
            x: (B, in_channels, H, W) float32 in [0, 1]; H and W are multiples of `stride`.

        Raises:
            ShapeError: another number of channels, or H or W is not a multiple of `stride`.
        """
        features = self.encoder(x)
        side, dense = self._overlap(features)
        mask, instance = self._branches(features, side)
        masks, classes, objectness = self.head(mask, instance)
        return SparseOutput(masks, classes, objectness, dense)

    def embed(self, x: Tensor) -> Tensor:
        """The global average of the coarsest features, (B, D) float32; `x` as for `forward`."""
        coarsest: Tensor = self.encoder(x)[-1]
        return coarsest.float().mean(dim=(2, 3))

    def _overlap(self, features: list[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """The side decoder's features at the masks' resolution and its logits at the image's, None without it."""
        if self.overlap is None:
            return None, None
        x, side = features[-1], features[-1]
        for i, block in enumerate(self.side_decoder):
            x = block(torch.cat([features[-2 - i], _double(x)], dim=1))
            if i == len(self.decoder) - 1:
                side = x
        return side, self.overlap(x).float()

    def _branches(self, features: list[Tensor], side: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mask and instance features (B, width, h, w) at the masks' resolution."""
        shared = self._shared(features, side)
        mask, instance = self.forks[0](shared[0], None)
        for fork, level in zip(self.forks[1:], shared[1:], strict=True):
            mask, instance = fork(level, (mask, instance))
        return mask, instance

    def _shared(self, features: list[Tensor], side: Tensor | None) -> list[Tensor]:
        """What both branches take at each fork, the coarsest first."""
        x, shared = features[-1], []
        last = len(self.decoder) - 1
        for i, block in enumerate(self.decoder):
            skip = features[-2 - i]
            x = block(torch.cat([skip, _double(x)], dim=1))
            if self.multi or i == last:
                parts = [x, coordinates(x)]
                parts += [skip] if self.multi else []
                parts += [side] if side is not None and i == last else []
                shared.append(torch.cat(parts, dim=1))
        return shared


class InstanceHead(nn.Module):
    """Mask and instance features to N masks and classes by instance activation maps.

    A = sigmoid(conv3x3(I) + P), normalised to sum 1 a query; a = A' X^T (eq. 4.9) with X = the instance features I and
    the pixels' places; class and kernel by linear layers from a; mask = kernel . (mask features, places, 1).

    Source: Prytula 2023, section 4.5.2. Differs: places, i.e. (u, v, u^2, uv, v^2) with the frame sqrt(N) wide, stand
    beside the features: P gives each query a place of its own, a knows where it looked, and a kernel can keep its mask
    there. Convolutions alone see equal cells as equal. `start` makes query i look around node i of a lattice and draw
    a disc around what it found, so that from the first step on different queries answer for different cells.
    """

    def __init__(self, width: int, queries: int, *, objectness: bool) -> None:
        super().__init__()
        self.queries = queries
        self.width = width
        self.activation = nn.Conv2d(width, queries + 1, 3, padding=1)
        self.place = nn.Linear(PLACES, queries)
        self.kernel = nn.Linear(width + PLACES, width + PLACES + 1)
        self.classify = nn.Linear(width + PLACES + 1, 1)
        self.judge = nn.Linear(width + PLACES + 1, 1) if objectness else None
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Makes queries rare and gives each its place; keeps the random weights of the features, made smaller."""
        u, v = (lattice(self.queries) * math.sqrt(self.queries) / 2).unbind(1)
        one, none = torch.ones_like(u), torch.zeros_like(u)
        self.activation.weight[1:].mul_(0.1)
        nn.init.zeros_(self.activation.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.activation.bias[:1], prior_logit(PRIOR))  # type: ignore[index]
        self.place.weight.copy_(torch.stack([2 * u, 2 * v, -one, none, -one], dim=1))
        self.place.bias.copy_(-(u**2) - v**2)
        width, steep = self.width, 2.0
        self.kernel.weight.mul_(0.2)
        nn.init.zeros_(self.kernel.weight[:, width:])
        nn.init.zeros_(self.kernel.weight[width:])
        nn.init.zeros_(self.kernel.bias)
        for axis, square in ((width, width + 2), (width + 1, width + 4)):
            self.kernel.weight[axis, axis] = 2 * steep
            self.kernel.weight[-1, square] = -steep
            self.kernel.bias[square] = -steep
        self.kernel.bias[-1] = steep * RADIUS**2
        for head, bias in ((self.classify, prior_logit(PRIOR)), (self.judge, 0.0)):
            if head is not None:
                nn.init.zeros_(head.weight[:, width:])
                nn.init.constant_(head.bias, bias)

    def forward(self, mask: Tensor, instance: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Raw logits.

        Args:
            mask: (B, width, h, w).
            instance: same shape.

        Returns:
            Masks (B, N, h, w), classes (B, N), objectness (B, N) or None, float32.
        """
        content = _by_pixel(self.activation(instance))
        with torch.autocast(instance.device.type, enabled=False):
            places = self._places(instance)
            active = torch.sigmoid(content[..., 1:] + content[..., :1] + self.place(places))
            looked = active.transpose(1, 2) @ _by_pixel(instance)
            where = active.transpose(1, 2) @ places
            mass = active.sum(dim=1).clamp(min=1e-6)[..., None]
            found = torch.cat([looked, where], dim=2) / mass
            kernel = self.kernel(found)
            masks = kernel[..., : self.width] @ _by_pixel(mask).transpose(1, 2)
            masks = masks + (kernel[..., self.width : -1] @ places.T + kernel[..., -1:])
            known = torch.cat([found, mass.log()], dim=2)
            classes = self.classify(known).squeeze(2)
            objectness = None if self.judge is None else self.judge(known).squeeze(2)
        return masks.unflatten(2, instance.shape[-2:]), classes, objectness

    def _places(self, like: Tensor) -> Tensor:
        """(hw, 5) float32: u, v, u^2, uv, v^2 of each pixel's middle, in units of the lattice's pitch."""
        u, v = (coordinates(like[:1].float())[0] * math.sqrt(self.queries) / 2).flatten(1)
        return torch.stack([u, v, u * u, u * v, v * v], dim=1)


class _Fork(nn.Module):
    """A mask and an instance branch of one level."""

    def __init__(self, channels: int, width: int, n_convs: int, *, first: bool) -> None:
        super().__init__()
        below = 0 if first else width
        self.mask = ConvBlock(channels + below, width, 0, n_convs)
        self.instance = ConvBlock(channels + below, width, 0, n_convs)

    def forward(self, shared: Tensor, below: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Features (B, width, h, w) of both from what they share and from their own of the level below."""
        if below is None:
            return self.mask(shared), self.instance(shared)
        mask, instance = (torch.cat([shared, _double(branch)], dim=1) for branch in below)
        return self.mask(mask), self.instance(instance)


def _by_pixel(x: Tensor) -> Tensor:
    """(B, C, h, w) to (B, hw, C) float32: no copy but for the precision where x is in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).float()


def lattice(n: int) -> Tensor:
    """Points spread evenly over the square in about sqrt(n) rows: (n, 2) float32 x, y in (-1, 1)."""
    n_rows = max(1, round(math.sqrt(n)))
    points = []
    for row in range(n_rows):
        in_row = n // n_rows + (row < n % n_rows)
        points += [((2 * i + 1) / in_row - 1, (2 * row + 1) / n_rows - 1) for i in range(in_row)]
    return torch.tensor(points)


def coordinates(like: Tensor) -> Tensor:
    """X and y of each pixel's middle, -1 and 1 at the frame's edges: (B, 2, h, w) of the dtype of `like`."""
    height, width = like.shape[-2:]
    y = (torch.arange(height, device=like.device, dtype=torch.float32) * 2 + 1) / height - 1
    x = (torch.arange(width, device=like.device, dtype=torch.float32) * 2 + 1) / width - 1
    both = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
    return both.to(like.dtype).expand(len(like), -1, -1, -1)


def prior_logit(prior: float) -> float:
    """The logit of a probability in (0, 1)."""
    return math.log(prior / (1 - prior))


def _up_block(widths: list[int], level: int, reduction: int) -> ConvBlock:
    return ConvBlock(widths[level] + widths[level + 1], widths[level], reduction)


def _double(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="nearest")
