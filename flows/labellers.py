"""Who proposes pseudo-labels in a project: built from its models and weights, asked once for each image."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from flows.audit import proposal_store, standings
from flows.context import LoopContext
from flows.gate import gate
from flows.predict import load_segmenter, predict_images
from flows.retrain import Lesson, challenger, context_of_kind, keep_back
from loop.adapters.mlflow_registry import ModelVersion
from loop.config import PseudoConfig
from loop.data.predictions import StoredPrediction
from loop.data.proposals import StoredProposal
from loop.data.snapshot import load_snapshot
from loop.data.store import read_image
from loop.errors import ImageError, InputError, LoopError, ServiceError, StateError
from loop.models import SEGMENTERS
from loop.models.segmenter import Segmenter
from loop.pseudo import build_labeller
from loop.pseudo.base import Labeller, Proposal, Tools
from loop.pseudo.evidence import evidence
from loop.pseudo.fusion import Fused, fuse_proposals
from loop.types import FloatArray, ImageRef, Instances, Sample, UInt8Array

logger = logging.getLogger(__name__)

CHAMPION = "champion"
PROMPTED = ("sam", "sam2")
"""Labellers that the champion's cells prompt, unless `pseudo.sam.mode` is automatic."""


@dataclass(frozen=True)
class Crew:
    """The labellers of a round.

    Attributes:
        labellers: those that could be built, as the settings name them.
        versions: name -> under which version its proposals are kept: its own, and where the champion's cells prompt it
            "@" and the champion's, as other hints give other cells; "+" and a hash where `pseudo` lets it look in
            another way than by default.
        missing: name -> why it could not be built.
        learnt: name -> ids of the images that it has learnt from, or that its hints come from.
        skipped: name -> the images on which it failed or was not believed, as `image: reason`; filled as it works.
    """

    labellers: tuple[Labeller, ...]
    versions: Mapping[str, str]
    missing: Mapping[str, str]
    learnt: Mapping[str, frozenset[str]]
    skipped: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of `labellers`."""
        return tuple(labeller.name for labeller in self.labellers)


def gather(context: LoopContext, champion: ModelVersion) -> Crew:
    """The project's labellers with the weights they have now; one that cannot be built is named and left out.

    Args:
        context: the project; `pseudo.labellers` names them.
        champion: its model in service.
    """
    versions: dict[str, ModelVersion] = {}

    def segmenter(kind: str) -> Segmenter:
        versions[kind] = _version_of(context, kind, champion)
        return load_segmenter(context, versions[kind])

    tools = Tools(context.config.pseudo, context.config.train.device, segmenter)
    built: list[Labeller] = []
    missing: dict[str, str] = {}
    names = tuple(dict.fromkeys(context.config.pseudo.labellers))
    for name in names:
        if name == context.config.model.name and CHAMPION in names:
            missing[name] = "it is the champion itself, which is asked already"
            continue
        try:
            built.append(build_labeller(name, tools))
        except ServiceError:
            raise
        except Exception as error:  # of whatever package the labeller comes from: the round goes on without it
            missing[name] = str(error) or type(error).__name__
    for name, reason in missing.items():
        logger.warning("labeller %s of %s is left out: %s", name, context.project_name, reason)
    learnt: dict[str, frozenset[str]] = {}
    kept: dict[str, str] = {}
    for labeller in built:
        prompted = _is_prompted(labeller, context.config.pseudo)
        teacher = versions.get(labeller.name, champion if prompted else None)
        learnt[labeller.name] = frozenset() if teacher is None else learnt_from(context, teacher)
        hinted = f"@{champion.label}" if prompted else ""
        kept[labeller.name] = f"{labeller.version}{hinted}{_way(labeller.name, context.config.pseudo)}"
    return Crew(tuple(built), kept, missing, learnt)


def _is_prompted(labeller: Labeller, config: PseudoConfig) -> bool:
    return labeller.needs_hint or (labeller.name in PROMPTED and config.sam.mode != "automatic")


def _way(name: str, config: PseudoConfig) -> str:
    """How a labeller looks at an image: "+" and a hash, or "" where that is as by default."""
    ways: list[list[str | int | bool]]
    both = (config, PseudoConfig())
    if name in PROMPTED:
        ways = [[c.sam.mode, c.sam.points_per_side, c.sam.hsv_filter] for c in both]
    elif name == CHAMPION or name in SEGMENTERS:
        ways = [[c.views] for c in both]
    else:
        return ""
    return "" if ways[0] == ways[1] else "+" + hashlib.sha256(json.dumps(ways[0]).encode()).hexdigest()[:6]


def _version_of(context: LoopContext, kind: str, champion: ModelVersion) -> ModelVersion:
    """The registered model of a kind that is in service.

    Raises:
        StateError: there is none yet.
    """
    if kind in (CHAMPION, context.config.model.name):
        return champion
    version = context_of_kind(context, kind).registry.champion()
    if version is None:
        raise StateError(f"the project has no {kind} model yet; the next round that learns trains one")
    return version


def learnt_from(context: LoopContext, version: ModelVersion) -> frozenset[str]:
    """The images whose labels by people a model learnt from; all labelled ones where nobody knows any more.

    Images that its training kept back to fit thresholds on count as not learnt from. So do those that it knows by
    pseudo-labels only: what a person says of them later is as new to it as of the other open images that it knows so,
    for which the confidence is wanted; without them a project would soon have nothing left to calibrate on.
    """
    try:
        snapshot = load_snapshot(context.workspace.snapshots_dir, version.tags.get("snapshot_id", ""))
    except StateError as error:
        logger.warning("what %s learnt from is not known, so no label is new to it: %s", version.label, error)
        return frozenset(row.image_id for row in context.index.images(context.project_name, state="labelled"))
    taught, _ = keep_back(snapshot.split("train"), float(version.tags.get("validation", 0)))
    return frozenset(sample.image.image_id for sample in taught)


def propose(
    context: LoopContext, crew: Crew, image: ImageRef, pixels: UInt8Array, hint: Instances | None
) -> dict[str, Proposal]:
    """What each labeller proposes for an image, by its name; what is on disk already is not made again.

    A labeller that fails on the image, or proposes more than `pseudo.max_cells` cells, is named in the log and left out
    for this image; one that sees no cell proposes none.

    Args:
        context: the project.
        crew: the labellers.
        image: which image.
        pixels: (H, W, C) uint8 of it.
        hint: the champion's cells of it, for labellers that are prompted by them.
    """
    found: dict[str, Proposal] = {}
    for labeller in crew.labellers:
        version = crew.versions[labeller.name]
        store = proposal_store(context, labeller.name, version)
        stored = store.load(image)
        is_new = stored is None
        if stored is None:
            try:
                made = labeller.propose(pixels, image_id=image.image_id, hint=hint)
            except Exception as error:  # whatever a labeller's package raises costs this image only
                _skip(crew, labeller, image, str(error) or type(error).__name__)
                continue
            stored = StoredProposal(replace(made.instances, model_version=version), made.stability)
        try:
            _check_number(labeller, len(stored.instances), context.config.pseudo.max_cells)
            if is_new:
                store.save(image, stored)
        except LoopError as error:
            _skip(crew, labeller, image, str(error))
            continue
        found[labeller.name] = Proposal(stored.instances, stored.stability)
    return found


def _skip(crew: Crew, labeller: Labeller, image: ImageRef, reason: str) -> None:
    logger.warning("labeller %s is left out for %s: %s", labeller.name, image.image_id, reason)
    crew.skipped.setdefault(labeller.name, []).append(f"{image.image_id}: {reason}")


def _check_number(labeller: Labeller, n: int, most: int) -> None:
    if n > most:
        raise InputError(f"{labeller.name} proposes {n} cells, more than pseudo.max_cells={most}; it is not believed")


class Seen(NamedTuple):
    """One image as the labellers see it: (H, W, C), their proposals, the fused cells, what speaks for each (N, F)."""

    pixels: UInt8Array
    proposals: dict[str, Proposal]
    fused: Fused
    features: FloatArray


class Panel:
    """A crew at work, each labeller with the say that its standing gives it.

    Where every labeller is switched off, `is_shadow`, all are heard as if they were believed, so that their proposals
    can be audited and they can recover; nothing of it may teach.
    """

    def __init__(self, context: LoopContext, champion: ModelVersion) -> None:
        self.crew = gather(context, champion)
        self.standings = standings(context, self.crew.names)
        trust = {name: found.trust for name, found in self.standings.items()}
        self.is_shadow = not any(trust.values())
        self.trust = dict.fromkeys(trust, 1.0) if self.is_shadow else trust
        self._context = context
        self._champion = champion

    @property
    def learnt(self) -> frozenset[str]:
        """The images that a labeller with a say has learnt from."""
        return frozenset().union(*(self.crew.learnt[name] for name, trust in self.trust.items() if trust > 0))

    def document(self) -> dict[str, dict[str, Any]]:
        """Version, say and skipped images of each labeller, by its name."""
        return {
            labeller.name: {
                "version": self.crew.versions[labeller.name],
                "trust": 0.0 if self.is_shadow else self.trust[labeller.name],
                "skipped": list(self.crew.skipped.get(labeller.name, [])),
            }
            for labeller in self.crew.labellers
        }

    def hints(self, images: Sequence[ImageRef]) -> Mapping[str, StoredPrediction]:
        """The champion's predictions, where a labeller other than the loop's own models may want them."""
        own = {CHAMPION, *SEGMENTERS}
        return (
            {}
            if own.issuperset(self.crew.names)
            else predict_images(self._context, self._champion, images, again=False)
        )

    def see(self, image: ImageRef, hint: StoredPrediction | None) -> Seen | None:
        """What the labellers see in an image; None where its file cannot be read, which the log says."""
        try:
            pixels = read_image(image.path).pixels
            if pixels.shape[:2] != (image.height, image.width):
                raise ImageError(f"{image.path} is {pixels.shape[:2]}, was {(image.height, image.width)} (H, W)")
        except ImageError as error:
            logger.warning("%s is not looked at by the labellers: %s", image.image_id, error)
            return None
        found = propose(self._context, self.crew, image, pixels, hint.instances if hint else None)
        return self._fused(found, pixels, image.image_id, self.trust)

    def all_believed(self, seen: Seen) -> Seen:
        """The same image as if those who are switched off had a say: what they would teach."""
        trust = {name: value or 1.0 for name, value in self.trust.items()}
        return self._fused(seen.proposals, seen.pixels, seen.fused.instances.image_id, trust)

    def _fused(self, found: dict[str, Proposal], pixels: UInt8Array, image_id: str, trust: Mapping[str, float]) -> Seen:
        fused = fuse_proposals(
            found,
            trust,
            self._context.config.pseudo,
            shape=(pixels.shape[0], pixels.shape[1]),
            image_id=image_id,
            min_area=self._context.config.instances.min_area,
        )
        return Seen(pixels, found, fused, evidence(fused, pixels, trust))


def further_kinds(context: LoopContext) -> list[str]:
    """The networks besides the project's own that propose pseudo-labels."""
    own = {CHAMPION, context.config.model.name}
    return [name for name in dict.fromkeys(context.config.pseudo.labellers) if name in SEGMENTERS and name not in own]


def train_kinds(context: LoopContext, snapshot_id: str, holdout: Sequence[Sample]) -> dict[str, str]:
    """Trains and gates each further network on a snapshot of people's labels; what became of it, by its name.

    They propose from the next round on, when there are labels that they have not learnt from. A training that fails is
    named and costs that labeller only.

    Raises:
        ServiceError: MLflow or the training pool stopped; run the round again to resume.
    """
    told: dict[str, str] = {}
    for kind in further_kinds(context):
        try:
            version = challenger(context, snapshot_id, None, Lesson(kind=kind))
            told[kind] = gate(context_of_kind(context, kind), version, holdout).reason
        except ServiceError:
            raise
        except LoopError as error:
            told[kind] = f"not trained: {error}"
            logger.warning("labeller %s of %s is not trained: %s", kind, context.project_name, error)
    return told
