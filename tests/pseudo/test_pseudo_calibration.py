import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from loop.config import PseudoConfig
from loop.errors import InputError, NonFiniteError, ShapeError
from loop.masks import from_masks
from loop.pseudo.calibration import (
    ISOTONIC_CELLS,
    L2,
    Calibrator,
    _knots,
    _logistic,
    calibrate,
    judged,
    reason_against,
    true_iou,
    uncalibrated,
)
from loop.pseudo.evidence import EVIDENCE
from loop.pseudo.fusion import Fused
from loop.types import Instances

CONFIG = PseudoConfig(calibrate_cells=40, keep_iou=0.75)
F = len(EVIDENCE)
SHAPE = (20, 30)


def judged_cells(seed, n, images=8):
    """Evidence whose third column decides, by chance, how well the cell fits."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, F)).astype(np.float32)
    features[:, 0] = 1  # one labeller: always found
    good = rng.random(n) < expit(2 * features[:, 2])
    iou = np.where(good, rng.uniform(0.75, 1, n), rng.uniform(0, 0.75, n)).astype(np.float32)
    return features, iou, [f"image-{i % images}" for i in range(n)]


@pytest.mark.parametrize("n", [60, 2000])
def test_confidence_is_the_chance_that_a_person_agrees(n):
    features, iou, images = judged_cells(0, n)
    found = calibrate(features, iou, images, CONFIG)
    assert (len(found.calibrator.knots) > 0) == (n >= ISOTONIC_CELLS)
    fresh, fresh_iou, _ = judged_cells(1, 4000)
    confidence = found.calibrator.confidence(fresh)
    assert confidence.dtype == np.float32
    truth = expit(2 * fresh[:, 2])
    assert np.abs(confidence - truth).mean() < (0.05 if n == 2000 else 0.2)
    assert abs(confidence.mean() - (fresh_iou >= 0.75).mean()) < (0.03 if n == 2000 else 0.12)


def test_figures_are_of_cells_that_the_fit_has_not_seen():
    features, iou, images = judged_cells(2, 400)
    found = calibrate(features, iou, images, CONFIG)
    assert found.figures["cells"] == 400
    assert found.figures["images"] == 8
    assert found.figures["agreed"] == pytest.approx((iou >= 0.75).mean())
    assert found.figures["ece"] < 0.1
    assert found.figures["spearman"] > 0.4
    assert sum(row.cells for row in found.bins) == 400
    # an image told by its evidence alone: within, all cells agree or none does; that must not help out of fold
    spoiled = features.copy()
    spoiled[:, 2:] = np.random.default_rng(3).normal(size=(400, F - 2))
    at = np.arange(400) % 8
    spoiled[:, 3] = at
    whole_images = np.where(np.isin(at, [0, 3, 5, 6]), 0.9, 0.1).astype(np.float32)
    leaky = calibrate(spoiled, whole_images, images, CONFIG)
    assert leaky.figures["brier_error"] > 0.2


def test_every_image_is_out_of_its_own_fold():
    features, iou, images = judged_cells(4, 80, images=4)
    found = calibrate(features, iou, images, CONFIG, folds=4)
    others = np.array([image != "image-1" for image in images])
    kept = [image for image in images if image != "image-1"]
    alone = calibrate(features[others], iou[others], kept, CONFIG, folds=4).calibrator
    np.testing.assert_allclose(found.out_of_fold[~others], alone.confidence(features[~others]), rtol=1e-5)


def test_the_regression_is_sklearns():
    features, iou, _ = judged_cells(5, 300)
    agreed = iou >= 0.75
    line = _logistic(features.astype(np.float64), agreed, L2)
    oracle = LogisticRegression(C=1 / L2, tol=1e-8, max_iter=1000).fit(features[:, 1:], agreed)
    np.testing.assert_allclose(line[1:-1], oracle.coef_[0], atol=2e-3)


def test_the_curve_is_sklearns_where_steps_are_large():
    rng = np.random.default_rng(6)
    scores = np.round(rng.normal(size=4000), 1)  # many ties
    agreed = rng.random(4000) < expit(scores)
    x, y = np.array(_knots(scores, agreed)).T
    assert (np.diff(x) > 0).all()
    assert (np.diff(y) >= 0).all()
    oracle = IsotonicRegression().fit(scores, agreed)
    np.testing.assert_allclose(np.interp(x, x, y)[2:-2], oracle.predict(np.round(x, 1))[2:-2], atol=0.05)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.sampled_from([60, 400]), lies=st.booleans())
def test_confidence_rises_with_the_score_and_stays_in_range(seed, n, lies):
    features, iou, images = judged_cells(seed, n)
    if lies:
        iou = np.random.default_rng(seed).permutation(iou)
    if reason_against(iou, images, CONFIG):
        return
    calibrator = calibrate(features, iou, images, CONFIG, folds=3).calibrator
    fresh = 5 * judged_cells(seed + 1, 200)[0]
    order = np.argsort(calibrator.score(fresh))
    confidence = calibrator.confidence(fresh)[order]
    assert (np.diff(confidence) >= -1e-6).all()
    assert confidence.min() >= 0
    assert confidence.max() <= 1


def test_a_constant_column_has_no_say():
    features, iou, images = judged_cells(7, 200)
    calibrator = calibrate(features, iou, images, CONFIG).calibrator
    assert calibrator.weights[0] == 0
    moved = features.copy()
    moved[:, 0] = 0.3
    np.testing.assert_array_equal(calibrator.confidence(moved), calibrator.confidence(features))


def test_evidence_that_says_nothing_gives_everyone_the_same_middling_confidence():
    rng = np.random.default_rng(8)
    features = np.ones((200, F), np.float32)
    iou = np.where(rng.random(200) < 0.3, 0.9, 0.1).astype(np.float32)
    confidence = calibrate(features, iou, [str(i % 5) for i in range(200)], CONFIG).calibrator.confidence(features)
    np.testing.assert_allclose(confidence, (iou >= 0.75).mean(), atol=0.03)


@pytest.mark.parametrize("n", [60, 400])
def test_a_stored_calibrator_is_the_same(n):
    calibrator = calibrate(*judged_cells(9, n), CONFIG).calibrator
    again = Calibrator.from_dict(json.loads(json.dumps(calibrator.to_dict())))
    assert again == calibrator
    features = judged_cells(10, 30)[0]
    np.testing.assert_array_equal(again.confidence(features), calibrator.confidence(features))


def test_what_is_no_stored_calibrator_is_refused():
    stored = calibrate(*judged_cells(9, 60), CONFIG).calibrator.to_dict()
    for wrong in ({}, {**stored, "bias": "high"}, {**stored, "bias": float("nan")}, {**stored, "more": 1}):
        with pytest.raises(InputError, match="no stored calibrator"):
            Calibrator.from_dict(wrong)
    for wrong in ({**stored, "names": ["score"]}, {**stored, "weights": [1.0]}):
        with pytest.raises(InputError, match="today's evidence"):
            Calibrator.from_dict(wrong)


def test_no_cells_have_no_confidence():
    calibrator = calibrate(*judged_cells(11, 60), CONFIG).calibrator
    assert calibrator.confidence(np.zeros((0, F), np.float32)).shape == (0,)


def test_too_little_to_calibrate_on_is_refused():
    features, iou, images = judged_cells(12, 60)
    with pytest.raises(InputError, match=r"39 judged cells.*40"):
        calibrate(features[:39], iou[:39], images[:39], CONFIG)
    with pytest.raises(InputError, match="one image"):
        calibrate(features, iou, ["a"] * 60, CONFIG)
    for value, said in ((0.8, "60 of 60"), (0.7, "0 of 60")):
        with pytest.raises(InputError, match=said):
            calibrate(features, np.full(60, value, np.float32), images, CONFIG)
    with pytest.raises(InputError, match="folds=1"):
        calibrate(features, iou, images, CONFIG, folds=1)
    with pytest.raises(ShapeError, match="one each a cell"):
        calibrate(features, iou[:50], images, CONFIG)
    with pytest.raises(ShapeError, match="evidence"):
        calibrate(features[:, :3], iou, images, CONFIG)
    with pytest.raises(NonFiniteError, match="IoU"):
        calibrate(features, np.full(60, np.nan, np.float32), images, CONFIG)
    features[7, 3] = np.nan
    with pytest.raises(NonFiniteError, match=f"{EVIDENCE[3]} of cell number 7"):
        calibrate(features, iou, images, CONFIG)
    assert reason_against(iou, images, CONFIG) == ""


def boxes(*places):
    masks = np.zeros((len(places), *SHAPE), bool)
    for mask, (y0, x0, y1, x1) in zip(masks, places, strict=True):
        mask[y0:y1, x0:x1] = True
    return from_masks(list(masks), SHAPE)


def test_true_iou_is_one_to_one():
    person = boxes((0, 0, 10, 10), (0, 15, 10, 25))
    whole, larger_half, smaller_half = (0, 15, 10, 25), (0, 0, 10, 6), (0, 6, 10, 10)
    np.testing.assert_allclose(true_iou(boxes(smaller_half, whole, larger_half), person), [0, 1, 0.6])
    np.testing.assert_allclose(true_iou(boxes((12, 0, 20, 8)), person), [0])
    assert true_iou(boxes(), person).shape == (0,)
    np.testing.assert_allclose(true_iou(person, boxes()), [0, 0])


def test_only_what_lies_on_known_ground_is_judged():
    known = np.zeros(SHAPE, bool)
    known[:, :10] = True
    cells = boxes((0, 0, 5, 5), (0, 5, 5, 15), (0, 6, 5, 16), (10, 20, 15, 25))
    np.testing.assert_array_equal(judged(cells, known), [True, True, False, False])
    np.testing.assert_array_equal(judged(cells, None), [True] * 4)
    assert judged(boxes(), known).shape == (0,)
    with pytest.raises(ShapeError, match="known ground"):
        judged(cells, np.ones((2, 2), bool))


def test_uncalibrated_is_score_times_stability():
    cells = Instances.build(SHAPE, [(0, 0, 2, 2)], [np.ones((2, 2), bool)], scores=[0.8])
    fused = Fused(cells, np.ones((1, 1), np.float32), ("a",), np.float32([0.5]))
    np.testing.assert_allclose(uncalibrated(fused), [0.4], rtol=1e-6)
