"""Who answers clicks: SAM or a champion, each with what it has seen of an image."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from backend.images import ImageFile
from backend.model_slot import Champion
from backend.sights import Sights
from backend.turns import Rank
from loop.labelstudio.results import Prompts
from loop.metrics.typical import Typical
from loop.models.click import cell_at
from loop.models.click_sam import sam_cell_at
from loop.models.sam import Sam
from loop.types import Instances


class Look(NamedTuple):
    """An image as a model has seen it: its (H, W), its memory, and 0 or 1 cells for prompts, usual cells, image id."""

    shape: tuple[int, int]
    nbytes: int
    cell: Callable[[Prompts, Typical | None, str], Instances]


@dataclass(frozen=True)
class ByChampion:
    """A champion answers; usual cells say nothing to it, it has learnt from them."""

    champion: Champion
    sights: Sights
    kind = "champion"

    @property
    def name(self) -> str:
        """The model's name."""
        return self.champion.label

    def look(self, file: ImageFile, rank: Rank) -> Look:
        """What clicks in an image are answered from; errors as `Sights.scene`."""
        scene = self.sights.scene(file, self.champion, rank)

        def cell(prompts: Prompts, typical: Typical | None, image_id: str) -> Instances:
            config = self.champion.segmenter.instance_config
            return cell_at(scene, prompts, config, image_id=image_id, model_version=self.name)

        return Look((int(scene.probs.shape[1]), int(scene.probs.shape[2])), scene.nbytes, cell)


@dataclass(frozen=True)
class BySam:
    """SAM answers; encoded images of `store_mb` MB in all are kept on disk."""

    sam: Sam
    sights: Sights
    store_mb: int
    kind = "sam"

    @property
    def name(self) -> str:
        """The model's name."""
        return f"sam:{self.sam.version}"

    def look(self, file: ImageFile, rank: Rank) -> Look:
        """What clicks in an image are answered from; errors as `Sights.embedding`."""
        embedding = self.sights.embedding(file, self.sam, rank, store_mb=self.store_mb)

        def cell(prompts: Prompts, typical: Typical | None, image_id: str) -> Instances:
            return sam_cell_at(
                self.sam, embedding, prompts, typical=typical, image_id=image_id, model_version=self.name
            )

        return Look(embedding.shape, embedding.nbytes, cell)


Answerer = ByChampion | BySam
