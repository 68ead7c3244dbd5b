"""Batches: one entry a task, each as Label Studio can store it."""

import threading
import time

import numpy as np
import orjson

from loop.labelstudio.interface import Interface
from loop.labelstudio.results import from_results


def test_a_batch_has_one_entry_a_task_with_the_cells_where_they_are(backend):
    with backend("bright") as b:
        tasks = [b.task("two.png", 1), b.task("empty.png", 2), b.task("two.png", 3)]
        stored = b.stored(b.predict_tasks(tasks).json(), tasks)
        assert [task_id for task_id, _ in stored] == [1, 2, 3]
        assert [len(one["result"]) for _, one in stored] == [3, 0, 3]
        assert {one["model_version"] for _, one in stored} == {"celloop-cells-v1"}
        cells = from_results(stored[0][1]["result"], Interface.parse(b.config), (512, 512), source="model").instances
        found = np.zeros((512, 512), bool)
        for (x0, y0, x1, y1), mask in zip(cells.boxes_xyxy, cells.masks, strict=True):
            found[y0:y1, x0:x1] |= mask
        truth = b.truth
        assert (found & truth).sum() / (found | truth).sum() > 0.95


def test_an_image_that_cannot_be_read_gets_no_prediction_and_does_not_harm_the_others(backend, caplog):
    with backend("bright") as b:
        tasks = [b.task("two.png", 1), b.task("missing.png", 2), b.task("corrupt.png", 3), b.task("two.png", 4)]
        tasks.append({"id": 5, "data": {"other": "x"}})
        reply = b.predict_tasks(tasks).json()
        assert [task_id for task_id, _ in b.stored(reply, tasks)] == [1, 4]
        assert reply["results"][1] == []
        assert reply["errors"] == [{"task": i, "error": "ImageError"} for i in (2, 3, 5)]
        assert b.metric("celloop_failures_total", kind="ImageError") == 3
        assert b.metric("celloop_predictions_total", project="cells") == 2
    assert "task 2 of Label Studio project 3 is not predicted" in caplog.text


def test_when_no_task_can_be_read_the_caller_is_told(backend):
    with backend("bright") as b:
        reply = b.predict("missing.png")
        assert reply.status_code == 422
        assert reply.json()["error"] == "ImageError"
        assert "missing.png" in reply.json()["detail"]
        assert str(b.display) not in reply.text
        assert b.predict("../index.sqlite").status_code == 422
        assert b.predict("corrupt.png").status_code == 422


def test_uploads_come_from_label_studio_with_the_token(backend, recorder):
    png = {}
    server = recorder(lambda request: (200, {}, png["bytes"]))
    with backend("bright", label_studio_url=server.url, label_studio_token="tok-1") as b:
        png["bytes"] = (b.display / "two.png").read_bytes()
        task = {"id": 9, "data": {"image": "/data/upload/3/0011aabb-two.png"}}
        assert len(b.predict_tasks([task]).json()["results"][0]["result"]) == 3
        assert server.received[0].headers["authorization"] == "Token tok-1"


def test_what_is_not_reached_in_time_gets_no_prediction(backend):
    with backend("bright", predict_s=1e-9) as b:
        reply = b.predict("two.png")
        assert reply.status_code == 503
        assert reply.json()["error"] == "BusyError"


def test_a_slow_batch_gives_what_is_done(backend):
    with backend("slow", predict_s=0.5) as b:
        tasks = [b.task("two.png", i) for i in range(1, 21)]
        begin = time.perf_counter()
        reply = b.predict_tasks(tasks).json()
        assert time.perf_counter() - begin < 3
        stored = [task_id for task_id, _ in b.stored(reply, tasks)]
        assert 1 <= len(stored) < 20
        assert stored == list(range(1, len(stored) + 1))
        assert {entry["error"] for entry in reply["errors"]} == {"BusyError"}


def test_a_batch_ends_early_when_the_backend_stops(backend):
    with backend("slow") as b:
        reply = []
        tasks = [b.task("two.png", i) for i in range(50)]
        thread = threading.Thread(target=lambda: reply.append(b.predict_tasks(tasks).json()))
        thread.start()
        time.sleep(0.3)
        b.parts.service.stop()
        thread.join(2)
        assert not thread.is_alive()
        assert 1 <= len(b.stored(reply[0], tasks)) < 50


def test_replies_are_the_bytes_of_orjson(backend):
    with backend("bright") as b:
        reply = b.predict("two.png")
        assert reply.headers["content-type"] == "application/json"
        assert reply.content == orjson.dumps(orjson.loads(reply.content))


def test_a_task_that_is_opened_again_is_not_predicted_again(backend, eventually):
    with backend("slow") as b:
        first = b.predict("two.png").content
        calls = len(b.slow_calls)
        assert b.predict("two.png").content == first
        assert b.predict_tasks([b.task("two.png", 1)] * 2).json()["results"] == orjson.loads(first)["results"] * 2
        assert len(b.slow_calls) == calls
        b.predict("empty.png")
        assert len(b.slow_calls) > calls


def test_what_a_prediction_depends_on_makes_another_one(backend, eventually, tmp_path):
    (tmp_path / "cells.yaml").write_text("")
    with backend("bright", configs_dir=tmp_path) as b:
        first = b.predict("two.png").json()["results"][0]
        points = [region["value"]["points"] for region in first["result"]]
        (tmp_path / "cells.yaml").write_text("publish: {tolerance_px: 4}")
        coarse = [region["value"]["points"] for region in b.predict("two.png").json()["results"][0]["result"]]
        assert sum(map(len, coarse)) < sum(map(len, points))
        brush = b.config.replace("<PolygonLabels", "<View").replace("</PolygonLabels", "</View")
        brush = brush.replace('<View name="poly" toName="image"><Label value="Cell"/><Label value="Dead"/></View>', "")
        assert {r["type"] for r in b.predict("two.png", label_config=brush).json()["results"][0]["result"]} == {
            "brushlabels"
        }
        b.index.set_published("cells", "celloop-cells-v1-r1", "celloop-cells-v1")
        b.setup()
        assert b.predict("two.png").json()["results"][0]["model_version"] == "celloop-cells-v1-r1"
        (b.display / "two.png").write_bytes((b.display / "empty.png").read_bytes())
        assert b.predict("two.png").json()["results"][0]["result"] == []
        b.registry.promote("dark")
        eventually(lambda: b.parts.slot.get("cells").label == "celloop-cells-v2")
        assert len(b.predict("two.png").json()["results"][0]["result"]) == 1


def test_the_index_is_asked_once_a_second_and_always_in_setup(backend):
    with backend("bright") as b:
        asked = []
        projects = b.index.projects

        class Counting:
            def projects(self):
                asked.append(None)
                return projects()

        b.parts.projects._index = Counting()
        for _ in range(5):
            b.predict("two.png")
        assert len(asked) == 1
        b.setup()
        b.setup()
        assert len(asked) == 3


def test_what_is_not_reached_is_one_line_of_the_log(backend, caplog):
    with backend("bright", predict_s=1e-9) as b:
        assert b.predict_tasks([b.task("two.png", i) for i in range(500)]).status_code == 503
    lines = [record.message for record in caplog.records if record.name == "backend.service"]
    assert lines == ["500 of 500 tasks of Label Studio project 3 were not reached in time"]


def test_what_callers_send_with_a_task_does_not_stay_beside_its_prediction(backend):
    with backend("bright") as b:
        for i in range(3):
            task = b.task("empty.png", i)
            task["data"]["celloop_id"] = f"{i}" + "x" * 100_000
            assert b.predict_tasks([task], label_config=f"{b.config}<!-- {'y' * 100_000} -->").status_code == 200
        kept = b.parts.service._replies
        assert len(kept) == 3
        assert all(len(key) <= 64 for key in kept._maps)
        assert 3 * 400 <= kept.size_bytes < 10_000
