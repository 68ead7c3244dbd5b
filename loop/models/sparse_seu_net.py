"""SparseSEU-Net: a U-Net that gives a set of masks, one a query, without boxes and without a watershed."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loop.config import ModelConfig
from loop.errors import ConfigError
from loop.models.blocks import ConvBlock, Encoder, LevelDropout

N_CONVS = 4
N_CONVS_BELOW = 2
PLACES = 5
MOMENTS = 3
PRIOR = 0.01
RADIUS = 0.7
STEEP = 2.0
SHARPNESS = math.log(4.0)


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
    its features join those of the first before the last fork. `dropout` is as in `UNet`.

    `heads` are the names of the channels of `dense`, `stride` is what height and width must be multiples of,
    `embedding_size` the D of `embed`, `queries` the N. Windows at inference should be of the training crop's size: the
    net knows where in the frame it looks. After a fresh draw of all weights `start` must be called.

    Source: Prytula 2023, sections 4.5 and 5.7. Differs: coordinates join the features in front of the branches (as in
    SparseInst, Cheng et al. 2022) and in the `InstanceHead`; masks are predicted `mask_stride` times smaller.
    """

    def __init__(self, config: ModelConfig) -> None:
        """Builds it.

        Raises:
            ConfigError: the masks would be no finer than the bottleneck, so that no decoder is left.
        """
        super().__init__()
        if config.mask_stride >= 2**config.depth:
            raise ConfigError(
                f"model.mask_stride={config.mask_stride} with model.depth={config.depth} leaves no decoder; give a "
                f"mask_stride below {2**config.depth}, or more depth"
            )
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
        self.dropout = LevelDropout(config.dropout)
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
        features = self.dropout(self.encoder(x))
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

    A = sigmoid(conv3x3(I) + P), normalised to sum 1 a query; a = A' X^T (eq. 4.9), X = the instance features I; class
    and kernel by linear layers from a; mask = kernel . mask features.

    Source: Prytula 2023, section 4.5.2. Differs, because convolutions alone see equal cells as equal wherever they lie:
    P falls off with the squared distance from a point of the query's own; a also holds how far A' spreads (its second
    moments); the kernel also weighs the offsets from the middle of A' and their products, so that it can keep its
    mask there (relative coordinates, as in CondInst, Tian et al. 2020); the classes also take the logarithm of the sum
    of A before it is normalised. The weights of the convolution are the sum of a part that all queries share and of one
    each. Offsets are in units of the frame's side / sqrt(N). `start` spreads the points over a lattice and makes each
    mask a disc around what its query found.
    """

    def __init__(self, width: int, queries: int, *, objectness: bool) -> None:
        super().__init__()
        self.queries = queries
        self.width = width
        self.activation = nn.Conv2d(width, queries + 1, 3, padding=1, bias=False)
        self.rarity = nn.Parameter(torch.zeros(queries))
        self.points = nn.Parameter(torch.zeros(queries, 2))
        self.sharpness = nn.Parameter(torch.zeros(queries))
        self.kernel = nn.Linear(width + MOMENTS, width + PLACES + 1)
        self.classify = nn.Linear(width + MOMENTS + 1, 1)
        self.judge = nn.Linear(width + MOMENTS + 1, 1) if objectness else None
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Makes queries rare and gives each its place; keeps the random weights of the features, some made smaller."""
        self.activation.weight[1:].mul_(0.1)
        nn.init.constant_(self.rarity, prior_logit(PRIOR))
        self.points.copy_(lattice(self.queries) * self._reach)
        nn.init.constant_(self.sharpness, SHARPNESS)
        self.kernel.weight.mul_(0.2)
        nn.init.zeros_(self.kernel.weight[self.width :])
        nn.init.zeros_(self.kernel.bias)
        self.kernel.bias[[self.width + 2, self.width + 4]] = -STEEP
        self.kernel.bias[-1] = STEEP * RADIUS**2
        for head, bias in ((self.classify, prior_logit(PRIOR)), (self.judge, 0.0)):
            if head is not None:
                nn.init.zeros_(head.weight[:, self.width :])
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
            active = torch.sigmoid(content[..., 1:] + content[..., :1] + self._nearness(places))
            mass = active.sum(dim=1).clamp(min=1e-6)[..., None]
            active = active.transpose(1, 2)
            middle, moments = _moments(active @ places / mass)
            found = torch.cat([active @ _by_pixel(instance) / mass, moments], dim=2)
            kernel = self.kernel(found)
            masks = kernel[..., : self.width] @ _by_pixel(mask).transpose(1, 2)
            around = _absolute(kernel[..., self.width :], middle)
            masks = masks + (around[..., :-1] @ places.T + around[..., -1:])
            known = torch.cat([found, mass.log()], dim=2)
            classes = self.classify(known).squeeze(2)
            objectness = None if self.judge is None else self.judge(known).squeeze(2)
        return masks.unflatten(2, instance.shape[-2:]), classes, objectness

    @property
    def _reach(self) -> float:
        """Half the frame's side in the unit of the offsets."""
        return math.sqrt(self.queries) / 2

    def _places(self, like: Tensor) -> Tensor:
        """(hw, 5) float32: u, v, u^2, uv, v^2 of each pixel's middle."""
        u, v = (coordinates(like[:1].float())[0] * self._reach).flatten(1)
        return torch.stack([u, v, u * u, u * v, v * v], dim=1)

    def _nearness(self, places: Tensor) -> Tensor:
        """(hw, N): highest at each query's point, falling with the squared distance from it."""
        sharp = self.sharpness.exp()
        squared = places[:, 2:3] + places[:, 4:5] - 2 * places[:, :2] @ self.points.T + (self.points**2).sum(1)
        return self.rarity - sharp * squared


def _moments(means: Tensor) -> tuple[Tensor, Tensor]:
    """From the means of u, v, u^2, uv, v^2 (..., 5): the middle (..., 2) and the second moments about it (..., 3)."""
    u, v = means[..., 0], means[..., 1]
    spread = means[..., 2:] - torch.stack([u * u, u * v, v * v], dim=-1)
    return means[..., :2], spread


def _absolute(around: Tensor, middle: Tensor) -> Tensor:
    """Weights of (u, v, u^2, uv, v^2, 1) that equal weights `around` (..., 6) of the same of offsets from `middle`."""
    ku, kv, kuu, kuv, kvv, one = around.unbind(-1)
    u, v = middle.unbind(-1)
    constant = one - ku * u - kv * v + kuu * u * u + kuv * u * v + kvv * v * v
    return torch.stack([ku - 2 * kuu * u - kuv * v, kv - 2 * kvv * v - kuv * u, kuu, kuv, kvv, constant], dim=-1)


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
