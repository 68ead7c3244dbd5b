"""U-Net: the plain encoder and decoder, the baseline of the others."""

import torch
from torch import Tensor, nn

from loop.config import ModelConfig
from loop.models.blocks import Decoder, Encoder, LevelDropout


class UNet(nn.Module):
    """Image to raw logits of the heads at the image's resolution.

    `heads` are the names of the channels in their order, `stride` is what height and width must be multiples of,
    `embedding_size` the D of `embed`. With `decoders: shared` one decoder carries all heads as channels (Prytula 2023,
    fig. 4.4 a, b), with `decoupled` each head has a decoder of its own (fig. 4.4 c). With `dropout` whole feature maps
    of the two coarsest levels are blanked in training mode; the embedding never sees it.

    Source: Ronneberger et al. 2015. Differs: padded convolutions, so that the output has the input's size; group
    normalisation; nearest-neighbour enlargement in place of transposed convolutions.
    """

    def __init__(self, config: ModelConfig, *, reduction: int = 0) -> None:
        super().__init__()
        widths = [config.base * 2**level for level in range(config.depth + 1)]
        self.heads: tuple[str, ...] = config.heads
        self.in_channels = config.in_channels
        self.stride = 2**config.depth
        self.embedding_size = widths[-1]
        self.encoder = Encoder(config.in_channels, widths, reduction)
        self.dropout = LevelDropout(config.dropout)
        groups = [self.heads] if config.decoders == "shared" else [(head,) for head in self.heads]
        self.decoders = nn.ModuleList(Decoder(widths, reduction) for _ in groups)
        self.outputs = nn.ModuleList(nn.Conv2d(widths[0], len(group), 1) for group in groups)

    def forward(self, x: Tensor) -> Tensor:
        """Raw logits (B, len(heads), H, W).

        Args:
            x: (B, in_channels, H, W) float32 in [0, 1]; H and W are multiples of `stride`.

        Raises:
            ShapeError: another number of channels, or H or W is not a multiple of `stride`.
        """
        features = self.dropout(self.encoder(x))
        parts = [output(decoder(features)) for decoder, output in zip(self.decoders, self.outputs, strict=True)]
        return torch.cat(parts, dim=1)

    def embed(self, x: Tensor) -> Tensor:
        """The global average of the coarsest features, (B, D) float32; `x` as for `forward`."""
        coarsest: Tensor = self.encoder(x)[-1]
        return coarsest.float().mean(dim=(2, 3))
