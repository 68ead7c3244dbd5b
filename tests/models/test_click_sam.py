"""What of SAM's answers a click takes: scripted answers for the choice, a small network for the plumbing."""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loop.labelstudio.results import Prompts
from loop.masks import from_masks, to_dense
from loop.metrics.typical import fit_typical
from loop.models.click_sam import sam_cell_at
from loop.models.sam import Answers, Sam, segment_anything
from loop.rings import crop_mask
from loop.types import Instances

SHAPE = (60, 90)


def disc(row, column, radius):
    rows, columns = np.ogrid[: SHAPE[0], : SHAPE[1]]
    return (rows - row) ** 2 + (columns - column) ** 2 <= radius**2


def block(y0, x0, y1, x1):
    mask = np.zeros(SHAPE, bool)
    mask[y0:y1, x0:x1] = True
    return mask


CELL, NEIGHBOUR = disc(30, 30, 10), disc(30, 49, 10)
CLUMP, ORGANELLE = CELL | NEIGHBOUR, disc(30, 30, 3)
NOTHING = np.zeros(SHAPE, bool)
TYPICAL = fit_typical([from_masks([disc(30, 45, radius)], SHAPE) for radius in (8, 9, 9, 10, 10, 10, 10, 11, 11, 12)])


@dataclass
class Script:
    """Answers the n-th prompt with the n-th entry: three (mask, score), and a fourth for a clear prompt."""

    answers: list
    asked: list = field(default_factory=list)
    shape: tuple = SHAPE

    def decode(self, embedding, *, points=None, point_labels=None, boxes=None, multimask=True):
        assert embedding is self
        self.asked.append(
            {
                "points": None if points is None else np.asarray(points)[0].tolist(),
                "labels": None if point_labels is None else np.asarray(point_labels)[0].tolist(),
                "box": None if boxes is None else np.asarray(boxes)[0].tolist(),
            }
        )
        every = self.answers[len(self.asked) - 1]
        chosen = every if multimask == "all" else every[:3]
        scores = np.array([[score for _, score in chosen]], np.float32)
        return Answers((tuple(crop_mask(mask) for mask, _ in chosen),), scores, np.ones_like(scores))


def prompts(positive=(), negative=(), boxes=()):
    """Points as (x, y), boxes as (x0, y0, x1, y1)."""
    points = [*positive, *negative]
    return Prompts(
        np.array(points, np.float64).reshape(-1, 2),
        np.array([True] * len(positive) + [False] * len(negative), bool),
        np.array(boxes, np.float64).reshape(-1, 4),
        "Cell",
    )


def answer(script, given, **more):
    found = sam_cell_at(script, script, given, **more)
    return to_dense(found)[0] if len(found) else None


def three(part=0.9, whole=0.9, group=0.9, *fourth):
    return Script([[(ORGANELLE, part), (CELL, whole), (CLUMP, group), *fourth]])


CLICK = prompts([(30.5, 30.5)])


def test_without_typical_cells_the_score_decides_and_of_equals_the_middle_mask():
    np.testing.assert_array_equal(answer(three(0.9, 0.8, 0.7), CLICK), ORGANELLE)
    np.testing.assert_array_equal(answer(three(0.7, 0.8, 0.9), CLICK), CLUMP)
    np.testing.assert_array_equal(answer(three(), CLICK), CELL)


@pytest.mark.parametrize("scores", [(0.95, 0.75, 0.9), (0.8, 0.7, 0.98), (0.9, 0.9, 0.9)])
def test_a_click_takes_the_cell_neither_the_clump_nor_an_organelle(scores):
    np.testing.assert_array_equal(answer(three(*scores), CLICK, typical=TYPICAL), CELL)


def test_what_sam_is_sure_of_wins_over_what_is_usual():
    np.testing.assert_array_equal(answer(three(0.1, 0.1, 0.95), CLICK, typical=TYPICAL), CLUMP)


def test_a_small_cell_at_the_edge_of_the_image_is_not_odd():
    corner, large = disc(0, 0, 6), disc(0, 0, 45)
    script = Script([[(corner, 0.8), (NOTHING, 0.9), (large, 0.9)]])
    np.testing.assert_array_equal(answer(script, prompts([(2, 2)]), typical=TYPICAL), corner)


def test_what_the_answer_says_of_itself():
    found = sam_cell_at(*[three(0.1, 0.7, 0.2)] * 2, CLICK, image_id="a", source="pseudo", model_version="sam-1")
    assert (found.image_id, found.source, found.model_version, found.shape) == ("a", "pseudo", "sam-1", SHAPE)
    assert found.scores[0] == pytest.approx(0.7)
    empty = sam_cell_at(*[Script([])] * 2, prompts(), image_id="a")
    assert (len(empty), empty.shape, empty.image_id) == (0, SHAPE, "a")


def test_only_negative_points_ask_nothing():
    script = Script([])
    assert answer(script, prompts(negative=[(30, 30)])) is None
    assert script.asked == []


def test_a_mask_without_the_point_is_out_and_one_within_three_px_is_in():
    apart = Script([[(NEIGHBOUR, 0.99), (CELL, 0.2), (NOTHING, 0.9)]])
    np.testing.assert_array_equal(answer(apart, CLICK), CELL)
    assert answer(Script([[(NEIGHBOUR, 0.99)] * 3]), CLICK) is None
    np.testing.assert_array_equal(answer(Script([[(CELL, 0.9)] * 3]), prompts([(30.5, 43.9)])), CELL)
    assert answer(Script([[(CELL, 0.9)] * 3]), prompts([(30.5, 44.1)])) is None


def test_only_the_piece_under_the_point_stays_and_its_holes_are_filled():
    far = disc(30, 75, 8)
    holed = (CELL & ~disc(30, 30, 5)) | far
    np.testing.assert_array_equal(answer(Script([[(holed, 0.9)] * 3]), CLICK), CELL)
    np.testing.assert_array_equal(answer(Script([[(holed, 0.9)] * 3]), prompts([(75, 30)])), far)


def test_the_frame_around_a_point_is_not_filled():
    frame = block(2, 2, 58, 88) & ~block(5, 5, 55, 85)
    np.testing.assert_array_equal(answer(Script([[(frame, 0.9)] * 3]), prompts([(3.5, 3.5)])), frame)


def test_all_points_are_one_prompt():
    script = three(0.9, 0.9, 0.9, (CLUMP, 0.9))
    answer(script, prompts([(30, 30), (49, 30)], negative=[(75, 30)]))
    assert script.asked == [{"points": [[30, 30], [49, 30], [75, 30]], "labels": [1, 1, 0], "box": None}]


def test_several_positive_points_take_what_holds_them_all():
    clicks = prompts([(25, 30), (54, 30)])
    np.testing.assert_array_equal(answer(three(0.9, 0.95, 0.9), clicks, typical=TYPICAL), CLUMP)


def test_a_clear_prompt_may_take_the_fourth_mask():
    script = three(0.3, 0.3, 0.3, (block(20, 20, 41, 41), 0.9))
    np.testing.assert_array_equal(answer(script, prompts([(25, 30), (35, 30)])), block(20, 20, 41, 41))
    np.testing.assert_array_equal(answer(three(0.3, 0.4, 0.3, (NEIGHBOUR, 0.9)), CLICK), CELL)


def test_points_that_sam_leaves_out_are_asked_for_again_and_joined_over_the_gap():
    left, right = block(20, 20, 40, 40), block(20, 43, 40, 60)
    script = Script([[(left, 0.9)] * 4, [(right, 0.5)] * 4])
    found = sam_cell_at(script, script, prompts([(25, 30), (55, 30)], negative=[(75, 30)]))
    np.testing.assert_array_equal(to_dense(found)[0][21:39, 20:60], True)
    assert found.scores[0] == pytest.approx(0.5)
    assert script.asked[1] == {"points": [[55, 30], [75, 30]], "labels": [1, 0], "box": None}


def test_a_point_that_sam_never_takes_in_is_asked_for_once():
    script = Script([[(CELL, 0.9)] * 4, [(CELL, 0.9)] * 3])
    np.testing.assert_array_equal(answer(script, prompts([(30, 30), (80, 50)])), CELL)
    assert len(script.asked) == 2


def test_a_negative_point_takes_the_mask_without_it():
    script = three(0.3, 0.6, 0.95, (CLUMP, 0.9))
    np.testing.assert_array_equal(answer(script, prompts([(25, 30)], negative=[(54, 30)])), CELL)


def test_a_negative_point_divides_what_sam_does_not():
    script = Script([[(CLUMP, 0.9)] * 4])
    kept = answer(script, prompts([(25, 30)], negative=[(54, 30)]))
    assert (kept & CELL).sum() / (kept | CELL).sum() > 0.95
    assert not kept[30, 54]


def test_positive_and_negative_on_one_pixel_leave_nothing():
    assert answer(Script([[(CELL, 0.9)] * 4]), prompts([(30, 30)], negative=[(30, 30)])) is None


def test_a_box_merges_what_lies_in_it_however_unusual():
    box = prompts(boxes=[(20, 20, 60, 41)])
    script = three(0.9, 0.95, 0.9, (CLUMP, 0.9))
    np.testing.assert_array_equal(answer(script, box, typical=TYPICAL), CLUMP)
    assert script.asked == [{"points": None, "labels": None, "box": [20, 20, 60, 41]}]


def test_a_box_around_one_cell_takes_it_and_not_the_clump():
    script = three(0.9, 0.8, 0.95, (CLUMP, 0.95))
    np.testing.assert_array_equal(answer(script, prompts(boxes=[(20, 20, 41, 41)]), typical=TYPICAL), CELL)


def test_a_box_over_pieces_of_one_cell_joins_them_over_a_thin_gap():
    torn = block(20, 20, 40, 38) | block(20, 41, 40, 60)
    joined = answer(Script([[(torn, 0.9)] * 4]), prompts(boxes=[(19, 19, 61, 41)]))
    np.testing.assert_array_equal(joined[21:39], block(20, 20, 40, 60)[21:39])
    assert (torn <= joined).all()


def test_of_pieces_far_apart_the_one_with_most_pixels_in_the_box_is_taken():
    both = CELL | disc(30, 75, 12)
    np.testing.assert_array_equal(answer(Script([[(both, 0.9)] * 4]), prompts(boxes=[(15, 15, 66, 45)])), CELL)
    assert answer(Script([[(both, 0.9)] * 4]), prompts(boxes=[(0, 0, 10, 10)])) is None


def test_the_answer_to_a_box_ends_at_the_box():
    drawn = prompts(boxes=[(20.4, 24.0, 41.0, 36.5)])
    kept = answer(Script([[(CLUMP, 0.9)] * 4]), drawn, typical=TYPICAL)
    np.testing.assert_array_equal(kept, CLUMP & block(24, 20, 37, 41))


def test_a_box_over_pieces_counts_only_what_lies_in_it():
    far = disc(30, 75, 12) | block(28, 50, 33, 75) | CELL
    np.testing.assert_array_equal(answer(Script([[(far, 0.9)] * 4]), prompts(boxes=[(15, 15, 48, 45)])), CELL)
    assert answer(Script([[(disc(30, 75, 12), 0.9)] * 4]), prompts([(30, 30)], boxes=[(20, 20, 41, 41)])) is None


def test_a_cell_in_the_box_wins_over_a_little_better_clump_that_the_box_cuts():
    script = three(0.1, 0.8, 0.9, (CLUMP, 0.95))
    np.testing.assert_array_equal(answer(script, prompts(boxes=[(20, 20, 41, 41)])), CELL)


def test_several_boxes_are_asked_one_by_one_and_joined():
    script = Script([[(CELL, 0.9)] * 4, [(NEIGHBOUR, 0.8)] * 4])
    given = prompts([(25, 30)], negative=[(75, 30)], boxes=[(20, 20, 41, 41), (39, 20, 60, 41)])
    np.testing.assert_array_equal(answer(script, given), CLUMP)
    assert script.asked == [
        {"points": [[25, 30], [75, 30]], "labels": [1, 0], "box": [20, 20, 41, 41]},
        {"points": [[75, 30]], "labels": [0], "box": [39, 20, 60, 41]},
    ]


def test_a_positive_point_beside_the_box_adds_its_cell():
    script = Script([[(CELL, 0.9)] * 4, [(NEIGHBOUR, 0.8)] * 3])
    np.testing.assert_array_equal(answer(script, prompts([(54, 30)], boxes=[(20, 20, 41, 41)])), CLUMP)
    assert [asked["box"] for asked in script.asked] == [[20, 20, 41, 41], None]


def test_a_box_without_area_is_no_error():
    assert answer(Script([[(CELL, 0.9)] * 4]), prompts(boxes=[(3, 3, 3, 3)])) is None
    np.testing.assert_array_equal(answer(Script([[(CELL, 0.9)] * 4]), prompts(boxes=[(30, 30, 30, 30)])), CELL)


def test_points_on_the_edge_mean_the_outermost_pixels():
    script = Script([[(block(50, 80, 60, 90), 0.9)] * 3])
    np.testing.assert_array_equal(answer(script, prompts([(90, 60)])), block(50, 80, 60, 90))


@st.composite
def random_prompts(draw):
    n = draw(st.integers(0, 4))
    xy = st.tuples(st.floats(0, SHAPE[1]), st.floats(0, SHAPE[0]))
    points = draw(st.lists(xy, min_size=n, max_size=n))
    positive = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    corners = draw(st.lists(st.tuples(xy, xy), max_size=2))
    boxes = [(min(a[0], b[0]), min(a[1], b[1]), max(a[0], b[0]), max(a[1], b[1])) for a, b in corners]
    return Prompts(
        np.array(points, float).reshape(-1, 2), np.array(positive, bool), np.array(boxes, float).reshape(-1, 4), ""
    )


@settings(max_examples=100, deadline=None)
@given(random_prompts(), st.integers(0, 2**31), st.booleans())
def test_whatever_sam_says_the_answer_holds_no_negative_point(given_prompts, seed, with_typical):
    rng = np.random.default_rng(seed)

    def some():
        return np.kron(rng.random((6, 9)) < 0.4, np.ones((10, 10))).astype(bool)

    script = Script([[(some(), float(rng.random())) for _ in range(4)] for _ in range(8)])
    found = sam_cell_at(script, script, given_prompts, typical=TYPICAL if with_typical else None)
    assert len(found) <= 1
    if not given_prompts.positive.any() and not len(given_prompts.boxes_xyxy):
        assert len(found) == 0
    for mask in to_dense(found):
        assert mask.any()
        for x, y in given_prompts.points_xy[~given_prompts.positive]:
            assert not mask[min(int(y), SHAPE[0] - 1), min(int(x), SHAPE[1] - 1)]


def small_sam():
    """SAM's own classes with small sizes and random weights."""
    segment_anything()
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
    from segment_anything.modeling import Sam as Net

    norm = partial(nn.LayerNorm, eps=1e-6)
    encoder = ImageEncoderViT(
        depth=1, embed_dim=16, img_size=64, num_heads=2, patch_size=16, out_chans=16, norm_layer=norm, use_rel_pos=True
    )
    net = Net(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=16, image_embedding_size=(4, 4), input_image_size=(64, 64), mask_in_chans=8
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=16, mlp_dim=24, num_heads=8),
            transformer_dim=16,
            iou_head_depth=3,
            iou_head_hidden_dim=12,
        ),
    )
    generator = torch.Generator().manual_seed(3)
    for value in net.state_dict().values():
        value.normal_(std=0.3, generator=generator)
    return Sam(net, version="small", device="cpu", precision="fp32")


def test_a_real_network_is_asked_in_the_frame_of_the_image():
    sam = small_sam()
    embedding = sam.encode(np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), np.uint8))
    several = 0
    for x, y in np.random.default_rng(1).uniform((0, 0), SHAPE[::-1], (12, 2)):
        answers = sam.decode(embedding, points=[[(x, y)]])
        holding = [
            float(score)
            for crop, score in zip(answers.crops[0], answers.scores[0], strict=True)
            if crop is not None and to_dense(Instances.build(SHAPE, [crop.box_xyxy], [crop.mask]))[0][int(y), int(x)]
        ]
        found = sam_cell_at(sam, embedding, prompts([(x, y)]), typical=None)
        if holding:
            several += 1
            assert found.scores[0] >= np.float32(max(holding))
    assert several > 3
    boxed = sam_cell_at(sam, embedding, prompts([(40, 30)], [(80, 50)], [(20, 10, 70, 50)]), typical=TYPICAL)
    assert len(boxed) <= 1
