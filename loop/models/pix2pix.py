"""pix2pix: a U-Net that draws the planes of cells, and the discriminator that it learns against."""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from loop.config import ModelConfig
from loop.models.blocks import Decoder, Encoder

DROPOUT = 0.5
INNER = 3
"""Blocks of the decoder with dropout, counted from the coarsest; never the finest (Isola et al. 2017, 6.1.1)."""


class Pix2Pix(nn.Module):
    """The generator: image to raw logits of the heads at its resolution; the same calls and attributes as `UNet`.

    The sigmoid of the logits are the planes: interior, border and distance in configs/model/pix2pix.yaml. In training
    mode half of the values between the inner blocks of the decoder are dropped at random; in evaluation mode none.

    Source: Isola et al. 2017, sections 3.2.1 and 6.1.1 (U-Net with skip connections, dropout 0.5); seed 000, section
    3.3. Differs: convolution blocks with max pooling and group normalisation as in `UNet`, in place of strided
    convolutions and batch normalisation, which depends on the other crops; the noise of dropout is off when it
    predicts, so that an image always gets the same cells; planes from which cells follow in place of a drawn mask.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        widths = [config.base * 2**level for level in range(config.depth + 1)]
        self.heads: tuple[str, ...] = config.heads
        self.in_channels = config.in_channels
        self.stride = 2**config.depth
        self.embedding_size = widths[-1]
        self.encoder = Encoder(config.in_channels, widths, 0)
        self.decoder = Decoder(widths, 0)
        for number in range(min(INNER, config.depth - 1)):
            self.decoder.blocks[number] = nn.Sequential(self.decoder.blocks[number], nn.Dropout(DROPOUT))
        self.output = nn.Conv2d(widths[0], len(self.heads), 1)

    def forward(self, x: Tensor) -> Tensor:
        """Raw logits (B, len(heads), H, W).

        Args:
            x: (B, in_channels, H, W) float32 in [0, 1]; H and W are multiples of `stride`.

        Raises:
            ShapeError: another number of channels, or H or W is not a multiple of `stride`.
        """
        logits: Tensor = self.output(self.decoder(self.encoder(x)))
        return logits

    def embed(self, x: Tensor) -> Tensor:
        """The global average of the coarsest features, (B, D) float32; `x` as for `forward`."""
        coarsest: Tensor = self.encoder(x)[-1]
        return coarsest.float().mean(dim=(2, 3))


class PatchDiscriminator(nn.Module):
    """Says of each patch of 70 x 70 px whether its planes are of a person or made: image and planes to raw logits.

    Source: Isola et al. 2017, section 6.1.2 (C64-C128-C256-C512, the 70 x 70 PatchGAN). Differs: in place of batch
    normalisation spectral normalisation of all weights (Miyato et al. 2018) or, without it, group normalisation with
    one group; with both, the gains of the latter undo what the former bounds, and the discriminator erred no more after
    100 steps. `width` channels in the first layer in place of 64.
    """

    def __init__(self, in_channels: int, planes: int, width: int, *, spectral: bool = True) -> None:
        """Draws its weights, and the vectors of the spectral norm, from torch's global generator.

        Args:
            in_channels: of the image.
            planes: number of planes.
            width: channels of the first layer; doubled in each of the next three.
            spectral: each weight is divided by its largest singular value, and nothing else is normalised.
        """
        super().__init__()
        sizes = [in_channels + planes, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for level in range(4):
            stride = 2 if level < 3 else 1
            layers.append(nn.Conv2d(sizes[level], sizes[level + 1], 4, stride, 1, bias=spectral or level == 0))
            if level and not spectral:
                layers.append(nn.GroupNorm(1, sizes[level + 1]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(sizes[-1], 1, 4, 1, 1))
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if spectral:
                    spectral_norm(layer)
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor, planes: Tensor) -> Tensor:
        """Raw logits (B, 1, h, w), one a patch, high = of a person; h = w = 18 for crops of 160 px.

        Args:
            image: (B, in_channels, H, W) float32 in [0, 1]; H and W at least 24 px.
            planes: (B, planes, H, W) float32 in [0, 1].
        """
        scores: Tensor = self.layers(torch.cat([image, planes], dim=1) * 2 - 1)
        return scores
