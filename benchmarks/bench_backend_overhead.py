"""What the backend adds to a prediction: /predict of one 512 x 512 image with 100 cells, the model's answer given.

First the whole request for a task that is opened again, whose prediction is kept (HTTP, checks, project, the image's
hash, JSON; goal: p50 <= 1 ms). `first_time`: the same for tasks that were not asked for before, with what decoding the
image and making the polygons take of it. Then the reply alone, already made: through orjson, as the backend sends it,
and through FastAPI's default encoder; also with brush regions. The server is a process of its own; one client that
keeps its connection.

    python benchmarks/bench_backend_overhead.py
"""

import argparse
import http.client
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvicorn
from fastapi import FastAPI, Response
from harness import report, time_ms
from PIL import Image

from backend.app import create_app
from backend.settings import Settings
from loop.adapters.index import Index
from loop.config import InstanceConfig
from loop.data.store import read_image
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.masks import from_masks, to_dense
from loop.models.segmenter import Prediction
from loop.types import Instances, UInt8Array

SIDE, CELLS_A_SIDE, REPEATS = 512, 10, 300
LABEL = "celloop-bench-v1"
BRUSH_ONLY = """<View><Image name="image" value="$image"/>
  <BrushLabels name="brush" toName="image"><Label value="Cell"/></BrushLabels></View>"""


def draw_cells() -> Instances:
    """100 ellipses on a grid, of 8 to 20 px radius."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    step = SIDE / CELLS_A_SIDE
    masks = []
    for i in range(CELLS_A_SIDE**2):
        a, b = rng.uniform(8, 20, 2)
        cx, cy = (i % CELLS_A_SIDE + 0.5) * step, (i // CELLS_A_SIDE + 0.5) * step
        masks.append(((x - cx) / a) ** 2 + ((y - cy) / b) ** 2 <= 1)
    return from_masks(masks, (SIDE, SIDE), image_id="bench", source="model", model_version=LABEL)


class GivenAnswer:
    """In place of a segmenter: always the same cells, at once."""

    instance_config = InstanceConfig()

    def __init__(self, cells: Instances) -> None:
        self._prediction = Prediction(cells, 0.1, np.zeros(16, np.float32))

    def predict(self, pixels: UInt8Array, *, image_id: str = "") -> Prediction:
        """The cells, whatever the image."""
        return self._prediction


@dataclass(frozen=True)
class _Version:
    label: str


class GivenRegistry:
    """A registry with one champion."""

    def champion(self) -> _Version:
        """The only version."""
        return _Version(LABEL)

    def download(self, version: Any, cache_dir: Path) -> Path:
        """Nothing is stored anywhere."""
        return cache_dir


def draw_image(cells: Instances, path: Path, seed: int = 1) -> None:
    """A grey picture of the cells with some noise, as RGB PNG."""
    picture = 40 + 120 * to_dense(cells).any(axis=0) + np.random.default_rng(seed).normal(0, 4, cells.shape)
    Image.fromarray(np.repeat(picture.astype(np.uint8)[:, :, None], 3, axis=2)).save(path)


def build_app(root: Path) -> FastAPI:
    """The backend on `root` with a given answer, and the same reply made beforehand on routes of its own."""
    cells = draw_cells()
    draw_image(cells, root / "image.png")
    index = Index(f"sqlite:///{root / 'index.sqlite'}")
    index.add_project("bench", ls_project_id=1, root=root, label_config=label_config())
    settings = Settings(index_url="unused", models_dir=root, display_root=root)
    app = create_app(settings, registry=lambda project: GivenRegistry(), index=index)
    app.state.parts.slot._load = lambda directory, label: GivenAnswer(cells)
    for kind, config in (("polygons", label_config()), ("brush", BRUSH_ONLY)):
        regions = to_results(cells, Interface.parse(config))
        _add_prepared(app, kind, {"results": [{"result": regions, "score": 0.5, "model_version": LABEL}]})
    return app


def _add_prepared(app: FastAPI, kind: str, reply: dict[str, Any]) -> None:
    @app.post(f"/orjson/{kind}")
    async def prepared() -> Response:
        return Response(orjson.dumps(reply), media_type="application/json")

    @app.post(f"/default/{kind}", response_model=None)
    async def default() -> dict[str, Any]:
        return reply


def ask(connection: http.client.HTTPConnection, path: str, body: bytes) -> bytes:
    """The reply's body; anything but 200 ends the benchmark."""
    connection.request("POST", path, body, {"content-type": "application/json"})
    reply = connection.getresponse()
    content = reply.read()
    if reply.status != 200:
        raise SystemExit(f"{path} answered {reply.status}: {content[:200]!r}")
    return content


def body_of(number: int) -> bytes:
    """The request that Label Studio sends when a task is opened."""
    task = {"id": number, "data": {"image": "/data/local-files/?d=image.png", "celloop_id": "image"}}
    body = {"tasks": [task], "project": "1.1700000000", "label_config": label_config(), "params": {}}
    return orjson.dumps(body)


def measure(port: int, image: Path) -> None:
    """Prints the figures of a server on `port` whose image is `image`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = body_of(1)
    reply = ask(connection, "/predict", request)
    regions = len(json.loads(reply)["results"][0]["result"])
    figures = time_ms(lambda: ask(connection, "/predict", request), REPEATS, warmup=20)
    numbers = itertools.count(2)
    first = time_ms(lambda: ask(connection, "/predict", body_of(next(numbers))), REPEATS // 3, warmup=5)
    cells, interface = draw_cells(), Interface.parse(label_config())
    parts = {
        "first_time_ms_p50": first["ms_p50"],
        "first_time_ms_p95": first["ms_p95"],
        "of_which_image_ms_p50": time_ms(lambda: read_image(image), 50, warmup=5)["ms_p50"],
        "of_which_polygons_ms_p50": time_ms(lambda: to_results(cells, interface), 50, warmup=5)["ms_p50"],
    }
    report("backend_overhead", regions=regions, reply_kb=round(len(reply) / 1e3, 1), **figures, **parts)
    for kind in ("polygons", "brush"):
        size = round(len(ask(connection, f"/orjson/{kind}", request)) / 1e3, 1)
        ours = time_ms(lambda kind=kind: ask(connection, f"/orjson/{kind}", request), REPEATS, warmup=20)
        default = time_ms(lambda kind=kind: ask(connection, f"/default/{kind}", request), REPEATS // 3, warmup=5)
        report(
            "backend_encoding",
            regions=f"{regions} {kind}",
            reply_kb=size,
            **ours,
            fastapi_default_ms_p50=default["ms_p50"],
            fastapi_default_ms_p95=default["ms_p95"],
            times_faster_p50=round(default["ms_p50"] / ours["ms_p50"], 1),
        )
    connection.close()


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns when the server has its model."""
    while process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/versions")
            if LABEL in connection.getresponse().read().decode():
                return
        except OSError:
            time.sleep(0.2)
        finally:
            connection.close()
    raise SystemExit(f"the server ended with {process.returncode}")


def main() -> None:
    """Starts the server, measures, stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "DIR"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        app = build_app(Path(given.serve[1]))
        uvicorn.run(app, port=int(given.serve[0]), log_level="warning", access_log=False, ws="none")
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.Popen([sys.executable, __file__, "--serve", str(port), directory])
        try:
            wait_for(port, process)
            measure(port, Path(directory) / "image.png")
        finally:
            process.terminate()
            process.wait(20)


if __name__ == "__main__":
    main()
