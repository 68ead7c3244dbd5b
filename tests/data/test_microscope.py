import csv
import math

import numpy as np
import pytest
import tifffile
from scipy import ndimage

from loop.data import microscope
from loop.data.cell_shapes import LINES, grow_cell
from loop.data.microscope import Field, draw_field, microscope_sample, render, write_dataset
from loop.data.store import read_image, read_label_image
from loop.errors import InputError
from loop.masks import to_dense
from loop.types import Instances

MODALITIES = ("phase", "brightfield_low", "brightfield_high", "fluorescence")
FRAME = np.s_[microscope.MARGIN : -microscope.MARGIN, microscope.MARGIN : -microscope.MARGIN]


def field_of(line, seed=0, shape=(224, 256), n=9, overlap=0.08):
    return draw_field(np.random.default_rng(seed), shape, n, line, overlap, size=0.8)


def bare(phase):
    """A field of a given phase, without cells to be told of."""
    none = Instances.build((phase.shape[0] - 2 * microscope.MARGIN, phase.shape[1] - 2 * microscope.MARGIN))
    return Field(none, none, phase.astype(np.float32), np.zeros(phase.shape, np.float32))


@pytest.mark.parametrize("line", LINES)
def test_cells_nuclei_and_overlaps_fit_together(line):
    field = field_of(line)
    cells, nuclei = to_dense(field.instances), to_dense(field.nuclei)
    assert cells.shape == nuclei.shape == (9, 224, 256)
    assert not (nuclei & ~cells).any()
    assert nuclei.sum(axis=0).max() == 1
    assert (nuclei.sum(axis=(1, 2)) >= 20).all()
    assert (nuclei.sum(axis=(1, 2)) < 0.6 * cells.sum(axis=(1, 2))).all()
    np.testing.assert_array_equal(field.overlap, cells.sum(axis=0) > 1)
    inside = cells.any(axis=0)
    assert not field.phase[FRAME][~inside].any()
    assert field.phase[FRAME][inside].mean() > 0.2
    assert np.isfinite(field.phase).all()
    assert field.dye[FRAME][nuclei.any(axis=0)].mean() > 10 * field.dye[FRAME][~nuclei.any(axis=0)].mean()


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("overlap", [0.05, 0.12])
def test_the_asked_share_of_overlap_is_about_reached(line, overlap):
    field = field_of(line, seed=3, shape=(320, 320), n=14, overlap=overlap)
    share = field.overlap.sum() / to_dense(field.instances).any(axis=0).sum()
    assert share == pytest.approx(overlap, abs=0.03)


@pytest.mark.parametrize("line", LINES)
def test_no_overlap_means_none(line):
    field = field_of(line, seed=1, shape=(320, 320), n=8, overlap=0.0)
    assert len(field.instances) == 8
    assert not field.overlap.any()


def test_the_lines_go_from_round_to_long():
    def length_over_width(line):
        rng = np.random.default_rng(0)
        ratios = []
        for _ in range(12):
            rows, columns = np.nonzero(grow_cell(rng, LINES[line], 0.0, 1.0).mask)
            low, high = np.linalg.eigvalsh(np.cov(np.stack([rows, columns])))
            ratios.append(math.sqrt(high / low))
        return np.median(ratios)

    ratios = {line: length_over_width(line) for line in LINES}
    assert len(ratios) == 6
    assert min(ratios, key=ratios.get) == "round"
    assert ratios["round"] < 1.4
    assert ratios["fibre"] > ratios["spindle"] > 2.5
    assert ratios["fibre"] > 4


def test_a_cell_is_one_part_and_its_outline_no_ellipse():
    rng = np.random.default_rng(5)
    solid = []
    for _ in range(20):
        cell = grow_cell(rng, LINES["spread"], 0.0, 1.0)
        assert ndimage.label(cell.mask)[1] == 1
        assert cell.nucleus.any()
        assert not (cell.nucleus & ~cell.mask).any()
        rows, columns = np.nonzero(cell.mask)
        centred = np.stack([rows - rows.mean(), columns - columns.mean()])
        squared = (centred * np.linalg.solve(np.cov(centred), centred)).sum(axis=0)
        solid.append((squared > 4).mean())  # of an ellipse nothing lies beyond 2 standard deviations
    assert np.mean(solid) > 0.02


def test_the_same_seed_gives_the_same_everything():
    first, second, other = (microscope_sample(np.random.default_rng(s), (96, 96), 4, size=0.5) for s in (3, 3, 4))
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(to_dense(first.instances), to_dense(second.instances))
    np.testing.assert_array_equal(to_dense(first.nuclei), to_dense(second.nuclei))
    assert (first.pixels != other.pixels).any()


def test_phases_of_cells_that_overlap_are_added():
    overlapping = 0
    for seed in range(6):
        one, two = (draw_field(np.random.default_rng(seed), (128, 128), n, "round", 0.3) for n in (1, 2))
        added = two.phase[FRAME] - one.phase[FRAME]
        first, second = to_dense(two.instances)
        np.testing.assert_array_equal(to_dense(one.instances)[0], first)
        assert not added[~second].any()
        shared = first & second
        overlapping += shared.sum()
        if shared.any():
            assert added[shared].mean() > 0.1
    assert overlapping > 500


def test_brightfield_planes_have_opposite_contrast_inside_cells():
    for line in LINES:
        field = field_of(line, seed=2)
        inside = to_dense(field.instances).any(axis=0)
        views = render(field, np.random.default_rng(0))
        low, high = (
            ndimage.gaussian_filter(v.astype(float), 1) - ndimage.gaussian_filter(v.astype(float), 12)
            for v in (views.brightfield_low, views.brightfield_high)
        )
        assert np.corrcoef(low[inside], high[inside])[0, 1] < -0.4


def test_defocus_of_a_weak_grating_follows_the_formula():
    # Of a phase of e cos(2 pi f x) and an absorption of a times that, the intensity at z is
    # 1 + 2 e (sin(chi) - a cos(chi)) cos(2 pi f x), with chi how far the first orders fall behind the zero order.
    canvas, periods, weak = 256, 16, 0.05
    x = np.arange(canvas) - microscope.MARGIN
    wave = np.cos(2 * np.pi * periods / canvas * x)
    grating = bare(np.broadcast_to(weak * wave, (canvas, canvas)))
    blank = bare(np.zeros((canvas, canvas)))
    seen, ground = (render(f, np.random.default_rng(0)) for f in (grating, blank))
    f_um, wavelength = periods / canvas / microscope.PX_UM, microscope.WAVELENGTH_UM / microscope.MEDIUM_INDEX
    chi = 2 * np.pi * microscope.DEFOCUS_UM / wavelength * (1 - math.sqrt(1 - (wavelength * f_um) ** 2))
    sigma_um = microscope.DEFOCUS_UM * microscope.CONDENSER_NA / 2
    blur = math.exp(-2 * (math.pi * sigma_um * f_um) ** 2)
    cosine = wave[microscope.MARGIN : -microscope.MARGIN] - wave[microscope.MARGIN : -microscope.MARGIN].mean()
    for name, sign in (("brightfield_low", -1), ("brightfield_high", 1)):
        change = (getattr(seen, name).astype(float) - getattr(ground, name)) / (120 * 1.7)
        amplitude = (change * cosine).sum() / (192 * (cosine**2).sum())
        expected = 2 * weak * (sign * math.sin(chi) - microscope.ABSORPTION * math.cos(chi)) * blur
        assert amplitude == pytest.approx(expected, rel=0.04)


def test_phase_contrast_has_a_bright_halo_around_dark_cells_and_darker_overlaps():
    canvas = 256
    y, x = np.mgrid[:canvas, :canvas] - canvas / 2
    disc = 0.3 * (np.hypot(y, x) < 40)
    once, twice = (render(bare(k * disc), np.random.default_rng(0)).phase.astype(float) for k in (1, 2))
    distance = np.hypot(y, x)[FRAME]
    ground = np.median(once[distance > 90])
    assert once[distance < 30].mean() < ground - 5
    assert once[(distance > 42) & (distance < 48)].mean() > ground + 5
    assert twice[distance < 30].mean() < once[distance < 30].mean() - 5


def test_without_cells_only_light_and_noise_are_left():
    field = draw_field(np.random.default_rng(0), (160, 192), 0)
    assert len(field.instances) == len(field.nuclei) == 0
    assert not field.overlap.any()
    assert not field.phase.any()
    views = render(field, np.random.default_rng(1))
    y, x = np.mgrid[-1:1:160j, -1:1:192j]
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    shot = math.sqrt(2500 + 36) / 2500
    for name, grey in (("phase", 110), ("brightfield_low", 120 * 1.7), ("brightfield_high", 120 * 1.7)):
        seen = getattr(views, name).astype(float).ravel()
        rest = seen - terms @ np.linalg.lstsq(terms, seen, rcond=None)[0]
        assert rest.std() == pytest.approx(grey * shot, rel=0.06)
        assert ndimage.gaussian_filter(rest.reshape(160, 192), 8).std() < 0.2
    assert views.fluorescence.mean() < 15


def test_nuclei_shine_in_fluorescence():
    field = field_of("cobble", seed=4)
    nuclei = to_dense(field.nuclei).any(axis=0)
    seen = render(field, np.random.default_rng(0)).fluorescence
    assert seen[nuclei].mean() > 5 * seen[~ndimage.binary_dilation(nuclei, iterations=6)].mean()


def test_sample_is_both_planes_and_their_mean():
    pixels, cells, nuclei = microscope_sample(np.random.default_rng(0), (80, 100), 3, "round", size=0.5, image_id="a")
    assert (pixels.shape, pixels.dtype) == ((80, 100, 3), np.uint8)
    np.testing.assert_allclose(pixels[..., 2], (pixels[..., 0].astype(float) + pixels[..., 1]) / 2, atol=0.5)
    assert len(cells) == len(nuclei) == 3
    assert cells.image_id == nuclei.image_id == "a"
    views = render(draw_field(np.random.default_rng(0), (64, 64), 1, size=0.5), np.random.default_rng(0))
    assert {getattr(views, name).dtype for name in MODALITIES} == {np.dtype(np.uint8)}
    assert {getattr(views, name).shape for name in MODALITIES} == {(64, 64)}


def test_written_folder(tmp_path):
    def write(name, seed):
        write_dataset(tmp_path / name, images=7, shape=(96, 96), seed=seed, cells=(3, 5), overlap=(0.1, 0.2), size=0.5)
        return {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}

    first, again, other = write("a", 0), write("b", 0), write("c", 1)
    assert first == again
    assert first != other
    with (tmp_path / "a" / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label", "group", "split", "modality"]
    assert [row["split"] for row in rows] == ["pool"] * 5 + ["val", "test"]
    assert {row["modality"] for row in rows} == set(LINES)
    assert len({row["group"] for row in rows}) == 7
    most = 0
    for i, row in enumerate(rows):
        rng = np.random.default_rng((0, i))
        n, share = int(rng.integers(3, 6)), float(rng.uniform(0.1, 0.2))
        expected = microscope_sample(rng, (96, 96), n, row["modality"], share, size=0.5)
        np.testing.assert_array_equal(read_image(tmp_path / "a" / row["image"]).pixels, expected.pixels)
        pages = np.atleast_3d(tifffile.imread(tmp_path / "a" / row["label"]))
        pages = pages if pages.shape[1:] == (96, 96) else np.moveaxis(pages, 2, 0)
        assert pages.dtype == np.uint16
        most = max(most, len(pages))
        nuclei = read_label_image(tmp_path / "a" / "nuclei" / f"{row['group']}.png")
        for k, (cell, nucleus) in enumerate(
            zip(to_dense(expected.instances), to_dense(expected.nuclei), strict=True), start=1
        ):
            assert [(page == k).any() for page in pages].count(True) == 1
            np.testing.assert_array_equal((pages == k).any(axis=0), cell)
            np.testing.assert_array_equal(nuclei == k, nucleus)
    assert most > 1


def test_refusals(tmp_path):
    rng = np.random.default_rng(0)
    for changed in ({"shape": (31, 64)}, {"n": -1}, {"line": "square"}, {"overlap": 0.6}, {"size": 0.0}):
        with pytest.raises(InputError, match="a line of round, cobble, spread, star, spindle, fibre"):
            draw_field(rng, **changed)
    with pytest.raises(InputError, match="of 40 cells fit"):
        draw_field(rng, (64, 64), 40, "round", 0.0)
    with pytest.raises(InputError, match="expected at least one of each"):
        write_dataset(tmp_path, images=0)
