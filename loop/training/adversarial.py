"""A generator that learns against a discriminator (pix2pix), watched so that it ends well where the game does not."""

import logging
import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loop.config import ModelConfig, TrainConfig
from loop.data.dataset import Batch
from loop.errors import ConfigError
from loop.losses.gan import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    lowest_discriminator_loss,
    weighted_l1,
)
from loop.models.pix2pix import PatchDiscriminator
from loop.models.runtime import autocast
from loop.training.criterion import head_weights, taught
from loop.training.distributed import Group
from loop.training.learner import MAX_GRADIENT_NORM, Learner, moments_of, put_moments, ramped

logger = logging.getLogger(__name__)

FIGURES = ("loss_l1", "loss_adversarial", "loss_discriminator", "score_real", "score_fake")
BETAS = (0.5, 0.999)
PENALTY_EVERY = 8
KEEP_EVERY = 20

DECAY = 0.95
SETTLE = 40
LONG = 150
NO_ERROR = 0.01
RUNAWAY = 12.0
WORSE = 2.0
SOON_WORSE = 1.3


class Losses(NamedTuple):
    """Of one step: mean absolute error of the planes, adversarial loss of the generator, loss of the discriminator."""

    l1: float
    adversarial: float
    discriminator: float


@dataclass
class Watch:
    """Tells from the losses whether a generator and its discriminator still learn from each other.

    `floor` is the lowest loss that a discriminator can have. The others are smoothed losses and counts so far.
    """

    floor: float
    seen: float = 0.0
    l1: float = 0.0
    best_l1: float = math.inf
    adversarial: float = 0.0
    discriminator: float = 0.0
    flawless: float = 0.0

    def take(self, losses: Losses) -> str:
        """Why it is over after a step with these losses; "" where it is not.

        Over: a loss is NaN or infinite; the error of the planes, smoothed, is `WORSE` times its best (divergence); the
        generator's adversarial loss, smoothed, is above `RUNAWAY` (it is lost); the discriminator made next to no error
        in each of the last `LONG` steps (it can teach no more).
        """
        for name, value in losses._asdict().items():
            if not math.isfinite(value):
                return f"the {name} loss became {value}"
        self.seen += 1
        keep = min(DECAY, 1 - 1 / self.seen)
        self.l1 = keep * self.l1 + (1 - keep) * losses.l1
        self.adversarial = keep * self.adversarial + (1 - keep) * losses.adversarial
        self.discriminator = keep * self.discriminator + (1 - keep) * losses.discriminator
        self.flawless = self.flawless + 1 if self.discriminator - self.floor < NO_ERROR else 0
        if self.seen < SETTLE:
            self.best_l1 = min(self.best_l1, max(self.l1, losses.l1))
        else:
            self.best_l1 = min(self.best_l1, self.l1)
        if self.l1 > WORSE * self.best_l1:
            return f"the planes' error rose to {self.l1:.3f} from {self.best_l1:.3f} at best"
        if self.adversarial > RUNAWAY:
            return f"the generator's adversarial loss ran away to {self.adversarial:.1f}"
        if self.flawless >= LONG:
            return f"the discriminator made next to no error in {LONG} steps (loss {self.discriminator:.4f})"
        return ""

    @property
    def is_well(self) -> bool:
        """Whether there is no sign of trouble, so that the weights are worth keeping."""
        return not self.flawless and self.l1 <= SOON_WORSE * self.best_l1 and self.adversarial <= RUNAWAY / 2


class AdversarialLearner(Learner):
    """A `Learner` of a generator: beside the error of its planes, a discriminator tells it how to look like a person's.

    A step goes through the generator once and updates both networks. The generator minimises the adversarial loss plus
    `gan_l1_weight` times the weighted mean absolute error of its planes, the heads weighed as in `TrainConfig`; the
    discriminator learns from the planes that the generator made in the same step, and every `PENALTY_EVERY` steps its
    gradient on a person's planes is penalised (R1, so many times as strong). Pixels that do not count are blank in what
    the discriminator sees, a person's planes and made ones alike; beside labelled crops those of pseudo-labelled ones
    count for it in full as soon as their weight is above 0. `consistency` is not used. Dropout is drawn from the seed
    and the step alone.

    Attributes:
        discriminator: on the group's device.
        ended: why the game is over: a loss is not finite, the planes get worse, or one of both has lost for good (see
            `Watch`); "" while all is well. The averaged weights are then the last that were good, and further steps
            change nothing.

    Raises:
        ConfigError: as `Learner`; or there is more than one process.

    Source: Isola et al. 2017, section 3.3; seed 000, section 3.3. Differs: AdamW with betas (0.5, 0.999), smoothed
    labels, spectral norm, a lazy R1 penalty (Karras et al. 2020, section 3.2), and two time scales (Heusel et al. 2017;
    there the discriminator is the faster, here the generator, which has more to learn).
    """

    def __init__(self, model: ModelConfig, config: TrainConfig, group: Group, *, spectral: bool = True) -> None:
        if group.world > 1:
            raise ConfigError(
                f"{group.world} processes train {model.name} together, but its discriminator learns in one only; train "
                "pix2pix on one process"
            )
        super().__init__(model, config, group)
        self._optimiser = torch.optim.AdamW(
            self.net.parameters(), lr=config.learning_rate, betas=BETAS, weight_decay=config.weight_decay
        )
        with self._drawn(0):
            judge = PatchDiscriminator(model.in_channels, len(self.lesson.heads), 2 * model.base, spectral=spectral)
        self.discriminator: nn.Module = judge.to(group.device).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        self._opponent = torch.optim.AdamW(
            self.discriminator.parameters(), lr=config.gan_rate, betas=BETAS, weight_decay=config.weight_decay
        )
        weights = head_weights(config)
        self._heads = torch.tensor([weights[head] for head in self.lesson.heads], device=group.device)[:, None, None]
        self._watch = Watch(lowest_discriminator_loss(config.gan_smooth))
        self._good, self._fresh = ([tensor.clone() for tensor in self.average.tensors] for _ in range(2))
        self._last = torch.zeros((), device=group.device)
        self._said: list[dict[str, float]] = []
        self._of_step = torch.zeros(5, device=group.device)

    def step(self, batches: list[Batch], rate: float, ramp: float = 1.0) -> Tensor:
        """One step of both networks on some batches; the generator's loss, () on the device.

        Arguments and errors as of `Learner.step`; `rate` is the generator's, that of the discriminator falls with it.
        The losses of each step are read from the device at once, to end in time.
        """
        if self.ended:
            self.steps += 1
            return self._last
        for options in self._opponent.param_groups:
            options["lr"] = self._config.gan_rate * rate / self._config.learning_rate
        with self._drawn(self.steps + 1):
            loss = super().step(batches, rate, ramp)
        nn.utils.clip_grad_norm_(self.discriminator.parameters(), MAX_GRADIENT_NORM)
        self._opponent.step()
        values = self._of_step.tolist()
        if all(map(math.isfinite, values)):
            self._said.append(dict(zip(FIGURES, values, strict=True)))
        self.ended = self._watch.take(Losses(*values[:3]))
        if self.ended:
            self._end()
            return self._last
        self._last = loss
        if self.steps % KEEP_EVERY == 0 and self._watch.is_well:
            self._keep()
        return loss

    def figures(self) -> dict[str, float]:
        """Means since last asked: the losses, and how likely the discriminator holds real and made patches for real."""
        said, self._said = self._said, []
        return {name: math.fsum(one[name] for one in said) / len(said) for name in FIGURES} if said else {}

    def tensors(self) -> dict[str, Tensor]:
        """As `Learner.tensors`, with the discriminator's and what is watched."""
        found = {f"judge.{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
        found |= moments_of(self._opponent, self.discriminator, "judge_adam")
        found |= {f"good.{i}": tensor for i, tensor in enumerate([*self._good, *self._fresh])}
        found["watch"] = torch.tensor(astuple(self._watch), dtype=torch.float64)
        found["last"] = self._last
        if self.ended:
            found["ended"] = torch.tensor(list(self.ended.encode()), dtype=torch.uint8)
        return super().tensors() | {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """As `Learner.restore`."""
        super().restore(tensors, steps)
        state = {name.removeprefix("judge."): t for name, t in tensors.items() if name.startswith("judge.")}
        self.discriminator.load_state_dict(state)
        put_moments(self._opponent, self.discriminator, tensors, "judge_adam")
        for i, kept in enumerate([*self._good, *self._fresh]):
            kept.copy_(tensors[f"good.{i}"])
        self._watch = Watch(*tensors["watch"].tolist())
        self._last.copy_(tensors["last"])
        self.ended = bytes(tensors["ended"].tolist()).decode() if "ended" in tensors else ""

    def _accumulate(self, batches: list[Batch]) -> Tensor:
        """Leaves the mean gradients of both networks in their parameters; the generator's mean loss."""
        self._opponent.zero_grad(set_to_none=True)
        self._of_step = torch.zeros(5, device=self._group.device)
        return super()._accumulate(batches)

    def _learn(self, piece: Batch, share: float) -> Tensor:
        """As `Learner._learn`, for both networks."""
        device, config = self._group.device, self._config
        image = torch.from_numpy(piece.image).to(device).contiguous(memory_format=torch.channels_last)
        truth, factor = ramped(taught(piece, device), piece, self._ramp)
        counts = (truth.weight > 0).float()
        with autocast(device, config.precision):
            logits = self._call(image)
        made = torch.sigmoid(logits.float())
        l1 = weighted_l1(made, truth.target, truth.weight * self._heads)
        self.discriminator.requires_grad_(False)
        adversarial = generator_loss(self._scores(image, made * counts))
        loss = adversarial + config.gan_l1_weight * l1
        torch.autograd.backward(share * factor * loss)
        self.discriminator.requires_grad_(True)
        real = self._scores(image, truth.target * counts)
        fake = self._scores(image, made.detach() * counts)
        judged = discriminator_loss(real, fake, smooth=config.gan_smooth)
        torch.autograd.backward(share * factor * judged)
        if config.gan_penalty and self.steps % PENALTY_EVERY == 0:
            known = (truth.target * counts).requires_grad_()
            with torch.autocast(device.type, enabled=False):
                penalty = gradient_penalty(self.discriminator(image, known), known)
            torch.autograd.backward(share * factor * config.gan_penalty * PENALTY_EVERY * penalty)
        scores = [real.float().sigmoid().mean(), fake.float().sigmoid().mean()]
        self._of_step += share * torch.stack([l1, adversarial, judged, *scores]).detach()
        return share * factor * loss.detach()

    def _scores(self, image: Tensor, planes: Tensor) -> Tensor:
        with autocast(self._group.device, self._config.precision):
            scores: Tensor = self.discriminator(image, planes)
        return scores

    def _keep(self) -> None:
        """The fresh weights, which `KEEP_EVERY` steps found no fault with, become good; the present are the fresh."""
        self._good, self._fresh = self._fresh, self._good
        for kept, current in zip(self._fresh, self.average.tensors, strict=True):
            kept.copy_(current)

    @torch.no_grad()
    def _end(self) -> None:
        logger.warning("step %d: %s; the last good weights are kept", self.steps, self.ended)
        for current, kept in zip(self.average.tensors, self._good, strict=True):
            current.copy_(kept)
        self.average.copy_to(self.net)
