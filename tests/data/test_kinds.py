import numpy as np
import pytest

from loop.data.kinds import appearance, kinds


def dark(rng):
    image = rng.integers(0, 20, (40, 50, 1)).astype(np.uint8)
    image[10:20, 10:20] = 200
    return image


def stained(rng):
    return np.stack([rng.integers(low, low + 40, (40, 50)) for low in (150, 100, 190)], axis=2).astype(np.uint8)


def test_images_of_two_looks_are_told_apart():
    rng = np.random.default_rng(0)
    found = kinds([dark(rng) for _ in range(6)] + [stained(rng) for _ in range(2)])
    assert len(set(found[:6])) == 1
    assert len(set(found[6:])) == 1
    assert found[0] != found[6]


@pytest.mark.parametrize("n", [1, 3, 7])
def test_few_images_are_of_one_kind(n):
    rng = np.random.default_rng(0)
    assert kinds([dark(rng) for _ in range(n)]) == [0] * n


def test_equal_images_are_of_one_kind():
    assert len(set(kinds([np.zeros((5, 5, 3), np.uint8)] * 20))) == 1


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 3), (500, 400, 3)])
def test_any_size_has_a_finite_appearance_of_nine_numbers(shape):
    look = appearance(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    assert look.shape == (9,)
    assert np.isfinite(look).all()


def test_appearance_by_hand():
    look = appearance(np.full((8, 8, 3), (255, 0, 0), np.uint8))
    np.testing.assert_allclose(look, [1 / 3] * 4 + [2 / 3, -1 / 3, -1 / 3, 1, 0], atol=1e-6)
