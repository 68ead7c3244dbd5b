"""A small physical microscope: thin phase objects seen in phase contrast, brightfield and fluorescence.

docs/microscope.md shows the pictures and says what is modelled and what is not.
Lengths are in px of PX_UM micrometres; phases in radians, relative to the medium.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from loop.data.cell_shapes import LINES, Cell, grow_cell
from loop.data.overlap_maps import overlap_mask
from loop.data.store import write_label_image, write_label_layers, write_png
from loop.errors import InputError
from loop.masks import to_label_image, to_layers
from loop.rings import crop_mask
from loop.types import BoolArray, FloatArray, Instances, UInt8Array

PX_UM = 0.35
WAVELENGTH_UM = 0.55
MEDIUM_INDEX = 1.33
DEFOCUS_UM = 9.0  # of either brightfield plane
CONDENSER_NA = 0.10  # its shadow blurs a defocused plane
ABSORPTION = 0.03  # of the amplitude, a rad of phase
HALO_PX = 18.0  # how far phase contrast's halo reaches: the inverse width of the phase ring
PLATE = 0.9  # amplitude that the phase plate lets through
PSF_PX = 1.3  # sigma of the fluorescence's point spread
MARGIN = 32  # px drawn around the frame, so that what lies beyond it is diffracted too

_TRIES = 60

_Corner = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Field:
    """Cells on a dish before any light falls on them.

    `instances` and `nuclei` have one entry a cell in the same order; cells may overlap, nuclei do not, and each nucleus
    lies inside its cell. `phase` and `dye` are (H + 64, W + 64) float32: the frame and MARGIN px around it; the phases
    of cells that overlap are added. `dye` is the density of the nuclear stain, about 1.
    """

    instances: Instances
    nuclei: Instances
    phase: FloatArray
    dye: FloatArray

    @property
    def overlap(self) -> BoolArray:
        """(H, W) bool: the pixels that two cells or more hold."""
        return overlap_mask(self.instances)


@dataclass(frozen=True, eq=False)
class Views:
    """What the camera saw of one field: (H, W) uint8 each."""

    phase: UInt8Array
    brightfield_low: UInt8Array
    brightfield_high: UInt8Array
    fluorescence: UInt8Array


class MicroscopeSample(NamedTuple):
    """`pixels` (H, W, 3) uint8: brightfield below and above focus, and the mean of both; with its cells and nuclei."""

    pixels: UInt8Array
    instances: Instances
    nuclei: Instances


def draw_field(
    rng: np.random.Generator,
    shape: tuple[int, int] = (512, 512),
    n: int = 30,
    line: str = "spread",
    overlap: float = 0.05,
    *,
    size: float = 1.0,
    image_id: str = "",
) -> Field:
    """Cells of one line, placed so that about the asked share of their area is held by two cells.

    Args:
        rng: the same state gives the same field.
        shape: (H, W) px, both at least 32.
        n: cells, 0 or more; each nucleus lies wholly in the frame, cells may be cut by it.
        line: a name of LINES.
        overlap: in [0, 0.5], pixels of two cells or more over pixels of any cell; 0 = none at all. It is aimed at cell
            by cell: sparse fields reach it closely, a field too full for it gets more.
        size: > 0, factor on the size of the cells.
        image_id: goes into the instances.

    Raises:
        InputError: an argument is out of its range, or so many cells find no place.
    """
    if min(shape) < 32 or n < 0 or line not in LINES or not 0 <= overlap <= 0.5 or not size > 0:
        raise InputError(
            f"shape={shape}, n={n}, line={line!r}, overlap={overlap}, size={size}; expected at least 32 px a side, "
            f"n >= 0, a line of {', '.join(LINES)}, overlap in [0, 0.5] and size > 0"
        )
    direction = rng.uniform(0, np.pi)
    dish = _Dish(shape)
    for i in range(n):
        cell = grow_cell(rng, LINES[line], direction, size)
        loose = overlap * (1.05 - (i + 1) / n) if i else 1.0  # the first may lie anywhere, the last ones make the share
        corner = dish.find_place(rng, cell, overlap, loose)
        if corner is None:
            raise InputError(f"only {i} of {n} cells fit into {shape}; draw fewer, smaller or allow overlap")
        dish.add(cell, corner)
    return dish.field(image_id)


def render(field: Field, rng: np.random.Generator) -> Views:
    """The field in each modality, with uneven light, shot noise and read noise drawn from `rng`."""
    wave = np.exp((1j - ABSORPTION) * field.phase).astype(np.complex64)
    spectrum: npt.NDArray[np.complex64] = np.fft.fft2(wave).astype(np.complex64, copy=False)
    fy, fx = np.fft.fftfreq(wave.shape[0])[:, None], np.fft.fftfreq(wave.shape[1])[None, :]
    square = (fx**2 + fy**2).astype(np.float32)
    low, high = (_defocused(spectrum, square, z) for z in (-DEFOCUS_UM, DEFOCUS_UM))
    near_axis = np.exp(-2 * (np.pi * HALO_PX) ** 2 * square)
    shifted = spectrum * (1 - (1 + 1j * PLATE) * near_axis)  # the zero order: attenuated and a quarter wave behind
    contrast = _blurred(np.abs(np.fft.ifft2(shifted)) ** 2 / PLATE**2, 0.7)
    glow = 0.75 * _blurred(field.dye, PSF_PX) + 0.12 * _blurred(field.dye, 14) + 0.03 * field.phase + 0.04
    shape = field.instances.shape
    lamp, laser = _light(rng, shape, 0.10), _light(rng, shape, 0.15)
    return Views(
        phase=_camera(rng, contrast, _light(rng, shape, 0.08), grey=110, electrons=2500),
        brightfield_low=_camera(rng, low, lamp, grey=120, electrons=2500, gain=1.7),
        brightfield_high=_camera(rng, high, lamp, grey=120, electrons=2500, gain=1.7),
        fluorescence=_camera(rng, glow, laser, grey=170, electrons=400),
    )


def microscope_sample(
    rng: np.random.Generator,
    shape: tuple[int, int] = (256, 256),
    n: int = 10,
    line: str | None = None,
    overlap: float = 0.05,
    *,
    size: float = 1.0,
    image_id: str = "",
) -> MicroscopeSample:
    """One brightfield image with its cells and nuclei; a random line where none is named. Arguments: `draw_field`."""
    name = list(LINES)[int(rng.integers(len(LINES)))] if line is None else line
    field = draw_field(rng, shape, n, name, overlap, size=size, image_id=image_id)
    return MicroscopeSample(_brightfield(render(field, rng)), field.instances, field.nuclei)


def write_dataset(
    directory: Path,
    *,
    images: int,
    shape: tuple[int, int] = (512, 512),
    seed: int = 0,
    cells: tuple[int, int] = (15, 35),
    overlap: tuple[float, float] = (0.02, 0.12),
    lines: Sequence[str] = tuple(LINES),
    size: float = 1.0,
) -> None:
    """Writes a dataset folder of brightfield images; the same arguments write the same files.

    images/STEM.png as in `MicroscopeSample`; labels/STEM.tif, one 16-bit label image a page, value i + 1 being cell i
    and overlapping cells on different pages; nuclei/STEM.png, value i + 1 being the nucleus of cell i; manifest.csv,
    the modality being the cell line and every image a group of its own. About 70, 15 and 15 of 100 images, but of
    three or more at least one, go to the splits pool, val and test.

    Args:
        directory: is made; files of the same names are replaced.
        images: how many, 1 or more; the lines take turns.
        shape: (H, W) px of each.
        seed: image i is drawn from (seed, i).
        cells: least and most cells of an image.
        overlap: least and largest share of overlap, see `draw_field`.
        lines: names of LINES.
        size: see `draw_field`.

    Raises:
        InputError: no images or lines are asked for, or as `draw_field`.
        ImageError: an image file cannot be written.
    """
    if images < 1 or not lines:
        raise InputError(f"images={images}, lines={list(lines)}; expected at least one of each")
    held_out = max(1, round(0.15 * images)) if images >= 3 else 0
    rows = []
    for i, split in enumerate(["pool"] * (images - 2 * held_out) + ["val"] * held_out + ["test"] * held_out):
        rng = np.random.default_rng((seed, i))
        line = lines[i % len(lines)]
        n, share = int(rng.integers(cells[0], cells[1] + 1)), float(rng.uniform(*overlap))
        stem = f"{line}_{i:05d}"
        sample = microscope_sample(rng, shape, n, line, share, size=size, image_id=stem)
        write_png(sample.pixels, directory / "images" / f"{stem}.png")
        write_label_layers(to_layers(sample.instances), directory / "labels" / f"{stem}.tif")
        write_label_image(to_label_image(sample.nuclei), directory / "nuclei" / f"{stem}.png")
        rows.append([f"images/{stem}.png", f"labels/{stem}.tif", stem, split, line])
    with (directory / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "label", "group", "split", "modality"])
        writer.writerows(rows)


def _brightfield(views: Views) -> UInt8Array:
    low, high = views.brightfield_low, views.brightfield_high
    mean = ((low.astype(np.uint16) + high + 1) // 2).astype(np.uint8)
    return np.stack([low, high, mean], axis=2)


def _defocused(spectrum: npt.NDArray[np.complex64], square: FloatArray, z_um: float) -> FloatArray:
    """Intensity at `z_um` from focus: angular spectrum in the medium, blurred by the condenser's shadow."""
    wavelength = WAVELENGTH_UM / MEDIUM_INDEX
    along = np.sqrt(np.maximum(0, 1 - (wavelength / PX_UM) ** 2 * square)) - 1
    wave = np.fft.ifft2(spectrum * np.exp(2j * np.pi * z_um / wavelength * along).astype(np.complex64))
    return _blurred(np.abs(wave) ** 2, abs(z_um) * CONDENSER_NA / PX_UM / 2)


def _blurred(intensity: npt.NDArray[np.floating], sigma: float) -> FloatArray:
    return np.asarray(cv2.GaussianBlur(intensity.astype(np.float32), (0, 0), sigma))


def _light(rng: np.random.Generator, shape: tuple[int, int], strength: float) -> FloatArray:
    """(H, W) about 1: a slope, and a fall towards the corners around a centre of its own."""
    y, x = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])[None, :]
    slope_y, slope_x, centre_y, centre_x = rng.uniform(-1, 1, 4)
    fall = rng.uniform(0.3, 1) * ((y - 0.4 * centre_y) ** 2 + (x - 0.4 * centre_x) ** 2 - 0.7)
    return np.asarray(1 + strength * (0.4 * (slope_y * y + slope_x * x) - fall), np.float32)


def _camera(
    rng: np.random.Generator,
    intensity: FloatArray,
    light: FloatArray,
    *,
    grey: float,
    electrons: float,
    gain: float = 1.0,
) -> UInt8Array:
    """The frame of an intensity, 8-bit: 1 becomes `electrons` and `grey`, deviations from it are drawn out by `gain`.

    Shot noise, and 6 electrons of read noise.
    """
    seen = np.maximum(intensity[MARGIN:-MARGIN, MARGIN:-MARGIN] * light, 0) * electrons
    counted = (rng.poisson(seen) + 6 * rng.standard_normal(seen.shape, np.float32)) / electrons
    return np.asarray(np.clip(grey * (1 + gain * (counted - 1)) + 0.5, 0, 255), np.uint8)


class _Dish:
    """Cells and the top left corners (row, column) of their patches, as they are put down one after the other."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self.placed: list[tuple[Cell, _Corner]] = []
        self.count = np.zeros(shape, np.int16)
        self.stained = np.zeros(shape, np.bool_)

    def add(self, cell: Cell, corner: _Corner) -> None:
        frame, part = _window(corner, cell.mask.shape, self.shape)
        self.placed.append((cell, corner))
        self.count[frame] += cell.mask[part]
        self.stained[frame] |= cell.nucleus[part]

    def find_place(self, rng: np.random.Generator, cell: Cell, overlap: float, loose: float) -> _Corner | None:
        """The first corner that costs at most `loose`, else the cheapest found; None where there is no place."""
        rows, columns = np.nonzero(cell.nucleus)
        lowest = np.array([-rows.min(), -columns.min()])
        highest = np.array(self.shape) - 1 - [rows.max(), columns.max()]
        if (highest < lowest).any():
            return None
        held, shared = int(np.count_nonzero(self.count)), int(np.count_nonzero(self.count > 1))
        best, best_cost = None, np.inf
        for attempt in range(_TRIES if overlap else 5 * _TRIES):
            beside = bool(self.placed) and overlap > 0 and attempt % 3 > 0
            tried = self._beside_another(rng, cell) if beside else rng.integers(lowest, highest + 1)
            row, column = np.clip(tried, lowest, highest)
            cost = self._cost(cell, (int(row), int(column)), held, shared, overlap)
            if cost < best_cost:
                best, best_cost = (int(row), int(column)), cost
            if best_cost <= loose or (best is not None and overlap == 0):
                break
        return best

    def field(self, image_id: str) -> Field:
        canvas = (self.shape[0] + 2 * MARGIN, self.shape[1] + 2 * MARGIN)
        phase, dye = np.zeros(canvas, np.float32), np.zeros(canvas, np.float32)
        for cell, (top, left) in self.placed:
            frame, part = _window((top + MARGIN, left + MARGIN), cell.mask.shape, canvas)
            phase[frame] += cell.phase[part]
            dye[frame] += cell.dye[part]
        cells = self._instances([cell.mask for cell, _ in self.placed], image_id)
        return Field(cells, self._instances([cell.nucleus for cell, _ in self.placed], image_id), phase, dye)

    def _beside_another(self, rng: np.random.Generator, cell: Cell) -> npt.NDArray[np.int64]:
        """A corner for which the cell lies about beside or partly on a random other one."""
        other, corner = self.placed[int(rng.integers(len(self.placed)))]
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.0)
        size, size_there = np.array(cell.mask.shape), np.array(other.mask.shape)
        away = far * (size + size_there) / 2 * [np.sin(angle), np.cos(angle)]
        return np.asarray(np.rint(np.array(corner) + (size_there - size) / 2 + away), np.int64)

    def _cost(self, cell: Cell, corner: _Corner, held: int, shared: int, overlap: float) -> float:
        """How far the share of overlap would be from `overlap`; infinite where nuclei meet, or cells that may not.

        Three layers, nuclei under other cells and what the frame cuts off cost a little more.
        """
        frame, part = _window(corner, cell.mask.shape, self.shape)
        mask, nucleus, below = cell.mask[part], cell.nucleus[part], self.count[frame]
        over, crowded = np.count_nonzero(mask & (below == 1)), np.count_nonzero(mask & (below > 1))
        if (nucleus & self.stained[frame]).any() or (overlap == 0 and over + crowded > 0):
            return float("inf")
        area, visible = np.count_nonzero(cell.mask), np.count_nonzero(mask)
        share = (shared + over) / (held + visible - over - crowded)
        hidden = np.count_nonzero(mask & self.stained[frame]) + np.count_nonzero(nucleus & (below > 0))
        return float(abs(share - overlap) + (0.5 * crowded + 0.1 * hidden + 0.02 * (area - visible)) / area)

    def _instances(self, masks: list[BoolArray], image_id: str) -> Instances:
        boxes, kept = [], []
        for mask, (_, corner) in zip(masks, self.placed, strict=True):
            (rows, columns), part = _window(corner, mask.shape, self.shape)
            crop = crop_mask(mask[part], x0=columns.start)
            if crop is not None:
                x0, y0, x1, y1 = crop.box_xyxy
                boxes.append((x0, y0 + rows.start, x1, y1 + rows.start))
                kept.append(crop.mask)
        return Instances.build(self.shape, boxes, kept, image_id=image_id)


def _window(
    corner: _Corner, size: tuple[int, ...], shape: tuple[int, int]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a patch whose top left is at `corner` lies in the frame, and which part of it."""
    starts = [min(max(c, 0), s) for c, s in zip(corner, shape, strict=True)]
    stops = [max(min(c + k, s), b) for c, k, s, b in zip(corner, size, shape, starts, strict=True)]
    frame = (slice(starts[0], stops[0]), slice(starts[1], stops[1]))
    part = (slice(starts[0] - corner[0], stops[0] - corner[0]), slice(starts[1] - corner[1], stops[1] - corner[1]))
    return frame, part
