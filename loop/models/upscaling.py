"""Coarse logits at the size of their image, computed only where they can rise above a level.

SAM's network gives logits at a quarter of its input side. The package scales them up to the whole input, cuts the
padding off, and scales what is left to the image, each time bilinearly. Every value of the result is a weighted mean of
up to three rows times three columns of the coarse grid; the weights are read off once for each axis.

Source: segment_anything 1.0, Sam.postprocess_masks. Differs: the two steps are one, without the intermediate at the
network's input size; windows instead of whole images; equal up to the rounding of float32.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn


class Axis(NamedTuple):
    """One axis of the scaling: fine[i] = the sum over k of weights[k, i] * coarse[places[k, i]], k below K (up to 3).

    `places` (K, n) int64 and `weights` (K, n) float32, >= 0, each column's sum 1, on the device. `first` and `last`
    (n,), non-decreasing: the lowest and the highest coarse place that fine place i depends on.
    """

    places: Tensor
    weights: Tensor
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]


@lru_cache(maxsize=64)
def axis(coarse: int, side: int, seen: int, size: int, device: torch.device) -> Axis:
    """The scaling of one axis from `coarse` places to `side`, of which the first `seen` stay, to `size`, all >= 1."""
    unit = torch.eye(coarse, dtype=torch.float64)[None]
    whole = nn.functional.interpolate(unit, side, mode="linear", align_corners=False)[..., :seen]
    matrix = nn.functional.interpolate(whole, size, mode="linear", align_corners=False)[0].T
    used = (matrix > 0).numpy()
    first = used.argmax(axis=1).astype(np.int64)
    last = (coarse - 1 - used[:, ::-1].argmax(axis=1)).astype(np.int64)
    taps = int((last - first).max()) + 1
    index = torch.from_numpy(np.minimum(first + np.arange(taps)[:, None], last))
    inside = torch.from_numpy(first + np.arange(taps)[:, None] <= last)
    weights = torch.where(inside, matrix.gather(1, index.T).T, 0.0)
    return Axis(index.to(device), weights.float().to(device), first, last)


def windows(coarse: Tensor, rows: Axis, columns: Axis, above: float) -> Iterator[tuple[int, int, Tensor]]:
    """For each grid the part of its fine image outside of which no value exceeds `above`.

    Args:
        coarse: (N, h, w) float32.
        rows: the scaling from h to H.
        columns: the scaling from w to W.
        above: a level.

    Yields:
        Top row, left column and the values (h', w') float32 there; (0, 0) values where there is none.
    """
    hot = coarse > above
    occupied = zip(hot.any(dim=2).cpu().numpy(), hot.any(dim=1).cpu().numpy(), strict=True)
    for grid, (some_rows, some_columns) in zip(coarse, occupied, strict=True):
        top, bottom = _reach(rows, some_rows)
        left, right = _reach(columns, some_columns)
        if top >= bottom or left >= right:
            yield 0, 0, coarse.new_empty((0, 0))
            continue
        low, high = int(rows.first[top]), int(rows.last[bottom - 1]) + 1
        wide = _scaled(grid[low:high].T.contiguous(), columns, left, right, 0)
        yield top, left, _scaled(wide.T.contiguous(), rows, top, bottom, low)


def _reach(along: Axis, occupied: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """First and end of the fine places that depend on occupied coarse ones; a mean of lower values is lower."""
    places = np.flatnonzero(occupied)
    if not len(places):
        return 0, 0
    return int(np.searchsorted(along.last, places[0])), int(np.searchsorted(along.first, places[-1], side="right"))


def _scaled(values: Tensor, along: Axis, start: int, end: int, offset: int) -> Tensor:
    """Fine rows `start` to `end` of values (n, m), whose first row is coarse row `offset`."""
    index, weights = along.places[:, start:end] - offset, along.weights[:, start:end, None]
    fine = values.index_select(0, index[0]) * weights[0]
    for k in range(1, len(index)):
        fine.addcmul_(values.index_select(0, index[k]), weights[k])
    return fine
