"""Clicks: prompts as Label Studio sends them, one cell back."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from backend import images as module


@pytest.mark.parametrize("n_prompts", [1, 2])
def test_a_click_on_a_cell_gives_this_cell_as_one_polygon(backend, n_prompts):
    with backend("bright") as b:
        reply = b.click("two.png", *b.keypoints[:n_prompts])
        (prediction,) = reply.json()["results"]
        (region,) = prediction["result"]
        assert region["type"] == "polygonlabels"
        assert region["from_name"] == "poly"
        assert region["to_name"] == "image"
        assert region["value"]["polygonlabels"] == ["Cell"]
        assert prediction["model_version"] == "celloop-cells-v1"
        assert 0.5 < prediction["score"] <= 1
        xs, ys = np.array(region["value"]["points"]).T * 512 / 100
        assert abs(xs.mean() - 358) < 4
        assert abs(ys.mean() - 102) < 4
        assert np.ptp(xs) == pytest.approx(41, abs=4)


def test_a_box_gives_the_cell_in_it_under_a_label_that_masks_can_have(backend):
    with backend("bright") as b:
        (region,) = b.click("two.png", b.rectangle).json()["results"][0]["result"]
        xs, ys = np.array(region["value"]["points"]).T * 512 / 100
        assert abs(xs.mean() - 345) < 4
        assert abs(ys.mean() - 384) < 4
        assert region["value"]["polygonlabels"] == ["Cell"]


def test_the_label_that_the_person_chose_is_kept(backend):
    with backend("bright") as b:
        dead = {"labels": ["Dead"], "keypointlabels": ["Dead"]}
        prompt = b.keypoints[0] | {"value": b.keypoints[0]["value"] | dead}
        (region,) = b.click("two.png", prompt).json()["results"][0]["result"]
        assert region["value"]["polygonlabels"] == ["Dead"]


def test_a_config_without_polygons_gets_a_brush_region(backend):
    config = """<View><Image name="image" value="$image"/>
        <BrushLabels name="brush" toName="image"><Label value="Cell"/></BrushLabels>
        <KeyPointLabels name="kp" toName="image" smart="true"><Label value="Cell"/></KeyPointLabels></View>"""
    with backend("bright") as b:
        (region,) = b.click("two.png", b.keypoints[0], label_config=config).json()["results"][0]["result"]
        assert region["type"] == "brushlabels"
        assert region["value"]["brushlabels"] == ["Cell"]


def test_a_click_on_background_gives_nothing(backend):
    with backend("bright") as b:
        prompt = b.keypoints[0] | {"value": b.keypoints[0]["value"] | {"x": 5.0, "y": 95.0}}
        expected = {"result": [], "score": 0.0, "model_version": "celloop-cells-v1"}
        assert b.click("two.png", prompt).json() == {"results": [expected]}
        assert b.metric("celloop_clicks_total", project="cells", outcome="background") == 1
        empty = b.click("two.png").json()
        assert empty == {"results": [expected]}


def test_later_clicks_use_the_maps_of_the_first_and_have_other_region_ids(backend):
    with backend("bright") as b:
        ids = [b.click("two.png", b.keypoints[0]).json()["results"][0]["result"][0]["id"] for _ in range(4)]
        assert len(set(ids)) == 4
        assert b.metric("celloop_click_maps_total", result="miss") == 1
        assert b.metric("celloop_click_maps_total", result="hit") == 3
        assert b.metric("celloop_click_map_bytes") == 2 * 512 * 512 * 4


def test_a_changed_image_is_computed_anew(backend):
    with backend("bright") as b:
        b.click("two.png", b.keypoints[0])
        (b.display / "two.png").write_bytes((b.display / "empty.png").read_bytes())
        assert b.click("two.png", b.keypoints[0]).json()["results"][0]["result"] == []
        assert b.metric("celloop_click_maps_total", result="miss") == 2


def test_prompts_that_make_no_sense_are_refused(backend):
    with backend("bright") as b:
        contexts = [
            {"result": [b.keypoints[0] | {"original_width": 100}]},
            {"result": [b.keypoints[0] | {"value": {"x": "left"}}]},
            {"result": [5]},
            {"result": "x"},
            {"result": [{"type": "brushlabels", "value": {}}]},
            [],
        ]
        for context in contexts:
            reply = b.post("/predict", b.body([b.task("two.png", 1)], params={"context": context}))
            assert reply.status_code == 400, context
            assert set(reply.json()) == {"error", "detail"}


def test_a_click_on_two_tasks_and_a_config_without_masks(backend):
    with backend("bright") as b:
        body = b.body([b.task("two.png", 1), b.task("two.png", 2)], params={"context": {"result": []}})
        assert b.post("/predict", body).json()["error"] == "BadRequestError"
        reply = b.predict("two.png", label_config='<View><Image name="image" value="$image"/></View>')
        assert reply.status_code == 400
        assert reply.json()["error"] == "LabelError"
        assert b.predict("two.png", label_config="").status_code == 200


def test_a_click_does_not_wait_behind_a_batch(backend):
    with backend("slow") as b:
        tasks = [b.task("two.png", i) for i in range(10)]
        batches = [threading.Thread(target=lambda: b.predict_tasks(tasks)) for _ in range(3)]
        for thread in batches:
            thread.start()
        time.sleep(0.3)
        for ask in (lambda: b.click("two.png", b.keypoints[0]), lambda: b.predict("two.png")):
            before = len(b.slow_calls)
            assert ask().status_code == 200
            assert len(b.slow_calls) - before <= 4
        b.parts.service.stop()
        for thread in batches:
            thread.join()


def _drawn(label, points):
    """A polygon as Label Studio keeps it; points in px of 512."""
    value = {"points": [[100 * x / 512, 100 * y / 512] for x, y in points], "closed": True, "polygonlabels": [label]}
    return {
        **{"id": "abc", "type": "polygonlabels", "from_name": "poly", "to_name": "image", "origin": "manual"},
        **{"original_width": 512, "original_height": 512, "image_rotation": 0, "value": value},
    }


@pytest.mark.parametrize("apart", [True, False])
def test_pixels_of_other_cells_on_screen_are_left_out(backend, tmp_path, apart):
    (tmp_path / "cells.yaml").write_text(f"click: {{apart: {str(apart).lower()}}}")
    right_third = _drawn("Cell", [(366, 20), (500, 20), (500, 300), (366, 300)])
    with backend("bright", configs_dir=tmp_path) as b:
        task = b.task("two.png", 1) | {
            "annotations": [],
            "predictions": [{"result": [right_third], "model_version": ""}],
        }
        body = b.body([task], params={"context": {"result": [b.keypoints[0]]}})
        (region,) = b.post("/predict", body).json()["results"][0]["result"]
        xs = np.array(region["value"]["points"])[:, 0] * 512 / 100
        assert xs.min() == pytest.approx(338, abs=2)
        assert xs.max() == pytest.approx(366 if apart else 378, abs=2)
        task["drafts"] = [{"result": [], "id": 7}]  # the person has deleted everything
        (region,) = b.post("/predict", body).json()["results"][0]["result"]
        assert np.array(region["value"]["points"])[:, 0].max() * 512 / 100 == pytest.approx(378, abs=2)


def test_what_comes_with_a_task_may_be_of_any_kind(backend):
    with backend("bright") as b:
        for odd in (None, 5, "x", {}, [None, 3, "x", {"result": 7}, {"result": [1, {}]}]):
            task = b.task("two.png", 1) | {"annotations": odd, "drafts": odd, "predictions": odd}
            reply = b.post("/predict", b.body([task], params={"context": {"result": [b.keypoints[0]]}}))
            assert len(reply.json()["results"][0]["result"]) == 1
            assert b.post("/predict", b.body([task])).status_code == 200


def test_a_label_that_masks_cannot_have_becomes_the_first(backend):
    config = """<View><Image name="image" value="$image"/>
        <PolygonLabels name="poly" toName="image"><Label value="Cell"/><Label value="Done area"/></PolygonLabels>
        <KeyPointLabels name="kp" toName="image" smart="true"><Label value="Done area"/></KeyPointLabels></View>"""
    with backend("bright") as b:
        chosen = {"labels": ["Done area"], "keypointlabels": ["Done area"]}
        prompt = b.keypoints[0] | {"value": b.keypoints[0]["value"] | chosen}
        (region,) = b.click("two.png", prompt, label_config=config).json()["results"][0]["result"]
        assert region["value"]["polygonlabels"] == ["Cell"]


def test_clicks_have_threads_of_their_own(backend):
    release, begun = threading.Event(), threading.Semaphore(0)
    with backend("bright", start_s=0.3) as b:
        b.click("two.png", b.keypoints[0])
        b.parts.service.predict = lambda *args, **kwargs: [begun.release(), release.wait(20), b"{}"][2]
        with ThreadPoolExecutor(12) as people:
            opened = [people.submit(b.predict, "two.png") for _ in range(12)]
            assert begun.acquire(timeout=10)
            time.sleep(0.5)
            assert b.click("two.png", b.keypoints[0]).status_code == 200
            release.set()
            assert {reply.result().status_code for reply in opened} <= {200, 503}


def test_an_image_that_is_replaced_while_it_is_read_gives_nothing_under_the_wrong_hash(backend, monkeypatch):
    with backend("bright") as b:
        real, cells = module.read_image, (b.display / "two.png").read_bytes()
        empty = (b.display / "empty.png").read_bytes()

        def replaced(path):
            path.write_bytes(empty)
            return real(path)

        with monkeypatch.context() as patched:
            patched.setattr(module, "read_image", replaced)
            refused = b.click("two.png", b.keypoints[0])
        assert refused.status_code == 422
        assert "replaced just now" in refused.json()["detail"]
        (b.display / "two.png").write_bytes(cells)
        assert len(b.click("two.png", b.keypoints[0]).json()["results"][0]["result"]) == 1


def test_settings_in_another_encoding_stop_no_click(backend, tmp_path, caplog):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "cells.yaml").write_bytes("# für Mäuse\nclick: {ahead: 0}\n".encode("latin-1"))
    with backend("bright", configs_dir=tmp_path / "configs") as b:
        assert b.click("two.png", b.keypoints[0]).status_code == 200
    assert caplog.text.count("settings of cells stay as they were") == 1
