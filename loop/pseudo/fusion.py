"""Several labellers' proposals for one image become one set of cells."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loop.config import PseudoConfig
from loop.errors import InputError, ShapeError
from loop.metrics.matching import Int64Array, iou_matrix, match
from loop.pseudo.base import Proposal
from loop.rings import Crop, crop_mask, largest_part
from loop.types import FloatArray, Instances, IntArray, Origin

FOUND_IOU = 0.5  # of a labeller without a say
LEAST_WEIGHT = 1e-6  # a cell of score or stability 0 is still there, under every other


class Fused(NamedTuple):
    """One set of cells and who stands behind each.

    Attributes:
        instances: N >= 0 cells, strongest first, source "pseudo", score = weighted mean score of the labellers that
            found the cell, weight 1, each with the origin of its strongest labeller.
        support: (N, L) float32 in [0, 1], IoU of the cell with that labeller's own, 0 = it did not find the cell.
        names: the L labellers, in alphabetical order.
        stability: (N,) float32 in [0, 1], weighted mean over the labellers that found the cell.
    """

    instances: Instances
    support: FloatArray
    names: tuple[str, ...]
    stability: FloatArray


class _Pool(NamedTuple):
    """The cells of all labellers that have a say, one after the other.

    `owner` (M,) is the place in `names`, `place` (M,) the cell's in its proposal, `weight` (M,) trust x score x
    stability, `stability` (M,) float32.
    """

    cells: tuple[Instances, ...]
    owner: Int64Array
    place: Int64Array
    weight: FloatArray
    stability: FloatArray

    def crop(self, k: int) -> Crop:
        cells, i = self.cells[int(self.owner[k])], int(self.place[k])
        x0, y0, x1, y1 = cells.boxes_xyxy[i].tolist()
        return Crop((x0, y0, x1, y1), cells.masks[i])


def fuse_proposals(
    proposals: Mapping[str, Proposal],
    trust: Mapping[str, float],
    config: PseudoConfig,
    *,
    shape: tuple[int, int] = (0, 0),
    image_id: str = "",
    min_area: int = 20,
) -> Fused:
    """One set of cells from what each labeller proposes; the order of the labellers does not matter.

    Cells of different labellers pair where their IoU reaches `fuse_iou`, best pairs first; a group has at most one cell
    of each labeller, and each of its cells reaches `fuse_iou` with every other, so neighbours do not chain. A pixel is
    the group's where the weights (trust x score x stability) of the cells that have it are more than half of the
    group's; at a tie the strongest cell decides. A pixel that two groups claim goes to the one of the larger weight in
    all, unless `overlaps`. The largest part of what is left is the cell.

    Args:
        proposals: by labeller; none at all is allowed.
        trust: by labeller, >= 0, how far it is believed; a labeller that is not named here counts 1; one of 0, or of
            more than `max_cells` cells, has no say, but its column of `support` still tells what it found.
        config: `fuse_iou`, `overlaps`, `max_cells`.
        shape: (H, W) of the image where there are no proposals, px.
        image_id: of the image where there are no proposals.
        min_area: smaller cells are dropped, px.

    Raises:
        InputError: a trust is negative or no number.
        ShapeError: proposals for images of different shapes, or not one stability a cell.

    The cost grows with the pairs of labellers, and for each with the pairs of their cells whose boxes touch.

    Source: seed 003, section 3.7 (IoU 0.15, weighted fusion, no pixel in two cells). Differs: weights hold trust and
    stability beside the score, and groups are closed under the threshold.
    """
    names = tuple(sorted(proposals))
    _check(proposals, trust)
    if not names:
        empty = Instances.build(shape, image_id=image_id, source="pseudo")
        return Fused(empty, np.zeros((0, 0), np.float32), names, np.zeros(0, np.float32))
    every = [proposals[name] for name in names]
    say = [trust.get(name, 1.0) * (len(proposals[name].instances) <= config.max_cells) for name in names]
    pool = _pool(every, say)
    groups = _groups(pool, config.fuse_iou)
    masks = [_vote(pool, group) for group in groups]
    if not config.overlaps:
        masks = _contest(masks, every[0].instances.shape)
    crops = [_largest_part(crop) for crop in masks]
    kept = [g for g, crop in enumerate(crops) if crop is not None and np.count_nonzero(crop.mask) >= min_area]
    groups, found = [groups[g] for g in kept], [crop for g in kept if (crop := crops[g]) is not None]
    instances = _instances(pool, groups, found, names, every)
    return Fused(instances, _support(instances, pool, groups, every), names, _mean(pool, groups, pool.stability))


def label_of(name: str, version: str) -> str:
    """Who made a cell, as its `Origin.by` says: "LABELLER:VERSION"; a version that starts so stays as it is."""
    return version if version.startswith(f"{name}:") else f"{name}:{version}"


def _check(proposals: Mapping[str, Proposal], trust: Mapping[str, float]) -> None:
    for name, value in trust.items():
        if not (np.isfinite(value) and value >= 0):
            raise InputError(f"the trust in {name} is {value}; give a number >= 0, 0 = it has no say")
    shapes = {name: proposal.instances.shape for name, proposal in proposals.items()}
    if len(set(shapes.values())) > 1:
        raise ShapeError(f"labellers propose cells for images of {shapes} (H, W); fuse proposals for one image")
    for name, (instances, stability) in proposals.items():
        if stability.shape != (len(instances),):
            raise ShapeError(f"{name} gives {len(instances)} cells and stabilities {stability.shape}; one each")


def _pool(every: Sequence[Proposal], say: Sequence[float]) -> _Pool:
    counts = [len(p.instances) if say[i] > 0 else 0 for i, p in enumerate(every)]
    told = list(zip(say, every, counts, strict=True))
    weights = [believed * p.instances.scores[:n] * p.stability[:n] for believed, p, n in told]
    return _Pool(
        cells=tuple(p.instances for p in every),
        owner=np.repeat(np.arange(len(every)), counts),
        place=np.concatenate([np.arange(n) for n in counts]),
        weight=np.maximum(np.concatenate(weights), LEAST_WEIGHT).astype(np.float32),
        stability=np.concatenate([p.stability[:n] for _, p, n in told]).astype(np.float32),
    )


def _groups(pool: _Pool, threshold: float) -> list[list[int]]:
    """Cells that are one, strongest group first; in each the strongest cell first."""
    first = np.searchsorted(pool.owner, np.arange(len(pool.cells) + 1))
    iou: dict[tuple[int, int], float] = {}
    for p, one in enumerate(pool.cells):
        for q in range(p + 1, len(pool.cells)):
            if first[p] == first[p + 1] or first[q] == first[q + 1]:
                continue
            table = iou_matrix(one, pool.cells[q])
            for i, j in np.argwhere(table >= threshold).tolist():
                iou[int(first[p]) + i, int(first[q]) + j] = float(table[i, j])
    group = [[k] for k in range(len(pool.owner))]  # one list, shared by all members
    for i, j in sorted(iou, key=lambda pair: (-iou[pair], pair)):
        ones, others = group[i], group[j]
        if ones is not others and all((min(a, b), max(a, b)) in iou for a in ones for b in others):
            joined = sorted(ones + others, key=lambda k: (-pool.weight[k], k))
            for k in joined:
                group[k] = joined
    distinct = [members for k, members in enumerate(group) if members[0] == k]
    return sorted(distinct, key=lambda members: (-float(pool.weight[members].sum()), members[0]))


def _vote(pool: _Pool, group: Sequence[int]) -> Crop:
    """The pixels that more than half of a group's weight has; the strongest cell's own where that leaves none."""
    own = pool.crop(group[0])
    if len(group) == 1:
        return own
    boxes = np.array([pool.crop(k).box_xyxy for k in group])
    left, top = boxes[:, :2].min(axis=0).tolist()
    right, bottom = boxes[:, 2:].max(axis=0).tolist()
    votes = np.zeros((bottom - top, right - left), np.float64)
    for k in group:
        (x0, y0, x1, y1), mask = pool.crop(k)
        votes[y0 - top : y1 - top, x0 - left : x1 - left] += pool.weight[k] * mask
    (x0, y0, x1, y1), mask = own
    half = float(pool.weight[list(group)].sum(dtype=np.float64)) / 2
    votes[y0 - top : y1 - top, x0 - left : x1 - left] += 1e-6 * half * mask
    crop = crop_mask(votes > half, x0=left)
    if crop is None:
        return own
    x0, y0, x1, y1 = crop.box_xyxy
    return Crop((x0, y0 + top, x1, y1 + top), crop.mask)


def _contest(crops: Sequence[Crop], shape: tuple[int, int]) -> list[Crop]:
    """The same masks without the pixels that an earlier one has; they may be empty then."""
    taken = np.zeros(shape, np.bool_)
    left: list[Crop] = []
    for (x0, y0, x1, y1), mask in crops:
        there = taken[y0:y1, x0:x1]
        left.append(Crop((x0, y0, x1, y1), mask & ~there))
        there |= mask
    return left


def _largest_part(crop: Crop) -> Crop | None:
    """The largest 8-connected part, cut to its box; None where nothing is left."""
    tight = crop_mask(largest_part(crop.mask), x0=crop.box_xyxy[0])
    if tight is None:
        return None
    x0, y0, x1, y1 = tight.box_xyxy
    return Crop((x0, y0 + crop.box_xyxy[1], x1, y1 + crop.box_xyxy[1]), tight.mask)


def _instances(
    pool: _Pool, groups: Sequence[Sequence[int]], crops: Sequence[Crop], names: Sequence[str], every: Sequence[Proposal]
) -> Instances:
    best = [group[0] for group in groups]
    by = [label_of(name, proposal.instances.model_version) for name, proposal in zip(names, every, strict=True)]
    labels: IntArray = np.array([pool.cells[int(pool.owner[k])].labels[int(pool.place[k])] for k in best], np.int32)
    scores = np.concatenate([p.instances.scores[pool.place[pool.owner == i]] for i, p in enumerate(every)])
    return Instances.build(
        every[0].instances.shape,
        [crop.box_xyxy for crop in crops],
        [crop.mask for crop in crops],
        scores=_mean(pool, groups, scores),
        labels=labels,
        image_id=every[0].instances.image_id,
        source="pseudo",
        model_version=by[0] if len(by) == 1 else "ensemble",
        origins=[Origin("pseudo", by[int(pool.owner[k])]) for k in best],
    )


def _mean(pool: _Pool, groups: Sequence[Sequence[int]], values: FloatArray) -> FloatArray:
    """(N,) float32 in [0, 1]: mean of the members' values in each group by their weights."""
    means = [np.average(values[list(group)], weights=pool.weight[list(group)]) for group in groups]
    return np.clip(np.array(means, np.float32), 0, 1)


def _support(
    instances: Instances, pool: _Pool, groups: Sequence[Sequence[int]], every: Sequence[Proposal]
) -> FloatArray:
    """(N, L): IoU with the group's own cell of each labeller; for one without a say, with the cell that fits best."""
    support = np.zeros((len(groups), len(every)), np.float32)
    for column, proposal in enumerate(every):
        iou = iou_matrix(instances, proposal.instances)
        if (pool.owner == column).any():
            for row, group in enumerate(groups):
                members = [int(pool.place[k]) for k in group if pool.owner[k] == column]
                support[row, column] = iou[row, members[0]] if members else 0
        elif iou.size:
            rows, columns = match(iou, FOUND_IOU).T
            support[rows, column] = iou[rows, columns]
    return support
