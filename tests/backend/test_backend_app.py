"""The routes over a real socket, and that nothing keeps /health and /setup from answering."""

import threading
import time

import numpy as np
from prometheus_client.parser import text_string_to_metric_families


def test_without_a_model(backend):
    with backend() as b:
        assert b.get("/health").json() == {"status": "UP"}
        assert b.setup().json() == {"model_version": "celloop-cells-r0"}
        assert b.get("/versions").json() == {"versions": ["celloop-cells-r0"]}
        reply = b.predict("two.png")
        assert reply.status_code == 503
        assert reply.json()["error"] == "NoModelError"
        assert "results" not in reply.json()
        assert b.click("two.png", b.keypoints[0]).status_code == 503


def test_setup_takes_extra_params_in_any_form(backend):
    with backend("bright") as b:
        for extra in (None, {}, {"a": 1}, '{"a": 1}', ""):
            assert b.setup(extra_params=extra).json() == {"model_version": "celloop-cells-v1"}
        assert b.setup(extra_params="no json").status_code == 400


def test_setup_names_what_is_published_where_the_held_model_made_it(backend, eventually):
    with backend("bright") as b:
        b.index.set_published("cells", "celloop-cells-v1-r1", "celloop-cells-v1")
        assert b.setup().json() == {"model_version": "celloop-cells-v1-r1"}
        assert b.predict("two.png").json()["results"][0]["model_version"] == "celloop-cells-v1-r1"
        b.registry.promote("dark")
        eventually(lambda: b.setup().json() == {"model_version": "celloop-cells-v2"})
        assert b.get("/versions", params={"project": "3.1700000000"}).json() == {"versions": ["celloop-cells-v2"]}


def test_a_project_of_somebody_else(backend):
    with backend("bright") as b:
        for reply in (b.setup(project="99.1700000000"), b.predict("two.png", project="99.1")):
            assert reply.status_code == 404
            assert reply.json()["error"] == "UnknownProjectError"
        assert b.get("/versions", params={"project": "99"}).status_code == 404
        assert b.get("/versions", params={"project": "x"}).status_code == 400


def test_what_nobody_expected_is_a_plain_500(backend, caplog):
    with backend("bright") as b:
        b.parts.service._images = None
        reply = b.predict("two.png")
        assert reply.status_code == 500
        assert reply.json() == {"error": "InternalError", "detail": "the backend failed; its log says why"}
        assert b.metric("celloop_failures_total", kind="AttributeError") == 1
    assert "Traceback" in caplog.text


def test_a_net_that_gives_nan_is_never_taken_into_service(backend, eventually):
    with backend() as b:
        b.registry.promote("nan")
        eventually(lambda: b.metric("celloop_failures_total", kind="CheckpointError") == 1)
        assert b.predict("two.png").status_code == 503


def test_health_and_setup_answer_while_a_model_works_and_another_loads(backend):
    with backend("slow") as b:
        tasks = [b.task("two.png", i) for i in range(15)]
        thread = threading.Thread(target=lambda: b.predict_tasks(tasks))
        thread.start()
        b.registry.promote("bright", download_s=1.0)
        times = []
        while thread.is_alive():
            begin = time.perf_counter()
            assert b.get("/health").status_code == 200
            assert b.setup().json()["model_version"] in ("celloop-cells-v1", "celloop-cells-v2")
            times.append(time.perf_counter() - begin)
            time.sleep(0.01)
        assert len(times) > 10
        assert np.median(times) < 0.1
        assert max(times) < 1.0


def test_setup_answers_although_the_index_hangs(backend):
    with backend("bright", lookup_s=0.2) as b:
        b.setup()
        release = threading.Event()
        b.parts.projects._index = type("Hanging", (), {"projects": lambda self: release.wait(20) and []})()
        begin = time.perf_counter()
        assert b.setup().json() == {"model_version": "celloop-cells-v1"}
        assert time.perf_counter() - begin < 1
        assert b.get("/health").elapsed.total_seconds() < 0.5
        assert b.setup(project="4.1").status_code == 503
        release.set()


def test_metrics_are_prometheus_text(backend):
    with backend("bright") as b:
        b.predict("two.png")
        b.get("/somewhere/else")
        families = {family.name: family for family in text_string_to_metric_families(b.get("/metrics").text)}
        requests = {(s.labels["route"], s.labels["status"]): s.value for s in families["celloop_requests"].samples}
        assert requests["/predict", "200"] == 1
        assert requests["other", "404"] == 1
        (model,) = families["celloop_model_info"].samples
        assert model.labels == {"project": "cells", "model": "celloop-cells-v1"}
        assert "celloop_request_seconds" in families
