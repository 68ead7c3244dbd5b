from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loop.errors import InputError, NonFiniteError
from loop.losses.assignment import assign, dice_matrix


def draw(seed, n, m, size=6):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, size, size, generator=generator),
        torch.randn(n, generator=generator),
        (torch.rand(m, size, size, generator=generator) > 0.6).float(),
    )


def test_dice_matrix_equals_a_loop():
    logits, _, targets = draw(0, 5, 3)
    probs = logits.sigmoid()
    matrix = dice_matrix(probs, targets)
    for i, p in enumerate(probs.double()):
        for j, g in enumerate(targets.double()):
            assert float(matrix[i, j]) == pytest.approx(
                float(2 * (p * g).sum() / ((p**2).sum() + (g**2).sum())), rel=1e-5
            )


def test_dice_of_empty_masks_is_zero():
    assert dice_matrix(torch.zeros(2, 3, 3), torch.zeros(1, 3, 3)).tolist() == [[0], [0]]


@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(0, 2), st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_no_permutation_scores_higher(seed, m, spare, lam):
    logits, classes, targets = draw(seed, m + spare, m)
    rows, columns = assign(logits, classes, targets, lam)
    assert sorted(columns.tolist()) == list(range(m))
    assert len(set(rows.tolist())) == m
    score = classes.sigmoid().double()[:, None] ** (1 - lam) * dice_matrix(logits.sigmoid(), targets).double() ** lam
    best = max(sum(score[q, g] for g, q in enumerate(order)) for order in permutations(range(m + spare), m))
    assert float(sum(score[rows, columns])) == pytest.approx(float(best), rel=1e-5)


def test_the_class_decides_between_equal_masks():
    mask = torch.full((4, 4), -9.0)
    mask[:2] = 9.0
    rows, columns = assign(mask.expand(3, 4, 4), torch.tensor([-2.0, 3.0, 0.0]), (mask > 0).float()[None])
    assert (rows.tolist(), columns.tolist()) == ([1], [0])


def test_no_targets():
    rows, columns = assign(*draw(0, 3, 0)[:2], torch.zeros(0, 6, 6))
    assert rows.shape == columns.shape == (0,)
    assert rows.dtype == torch.int64


def test_more_targets_than_queries_names_the_crop_and_what_to_do():
    with pytest.raises(
        InputError, match=r"crop 7 .* 4 cells, the model has 3 queries; use smaller crops .*more queries"
    ):
        assign(*draw(0, 3, 4), crop=7)


def test_nan_is_refused():
    logits, classes, targets = draw(0, 3, 2)
    logits[1, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="crop 2 "):
        assign(logits, classes, targets, crop=2)


def test_no_gradient_flows_through_the_assignment():
    logits, classes, targets = draw(0, 3, 2)
    rows, _ = assign(logits.requires_grad_(), classes.requires_grad_(), targets)
    assert not rows.requires_grad
