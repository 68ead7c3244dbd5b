import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from label_studio_sdk.label_interface import LabelInterface

from loop import masks
from loop.errors import LabelError, NonFiniteError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import from_results, is_unusable, prompts_from_context, to_results
from loop.labelstudio.rle import encode_brush
from loop.types import Instances

CONFIG = label_config(("Cell", "Debris"))
DEFAULT = Interface.parse(CONFIG)
ONE_CLASS = Interface.parse(label_config())
PERSONS = Interface.parse(
    '<View><Image name="image" value="$image"/>'
    '<PolygonLabels name="p" toName="image"><Label value="Cell"/></PolygonLabels>'
    '<BitmaskLabels name="m" toName="image"><Label value="Cell"/></BitmaskLabels>'
    '<RectangleLabels name="r" toName="image"><Label value="Cell"/></RectangleLabels>'
    '<EllipseLabels name="e" toName="image"><Label value="Cell"/></EllipseLabels>'
    '<VectorLabels name="v" toName="image"><Label value="Cell"/></VectorLabels></View>'
)
unhurried = settings(max_examples=60, deadline=None)


def region(kind, control, value, label="Cell", shape=(100, 200), **more):
    return {
        "id": "r1",
        "from_name": control,
        "to_name": "image",
        "type": f"{kind}labels",
        "original_width": shape[1],
        "original_height": shape[0],
        "image_rotation": 0,
        "value": {**value, f"{kind}labels": [label]} if label else value,
        **more,
    }


def polygon(**more):
    return region("polygon", "cell", {"points": [[10, 10], [20, 10], [20, 30], [10, 30]], "closed": True}, **more)


def over_the_wire(results):
    return json.loads(json.dumps(results))


def grid_of_cells(n, side=12):
    per_row = int(np.ceil(np.sqrt(n)))
    labels = np.zeros((per_row * side, per_row * side), np.int32)
    for i in range(n):
        y, x = divmod(i, per_row)
        labels[y * side : y * side + side - 1, x * side : x * side + side - 1] = i + 1
    return masks.from_label_image(labels, image_id="plate1", source="model", model_version="celloop-x-v3")


@given(
    hnp.arrays(bool, st.tuples(st.integers(0, 3), st.just(11), st.just(13))),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.integers(0, 1),
)
@unhurried
def test_any_masks_come_back_through_label_studio(stack, tolerance, label):
    """Noise: holes, specks, several parts, overlaps, borders. What no ring can hold travels as a brush region."""
    cells = masks.from_masks(list(stack), (11, 13), labels=[label] * len(stack), source="human", image_id="a")
    results = over_the_wire(to_results(cells, DEFAULT, tolerance_px=tolerance))
    parsed = from_results(results, DEFAULT, (11, 13), image_id="a")
    assert (parsed.prompts_left, parsed.unknown_labels, parsed.unreadable) == (0, (), ())
    assert parsed.instances.labels.tolist() == [label] * len(cells)
    assert parsed.instances.image_id == "a"
    for before, after in zip(masks.to_dense(cells), masks.to_dense(parsed.instances), strict=True):
        assert (before & after).sum() / (before | after).sum() >= 0.97


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.25, 0.5, 1.0]))
@unhurried
def test_whole_cells_stay_polygons_and_come_back_as_their_rings_say(seed, tolerance):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(20, 1500, 2))
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    centres = rng.uniform((0, 0), shape, (3, 2))
    radii = rng.uniform(3.2, 20, (3, 2))
    cells = masks.from_masks(
        [
            ((rows - y) / ry) ** 2 + ((columns - x) / rx) ** 2 <= 1
            for (y, x), (ry, rx) in zip(centres, radii, strict=True)
        ],
        shape,
    )
    results = over_the_wire(to_results(cells, DEFAULT, tolerance_px=tolerance))
    assert {item["type"] for item in results} == {"polygonlabels"}
    assert LabelInterface(CONFIG).validate_prediction({"result": results, "score": 0.1}, return_errors=True) == []
    parsed = from_results(results, DEFAULT, shape).instances
    rings = masks.from_polygons(masks.to_polygons(cells, tolerance), shape)
    np.testing.assert_array_equal(parsed.boxes_xyxy, rings.boxes_xyxy)
    for i in range(3):
        np.testing.assert_array_equal(parsed.masks[i], rings.masks[i])


def test_a_thousand_cells_have_their_own_lasting_ids():
    cells = grid_of_cells(1000)
    results = to_results(cells, DEFAULT)
    ids = [item["id"] for item in results]
    assert len(set(ids)) == 1000
    assert ids == [item["id"] for item in to_results(cells, DEFAULT)]
    assert not set(ids) & {item["id"] for item in to_results(cells, DEFAULT, id_seed="second click")}
    points = np.concatenate([item["value"]["points"] for item in results])
    assert points.min() >= 0
    assert points.max() <= 100
    assert LabelInterface(CONFIG).validate_prediction({"result": results, "score": 0.1}, return_errors=True) == []


def test_one_region_as_label_studio_gets_it():
    cells = Instances.build(
        (100, 200),
        [(180, 60, 200, 100)],
        [np.ones((40, 20), bool)],
        scores=[0.98771],
        labels=[1],
        source="model",
        image_id="a",
    )
    (item,) = to_results(cells, DEFAULT, tolerance_px=1.0)
    assert (item["from_name"], item["to_name"], item["type"], item["origin"]) == (
        "cell",
        "image",
        "polygonlabels",
        "prediction",
    )
    assert (item["original_width"], item["original_height"], item["image_rotation"]) == (200, 100, 0)
    assert item["score"] == 0.9877
    assert item["value"]["polygonlabels"] == ["Debris"]
    assert item["value"]["closed"] is True
    points = np.array(item["value"]["points"])
    assert (points.min(0) >= (90, 60)).all()
    assert points.max() == 100


def holed():
    mask = np.ones((9, 9), bool)
    mask[3:6, 3:6] = False
    return masks.from_masks([np.pad(mask, ((1, 10), (1, 20)))], (20, 30))


@pytest.mark.parametrize(("interface", "kind"), [(DEFAULT, "brushlabels"), (PERSONS, "bitmasklabels")])
def test_a_holed_cell_goes_as_a_picture_where_the_config_has_one(interface, kind):
    (item,) = over_the_wire(to_results(holed(), interface))
    assert item["type"] == kind
    parsed = from_results([item], interface, (20, 30)).instances
    np.testing.assert_array_equal(masks.to_dense(parsed), masks.to_dense(holed()))


def test_a_holed_cell_loses_its_hole_where_only_polygons_are_allowed():
    only = Interface.parse(
        '<View><Image name="i" value="$i"/><PolygonLabels name="p" toName="i"><Label value="A"/></PolygonLabels></View>'
    )
    (item,) = to_results(holed(), only)
    assert item["type"] == "polygonlabels"
    assert from_results([item], only, (20, 30)).instances.masks[0].sum() == 81


def test_a_config_without_polygons_gets_brush_regions():
    only = Interface.parse(
        '<View><Image name="i" value="$i"/><BrushLabels name="b" toName="i"><Label value="A"/></BrushLabels></View>'
    )
    cells = grid_of_cells(4)
    results = to_results(cells, only)
    assert {item["type"] for item in results} == {"brushlabels"}
    np.testing.assert_array_equal(
        masks.to_label_image(from_results(results, only, cells.shape).instances), masks.to_label_image(cells)
    )


def test_a_cell_of_a_class_that_the_config_lacks_is_refused():
    cells = Instances.build((9, 9), [(0, 0, 3, 3)], [np.ones((3, 3), bool)], labels=[2], image_id="plate1")
    with pytest.raises(LabelError, match="cell 0 of image 'plate1' has label 2"):
        to_results(cells, DEFAULT)
    drawn_only = Interface.parse(
        '<View><Image name="i" value="$i"/><PolygonLabels name="p" toName="i"><Label value="A"/></PolygonLabels>'
        '<EllipseLabels name="e" toName="i"><Label value="B"/></EllipseLabels></View>'
    )
    with pytest.raises(LabelError, match=r"label 1 \(B\), which no mask control"):
        to_results(Instances.build((9, 9), [(0, 0, 3, 3)], [np.ones((3, 3), bool)], labels=[1]), drawn_only)


def test_a_score_that_is_no_number_is_refused():
    cells = Instances.build((9, 9), [(0, 0, 3, 3)], [np.ones((3, 3), bool)], scores=[np.nan], image_id="plate1")
    with pytest.raises(NonFiniteError, match="'plate1' has score nan"):
        to_results(cells, DEFAULT)


def test_an_empty_annotation_is_no_cells():
    parsed = from_results([], DEFAULT, (10, 20), image_id="a")
    assert len(parsed.instances) == 0
    assert parsed.instances.shape == (10, 20)
    assert to_results(parsed.instances, DEFAULT) == []


def test_every_kind_that_a_person_may_draw_is_read():
    shape = (100, 200)
    brush = np.zeros(shape, bool)
    brush[50:60, 10:30] = True
    results = [
        region("polygon", "p", {"points": [[5, 10], [15, 10], [15, 30], [5, 30]]}),
        region("rectangle", "r", {"x": 20, "y": 10, "width": 5, "height": 10, "rotation": 0}),
        region("ellipse", "e", {"x": 50, "y": 50, "radiusX": 5, "radiusY": 10, "rotation": 45}),
        region("bitmask", "m", to_results(holed(), PERSONS)[0]["value"], shape=(20, 30)),
    ]
    cells = from_results(results[:3], PERSONS, shape).instances
    assert cells.boxes_xyxy[:2].tolist() == [[10, 10, 30, 30], [40, 10, 50, 20]]
    assert cells.masks[2].sum() == pytest.approx(np.pi * 10 * 10, rel=0.03)
    assert len(from_results(results[3:], PERSONS, (20, 30)).instances) == 1
    stroke = region("brush", "brush", {"format": "rle", "rle": encode_brush(brush)}, label="Debris")
    cells = from_results([stroke], DEFAULT, shape).instances
    assert (cells.boxes_xyxy.tolist(), cells.labels.tolist()) == ([[10, 50, 30, 60]], [1])


def test_a_damaged_brush_region_leaves_the_others_whole_and_in_order():
    shape = (100, 200)
    strokes = np.zeros((3, *shape), bool)
    for k in range(3):
        strokes[k, 10 * k : 10 * k + 5, 20:40] = True
    rles = [encode_brush(stroke) for stroke in strokes]
    rles[1] = rles[1][:20]
    items = [region("brush", "brush", {"format": "rle", "rle": rle}, label="Debris") for rle in rles]
    items[1:1] = [polygon(), {**items[0], "value": None}]
    parsed = from_results([*items, {**items[0], "value": {"brushlabels": ["Debris"]}}], DEFAULT, shape)
    assert parsed.instances.labels.tolist() == [1, 0, 1]
    assert parsed.instances.boxes_xyxy[::2].tolist() == [[20, 0, 40, 5], [20, 20, 40, 25]]
    told = [text.partition(": ")[2] for text in parsed.unreadable]
    assert told == [
        "its value is a NoneType; expected an object",
        "brush run lengths end after 20 bytes in the middle of the mask",
        "brush run lengths end after 0 bytes, before the mask begins",
    ]


def test_prompts_left_over_are_no_cells():
    results = [
        polygon(),
        region("keypoint", "point", {"x": 70.0, "y": 20.0, "width": 0.2}, is_positive=True),
        region("keypoint", "gone", {"x": 70.0, "y": 20.0, "width": 0.2}),
        region("rectangle", "box", {"x": 60, "y": 70, "width": 10, "height": 10, "rotation": 0}),
    ]
    parsed = from_results(results, DEFAULT, (100, 200))
    assert len(parsed.instances) == 1
    assert (parsed.prompts_left, parsed.unreadable) == (3, ())


def test_other_answers_are_passed_over():
    results = [
        {"id": "c", "from_name": "usable", "to_name": "image", "type": "choices", "value": {"choices": ["unusable"]}},
        {"from_id": "a", "to_id": "b", "type": "relation", "direction": "right"},
        {"id": "t", "from_name": "note", "to_name": "image", "type": "textarea", "value": {"text": ["blurred"]}},
    ]
    parsed = from_results(results, DEFAULT, (100, 200))
    assert (len(parsed.instances), parsed.prompts_left, parsed.unreadable) == (0, 0, ())
    assert is_unusable(results)
    assert not is_unusable(results[1:])
    assert not is_unusable([])


def test_labels_that_the_config_lacks_are_named_and_left_out():
    results = [polygon(label="Dust"), polygon(label="Debris"), polygon(label="Dust"), polygon(label="Fibre")]
    parsed = from_results(results, DEFAULT, (100, 200))
    assert parsed.unknown_labels == ("Dust", "Fibre")
    assert parsed.instances.labels.tolist() == [1]


def test_a_region_without_a_label_belongs_to_the_only_class():
    assert from_results([polygon(label="")], ONE_CLASS, (100, 200)).instances.labels.tolist() == [0]
    (text,) = from_results([polygon(label="")], DEFAULT, (100, 200)).unreadable
    assert "has no label; expected one of Cell, Debris" in text


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (region("vector", "v", {"vertices": [{"x": 1, "y": 2}]}), "holds no cell; expected one of polygon, brush"),
        (region("polygon", "old", {"points": [[0, 0], [9, 0], [9, 9]]}), "no control 'old'"),
        (region("polygon", "p", {"points": [[0, 0], [9, 0]]}), "at least 3 points"),
        (region("polygon", "p", {"points": [[0, 0], [9, 0], ["x", 9]]}), "pairs of numbers"),
        (region("polygon", "p", {"points": [[0, 0], [0.1, 0], [0, 0.1]]}), "covers no pixel"),
        (region("rectangle", "r", {"x": 1, "y": 1, "width": None, "height": 3}), "its width is None"),
        (region("ellipse", "e", {"x": 1, "y": 1, "radiusX": 0, "radiusY": 3}), "covers no pixel"),
        (region("bitmask", "m", {"imageDataURL": "x"}), "expected data:image/png"),
        (region("polygon", "p", {"points": [[0, 0], [9, 0], [9, 10**400]]}), "pairs of numbers"),
        (region("rectangle", "r", {"x": 10**400, "y": 1, "width": 2, "height": 3}), "its x is 1000"),
        ({**region("rectangle", "r", {}), "value": {"rectanglelabels": 7}}, "its labels are '7'"),
        ({**region("polygon", "p", {}), "value": None}, "its value is a NoneType"),
        ("junk", "a str in place of a region"),
    ],
)
def test_what_cannot_be_read_is_told_and_the_rest_is_kept(item, says):
    good = region("rectangle", "r", {"x": 20, "y": 10, "width": 5, "height": 10})
    parsed = from_results([item, good], PERSONS, (100, 200))
    assert len(parsed.instances) == 1
    assert len(parsed.unreadable) == 1
    assert says in parsed.unreadable[0]


@pytest.mark.parametrize("odd", [["a"], {"a": 1}, None, 5])
def test_an_id_of_any_kind_is_read(odd):
    drawn = region("rectangle", "r", {"x": 20, "y": 10, "width": 5, "height": 10})
    from_a_model = {**drawn, "id": odd, "origin": "prediction"}
    parsed = from_results([from_a_model], PERSONS, (100, 200), offered=[{**drawn, "id": odd}])
    assert [origin.source for origin in parsed.instances.origins] == ["human-accepted"]


@pytest.mark.parametrize("value", [None, 5, {}, {"choices": None}, {"choices": 5}, {"choices": "unusable"}])
def test_a_damaged_choice_says_nothing(value):
    assert not is_unusable([{"id": "c", "type": "choices", "value": value}])


def test_a_models_cells_keep_their_scores_and_a_persons_do_not():
    results = to_results(grid_of_cells(2), DEFAULT)
    results[0]["score"], results[1]["score"] = 0.25, None
    shape = (24, 24)
    assert from_results(results, DEFAULT, shape, source="model").instances.scores.tolist() == [0.25, 1.0]
    assert from_results(results, DEFAULT, shape).instances.scores.tolist() == [1.0, 1.0]
    assert from_results(results, DEFAULT, shape).instances.source == "human"


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ({"original_width": 100, "original_height": 200}, "of 100 x 200 px; image 'a' has 200 x 100 px"),
        ({"original_width": None, "original_height": None}, "of None x None px; image 'a' has 200 x 100 px"),
        ({"image_rotation": 90}, "turned by 90 degrees"),
    ],
)
def test_an_annotation_of_another_frame_is_refused(size, says):
    with pytest.raises(LabelError, match=says):
        from_results([polygon(), {**polygon(), **size}], DEFAULT, (100, 200), image_id="a")


def captured(kind, control, values, **more):
    """The fields that the browser sends, as recorded from Label Studio 1.23.2."""
    return {**region(kind, control, values, shape=(512, 512), origin="manual"), **more}


def test_points_of_the_smart_tool():
    context = {
        "result": [
            captured(
                "keypoint", "point", {"x": 70.03, "y": 19.98, "width": 0.23, "labels": ["Cell"]}, is_positive=True
            ),
            captured(
                "keypoint", "point", {"x": 80.02, "y": 80.02, "width": 0.23, "labels": ["Cell"]}, is_positive=False
            ),
            captured("keypoint", "point", {"x": 101.0, "y": -1.0, "width": 0.23}),
        ]
    }
    prompts = prompts_from_context(context, (512, 512))
    np.testing.assert_allclose(prompts.points_xy, [[358.554, 102.298], [409.702, 409.702], [512, 0]], atol=1e-3)
    assert prompts.positive.tolist() == [True, False, True]
    assert prompts.boxes_xyxy.shape == (0, 4)
    assert prompts.label == "Cell"


def test_boxes_of_the_smart_tool():
    upright = captured(
        "rectangle", "box", {"x": 50, "y": 25, "width": 12.5, "height": 50, "rotation": 0}, label="Debris"
    )
    turned = captured("rectangle", "box", {"x": 50, "y": 50, "width": 25, "height": 12.5, "rotation": 90})
    upright["value"]["rectanglelabels"] = ["Debris"]
    prompts = prompts_from_context({"result": [upright, turned]}, (512, 512))
    np.testing.assert_allclose(prompts.boxes_xyxy, [[256, 128, 320, 384], [192, 256, 256, 384]], atol=1e-3)
    assert prompts.label == "Debris"
    assert prompts.points_xy.shape == (0, 2)


@pytest.mark.parametrize("context", [None, {}, {"result": []}, {"result": None}])
def test_no_prompts(context):
    prompts = prompts_from_context(context, (5, 6))
    assert (prompts.points_xy.shape, prompts.positive.shape, prompts.boxes_xyxy.shape) == ((0, 2), (0,), (0, 4))
    assert prompts.label == ""


def test_prompts_that_cannot_be_understood_are_refused():
    cases = [
        (5, "expected a list of objects"),
        (captured("keypoint", "point", {"x": 10**400, "y": 3}), "its x is 1000"),
        (captured("brush", "brush", {"rle": []}), "is no prompt; expected keypoints or rectangles"),
        (captured("keypoint", "point", {"x": None, "y": 3}), "its x is None"),
        (
            captured("keypoint", "point", {"x": 1, "y": 3}, original_width=100),
            "of 100 x 512 px; image '' has 512 x 512",
        ),
    ]
    for item, says in cases:
        with pytest.raises(LabelError, match=says):
            prompts_from_context({"result": [item]}, (512, 512))
    with pytest.raises(LabelError, match="expected a list of objects"):
        prompts_from_context({"result": 5}, (512, 512))
