"""Events: checked, counted, answered at once, one sync for many."""

import threading
import time

import httpx
import numpy as np

BASIC = httpx.BasicAuth("celloop", "pass-1")


def test_the_webhook_wants_its_secret_or_the_password(backend):
    event = {"action": "ANNOTATION_CREATED", "project": {"id": 3}}
    with backend(webhook_secret="hook-1", user="celloop", password="pass-1") as b:
        for headers in ({}, {"X-Celloop-Secret": "wrong"}, {"X-Celloop-Secret": "hook-ü".encode()}):
            assert b.http.post("/webhook", json=event, headers=headers).status_code == 401
        assert b.http.post("/webhook", json=event, headers={"X-Celloop-Secret": "hook-1"}).status_code == 200
        training = {"action": "START_TRAINING", "project": {"id": 3}}
        assert b.http.post("/webhook", json=training, auth=BASIC).status_code == 200
        assert b.http.get("/versions", headers={"X-Celloop-Secret": "hook-1"}).status_code == 401
    with backend(webhook_secret="hook-1") as b:
        assert b.http.post("/webhook", json=event, auth=BASIC).status_code == 401


PROJECT = {"id": 3, "title": "cells", "label_config": "<View/>", "token": "secret-project-token", "model_version": "v"}


EVENTS = (
    {
        "action": "ANNOTATION_CREATED",
        "annotation": {"id": 1, "result": [], "was_cancelled": False, "lead_time": 3.2, "task": 29, "project": 3},
        "task": {"id": 29, "data": {"image": "/a.png"}, "is_labeled": True},
        "project": PROJECT,
    },
    {"action": "ANNOTATIONS_DELETED", "annotations": [{"id": 1}], "project": PROJECT},
    {"action": "TASKS_CREATED", "tasks": [{"id": 201, "data": {}}], "project": PROJECT},
    {"action": "TASKS_DELETED", "tasks": [{"id": 201}], "project": PROJECT},
    {"action": "ANNOTATIONS_CREATED", "annotation": [{"id": 1}], "task": [{"id": 2}], "project": PROJECT},
    {"action": "START_TRAINING", "project": PROJECT},
    {"action": "PROJECT_UPDATED", "project": PROJECT},
    {"action": "INVENTED", "project": PROJECT},
    {"action": "ANNOTATION_CREATED"},
)


def test_webhook_events_are_counted(backend):
    with backend(prefect_api_url="http://127.0.0.1:1/api", debounce_s=60.0) as b:
        for event in EVENTS:
            action = "other" if event["action"] == "INVENTED" else event["action"]
            before = b.metric("celloop_webhook_events_total", action=action) or 0
            reply = b.post("/webhook", event)
            assert reply.status_code == 200
            wakes = event["action"] not in ("PROJECT_UPDATED", "INVENTED") and "project" in event
            assert reply.json() == {"status": "sync" if wakes else "noted"}
            assert b.metric("celloop_webhook_events_total", action=action) == before + 1
            assert "secret-project-token" not in reply.text


def test_the_webhook_answers_at_once_although_prefect_hangs(backend, recorder):
    release = threading.Event()

    def hang(request):
        release.wait(5)
        return 500, {}, b""

    server = recorder(hang)
    event = {"action": "ANNOTATION_CREATED", "annotation": {"id": 1, "result": [{"v": "x" * 100_000}]}}
    with backend(prefect_api_url=server.url + "/api", debounce_s=0.0) as b:
        times = []
        for _ in range(30):
            begin = time.perf_counter()
            assert b.post("/webhook", event | {"project": PROJECT}).status_code == 200
            times.append(time.perf_counter() - begin)
        assert np.median(times) < 0.05
        release.set()


def test_two_hundred_webhooks_start_one_sync(backend, recorder, eventually):
    server = recorder(lambda request: (200, {}, b'{"id": "d-1"}'))
    with backend(prefect_api_url=server.url + "/api", debounce_s=0.5) as b:
        threads = [
            threading.Thread(
                target=lambda: [
                    b.post("/webhook", {"action": "ANNOTATION_CREATED", "project": PROJECT}) for _ in range(50)
                ]
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        eventually(lambda: b.metric("celloop_sync_wakes_total", outcome="started") == 1)
        time.sleep(0.7)
        assert sum(request.method == "POST" for request in server.received) == 1
        assert b.metric("celloop_webhook_events_total", action="ANNOTATION_CREATED") == 200
