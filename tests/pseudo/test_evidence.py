import cv2
import numpy as np
import pytest
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image

from loop.config import PseudoConfig
from loop.data.synthetic import draw_cells
from loop.errors import ShapeError
from loop.masks import from_masks, to_dense
from loop.pseudo.base import Proposal
from loop.pseudo.evidence import EVIDENCE, evidence
from loop.pseudo.fusion import Fused, fuse_proposals
from loop.types import Instances

SHAPE = (40, 60)


def box(y0, x0, y1, x1):
    mask = np.zeros(SHAPE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def fused_of(masks, scores=None, support=None, stability=None, names=("a",)):
    cells = from_masks(masks, SHAPE, scores=scores, source="pseudo")
    n = len(cells)
    support = np.ones((n, len(names))) if support is None else support
    return Fused(
        cells, np.float32(support), names, np.ones(n, np.float32) if stability is None else np.float32(stability)
    )


def column(table, name):
    return table[:, EVIDENCE.index(name)]


BLACK = np.zeros((*SHAPE, 3), np.uint8)


def test_agreement_is_weighted_by_trust():
    fused = fused_of([box(5, 5, 15, 15)], support=[[0.9, 0, 0.6]], names=("a", "b", "c"))
    table = evidence(fused, BLACK, {"a": 1, "b": 1, "c": 0.5})
    np.testing.assert_allclose(column(table, "found_by"), [1.5 / 2.5], rtol=1e-6)
    np.testing.assert_allclose(column(table, "agreement"), [(0.9 + 0.3) / 1.5], rtol=1e-6)


def test_score_and_stability_are_logits_kept_finite():
    masks = [box(5, 5, 15, 15), box(20, 20, 30, 30), box(20, 40, 30, 50)]
    table = evidence(fused_of(masks, scores=[0.5, 0.75, 1], stability=[0, 0.5, 0.8]), BLACK, {})
    score, stability = [0, np.log(3), np.log(999)], [-np.log(999), 0, np.log(4)]
    np.testing.assert_allclose(column(table, "score"), score, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(column(table, "stability"), stability, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(column(table, "image_score"), np.full(3, np.mean(score)), rtol=1e-5)
    np.testing.assert_allclose(column(table, "image_stability"), np.full(3, np.mean(stability)), rtol=1e-5)


def test_sizes_are_told_against_the_others_of_the_image():
    table = evidence(fused_of([box(1, 1, 11, 11), box(1, 15, 11, 25), box(1, 30, 21, 50)]), BLACK, {})
    np.testing.assert_allclose(column(table, "area"), np.log([100, 100, 400]), rtol=1e-6)
    np.testing.assert_allclose(column(table, "odd_area"), [0, 0, np.log(4)], rtol=1e-6, atol=1e-7)


def test_shapes_agree_with_skimage():
    corner = box(2, 2, 12, 5) | box(9, 2, 12, 12)
    masks = [corner, *to_dense(draw_cells(np.random.default_rng(0), SHAPE, 5).instances)]
    table = evidence(fused_of(masks), BLACK, {})
    fine = np.ones((8, 8), int)  # pixels as squares, not as points
    truth = [regionprops(np.kron(mask, fine))[0] for mask in masks]
    np.testing.assert_allclose(column(table, "eccentricity"), [t.eccentricity for t in truth], atol=1e-3)
    truth = [regionprops(mask.astype(int))[0] for mask in masks]
    np.testing.assert_allclose(column(table, "hull_share"), [t.solidity for t in truth], atol=0.08)  # another hull rule
    solidity = [mask.sum() / convex_hull_image(mask, offset_coordinates=False).sum() for mask in masks]
    np.testing.assert_allclose(column(table, "hull_share"), solidity, atol=1e-6)
    assert column(table, "hull_share")[0] < 0.75


def test_cells_at_the_edge_are_told():
    masks = [box(0, 5, 10, 15), box(20, 0, 30, 9), box(30, 20, 40, 30), box(12, 50, 22, 60), box(10, 30, 20, 40)]
    np.testing.assert_array_equal(column(evidence(fused_of(masks), BLACK, {}), "at_edge"), [1, 1, 1, 1, 0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bright", [True, False])
def test_a_cell_that_stands_out_has_contrast_and_a_sharp_outline(channels, bright):
    image = np.full((*SHAPE, channels), 50 if bright else 200, np.uint8)
    real, imagined = box(10, 8, 22, 20), box(10, 38, 22, 50)
    image[real] = 150 if bright else 100
    table = evidence(fused_of([real, imagined]), image, {})
    spread = np.sqrt(channels) * (100 * np.sqrt(144 / 2400 * (1 - 144 / 2400)))
    np.testing.assert_allclose(column(table, "contrast"), [100 * np.sqrt(channels) / spread, 0], rtol=1e-4, atol=1e-6)
    assert column(table, "sharpness")[0] > 5
    assert column(table, "sharpness")[1] == 0


@pytest.mark.parametrize("place", [(0, 20), (28, 20), (10, 0), (10, 48), (0, 0)])
def test_a_cell_at_the_edge_has_the_contrast_of_one_in_the_middle(place):
    """What lies beyond the image is no ground that a cell could be told from."""
    y, x = place
    found = []
    for cell in (box(14, 24, 26, 36), box(y, x, y + 12, x + 12)):
        image = np.full((*SHAPE, 3), 50, np.uint8)
        image[cell] = 150
        found.append(float(column(evidence(fused_of([cell]), image, {}), "contrast")[0]))
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_neighbours_fill_the_ring_at_the_edge_as_in_the_middle():
    pairs = ([box(14, 20, 26, 32), box(14, 32, 26, 44)], [box(0, 20, 40, 32), box(0, 32, 40, 44)])
    middle, across = (column(evidence(fused_of(pair), BLACK, {}), "touching")[0] for pair in pairs)
    assert middle < across
    assert across == pytest.approx(0.5)


def test_the_spread_of_a_large_image_is_exact():
    shape = (900, 900)
    image = np.random.default_rng(0).integers(100, 256, (*shape, 3), dtype=np.uint8)
    mask = np.zeros(shape, bool)
    mask[400:440, 400:440] = True
    image[mask] = 20
    cells = from_masks([mask], shape, source="pseudo")
    fused = Fused(cells, np.ones((1, 1), np.float32), ("a",), np.ones(1, np.float32))
    ring = cv2.dilate(mask.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (7, 7))).astype(bool) & ~mask
    apart = image[mask].mean(axis=0) - image[ring].mean(axis=0)
    spread = np.sqrt(sum(image[..., c].astype(np.float64).var() for c in range(3)))
    np.testing.assert_allclose(
        column(evidence(fused, image, {}), "contrast"), [np.linalg.norm(apart) / spread], rtol=2e-6
    )


def test_neighbours_fill_the_ring():
    alone, left, right = box(2, 2, 12, 12), box(20, 10, 30, 20), box(20, 20, 30, 30)
    touching = column(evidence(fused_of([alone, left, right]), BLACK, {}), "touching")
    assert touching[0] == 0
    assert 0.2 < touching[1] < 0.35
    assert touching[1] == pytest.approx(touching[2])


def test_one_pixel_and_the_whole_image_are_cells_too():
    everything = np.ones(SHAPE, bool)
    table = evidence(fused_of([box(0, 0, 1, 1), everything]), BLACK, {})
    assert np.isfinite(table).all()
    np.testing.assert_allclose(column(table, "hull_share"), [1, 1])


def test_fused_proposals_of_any_number_of_labellers_give_a_finite_table():
    drawn = draw_cells(np.random.default_rng(4), SHAPE, 4, touching=True)
    proposal = Proposal(drawn.instances, np.ones(4, np.float32))
    for names in ("a", "ab", "abc"):
        fused = fuse_proposals(dict.fromkeys(names, proposal), {}, PseudoConfig(), min_area=1)
        table = evidence(fused, drawn.pixels, {})
        assert table.shape == (4, len(EVIDENCE))
        assert table.dtype == np.float32
        assert np.isfinite(table).all()
        np.testing.assert_array_equal(column(table, "found_by"), np.ones(4))


def test_no_cells_are_no_rows():
    empty = Fused(Instances.build((0, 0)), np.zeros((0, 0), np.float32), (), np.zeros(0, np.float32))
    assert evidence(empty, BLACK, {}).shape == (0, len(EVIDENCE))


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ShapeError, match=r"\(40, 60\)"):
        evidence(fused_of([box(5, 5, 15, 15)]), np.zeros((8, 8, 3), np.uint8), {})
