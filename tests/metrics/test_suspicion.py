"""How suspicious labels are: each kind by hand, what a model knows and does not know, and planted errors on top."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loop.data.synthetic import draw_cells
from loop.errors import NonFiniteError, ShapeError
from loop.masks import from_masks, to_dense
from loop.metrics.suspicion import (
    KINDS,
    LABEL_KINDS,
    Suspicion,
    findings,
    image_score,
    judge,
    reason,
    suspicion_of,
    unusual,
    usual,
)
from loop.types import BoolArray, FloatArray, Instances

SHAPE = (40, 60)


def block(y: int, x: int, height: int = 10, width: int = 10) -> BoolArray:
    mask = np.zeros(SHAPE, bool)
    mask[y : y + height, x : x + width] = True
    return mask


def cells(*masks: BoolArray) -> Instances:
    return from_masks(list(masks), SHAPE, image_id="a")


def sure_of(predicted: Instances, p: float = 1.0) -> FloatArray:
    """The map of a model that says `p` in its cells and 1 - p elsewhere."""
    inside = to_dense(predicted).any(axis=0) if len(predicted) else np.zeros(predicted.shape, bool)
    return np.where(inside, p, 1 - p).astype(np.float32)


def columns(labelled: Instances, predicted: Instances, p: float = 1.0) -> dict[str, list[float]]:
    found = suspicion_of(labelled, predicted, sure_of(predicted, p))
    named = {kind: found.labelled[:, k].tolist() for k, kind in enumerate(LABEL_KINDS)}
    return {**named, "deleted": found.deleted.tolist()}


def test_labels_that_a_model_agrees_with_are_not_suspicious() -> None:
    both = cells(block(2, 2), block(2, 20), block(20, 30))
    found = columns(both, both)
    assert all(value == 0 for values in found.values() for value in values)
    assert [len(found[kind]) for kind in KINDS] == [3] * 5


def test_a_cell_on_background_is_invented() -> None:
    kept = block(2, 2)
    found = columns(cells(kept, block(20, 40)), cells(kept))
    assert found["invented"] == [0.0, 1.0]
    assert found["shifted"] == found["merged"] == found["split"] == [0.0, 0.0]
    assert found["deleted"] == [0.0]
    assert columns(cells(block(20, 40)), cells(kept), p=0.8)["invented"] == pytest.approx([0.6])


def test_a_cell_without_label_is_deleted_unless_labels_cover_half_of_it() -> None:
    kept, other = block(2, 2), block(20, 40)
    assert columns(cells(kept), cells(kept, other))["deleted"] == [0.0, 1.0]
    assert columns(cells(kept), cells(kept, other), p=0.9)["deleted"] == pytest.approx([0.0, 0.8])
    # a quarter of the predicted cell is covered: 1 - 2 / 4
    assert columns(cells(block(20, 40, 5, 5)), cells(other))["deleted"] == [0.5]
    assert columns(cells(block(20, 40, 5, 10)), cells(other))["deleted"] == [0.0]


def test_a_cell_beside_the_one_that_is_seen_is_shifted() -> None:
    # moved by 4 of 10 px: 0.4 of the label lies on background, 0.4 of the cell in no label
    found = columns(cells(block(10, 14)), cells(block(10, 10)))
    assert found["shifted"] == pytest.approx([0.8])
    assert found["invented"] == [0.0]
    assert found["deleted"] == [0.0]
    # a label that is only too large, or too small, is not shifted
    assert columns(cells(block(8, 8, 14, 14)), cells(block(10, 10)))["shifted"] == [0.0]
    assert columns(cells(block(12, 12, 6, 6)), cells(block(10, 10)))["shifted"] == [0.0]


def test_two_cells_in_one_label_are_merged() -> None:
    one, other, speck = block(10, 10), block(10, 20), block(10, 20, 1, 10)
    assert columns(cells(one | other), cells(one, other))["merged"] == [1.0]
    # parts of 100 and 10 px: 2 x 10 / 110
    assert columns(cells(one | speck), cells(one, speck))["merged"] == pytest.approx([20 / 110])
    assert columns(cells(one | other), cells(one | other))["merged"] == [0.0]


def test_two_labels_in_one_cell_are_split() -> None:
    one, other, third = block(10, 10), block(10, 20), block(10, 30, 10, 5)
    assert columns(cells(one, other), cells(one | other))["split"] == [1.0, 1.0]
    found = columns(cells(one, other, third), cells(one | other | third))["split"]
    assert found == pytest.approx([1.0, 1.0, 2 * 50 / 150])
    assert columns(cells(one | other), cells(one | other))["split"] == [0.0]


def test_a_model_that_does_not_know_accuses_nobody() -> None:
    labelled, predicted = cells(block(2, 2), block(20, 40)), cells(block(2, 5), block(5, 30))
    found = suspicion_of(labelled, predicted, np.full(SHAPE, 0.5, np.float32))
    assert found.cells.tolist() == [0.0] * 4
    assert image_score(found) == 0.0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sure=st.tuples(st.floats(0.5, 1.0), st.floats(0.5, 1.0)).map(sorted),
    n=st.integers(1, 5),
)
def test_suspicion_grows_with_the_confidence_of_the_model(seed: int, sure: list[float], n: int) -> None:
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 28, (2, n, 2)).tolist()
    labelled, predicted = (cells(*(block(y, x) for y, x in group)) for group in corners)
    less, more = (suspicion_of(labelled, predicted, sure_of(predicted, p)) for p in sure)
    assert (more.labelled >= less.labelled - 1e-6).all()
    assert (more.deleted >= less.deleted - 1e-6).all()
    assert (more.cells >= 0).all()
    assert (more.cells <= 1).all()


def test_nothing_is_missed_where_labels_are_not_complete() -> None:
    predicted = cells(block(2, 2), block(20, 40))
    known = np.zeros(SHAPE, bool)
    known[:, :30] = True
    found = suspicion_of(cells(), predicted, sure_of(predicted), known)
    assert found.deleted.tolist() == [1.0, 0.0]
    shifted = suspicion_of(cells(block(20, 36)), predicted, sure_of(predicted), known)
    assert shifted.labelled[0, LABEL_KINDS.index("shifted")] == 0.0


def test_empty_images_have_no_suspicion() -> None:
    found = suspicion_of(cells(), cells(), np.zeros(SHAPE, np.float32))
    assert found.labelled.shape == (0, 4)
    assert image_score(found) == 0.0
    assert findings(found, cells(), cells()) == []
    assert suspicion_of(cells(block(1, 1)), cells(), np.zeros(SHAPE, np.float32)).labelled[0, 0] == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    one = cells(block(1, 1))
    with pytest.raises(ShapeError, match="'a'"):
        suspicion_of(one, one, np.zeros((3, 4), np.float32))
    with pytest.raises(ShapeError, match="'a'"):
        suspicion_of(one, one, sure_of(one), np.ones((3, 4), bool))
    with pytest.raises(NonFiniteError, match="'a'"):
        suspicion_of(one, one, np.full(SHAPE, np.nan, np.float32))
    with pytest.raises(ShapeError, match="1 modalities for 0 images"):
        usual([], ["x"])
    with pytest.raises(ShapeError, match="labelled and 0 predicted"):
        findings(Suspicion(np.zeros((1, 4)), np.zeros(0)), one, one)


def raw(labelled: list[float], deleted: list[float] | None = None) -> Suspicion:
    table = np.zeros((len(labelled), 4))
    table[:, 0] = labelled
    return Suspicion(table, np.array(deleted or [], float))


def test_what_is_usual_is_told_by_the_other_images_of_the_modality() -> None:
    rng = np.random.default_rng(0)
    images = [raw(rng.random(size).tolist(), rng.random(3).tolist()) for size in (5, 40, 1, 30, 0, 12)]
    kinds = ["x", "x", "y", "x", "y", "z"]
    levels = usual(images, kinds)
    for i, level in enumerate(levels):
        others = [j for j in range(6) if j != i]
        like = np.sort(np.concatenate([images[j].labelled[:, 0] for j in others if kinds[j] == kinds[i]] or [[]]))
        everywhere = np.sort(np.concatenate([images[j].labelled[:, 0] for j in others]))
        here = like[int(0.9 * (len(like) - 1))] if len(like) else 0.0
        share = len(like) / (len(like) + 100)
        expected = share * here + (1 - share) * everywhere[int(0.9 * (len(everywhere) - 1))]
        assert level[0] == pytest.approx(expected)
        assert level[1:4].tolist() == [0.0, 0.0, 0.0]
    assert [level.tolist() for level in usual([raw([0.7])], [""])] == [[0.0] * 5]
    assert usual([], []) == []


def test_habits_excuse_but_never_reverse() -> None:
    level = np.array([0.4, 0.0, 0.0, 0.0, 0.2])
    found = unusual(raw([0.0, 0.4, 0.8], [0.2]), level)
    assert found.labelled[:, 0] == pytest.approx([0.0, 0.2, 0.64 / 1.2])
    assert found.deleted == pytest.approx([0.1])
    assert unusual(raw([0.3], [1.0]), np.zeros(5)).cells == pytest.approx([0.3, 1.0])


def test_a_modality_in_which_the_model_is_bad_does_not_fill_the_top() -> None:
    bad = [raw([0.6, 0.7, 0.6, 0.7] * 10) for _ in range(10)]
    good = [raw([0.0] * 40) for _ in range(10)]
    wrong = raw([0.0] * 37 + [0.7] * 3)
    judged = judge([*bad, *good, wrong], ["bad"] * 10 + ["good"] * 11)
    scores = [image_score(one) for one in judged]
    assert int(np.argmax(scores)) == 20
    plain = [image_score(one) for one in (*bad, *good, wrong)]
    assert int(np.argmax(plain)) != 20


def test_image_score_lies_between_mean_and_maximum() -> None:
    three_of_sixty = image_score(raw([1.0] * 3 + [0.0] * 57))
    assert three_of_sixty == pytest.approx((3 / 60) ** (1 / 8))
    assert image_score(raw([1.0] + [0.0] * 59)) < three_of_sixty < image_score(raw([1.0] * 6 + [0.0] * 54))
    assert image_score(raw([0.2] * 60)) == pytest.approx(0.2)


def test_findings_name_kind_place_and_words() -> None:
    labelled, predicted = cells(block(2, 2), block(20, 40)), cells(block(2, 2), block(20, 5))
    found = findings(suspicion_of(labelled, predicted, sure_of(predicted, 0.9)), labelled, predicted)
    assert {(one.kind, one.cell, one.box_xyxy) for one in found} == {
        ("invented", 1, (40, 20, 50, 30)),
        ("deleted", 1, (5, 20, 15, 30)),
    }
    assert [one.suspicion for one in found] == pytest.approx([0.8, 0.8])
    assert reason(found) == (
        "1 cell drawn where the model sees background; 1 cell not drawn though the model sees a cell"
    )
    assert reason([found[0], found[0]]) == "2 cells drawn where the model sees background"
    assert reason([]) == ""
    raised = findings(suspicion_of(labelled, predicted, sure_of(predicted, 0.9)), labelled, predicted, least=0.9)
    assert raised == []


def planted(truth: Instances, kind: str) -> Instances:
    """Labels with one error of that kind; the cells of an image part from one another by a pixel at least."""
    masks = list(to_dense(truth))
    if kind == "invented":
        free = ~np.any(masks, axis=0)
        spot = np.zeros_like(free)
        spot[tuple(np.argwhere(free)[len(np.argwhere(free)) // 2])] = True
        return from_masks([*masks, spot], truth.shape)
    first = masks.pop(0)
    if kind == "shifted":
        masks.insert(0, np.roll(first, 4, axis=(0, 1)))
    elif kind == "merged":
        masks[0] |= first
    elif kind == "split":
        half = np.cumsum(first).reshape(first.shape) <= first.sum() / 2
        masks += [first & half, first & ~half]
    return from_masks(masks, truth.shape)


def test_planted_errors_are_all_on_top_with_a_perfect_predictor() -> None:
    rng = np.random.default_rng(3)
    truths = [draw_cells(rng, (96, 96), 8, image_id=f"i{i}").instances for i in range(40)]
    wrong = {4 * i: kind for i, kind in enumerate(KINDS)}
    labels = [planted(truth, wrong[i]) if i in wrong else truth for i, truth in enumerate(truths)]
    raws = []
    for label, truth in zip(labels, truths, strict=True):
        interior = to_dense(truth).any(axis=0).astype(np.float32)
        raws.append(suspicion_of(replace(label, image_id=truth.image_id), truth, interior))
    judged = judge(raws, ["fluo"] * 40)
    scores = np.array([image_score(one) for one in judged])
    assert set(np.argsort(-scores)[: len(wrong)].tolist()) == set(wrong)
    assert [float(scores[i]) for i in range(40) if i not in wrong] == [0.0] * 35
    for i, kind in wrong.items():
        assert findings(judged[i], labels[i], truths[i])[0].kind == kind
