import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.config import PseudoConfig
from loop.errors import InputError, ShapeError
from loop.masks import from_masks, to_dense
from loop.metrics.matching import areas
from loop.pseudo.base import Proposal
from loop.pseudo.fusion import fuse_proposals, label_of
from loop.types import Instances, Origin

SHAPE = (30, 40)
CONFIG = PseudoConfig()


def box(y0, x0, y1, x1, shape=SHAPE):
    mask = np.zeros(shape, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def proposal(*masks, scores=None, stability=None, version="v1", shape=SHAPE):
    cells = from_masks(masks, shape, scores=scores, source="pseudo", model_version=version, image_id="a")
    return Proposal(cells, np.ones(len(cells), np.float32) if stability is None else np.float32(stability))


def random_proposal(rng, n):
    masks = []
    for _ in range(n):
        y, x = rng.integers(0, SHAPE[0] - 6), rng.integers(0, SHAPE[1] - 6)
        masks.append(box(y, x, y + rng.integers(4, 12), x + rng.integers(4, 12)))
    return proposal(*masks, scores=rng.random(n), stability=rng.random(n))


def test_one_labellers_cells_come_back_as_they_are_strongest_first():
    given_masks = [box(0, 0, 10, 10), box(15, 15, 25, 30)]
    fused = fuse_proposals({"a": proposal(*given_masks, scores=[0.4, 0.9], stability=[1, 0.5])}, {}, CONFIG)
    np.testing.assert_array_equal(to_dense(fused.instances), given_masks[::-1])
    np.testing.assert_allclose(fused.instances.scores, [0.9, 0.4])
    np.testing.assert_allclose(fused.stability, [0.5, 1])
    np.testing.assert_allclose(fused.support, [[1], [1]])
    assert fused.names == ("a",)
    assert fused.instances.source == "pseudo"
    assert fused.instances.origins == (Origin("pseudo", "a:v1"),) * 2


def test_the_vote_is_weighted_by_trust_score_and_stability():
    # columns 0-9, 0-9 and 4-13 of ten rows: weights 0.5, 0.5 and 0.9: no single one has half of 1.9
    small, moved = box(0, 0, 10, 10), box(0, 4, 10, 14)
    three = {"a": proposal(small, scores=[0.5]), "b": proposal(small, scores=[1], stability=[0.5])}
    fused = fuse_proposals({**three, "c": proposal(moved, scores=[0.9], version="c:7")}, {}, CONFIG)
    np.testing.assert_array_equal(to_dense(fused.instances), [small])
    np.testing.assert_allclose(fused.support, [[1, 1, 60 / 140]], rtol=1e-6)
    assert fused.instances.origins == (Origin("pseudo", "c:7"),)
    np.testing.assert_allclose(fused.instances.scores, [(0.25 + 0.5 + 0.81) / 1.9], rtol=1e-6)
    trusted = fuse_proposals({**three, "c": proposal(moved, scores=[0.9])}, {"c": 2.0}, CONFIG)
    np.testing.assert_array_equal(to_dense(trusted.instances), [moved])


def test_a_labeller_without_trust_has_no_say_but_what_it_found_is_told():
    cell, other = box(0, 0, 10, 10), box(15, 20, 25, 30)
    fused = fuse_proposals({"a": proposal(cell), "b": proposal(cell, other)}, {"b": 0.0}, CONFIG)
    np.testing.assert_array_equal(to_dense(fused.instances), [cell])
    np.testing.assert_allclose(fused.support, [[1, 1]])
    nobody = fuse_proposals({"a": proposal(cell)}, {"a": 0}, CONFIG)
    assert len(nobody.instances) == 0
    assert nobody.support.shape == (0, 1)


def test_a_labeller_of_too_many_cells_is_not_believed():
    config = PseudoConfig(max_cells=1)
    fused = fuse_proposals(
        {"a": proposal(box(0, 0, 9, 9)), "b": proposal(box(0, 9, 9, 20), box(12, 0, 20, 9))}, {}, config
    )
    np.testing.assert_array_equal(to_dense(fused.instances), [box(0, 0, 9, 9)])


def test_neighbours_do_not_chain_through_a_cell_between_them():
    # each overlaps the middle one by half of its width (IoU 1/3), the outer two not at all
    left, middle, right = box(0, 0, 10, 10), box(0, 5, 10, 15), box(0, 10, 10, 20)
    scores = {"a": 0.9, "b": 0.2, "c": 0.8}
    cells = {
        name: proposal(mask, scores=[scores[name]]) for name, mask in zip("abc", (left, middle, right), strict=True)
    }
    fused = fuse_proposals(cells, {}, CONFIG)
    np.testing.assert_array_equal(to_dense(fused.instances), [left, right])
    np.testing.assert_allclose(fused.support, [[1, 1 / 3, 0], [0, 0, 1]], rtol=1e-6)


def test_two_cells_of_one_labeller_stay_two_though_another_sees_one():
    halves, whole = (box(0, 0, 10, 10), box(0, 10, 10, 20)), box(0, 0, 10, 20)
    fused = fuse_proposals({"a": proposal(*halves, scores=[0.9, 0.9]), "b": proposal(whole, scores=[0.3])}, {}, CONFIG)
    np.testing.assert_array_equal(to_dense(fused.instances), halves)


def test_overlapping_cells_share_pixels_only_where_they_may():
    strong, weak = box(0, 0, 10, 10), box(0, 5, 10, 15)
    both = {"a": proposal(strong, weak, scores=[0.9, 0.5])}
    np.testing.assert_array_equal(to_dense(fuse_proposals(both, {}, CONFIG).instances), [strong, box(0, 10, 10, 15)])
    shared = fuse_proposals(both, {}, PseudoConfig(overlaps=True)).instances
    np.testing.assert_array_equal(to_dense(shared), [strong, weak])


def test_what_is_too_small_or_cut_off_is_dropped():
    across = box(12, 0, 14, 40)  # cut into two parts by the stronger cell; the larger stays
    cells = {"a": proposal(box(0, 0, 4, 4), box(10, 5, 20, 15), across, scores=[0.9, 0.8, 0.5])}
    np.testing.assert_array_equal(
        to_dense(fuse_proposals(cells, {}, CONFIG).instances), [box(10, 5, 20, 15), box(12, 15, 14, 40)]
    )
    assert len(fuse_proposals(cells, {}, CONFIG, min_area=16).instances) == 3
    assert len(fuse_proposals(cells, {}, CONFIG, min_area=101).instances) == 0


def test_cells_of_no_score_or_stability_are_still_there():
    fused = fuse_proposals({"a": proposal(box(0, 0, 9, 9), scores=[0.0], stability=[0.0])}, {}, CONFIG)
    assert len(fused.instances) == 1
    assert fused.instances.scores[0] == 0


@pytest.mark.parametrize("proposals", [{}, {"a": proposal()}, {"a": proposal(), "b": proposal()}])
def test_nothing_proposed_is_nothing_fused(proposals):
    fused = fuse_proposals(proposals, {}, CONFIG, shape=SHAPE)
    assert len(fused.instances) == 0
    assert fused.instances.shape == SHAPE
    assert fused.support.shape == (0, len(proposals))
    assert fused.stability.shape == (0,)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), labellers=st.integers(1, 4), overlaps=st.booleans())
def test_the_order_of_labellers_does_not_matter_and_no_pixel_is_given_twice(seed, labellers, overlaps):
    rng = np.random.default_rng(seed)
    proposals = {name: random_proposal(rng, int(rng.integers(0, 9))) for name in "abcd"[:labellers]}
    config = PseudoConfig(overlaps=overlaps)
    fused = fuse_proposals(proposals, {"b": 0.5}, config)
    turned = fuse_proposals(dict(reversed(proposals.items())), {"b": 0.5}, config)
    np.testing.assert_array_equal(to_dense(fused.instances), to_dense(turned.instances))
    np.testing.assert_array_equal(fused.support, turned.support)
    assert fused.instances.origins == turned.instances.origins
    if not overlaps:
        assert to_dense(fused.instances).sum(axis=0).max(initial=0) <= 1
    assert (areas(fused.instances) >= 20).all()
    assert ((fused.support >= 0) & (fused.support <= 1)).all()
    assert ((fused.stability >= 0) & (fused.stability <= 1)).all()


def test_proposals_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="images of"):
        fuse_proposals({"a": proposal(), "b": proposal(shape=(5, 5))}, {}, CONFIG)
    with pytest.raises(ShapeError, match="one each"):
        fuse_proposals({"a": Proposal(Instances.build(SHAPE), np.ones(2, np.float32))}, {}, CONFIG)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(InputError, match="trust in a"):
            fuse_proposals({"a": proposal()}, {"a": wrong}, CONFIG)


def test_a_version_that_names_its_labeller_is_not_named_twice():
    assert label_of("sam", "sam:vit_b-01") == "sam:vit_b-01"
    assert label_of("champion", "celloop-demo-v3") == "champion:celloop-demo-v3"
