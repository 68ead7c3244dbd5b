import json
import time

import httpx
import pytest

from backend.metrics import Metrics
from backend.wake import SyncWaker

NAMES = {7: "cells", 8: "with space/slash"}


@pytest.fixture
def prefect(recorder):
    def answer(request):
        if request.method == "GET" and request.path.startswith("/api/deployments/name/watch/"):
            name = request.path.rpartition("/watch/")[2]
            return 200, {}, json.dumps({"id": f"id-of-{name}"}).encode()
        if request.method == "POST" and request.path.endswith("/create_flow_run"):
            return 201, {}, b"{}"
        return 404, {}, b"{}"

    return recorder(answer)


@pytest.fixture
def waker_at(monkeypatch):
    monkeypatch.setattr("backend.wake.RETRY_S", (0.05, 0.1, 0.2))
    wakers = []
    with httpx.Client(trust_env=False) as client:

        def build(api_url, debounce_s=0.15, limit_s=10.0, name_of=NAMES.get):
            waker = SyncWaker(api_url, name_of, Metrics(), client, debounce_s=debounce_s, limit_s=limit_s)
            wakers.append(waker)
            waker.start()
            return waker

        yield build
        for waker in wakers:
            waker.stop()


def _runs(server):
    return [request for request in server.received if request.path.endswith("/create_flow_run")]


def _count(waker, outcome):
    return waker._metrics.registry.get_sample_value("celloop_sync_wakes_total", {"outcome": outcome}) or 0


def test_two_hundred_events_start_one_run(prefect, waker_at, eventually):
    waker = waker_at(prefect.url + "/api/", debounce_s=0.5)
    assert all(waker.event(7, "ANNOTATION_CREATED") for _ in range(200))
    eventually(lambda: _count(waker, "started") == 1)
    time.sleep(0.7)
    (run,) = _runs(prefect)
    assert [request.path for request in prefect.received] == [
        "/api/deployments/name/watch/cells",
        "/api/deployments/id-of-cells/create_flow_run",
    ]
    assert json.loads(run.body)["idempotency_key"].startswith("celloop-webhook-7-")


def test_a_later_event_starts_another_run_with_another_key(prefect, waker_at, eventually):
    waker = waker_at(prefect.url + "/api")
    for n in (1, 2):
        waker.event(7, "ANNOTATION_UPDATED")
        eventually(lambda n=n: _count(waker, "started") == n)
    keys = [json.loads(run.body)["idempotency_key"] for run in _runs(prefect)]
    assert len(set(keys)) == 2


def test_events_that_never_pause_still_start_a_run(prefect, waker_at):
    waker = waker_at(prefect.url + "/api", debounce_s=0.3, limit_s=0.5)
    limit = time.monotonic() + 1.0
    while time.monotonic() < limit:
        waker.event(7, "ANNOTATION_CREATED")
        time.sleep(0.02)
    assert len(_runs(prefect)) >= 1


def test_each_project_has_its_own_run_and_names_are_quoted(prefect, waker_at, eventually):
    waker = waker_at(prefect.url + "/api")
    for _ in range(5):
        waker.event(7, "ANNOTATIONS_DELETED")
        waker.event(8, "TASKS_DELETED")
    eventually(lambda: _count(waker, "started") == 2)
    assert {request.path for request in prefect.received if request.method == "GET"} == {
        "/api/deployments/name/watch/cells",
        "/api/deployments/name/watch/with%20space%2Fslash",
    }


@pytest.mark.parametrize("action", ["PROJECT_UPDATED", "PROJECT_CREATED", "LABEL_LINK_CREATED", "nonsense"])
def test_what_publishing_causes_wakes_nobody(prefect, waker_at, action):
    waker = waker_at(prefect.url + "/api", debounce_s=0.0)
    assert not waker.event(7, action)
    time.sleep(0.1)
    assert prefect.received == []


def test_an_unknown_project_is_counted_and_prefect_not_asked(prefect, waker_at, eventually):
    waker = waker_at(prefect.url + "/api", debounce_s=0.0)
    waker.event(99, "ANNOTATION_CREATED")
    eventually(lambda: _count(waker, "unknown") == 1)
    assert prefect.received == []


def test_without_prefect_nothing_is_woken(waker_at):
    assert not waker_at("").event(7, "ANNOTATION_CREATED")


def test_a_failure_is_logged_and_the_next_event_tried_again(recorder, waker_at, eventually, caplog):
    server = recorder(lambda request: (500, {}, b"{}"))
    waker = waker_at(server.url + "/api", debounce_s=0.0)
    waker.event(7, "ANNOTATION_CREATED")
    eventually(lambda: _count(waker, "failed") == 1)
    assert "no sync started for Label Studio project 7: RefusedError" in caplog.text
    server.answer = lambda request: (200, {}, b'{"id": "d"}')
    waker.event(7, "ANNOTATION_CREATED")
    eventually(lambda: _count(waker, "started") == 1)


def test_prefect_not_there_and_an_index_that_fails(waker_at, eventually):
    def broken(ls_project_id):
        raise OSError("disk")

    for waker in (waker_at("http://127.0.0.1:1/api", debounce_s=0.0), waker_at("http://x/api", 0.0, name_of=broken)):
        waker.event(7, "ANNOTATION_CREATED")
        eventually(lambda waker=waker: _count(waker, "failed") == 1)


def test_stop_drops_what_is_pending(prefect, waker_at):
    waker = waker_at(prefect.url + "/api", debounce_s=30.0)
    waker.event(7, "ANNOTATION_CREATED")
    begin = time.perf_counter()
    waker.stop()
    assert time.perf_counter() - begin < 1.0
    assert prefect.received == []


def test_a_wake_is_tried_again_under_its_key_while_prefect_is_busy(recorder, waker_at, eventually):
    def busy_twice(request):
        if request.method == "GET":
            return 200, {}, b'{"id": "d"}'
        busy_twice.asked += 1
        return (503 if busy_twice.asked <= 2 else 201), {}, b"{}"

    busy_twice.asked = 0
    server = recorder(busy_twice)
    waker = waker_at(server.url + "/api")
    waker.event(7, "ANNOTATION_CREATED")
    eventually(lambda: _count(waker, "started") == 1)
    assert _count(waker, "failed") == 0
    assert len({json.loads(run.body)["idempotency_key"] for run in _runs(server)}) == 1


def test_one_that_stays_away_is_given_up_after_a_few_tries(recorder, waker_at, eventually, monkeypatch):
    monkeypatch.setattr("backend.wake.RETRY_S", (0.01, 0.01))
    server = recorder(lambda request: (503, {}, b"{}"))
    waker = waker_at(server.url + "/api")
    waker.event(7, "ANNOTATION_CREATED")
    eventually(lambda: _count(waker, "failed") == 1)
    assert len(server.received) == 3
