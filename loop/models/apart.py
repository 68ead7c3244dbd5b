"""One cell without the pixels of its neighbours."""

from dataclasses import replace

import numpy as np

from loop.metrics.matching import areas, intersections
from loop.rings import crop_mask, largest_part
from loop.types import Instances


def leave_out(cell: Instances, others: Instances) -> Instances:
    """The cell without the pixels of other cells that it only reaches into.

    An other cell that shares half or more of its own area, or of the cell's, with the cell is what the person is about
    to replace, join or divide: it takes nothing away. Of what is left the largest piece (8-connected) stays.

    Args:
        cell: 0 or 1 cells.
        others: N >= 0 cells of the same image; they may overlap.

    Returns:
        0 or 1 cells, everything but box and mask as before; 0 where nothing is left.

    Raises:
        ShapeError: the two belong to images of different sizes.

    Costs O(N) comparisons of boxes, and O(pixels) for those that overlap the cell.
    """
    if not len(cell):
        return cell
    shared = intersections(cell, others)[0]
    replaced = 2 * shared >= np.minimum(areas(cell)[0], areas(others))
    x0, y0, x1, y1 = cell.boxes_xyxy[0].tolist()
    left = cell.masks[0].copy()
    for i in np.flatnonzero((shared > 0) & ~replaced).tolist():
        a0, b0, a1, b1 = others.boxes_xyxy[i].tolist()
        u0, v0, u1, v1 = max(x0, a0), max(y0, b0), min(x1, a1), min(y1, b1)
        left[v0 - y0 : v1 - y0, u0 - x0 : u1 - x0] &= ~others.masks[i][v0 - b0 : v1 - b0, u0 - a0 : u1 - a0]
    found = crop_mask(largest_part(left), x0=x0)
    if found is None:
        return cell.take([])
    a0, b0, a1, b1 = found.box_xyxy
    return replace(cell, boxes_xyxy=np.array([[a0, b0 + y0, a1, b1 + y0]], np.int32), masks=(found.mask,))
