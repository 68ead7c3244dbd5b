"""Damages labels in known places: cells shifted, merged, deleted and invented, in equal parts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from loop.masks import from_masks, to_dense
from loop.metrics.matching import areas
from loop.types import BoolArray, Sample

KINDS = ("shifted", "merged", "deleted", "invented")

SHIFT = (0.3, 0.5)
"""How far a cell is shifted, in diameters of a disc of its area: its IoU with itself falls to 0.45 .. 0.24."""
NEAR = 1.6
"""Cells are merged whose centres are no farther apart than this, in the mean of their diameters."""
TRIES = 100


@dataclass(frozen=True, eq=False)
class Damage:
    """One corruption: its kind and where it was done, (H, W) bool, what was there before and what is there now."""

    kind: str
    place: BoolArray


@dataclass(frozen=True, eq=False)
class Corrupted:
    """A sample with damaged labels, and every damage to it; none where it was left alone."""

    sample: Sample
    damages: tuple[Damage, ...]


def concentrated(
    samples: Sequence[Sample], rng: np.random.Generator, *, share: float, within: float
) -> list[Corrupted]:
    """Labels of whole images damaged: images at random, `within` of the cells of each, until `share` of all cells is.

    At least one cell of an image drawn is damaged. A merger counts as one damaged cell.
    """
    wanted = share * sum(len(sample.instances) for sample in samples)
    found = [Corrupted(sample, ()) for sample in samples]
    dealt = 0
    for i in rng.permutation(len(samples)).tolist():
        if dealt >= wanted:
            break
        n = min(max(1, round(within * len(samples[i].instances))), math.ceil(wanted) - dealt)
        found[i] = corrupt(samples[i], n, rng, first_kind=dealt)
        dealt += len(found[i].damages)
    return found


def spread(samples: Sequence[Sample], rng: np.random.Generator, *, share: float) -> list[Corrupted]:
    """Labels of all images damaged alike: `share` of all cells, each drawn at random from all images."""
    owners = np.repeat(np.arange(len(samples)), [len(sample.instances) for sample in samples])
    drawn = rng.permutation(owners)[: round(share * len(owners))]
    counts = np.bincount(drawn, minlength=len(samples)).tolist()
    found, dealt = [], 0
    for sample, n in zip(samples, counts, strict=True):
        found.append(corrupt(sample, n, rng, first_kind=dealt) if n else Corrupted(sample, ()))
        dealt += len(found[-1].damages)
    return found


def corrupt(sample: Sample, n: int, rng: np.random.Generator, *, first_kind: int = 0) -> Corrupted:
    """`n` cells of a sample damaged, the kinds in turn from number `first_kind`, no cell twice.

    A kind that is not possible (no neighbour to merge with, no room to invent a cell) gives way to the next one; where
    none is possible, fewer than `n` are damaged.
    """
    cells = sample.instances
    masks: dict[int, BoolArray] = dict(enumerate(to_dense(cells)))
    centres = np.array([np.argwhere(mask).mean(axis=0) for mask in masks.values()]).reshape(-1, 2)
    sizes = centres, np.sqrt(4 * areas(cells) / np.pi)
    free = rng.permutation(len(cells)).tolist()
    damages: list[Damage] = []
    turn = first_kind
    while free and len(damages) < n:
        damage = None
        for kind in (KINDS[(turn + k) % len(KINDS)] for k in range(len(KINDS))):
            damage = next(filter(None, (_damage(kind, own, masks, free, sizes, rng) for own in list(free))), None)
            turn += 1
            if damage is not None:
                damages.append(damage)
                break
        if damage is None:
            break
    kept = [mask for _, mask in sorted(masks.items())]
    return Corrupted(sample._replace(instances=from_masks(kept, cells.shape, image_id=cells.image_id)), tuple(damages))


def _damage(
    kind: str,
    own: int,
    masks: dict[int, BoolArray],
    free: list[int],
    sizes: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> Damage | None:
    """Changes `masks` and `free`; None, and nothing changed, where it cannot be done."""
    centres, diameters = sizes
    before = masks[own]
    if kind == "deleted":
        free.remove(own)
        return Damage(kind, masks.pop(own))
    if kind == "shifted":
        moved = _moved(before, rng.uniform(*SHIFT) * diameters[own], rng)
        if moved is None:
            return None
        free.remove(own)
        masks[own] = moved
        return Damage(kind, before | moved)
    if kind == "merged":
        distance = np.linalg.norm(centres - centres[own], axis=1) / ((diameters + diameters[own]) / 2)
        near = [k for k in free if k != own and distance[k] <= NEAR]
        if not near:
            return None
        other = min(near, key=lambda k: float(distance[k]))
        free.remove(own)
        free.remove(other)
        rest = [mask for k, mask in masks.items() if k not in (own, other)]
        masks[own] = _hull(before | masks.pop(other)) & ~np.any([np.zeros_like(before), *rest], axis=0)
        return Damage(kind, masks[own])
    copy = _invented(before, np.any(list(masks.values()), axis=0), rng)
    if copy is None:
        return None
    masks[max(masks) + 1] = copy  # the cell that it is like stays as it is
    return Damage(kind, copy)


def _moved(mask: BoolArray, by: float, rng: np.random.Generator) -> BoolArray | None:
    """The mask shifted by a distance in px in a random direction in which it stays inside the image."""
    for _ in range(TRIES):
        angle = rng.uniform(0, 2 * np.pi)
        rows, columns = np.nonzero(mask)
        rows, columns = rows + round(by * np.sin(angle)), columns + round(by * np.cos(angle))
        if min(rows.min(), columns.min()) >= 0 and rows.max() < mask.shape[0] and columns.max() < mask.shape[1]:
            moved = np.zeros_like(mask)
            moved[rows, columns] = True
            return None if np.array_equal(moved, mask) else moved
    return None


def _hull(mask: BoolArray) -> BoolArray:
    hull = cv2.convexHull(np.argwhere(mask)[:, ::-1].astype(np.int32))
    return cv2.fillConvexPoly(np.zeros(mask.shape, np.uint8), hull, 1).astype(np.bool_) | mask


def _invented(mask: BoolArray, taken: BoolArray, rng: np.random.Generator) -> BoolArray | None:
    """The mask, mirrored at random, at a random place where no cell is."""
    rows, columns = np.nonzero(mask)
    crop = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    crop = crop[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    height, width = mask.shape
    for _ in range(TRIES):
        y, x = rng.integers(0, height - crop.shape[0] + 1), rng.integers(0, width - crop.shape[1] + 1)
        window = (slice(y, y + crop.shape[0]), slice(x, x + crop.shape[1]))
        if not (taken[window] & crop).any():
            copy = np.zeros_like(mask)
            copy[window] = crop
            return copy
    return None
