"""The backend under label-studio-ml: its own server, asked as Label Studio asks, over a real socket."""

import logging
import threading

import httpx
import orjson
import pytest

from backend.app import create_app

ml = pytest.importorskip("label_studio_ml.api", reason="label-studio-ml 2.x is not installed (docs/label-studio-ml.md)")
serving = pytest.importorskip("werkzeug.serving")


@pytest.fixture
def under_label_studio_ml(monkeypatch, tmp_path):
    """under_label_studio_ml(backend, **environment) -> a client of label-studio-ml's server over the same data."""
    from backend import label_studio_ml as adapter

    opened = []

    def start(b, basic_auth=None, **environment):
        given = {
            "CELLOOP_INDEX_URL": "unused",
            "CELLOOP_MODELS_DIR": str(tmp_path / "models"),
            "CELLOOP_DISPLAY_ROOT": str(b.display),
            "PREFECT_API_URL": "http://127.0.0.1:9/api",
        }
        for name in ("CELLOOP_BACKEND_USER", "CELLOOP_BACKEND_PASSWORD", "CELLOOP_WEBHOOK_SECRET"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (given | environment).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(
            adapter,
            "create_app",
            lambda settings: create_app(settings, registry=lambda name: b.registry, index=b.index),
        )
        monkeypatch.setattr(adapter.CelloopBackend, "_process", None)
        monkeypatch.setattr(ml, "BASIC_AUTH", basic_auth)
        monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
        server = serving.make_server("127.0.0.1", 0, ml.init_app(adapter.CelloopBackend), threaded=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        client = httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", trust_env=False, timeout=30)
        opened.append((server, thread, client))
        return client

    yield start
    for server, thread, client in opened:
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()
    if adapter.CelloopBackend._process is not None:
        adapter.CelloopBackend._process.stop()


def _setup(client, b, **given):
    body = {
        "project": "3.1700000000",
        "schema": b.config,
        "hostname": "h",
        "access_token": "t",
        "extra_params": {"a": 1},
    }
    return client.post("/setup", json=body, **given)


def _ready(client, b, eventually):
    eventually(lambda: _setup(client, b).json() == {"model_version": "celloop-cells-v1"}, within_s=20)


def _without_ids(reply):
    item = reply["results"][0]
    return item | {"result": [{key: region[key] for key in region if key != "id"} for region in item["result"]]}


def test_it_answers_as_the_backend_itself(backend, under_label_studio_ml, eventually):
    with backend("bright") as b:
        client = under_label_studio_ml(b)
        assert client.get("/health").json()["status"] == "UP"
        _ready(client, b, eventually)
        tasks = [b.task("two.png", 1), b.task("empty.png", 2)]
        reply = client.post("/predict", json=b.body(tasks))
        assert reply.status_code == 200
        assert reply.json() == b.predict_tasks(tasks).json()
        assert [len(found["result"]) for _, found in b.stored(reply.json(), tasks)] == [3, 0]
        click = b.body([tasks[0] | {"drafts": []}], params={"context": {"result": [b.keypoints[0]]}})
        reply = client.post("/predict", json=click)
        assert _without_ids(reply.json()) == _without_ids(b.click("two.png", b.keypoints[0]).json())
        assert (
            client.post("/predict", json=b.body(tasks, params={"context": {}})).json() == b.predict_tasks(tasks).json()
        )


def test_ids_of_regions_are_the_loop_s_own(backend, under_label_studio_ml, eventually):
    with backend("bright") as b:
        client = under_label_studio_ml(b)
        _ready(client, b, eventually)
        regions = client.post("/predict", json=b.body([b.task("two.png", 1)])).json()["results"][0]["result"]
        ids = [region["id"] for region in regions]
        assert len(set(ids)) == 3
        assert all(len(name) >= 10 for name in ids)


def test_one_service_for_all_requests(backend, under_label_studio_ml, eventually, monkeypatch):
    from backend import label_studio_ml as adapter

    with backend("bright") as b:
        client = under_label_studio_ml(b)
        threads = [threading.Thread(target=lambda: _setup(client, b)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        process = adapter.CelloopBackend._process
        _ready(client, b, eventually)
        client.post("/predict", json=b.body([b.task("two.png", 1)]))
        assert adapter.CelloopBackend._process is process
        assert sum(thread.name == "celloop-backend" for thread in threading.enumerate()) == 1


def test_failures_are_answered_as_the_backend_answers_them(backend, under_label_studio_ml, eventually):
    with backend("bright") as b:
        client = under_label_studio_ml(b)
        _ready(client, b, eventually)
        bodies = [
            b.body([b.task("missing.png", 1)]),
            b.body([b.task("../index.sqlite", 1)]),
            b.body([b.task("two.png", 1)], label_config="<View/>"),
            b.body([b.task("two.png", 1)], project="99.1"),
            b.body([b.task("two.png", 1)] * 2, params={"context": {"result": [b.keypoints[0]]}}),
            b.body([{"id": 1}]),
        ]
        for body in bodies:
            reply, expected = client.post("/predict", json=body), b.post("/predict", body)
            assert 400 <= reply.status_code < 500
            assert (reply.status_code, reply.json()["error"]) == (expected.status_code, expected.json()["error"])
            assert "traceback" not in reply.text.lower()
            assert str(b.display.parent) not in reply.text


def test_what_nobody_expected_is_a_plain_500(backend, under_label_studio_ml, eventually):
    from backend import label_studio_ml as adapter

    with backend("bright") as b:
        client = under_label_studio_ml(b)
        _ready(client, b, eventually)
        adapter.CelloopBackend.process().parts.service.predict = None
        reply = client.post("/predict", json=b.body([b.task("two.png", 1)]))
        assert (reply.status_code, reply.json()["error"]) == (500, "InternalError")
        assert "traceback" not in reply.text.lower()


def test_without_a_model_and_without_settings(backend, under_label_studio_ml):
    with backend() as b:
        client = under_label_studio_ml(b)
        assert _setup(client, b).json() == {"model_version": "celloop-cells-r0"}
        reply = client.post("/predict", json=b.body([b.task("two.png", 1)]))
        assert (reply.status_code, reply.json()["error"]) == (503, "NoModelError")
        assert int(reply.headers["retry-after"]) >= 1
        broken = under_label_studio_ml(b, CELLOOP_INDEX_URL="")
        assert "CELLOOP_INDEX_URL" in _setup(broken, b).json()["detail"]


def test_events_wake_the_sync_and_train_nothing(backend, under_label_studio_ml, eventually):
    from backend import label_studio_ml as adapter

    with backend("bright") as b:
        client = under_label_studio_ml(b)
        _ready(client, b, eventually)
        woken = []
        adapter.CelloopBackend.process().parts.waker.event = lambda project, action: not woken.append((project, action))
        event = {"project": {"id": 3, "label_config": b.config}, "annotation": {"id": 1}}
        for action in ("ANNOTATION_CREATED", "ANNOTATION_UPDATED", "ANNOTATION_DELETED", "START_TRAINING"):
            reply = client.post("/webhook", json=event | {"action": action})
            assert reply.json() == {"result": {"status": "sync"}, "status": "ok"}
        assert [action for _, action in woken] == [
            "ANNOTATION_CREATED",
            "ANNOTATION_UPDATED",
            "ANNOTATIONS_DELETED",
            "START_TRAINING",
        ]
        assert {project for project, _ in woken} == {3}
        adapter.CelloopBackend()
        model = adapter.CelloopBackend("3", b.config)
        assert model.process_event("ANNOTATIONS_DELETED", {}, "job", {}) == {"status": "sync"}
        assert "ANNOTATIONS_DELETED" in model.TRAIN_EVENTS


def test_the_password_of_the_environment_counts(backend, under_label_studio_ml):
    with backend("bright") as b:
        secrets = {
            "CELLOOP_BACKEND_USER": "celloop",
            "CELLOOP_BACKEND_PASSWORD": "pass-1",
            "CELLOOP_WEBHOOK_SECRET": "hook-1",
        }
        client = under_label_studio_ml(b, **secrets)
        right = httpx.BasicAuth("celloop", "pass-1")
        event = {"action": "START_TRAINING", "project": {"id": 3, "label_config": b.config}}
        for auth in (None, httpx.BasicAuth("celloop", "x")):
            assert _setup(client, b, auth=auth).status_code == 401
            assert client.post("/predict", json=b.body([b.task("two.png", 1)]), auth=auth).status_code == 401
            assert client.post("/webhook", json=event, auth=auth).status_code == 401
        assert _setup(client, b, auth=right).status_code == 200
        assert client.post("/webhook", json=event, auth=right).status_code == 201
        assert client.post("/webhook", json=event, headers={"X-Celloop-Secret": "hook-1"}).status_code == 201


@pytest.mark.parametrize(("basic_auth", "status"), [(None, 401), (("ann", "word"), 200)])
def test_strangers_are_not_answered_without_a_password(backend, under_label_studio_ml, basic_auth, status):
    with backend("bright") as b:
        under_label_studio_ml(b, basic_auth=basic_auth)
        body = orjson.dumps({"project": "3.1", "schema": b.config})
        asked = ml._server.test_client().post(
            "/setup",
            data=body,
            content_type="application/json",
            environ_base={"REMOTE_ADDR": "10.1.2.3"},
            auth=basic_auth,
        )
        assert asked.status_code == status


def test_nothing_is_written_for_a_project(backend, under_label_studio_ml, eventually):
    from label_studio_ml.model import CACHE

    with backend("bright") as b:
        client = under_label_studio_ml(b)
        _ready(client, b, eventually)
        assert ("3", "model_version") not in CACHE
        assert ("3", "label_config") not in CACHE
