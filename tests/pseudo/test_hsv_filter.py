import colorsys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loop.errors import NonFiniteError, ShapeError
from loop.masks import from_label_image
from loop.pseudo.hsv_filter import cell_colours, hsv_filter
from loop.types import Instances

PURPLE, PINK, GREEN, WHITE = (120, 40, 160), (235, 190, 215), (60, 150, 70), (250, 248, 250)


def painted(*colours, side=6, noise=4, seed=0):
    """Squares in a row, each of a colour with a little noise, and their instances."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side + 4, len(colours) * (side + 2) + 2), np.int32)
    image = np.full((*labels.shape, 3), WHITE, np.int64)
    for i, colour in enumerate(colours):
        place = slice(2, 2 + side), slice(2 + i * (side + 2), 2 + i * (side + 2) + side)
        labels[place] = i + 1
        image[place] = colour + rng.integers(-noise, noise + 1, 3)
    return image.clip(0, 255).astype(np.uint8), from_label_image(labels)


def kept(image, cells, **options):
    chosen = hsv_filter(image, cells, **options)
    columns = cells.boxes_xyxy[:, 0].tolist()
    return [columns.index(x) for x in chosen.boxes_xyxy[:, 0].tolist()]


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_colours_are_points_of_the_cone(colour):
    image = np.full((4, 5, 3), colour, np.uint8)
    x, y, value = cell_colours(image, Instances.build((4, 5), [(1, 1, 3, 3)], [np.ones((2, 2), bool)]))[0]
    hue, saturation, expected = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    assert value == pytest.approx(expected, abs=1e-4)
    assert x == pytest.approx(saturation * np.cos(2 * np.pi * hue), abs=1e-3)
    assert y == pytest.approx(saturation * np.sin(2 * np.pi * hue), abs=1e-3)


def test_the_mean_is_over_the_mask_only():
    image = np.zeros((2, 4, 3), np.uint8)
    image[0, 0], image[1, 1] = (200, 0, 0), (100, 0, 0)
    mask = np.eye(2, dtype=bool)
    assert cell_colours(image, Instances.build((2, 4), [(0, 0, 2, 2)], [mask]))[0] == pytest.approx([1, 0, 150 / 255])


def test_hue_is_a_circle():
    reds, _ = painted((200, 20, 23), (200, 23, 20), noise=0)
    colours = cell_colours(reds, painted((0, 0, 0), (0, 0, 0))[1])
    assert np.linalg.norm(colours[0] - colours[1]) < 0.05  # hues of 359 and 1 degrees


def test_without_known_colours_the_stained_stay():
    image, cells = painted(PURPLE, PINK, PURPLE, PINK, PINK)
    assert kept(image, cells) == [0, 2]


def test_known_colours_choose_the_cluster():
    image, cells = painted(PURPLE, PINK, PURPLE, PINK, PINK)
    for colour, expected in ((PURPLE, [0, 2]), (PINK, [1, 3, 4])):
        other, known = painted(colour, colour, colour, seed=1)
        assert kept(image, cells, known_colours=cell_colours(other, known)) == expected


def test_nothing_goes_where_all_are_alike():
    image, cells = painted(*[PURPLE] * 6, noise=10)
    assert kept(image, cells) == list(range(6))
    known = cell_colours(*painted(*[PURPLE] * 30, noise=25, seed=3))
    assert kept(image, cells, known_colours=known) == list(range(6))


def test_the_nearest_cluster_stays_even_if_it_is_far():
    image, cells = painted(PINK, PINK, GREEN)
    assert kept(image, cells, known_colours=cell_colours(*painted(PURPLE, PURPLE))) == [0, 1]


def test_grey_images_few_masks_and_no_colours_pass():
    image, cells = painted(PURPLE, PINK, PURPLE)
    grey = image.mean(axis=2, keepdims=True).astype(np.uint8)
    assert hsv_filter(grey, cells) is cells
    assert hsv_filter(np.repeat(grey, 3, axis=2), cells) is cells
    one = cells.take([1])
    assert hsv_filter(image, one) is one
    none = cells.take([])
    assert hsv_filter(image, none) is none
    assert cell_colours(image, none).shape == (0, 3)
    assert kept(image, cells, known_colours=np.zeros((0, 3), np.float32)) == [0, 2]


def test_the_same_seed_gives_the_same_masks():
    image, cells = painted(*[PURPLE, PINK, GREEN] * 5, noise=30)
    assert kept(image, cells, seed=7) == kept(image, cells, seed=7)


def test_what_does_not_belong_together_is_refused():
    image, cells = painted(PURPLE, PINK)
    with pytest.raises(ShapeError, match="the image is"):
        cell_colours(image[:-1], cells)
    with pytest.raises(ShapeError, match="known colours are"):
        hsv_filter(image, cells, known_colours=np.zeros((2, 2), np.float32))
    with pytest.raises(NonFiniteError, match="known colours"):
        hsv_filter(image, cells, known_colours=np.full((2, 3), np.nan, np.float32))
