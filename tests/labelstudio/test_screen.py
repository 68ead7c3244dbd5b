import logging

import numpy as np
import pytest

from loop.labelstudio import results
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.regions import read_cell
from loop.labelstudio.results import to_results
from loop.labelstudio.screen import others_on_screen
from loop.masks import from_masks, to_dense

SHAPE = (40, 60)
NAMES = {"doubtful": "Cell?", "done": "Done area"}
INTERFACE = Interface.parse(label_config(("Cell", "Dead"), **NAMES), **NAMES)


def square(y, x, side=8):
    mask = np.zeros(SHAPE, bool)
    mask[y : y + side, x : x + side] = True
    return mask


A, B, C = square(2, 2), square(20, 30), square(2, 50)


def regions(*masks, **fields):
    return to_results(from_masks(masks, SHAPE, source="model", **fields), INTERFACE, tolerance_px=0)


def body(result, number=1, updated="2026-11-20T08:50:24.606434Z", **more):
    return {"id": number, "result": result, "created_at": "2026-11-20T08:00:00Z", "updated_at": updated, **more}


def shown(task, **given):
    return list(to_dense(others_on_screen(task, INTERFACE, SHAPE, **given)))


def same(found, *masks):
    np.testing.assert_array_equal(np.reshape(found, (-1, *SHAPE)), np.reshape(masks, (-1, *SHAPE)))


PREDICTIONS = [
    body(regions(A), 1, model_version="m-v1"),
    body(regions(B), 2, "2026-11-20T09:00:00Z", model_version="m-v2"),
]


def test_the_newest_draft_comes_first():
    drafts = [body(regions(A), 7), body(regions(B), 8, "2026-11-20T08:50:25Z"), body(regions(C), 9)]
    annotations = [body(regions(A, C), 3, "2026-11-21T00:00:00Z")]
    same(shown({"drafts": drafts, "annotations": annotations, "predictions": PREDICTIONS}), B)


def test_without_drafts_the_newest_annotation_that_is_no_skip():
    annotations = [
        body(regions(A), 3, was_cancelled=False),
        body(regions(C), 4, "2026-11-22T00:00:00Z", was_cancelled=True),
        body(regions(A, B), 5, "2026-11-20T08:50:24.7Z"),
    ]
    same(shown({"drafts": [], "annotations": annotations, "predictions": PREDICTIONS}), A, B)


@pytest.mark.parametrize(("version", "expected"), [("m-v1", A), ("m-v2", B), ("gone", B), ("", B)])
def test_without_both_the_prediction_of_the_published_version_else_the_newest(version, expected):
    same(shown({"drafts": [], "annotations": [], "predictions": PREDICTIONS}, version=version), expected)


def test_a_draft_without_regions_says_that_all_was_deleted():
    assert shown({"drafts": [body([])], "predictions": PREDICTIONS}) == []


def test_a_whole_second_comes_before_its_fractions():
    drafts = [body(regions(A), 2, "2026-11-20T08:50:24Z"), body(regions(B), 1, "2026-11-20T08:50:24.000001Z")]
    same(shown({"drafts": drafts}), B)


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"drafts": None, "annotations": None, "predictions": None},
        {"drafts": "x", "annotations": [3], "predictions": [{"id": 1}, {"result": "x"}]},
    ],
)
def test_a_task_without_anything_readable_has_no_cells(task):
    assert shown(task) == []


def test_prompts_areas_and_choices_are_no_cells():
    frame = {"original_width": 60, "original_height": 40, "image_rotation": 0, "to_name": "image"}
    point = {"x": 5, "y": 5, "width": 0.2, "keypointlabels": ["Cell"]}
    box = {"x": 5, "y": 5, "width": 20, "height": 20, "rotation": 0, "rectanglelabels": ["Cell"]}
    odd = [
        frame | {"id": "p", "type": "keypointlabels", "from_name": "point", "is_positive": True, "value": point},
        frame | {"id": "b", "type": "rectanglelabels", "from_name": "box", "value": box},
        frame
        | {
            "id": "d",
            "type": "rectanglelabels",
            "from_name": "done",
            "value": box | {"rectanglelabels": ["Done area"]},
        },
        {"id": "c", "type": "choices", "from_name": "usable", "to_name": "image", "value": {"choices": ["unusable"]}},
    ]
    same(shown({"drafts": [body([*odd, *regions(A)])]}), A)


@pytest.mark.parametrize(
    "change",
    [
        {"original_width": 61},
        {"image_rotation": 90},
        {"value": None},
        {"value": {"points": [[1, 2], [3]], "polygonlabels": ["Cell"]}},
        {"value": {"points": None, "polygonlabels": ["Cell"]}},
        {"value": {"points": [[10**400, 2], [3, 4], [5, 1]], "polygonlabels": ["Cell"]}},
        {"id": ["a"], "from_name": "nothing"},
        {"value": {"points": [[1, 2], [3, 4], [5, 1]], "polygonlabels": 7}},
        {"value": {"points": [[1, 2], [3, 4], [5, 1]], "polygonlabels": ["Nobody's"]}},
        {"type": "brushlabels", "from_name": "brush", "value": {"rle": {"a": 1}, "brushlabels": ["Cell"]}},
        {"type": None},
        {"from_name": ["cell"]},
        {"score": "high"},
    ],
)
@pytest.mark.parametrize("near", [None, (0, 0, 60, 40)])
def test_one_odd_region_costs_only_itself(change, near):
    odd = regions(C)[0] | change
    same(shown({"drafts": [body([*regions(A), odd, 5, None, *regions(B)])]}, near=near), A, B)


def test_what_is_left_out_stands_in_the_log(caplog, monkeypatch):
    def read(region, *rest):
        return read_cell(region, *rest) if region["id"] == "two" else 7 / 0

    monkeypatch.setattr(results, "read_cell", read)
    damaged = {"value": {"points": [[1, 2], [3, 4]], "polygonlabels": ["Cell"]}}
    with caplog.at_level(logging.DEBUG, logger="loop"):
        shown({"drafts": [body([regions(C)[0] | {"id": name} | damaged for name in ("two", "seven")])]})
    levels = {
        name: record.levelname for record in caplog.records for name in ("two", "seven") if name in record.message
    }
    assert levels == {"two": "DEBUG", "seven": "WARNING"}


@pytest.mark.parametrize(
    ("near", "expected"),
    [
        ((0, 0, 60, 40), (A, B, C)),
        ((9, 9, 31, 21), (A, B)),
        ((10, 10, 30, 20), ()),
        ((55, 3, 56, 4), (C,)),
    ],
)
@pytest.mark.parametrize("kind", ["polygon", "brush"])
def test_only_cells_near_a_box_are_wanted(near, expected, kind):
    controls = INTERFACE.controls if kind == "polygon" else [c for c in INTERFACE.controls if c.kind != "polygonlabels"]
    only = Interface(INTERFACE.image_name, INTERFACE.image_value_key, tuple(controls), INTERFACE.labels)
    result = to_results(from_masks([A, B, C], SHAPE, source="model"), only, tolerance_px=0)
    assert {item["type"] for item in result} == {f"{kind}labels"}
    same(shown({"predictions": [body(result)]}, near=near), *expected)


def test_classes_stay():
    found = others_on_screen({"drafts": [body(regions(A, B, labels=[1, 0]))]}, INTERFACE, SHAPE)
    assert found.labels.tolist() == [1, 0]
