"""Doubtful cells, done areas and where a person's cells come from."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_studio_sdk.label_interface import LabelInterface
from scipy import ndimage

from loop import masks
from loop.errors import ShapeError
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import from_results, to_results
from loop.labelstudio.rle import encode_brush
from loop.types import Origin

SPECIAL = {"doubtful": "Cell?", "done": "Done area"}
XML = label_config(("Cell", "Debris"), **SPECIAL)
INTERFACE = Interface.parse(XML, **SPECIAL)
OLD = Interface.parse(label_config(("Cell", "Debris")), **SPECIAL)
SHAPE = (40, 60)
HUMAN = Origin("human")


def cells(*scores, labels=None):
    """Squares of 8 px in a row; the last one has a hole, which no polygon holds."""
    stack = np.zeros((len(scores), *SHAPE), bool)
    for i, mask in enumerate(stack):
        mask[4:12, 10 * i + 1 : 10 * i + 9] = True
    if len(stack):
        stack[-1, 6:10, 10 * (len(stack) - 1) + 3 : 10 * (len(stack) - 1) + 7] = False
    fields = {"scores": scores, "labels": labels, "image_id": "a", "source": "pseudo", "model_version": "v3"}
    return masks.from_masks(list(stack), SHAPE, **fields)


def names(results):
    return [item["value"][item["type"]][0] for item in results]


def region(kind, control, value, label, **more):
    size = {"original_width": SHAPE[1], "original_height": SHAPE[0]}
    named = {f"{kind}labels": [label]} if label else {}
    return {"id": "r", "from_name": control, "type": f"{kind}labels", **size, "value": {**value, **named}, **more}


def rectangle(x0, y0, x1, y1, label="Done area", control="done"):
    """A box given in px."""
    value = {"x": x0 / 0.6, "y": y0 / 0.4, "width": (x1 - x0) / 0.6, "height": (y1 - y0) / 0.4}
    return region("rectangle", control, value, label)


def test_cells_of_low_confidence_get_the_doubtful_label():
    given_scores = (0.2, 0.7, 0.69, 0.1, 0.3)
    results = to_results(cells(*given_scores, labels=[0, 0, 0, 1, 0]), INTERFACE, doubtful_below=0.7)
    assert names(results) == ["Cell?", "Cell", "Cell?", "Debris", "Cell?"]
    assert [item["type"] for item in results] == ["polygonlabels"] * 4 + ["brushlabels"]
    assert [item["score"] for item in results] == list(given_scores)
    assert LabelInterface(XML).validate_prediction({"result": results, "score": 0.1}, return_errors=True) == []
    assert names(to_results(cells(0.0, 0.4), INTERFACE)) == ["Cell", "Cell"]


def test_a_project_from_before_there_was_such_a_label_gets_the_first_one():
    results = to_results(cells(0.2, 0.9), OLD, doubtful_below=0.7)
    assert names(results) == ["Cell", "Cell"]
    assert results == to_results(cells(0.2, 0.9), OLD)
    only_polygons = Interface.parse(
        '<View><Image name="i" value="$i"/><PolygonLabels name="p" toName="i"><Label value="Cell"/>'
        '<Label value="Cell?"/></PolygonLabels><BrushLabels name="b" toName="i"><Label value="Cell"/></BrushLabels>'
        "</View>",
        doubtful="Cell?",
    )
    results = to_results(cells(0.2, 0.2), only_polygons, doubtful_below=0.7)
    assert [(item["from_name"], name) for item, name in zip(results, names(results), strict=True)] == [
        ("p", "Cell?"),
        ("b", "Cell"),
    ]


@given(st.lists(st.floats(0, 1, width=32), max_size=6), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_doubtful_cells_come_back_as_cells_like_others(scores, below):
    made = cells(*scores)
    results = json.loads(json.dumps(to_results(made, INTERFACE, doubtful_below=below)))
    parsed = from_results(results, INTERFACE, SHAPE, source="model")
    assert (parsed.unknown_labels, parsed.unreadable, parsed.done) == ((), (), None)
    assert parsed.instances.labels.tolist() == [0] * len(scores)
    assert parsed.instances.origins == ()
    np.testing.assert_array_equal(masks.to_dense(parsed.instances), masks.to_dense(made))
    # Also a project whose config in Label Studio is newer than the one that is kept knows the label.
    assert len(from_results(results, OLD, SHAPE).instances) == len(scores)


def test_done_areas_of_every_kind_are_no_cells():
    brush = np.zeros(SHAPE, bool)
    brush[30:36, 2:9] = True
    points = [[0, 0], [50, 0], [50, 25], [0, 25]]
    results = [
        rectangle(40, 20, 60, 40),
        region("polygon", "cell", {"points": points}, "Done area"),
        *to_results(cells(1.0), INTERFACE),
        region("brush", "brush", {"format": "rle", "rle": encode_brush(brush)}, "Done area"),
        rectangle(50, 0, 55, 5, label=None),
    ]
    parsed = from_results(results, INTERFACE, SHAPE)
    expected = np.zeros(SHAPE, bool)
    expected[20:, 40:] = expected[:10, :30] = expected[30:36, 2:9] = expected[:5, 50:55] = True
    np.testing.assert_array_equal(parsed.done, expected)
    assert (len(parsed.instances), parsed.unknown_labels, parsed.unreadable) == (1, (), ())
    assert not parsed.whole
    drawn = ndimage.binary_dilation(masks.to_dense(parsed.instances)[0], np.ones((3, 3), bool), iterations=2)
    np.testing.assert_array_equal(parsed.known(), expected | drawn)


def test_without_done_areas_or_with_one_over_everything_the_whole_image_is_known():
    for results in ([], [rectangle(0, 0, 60, 40)], [rectangle(0, 0, 30, 40), rectangle(30, 0, 60, 40)]):
        parsed = from_results(results, INTERFACE, SHAPE)
        assert parsed.whole
        assert parsed.known() is None


def test_a_done_area_that_cannot_be_read_leaves_only_the_cells_known():
    parsed = from_results([rectangle(70, 50, 80, 60), *to_results(cells(1.0), INTERFACE)], INTERFACE, SHAPE)
    assert "covers no pixel" in parsed.unreadable[0]
    assert not parsed.whole
    assert not parsed.done.any()
    assert np.argwhere(parsed.known())[[0, -1]].tolist() == [[2, 0], [13, 10]]


def test_a_label_of_that_name_is_an_ordinary_class_where_it_is_switched_off():
    interface = Interface.parse(XML)
    assert interface.labels == ("Cell", "Cell?", "Debris", "Done area")
    parsed = from_results([rectangle(40, 20, 60, 40)], interface, SHAPE)
    assert parsed.instances.labels.tolist() == [3]
    assert parsed.done is None


def moved(item):
    points = [[x + 1, y] for x, y in item["value"]["points"]]
    return {**item, "value": {**item["value"], "points": points}}


def relabelled(item, label):
    return {**item, "value": {**item["value"], item["type"]: [label]}}


def test_each_cell_knows_whether_it_was_drawn_accepted_or_edited():
    offered = to_results(
        replace(cells(0.2, 0.9, 0.9, 0.9, 0.9), labels=np.zeros(5, np.int32)), INTERFACE, doubtful_below=0.5
    )
    drawn = {**moved(offered[1]), "id": "mine", "origin": "manual"}
    clicked = {**moved(offered[1]), "id": "click"}
    finer = {**offered[3], "value": {**offered[3]["value"], "closed": True, "points": offered[3]["value"]["points"][:]}}
    finer["value"]["points"].append(finer["value"]["points"][0])
    results = [
        relabelled(offered[0], "Cell"),
        moved(offered[1]),
        relabelled(offered[2], "Debris"),
        finer,
        offered[4],
        drawn,
        clicked,
        {**offered[3], "origin": "prediction-changed"},
        {key: value for key, value in offered[3].items() if key != "origin"},
    ]
    parsed = from_results(results, INTERFACE, SHAPE, started_from="v3-r2", offered=offered)
    accepted, edited = Origin("human-accepted", "v3-r2"), Origin("human-edited", "v3-r2")
    assert parsed.instances.origins == (accepted, edited, edited, accepted, accepted, HUMAN, accepted, edited, HUMAN)
    assert parsed.instances.source == "human"
    assert parsed.instances.scores.tolist() == [1.0] * 9
    unchecked = from_results(results, INTERFACE, SHAPE, started_from="v3-r2").instances
    assert unchecked.origins[1] == accepted


def test_what_was_offered_may_be_damaged():
    (item,) = to_results(replace(cells(0.9, 0.9), labels=np.zeros(2, np.int32)).take([0]), INTERFACE)
    for before in ("junk", {**item, "value": None}, {**item, "from_name": "gone", "value": {}}):
        parsed = from_results([item], INTERFACE, SHAPE, offered=[before])
        expected = "human-accepted" if isinstance(before, str) else "human-edited"
        assert parsed.instances.origins == (Origin(expected),)


def test_cells_that_a_person_drew_need_no_origins():
    human = replace(cells(1.0, 1.0), source="human")
    parsed = from_results(to_results(human, INTERFACE), INTERFACE, SHAPE, started_from="v3-r2")
    assert parsed.instances.origins == ()
    assert parsed.instances.origin(1) == HUMAN
    model = from_results(to_results(cells(0.5), INTERFACE), INTERFACE, SHAPE, source="model", started_from="v3-r2")
    assert model.instances.origins == ()
    assert from_results([], INTERFACE, SHAPE).instances.origins == ()


def test_origins_are_kept_with_their_masks_where_empty_ones_are_dropped():
    one = np.ones((2, 2), bool)
    origins = [Origin("pseudo", "sam:1"), HUMAN, Origin("model", "v1")]
    kept = masks.from_masks([one, ~one, one], (2, 2), origins=origins)
    assert kept.origins == (origins[0], origins[2])
    with pytest.raises(ShapeError, match="3 masks but 1 origins"):
        masks.from_masks([one, ~one, one], (2, 2), origins=origins[:1])
