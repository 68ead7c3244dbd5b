"""One cell at a time, as a thin phase object: an outline, a nucleus, a thickness with what floats in it.

Lengths are in px, phases in radians relative to the medium; loop/data/microscope.py says how large a px is.
"""

from typing import NamedTuple

import cv2
import numpy as np

from loop.rings import PointArray, fill_rings
from loop.types import BoolArray, FloatArray

_RIM = 12  # px around the outline in a cell's patch


class CellLine(NamedTuple):
    """How the cells of one line look; lengths are shares of `radius` where not in px."""

    radius: float  # px, of the disc of a typical cell's area
    aspect: float  # length over width
    taper: float  # 0 = round ends, 1 = pointed
    wobble: float  # roughness of the outline
    arms: int  # most protrusions
    bend: float  # rad, typical turn of the spine along the cell
    height: float  # rad, phase of the thickest cytoplasm
    lamella: float  # share of the height that the flat rim has
    granules: float  # a px of cytoplasm


LINES = {
    "round": CellLine(27, 1.12, 0.0, 0.09, 0, 0.1, 1.2, 0.35, 0.030),
    "cobble": CellLine(31, 1.35, 0.0, 0.26, 0, 0.3, 0.85, 0.50, 0.025),
    "spread": CellLine(36, 1.6, 0.25, 0.45, 2, 0.5, 0.85, 0.38, 0.030),
    "star": CellLine(30, 1.5, 0.3, 0.35, 5, 0.5, 0.85, 0.40, 0.025),
    "spindle": CellLine(31, 4.0, 0.7, 0.30, 0, 0.5, 0.80, 0.48, 0.020),
    "fibre": CellLine(30, 9.0, 0.8, 0.30, 0, 0.45, 0.75, 0.50, 0.015),
}
"""Six lines, from round to long and fibrous."""


class Cell(NamedTuple):
    """One cell in a patch (h, w) of its own: mask and nucleus bool, phase (rad) and dye (about 1) float32."""

    mask: BoolArray
    nucleus: BoolArray
    phase: FloatArray
    dye: FloatArray


class _Body(NamedTuple):
    """Masks of a cell, each pixel's depth in it (px), and its distance from the nucleus's centre in radii."""

    mask: BoolArray
    nucleus: BoolArray
    depth: FloatArray
    distance: FloatArray


def grow_cell(rng: np.random.Generator, line: CellLine, direction: float, size: float) -> Cell:
    """A random cell of a line; its nucleus is not empty and lies inside it.

    Args:
        rng: the same state gives the same cell.
        line: how its cells look.
        direction: rad, the way the cells of the dish point; long cells keep to it more than round ones.
        size: > 0, factor on the radius.
    """
    radius = max(size * line.radius * float(np.exp(rng.normal(0, 0.15))), 4.0)
    dividing = rng.random() < 0.03  # a cell that divides is round, small and thick
    if dividing:
        line = line._replace(aspect=1.05, taper=0.0, wobble=0.05, arms=0, height=1.6 * line.height, lamella=0.1)
        radius *= 0.7
    ring = _outline(rng, line, radius, direction + rng.normal(0, 0.3 + 3 / line.aspect**2))
    corner = np.floor(ring.min(axis=0)) - _RIM
    width, height = (np.ceil(ring.max(axis=0)) - corner + _RIM).astype(int)
    mask = _filled(ring - corner, (int(height), int(width)))
    depth = np.asarray(cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE))
    nucleus, distance = _nucleus(rng, mask, depth, radius)
    phase = _phase(rng, _Body(mask, nucleus, depth, distance / radius), line)
    chromatin = np.maximum(1 + 0.25 * _noise(rng, mask.shape, 1.8) + 0.15 * _noise(rng, mask.shape, 5.0), 0.2)
    brightness = float(np.exp(rng.normal(0, 0.25))) * (1.8 if dividing else 1.0)
    dye = brightness * chromatin * cv2.GaussianBlur(nucleus.astype(np.float32), (0, 0), 1.0)
    return Cell(mask, nucleus, phase, dye.astype(np.float32))


def _outline(rng: np.random.Generator, line: CellLine, radius: float, angle: float) -> PointArray:
    """(K, 2) x, y of a closed curve around the origin: random Fourier radii, stretched, tapered, bent along a spine."""
    theta = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    order = np.arange(2, 10)[:, None]
    waves = rng.normal(0, 1, order.shape) / order**1.3 * np.cos(order * theta + rng.uniform(0, 2 * np.pi, order.shape))
    r = np.exp(line.wobble * waves.sum(axis=0))
    for _ in range(int(rng.integers(line.arms // 2, line.arms + 1)) if line.arms else 0):
        away = np.angle(np.exp(1j * (theta - rng.uniform(0, 2 * np.pi))))
        r += rng.uniform(0.5, 1.3) * np.exp(-(np.abs(away / rng.uniform(0.10, 0.22)) ** 1.5))
    aspect = line.aspect * float(np.exp(rng.normal(0, 0.2)))
    u = np.sqrt(aspect) * r ** (1 / aspect) * np.cos(theta)  # long cells vary in width, not at their tips
    v = r * np.sin(theta) * np.abs(np.sin(theta)) ** line.taper / np.sqrt(aspect)
    along = u / np.abs(u).max()
    v *= 1 + rng.uniform(-0.45, 0.45) * along
    area = 0.5 * abs(float(np.sum(u * np.roll(v, -1) - v * np.roll(u, -1))))
    u, v = (radius * np.sqrt(np.pi / area) * w for w in (u, v))
    length = float(np.abs(u).max())
    s = np.linspace(-1, 1, 101)
    turn = line.bend * rng.normal(0, 1) * s + 0.6 * line.bend * rng.normal(0, 1) * np.sin(np.pi * s) + angle
    x, y = (np.cumsum(w) * length * (s[1] - s[0]) for w in (np.cos(turn), np.sin(turn)))
    at = u / length
    heading = np.interp(at, s, turn)
    return np.stack(
        [np.interp(at, s, x - x[50]) - v * np.sin(heading), np.interp(at, s, y - y[50]) + v * np.cos(heading)], axis=1
    )


def _filled(ring: PointArray, shape: tuple[int, int]) -> BoolArray:
    """The largest part of what the ring encloses, without slivers and necks of one px that a crossing ring leaves."""
    mask = np.zeros(shape, np.uint8)
    (crop,) = fill_rings([ring], shape)
    if crop is not None:
        x0, y0, x1, y1 = crop.box_xyxy
        mask[y0:y1, x0:x1] = crop.mask
    opened = cv2.morphologyEx(mask, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_RECT, (2, 2)))
    _, parts, stats, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    largest: BoolArray = parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return largest


def _nucleus(
    rng: np.random.Generator, mask: BoolArray, depth: FloatArray, radius: float
) -> tuple[BoolArray, FloatArray]:
    """A wavy ellipse where the cell is wide, turned as the cell is there, and each pixel's distance from its centre."""
    wide = np.argwhere(depth >= 0.88 * depth.max())
    row, column = wide[int(rng.integers(len(wide)))]
    y = np.arange(mask.shape[0], dtype=np.float32)[:, None] - row
    x = np.arange(mask.shape[1], dtype=np.float32)[None, :] - column
    distance = np.hypot(y, x)
    rows, columns = np.nonzero(mask & (distance <= radius))
    spread = np.cov(np.stack([columns - column, rows - row])) if len(rows) > 2 else np.eye(2)
    axis = np.linalg.eigh(spread)[1][:, 1]
    along, across = x * axis[0] + y * axis[1], y * axis[0] - x * axis[1]
    typical = radius * rng.uniform(0.36, 0.44)
    half_width = min(typical / np.sqrt(rng.uniform(1.05, 1.4)), 0.72 * float(depth[row, column]))
    half_length = min(typical**2 / half_width, 2.4 * half_width)
    angle = np.arctan2(across, along)
    wave = 1 + 0.04 * np.cos(2 * angle + rng.uniform(0, 6)) + 0.04 * np.cos(3 * angle + rng.uniform(0, 6))
    nucleus = (np.hypot(along / half_length, across / half_width) <= wave) & (depth > 1.5)
    nucleus[row, column] = True
    return nucleus, distance


def _phase(rng: np.random.Generator, body: _Body, line: CellLine) -> FloatArray:
    """(h, w) rad: a flat rim, a body that rises to the nucleus, organelles, granules, nucleus and nucleoli."""
    mask, nucleus, depth, distance = body
    solid = mask.astype(np.float32)
    deepest = float(depth.max())
    rim = 0.5 * _rise(solid, 1.2) + 0.5 * _rise(solid, 0.16 * deepest + 1)
    dome = _rise(solid, 0.55 * deepest) * (0.3 + 0.7 * np.exp(-(distance**2)))
    ruffles = np.maximum(_noise(rng, mask.shape, 0.3 * deepest + 1), 0) * (depth < 0.22 * deepest + 2) * rim
    soft = cv2.GaussianBlur(nucleus.astype(np.float32), (0, 0), 1.0)
    organelles = 0.07 * _noise(rng, mask.shape, 1.3) + 0.10 * _noise(rng, mask.shape, 0.12 * deepest + 2)
    cytoplasm = line.lamella * rim * (1 + 0.25 * ruffles) + (1 - line.lamella) * dome
    cytoplasm = cytoplasm * (1 + organelles * (1 - 0.7 * soft))
    chance = line.granules * np.exp(-distance) * (rim > 0.6) * (1 - soft)
    seeds = (rng.random(mask.shape, np.float32) < chance) * rng.normal(0.6, 0.8, mask.shape)
    granules = 1.2 * cv2.GaussianBlur(seeds.astype(np.float32), (0, 0), 0.9)
    inside = cv2.GaussianBlur(nucleus.astype(np.float32), (0, 0), 1.8) > 0.85
    spots = np.argwhere(inside if inside.any() else nucleus)
    nucleoli = np.zeros(mask.shape, np.float32)
    nucleoli[tuple(spots[rng.integers(len(spots), size=int(rng.integers(1, 4)))].T)] = 1
    nucleoli = cv2.GaussianBlur(nucleoli, (0, 0), 0.05 * deepest + 1.1)
    nucleoli *= 0.22 / max(float(nucleoli.max()), 1e-6) * (soft > 0.3)
    phase = line.height * (cytoplasm + granules + 0.16 * soft + nucleoli)
    return np.where(mask, np.maximum(phase, 0), 0).astype(np.float32)


def _rise(solid: FloatArray, sigma: float) -> FloatArray:
    """0 at the edge and outside, up to 1 where the mask is wide against `sigma`; smooth inside."""
    return np.asarray(np.maximum(2 * cv2.GaussianBlur(solid, (0, 0), sigma) - 1, 0))


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float) -> FloatArray:
    """Gaussian noise of standard deviation about 1, correlated over `sigma` px."""
    white = rng.standard_normal(shape, np.float32)
    return np.asarray(cv2.GaussianBlur(white, (0, 0), sigma) * np.float32(2 * np.sqrt(np.pi) * sigma))
