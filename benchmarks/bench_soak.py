"""Half an hour of clicks at the real stack: memory, failures, a change of the model and a killed backend on the way.

    python benchmarks/bench_soak.py [--minutes 30] [--rate 4]

Clicks go to the backend itself at `--rate` a second over several pictures; every five seconds one goes through Label
Studio, as its page sends it, and every thirty an annotation is submitted there. At 30 and 45 % of the time the other
model is promoted, at 60 % the backend is killed (SIGKILL) and the supervisor starts it again. `failed`: clicks without
a 200 outside of the seconds between the kill and the backend's next answer, which are `down_s`. `rss_mb_per_hour`: the
slope of the backend's memory from a fifth of the time on until the kill. `annotations` submitted and found at the end.
Prints one JSON line.
"""

import argparse
import os
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import httpx
import numpy as np
import psutil
from harness import report
from served_project import Picture, draw_project, publish_cells, services, train_model, wait_for_model

from flows.context import LoopContext
from flows.local.status import read_status
from flows.local.workspace import Workspace
from loop.adapters.label_studio_http import Connection
from loop.adapters.mlflow_registry import ModelVersion
from loop.errors import LoopError

CELLS = [6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28]
SIDE = 256
WARM_SHARE = 0.2


@dataclass
class Log:
    """What happened: (seconds since the start, milliseconds, status) of clicks, and the rest by name."""

    start: float = field(default_factory=time.monotonic)
    clicks: list[tuple[float, float, int]] = field(default_factory=list)
    empty: int = 0
    through: list[tuple[float, bool]] = field(default_factory=list)
    submitted: list[int] = field(default_factory=list)
    refused: int = 0
    memory: list[tuple[float, float]] = field(default_factory=list)
    events: dict[str, float] = field(default_factory=dict)

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start


def body_of(context: LoopContext, picture: Picture, rng: np.random.Generator) -> dict[str, Any]:
    """An interactive request with a click in the middle of one of the picture's cells."""
    i = int(rng.integers(len(picture.cells)))
    depth = cv2.distanceTransform(np.pad(picture.cells.masks[i].astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    x0, y0 = picture.cells.boxes_xyxy[i][:2].tolist()
    point = {
        "type": "keypointlabels",
        "from_name": "point",
        "to_name": "image",
        "id": uuid.uuid4().hex[:10],
        "is_positive": True,
        "original_width": SIDE,
        "original_height": SIDE,
        "image_rotation": 0,
        "value": {
            "x": (x0 + column + 0.5) / SIDE * 100,
            "y": (y0 + row + 0.5) / SIDE * 100,
            "width": 0.3,
            "keypointlabels": ["Cell"],
        },
    }
    return {
        "tasks": [{"id": picture.row.task_id, "data": {"image": picture.row.display}}],
        "project": f"{context.project.ls_project_id}.0",
        "label_config": context.project.label_config,
        "params": {"context": {"result": [point]}},
    }


def click(client: httpx.Client, url: str, body: dict[str, Any], log: Log) -> None:
    """One click at the backend, into the log."""
    begin, at = time.perf_counter(), log.now()
    try:
        reply = client.post(f"{url}/predict", json=body)
        status = reply.status_code
        if status == httpx.codes.OK and not reply.json()["results"][0]["result"]:
            log.empty += 1
    except httpx.TransportError:
        status = 0
    log.clicks.append((at, 1000 * (time.perf_counter() - begin), status))


def keep_clicking(context: LoopContext, pictures: list[Picture], rate: float, log: Log, ended: threading.Event) -> None:
    """Clicks at a steady rate, however long each takes."""
    rng = np.random.default_rng(1)
    url = context.endpoints.backend_url
    with httpx.Client(timeout=30, trust_env=False) as client, ThreadPoolExecutor(8) as pool:
        n = 0
        while not ended.is_set():
            body = body_of(context, pictures[int(rng.integers(len(pictures)))], rng)
            pool.submit(click, client, url, body, log)
            n += 1
            ended.wait(max(0.0, log.start + n / rate - time.monotonic()))


def keep_labelling(context: LoopContext, pictures: list[Picture], log: Log, ended: threading.Event) -> None:
    """A person at Label Studio: a click every five seconds, an annotation every thirty."""
    rng = np.random.default_rng(2)
    endpoints = context.endpoints
    connection = Connection(endpoints.label_studio_url, endpoints.label_studio_token, timeout_s=120)
    attached = connection.get("/api/ml/", project=context.project.ls_project_id)[0]["id"]
    turn = 0
    while not ended.is_set():
        picture = pictures[int(rng.integers(len(pictures)))]
        request = {"task": picture.row.task_id, "context": body_of(context, picture, rng)["params"]["context"]}
        at = log.now()
        answer = connection.send("POST", f"/api/ml/{attached}/interactive-annotating", body=request).body
        log.through.append((at, bool((answer.get("data") or {}).get("result"))))
        if turn % 6 == 0:
            regions = context.label_studio.predictions(picture.row.task_id or 0)[-1].result
            try:
                number = context.label_studio.submit(
                    picture.row.task_id or 0, regions, lead_time_s=20.0, unique_id=uuid.uuid4()
                )
                log.submitted.append(number)
            except LoopError:
                log.refused += 1
        turn += 1
        ended.wait(5)
    connection.close()


def backend_pid(workspace: Workspace) -> int | None:
    """The backend's process now."""
    return next((s.pid for s in read_status(workspace).services if s.name == "backend"), None)


def watch_memory(workspace: Workspace, log: Log, ended: threading.Event) -> None:
    """The backend's resident memory every five seconds, MB."""
    while not ended.wait(5):
        pid = backend_pid(workspace)
        if pid is not None and psutil.pid_exists(pid):
            log.memory.append((log.now(), psutil.Process(pid).memory_info().rss / 1e6))


def disturb(
    workspace: Workspace, context: LoopContext, versions: tuple[ModelVersion, ModelVersion], seconds: float, log: Log
) -> None:
    """Two changes of the model and a kill, at their times."""

    def wait_until(share: float) -> None:
        time.sleep(max(0.0, share * seconds - log.now()))

    for share, version in ((0.3, versions[1]), (0.45, versions[0])):
        wait_until(share)
        context.registry.promote(version, "a change in the middle of work", {})
        log.events[f"promoted_{version.label}"] = log.now()
        wait_for_model(context, version.label)
    wait_until(0.6)
    pid = backend_pid(workspace)
    if pid is None:
        raise SystemExit("the backend does not run")
    log.events["killed"] = log.now()
    os.kill(pid, signal.SIGKILL)
    wait_for_model(context, versions[0].label, timeout_s=120)
    log.events["back"] = log.now()
    wait_until(1.0)


def figures(log: Log, found: int) -> dict[str, Any]:
    """The log in numbers."""
    killed, back = log.events["killed"], log.events["back"]
    calm = [c for c in log.clicks if not killed - 1 <= c[0] <= back + 1]
    good = [ms for _, ms, status in calm if status == httpx.codes.OK]
    warm = WARM_SHARE * killed / 0.6
    before = np.array([m for m in log.memory if warm <= m[0] < killed - 1])
    after = [m[1] for m in log.memory if m[0] > back + 5]
    slope = float(np.polyfit(before[:, 0] / 3600, before[:, 1], 1)[0]) if len(before) > 2 else float("nan")
    lost = [at for at, answered in log.through if not answered and not killed - 1 <= at <= back + 6]
    return {
        "clicks": len(log.clicks),
        "failed": sum(status != httpx.codes.OK for _, _, status in calm),
        "failed_while_down": sum(
            status != httpx.codes.OK for at, _, status in log.clicks if killed - 1 <= at <= back + 1
        ),
        "down_s": round(back - killed, 1),
        "without_a_cell": log.empty,
        "click_ms_p50": round(float(np.median(good)), 1),
        "click_ms_p95": round(float(np.percentile(good, 95)), 1),
        "click_ms_max": round(max(good), 1),
        "rss_mb_first_last": [round(float(before[0, 1])), round(float(before[-1, 1]))] if len(before) else [],
        "rss_mb_after_restart": [round(after[0]), round(after[-1])] if after else [],
        "rss_mb_per_hour": round(slope, 1),
        "through_label_studio": len(log.through),
        "through_label_studio_unanswered": len(lost),
        "annotations_submitted": len(log.submitted),
        "annotations_refused": log.refused,
        "annotations_found": found,
        "events_s": {name: round(at, 1) for name, at in log.events.items()},
    }


def main() -> None:
    """Starts everything, clicks, stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=4.0)
    given = parser.parse_args()
    with services() as workspace:
        context, pictures = draw_project(workspace, "soak", CELLS, SIDE)
        versions = (train_model(workspace, context, 0), train_model(workspace, context, 1))
        context.registry.promote(versions[0], "the first one", {})
        publish_cells(context, {p.row.image_id: p.cells for p in pictures}, versions[0])
        wait_for_model(context, versions[0].label)
        log, ended = Log(), threading.Event()
        workers = [
            threading.Thread(target=keep_clicking, args=(context, pictures, given.rate, log, ended)),
            threading.Thread(target=keep_labelling, args=(context, pictures, log, ended)),
            threading.Thread(target=watch_memory, args=(workspace, log, ended)),
        ]
        for worker in workers:
            worker.start()
        try:
            disturb(workspace, context, versions, 60 * given.minutes, log)
        finally:
            ended.set()
            for worker in workers:
                worker.join()
        kept = {a.id for picture in pictures for a in context.label_studio.annotations(picture.row.task_id or 0)}
        report("soak", minutes=given.minutes, rate=given.rate, **figures(log, len(kept & set(log.submitted))))


if __name__ == "__main__":
    main()
