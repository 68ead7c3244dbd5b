"""SEU-Net: a U-Net whose blocks carry squeeze-and-excitation."""

from loop.config import ModelConfig
from loop.models.unet import UNet


class SEUNet(UNet):
    """A `UNet` with squeeze-and-excitation after each block on both ways; the same calls and attributes.

    Source: Prytula 2023, sections 4.2 to 4.2.3. Differs: as `UNet`; by default two heads (interior and border) that
    share one decoder, which learns most in the few minutes of a round.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, reduction=config.reduction)
