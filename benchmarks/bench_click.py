"""A click from request to reply, at the backend: real sockets, ViT-B, images of 512 x 512 px with 100 cells drawn.

    python benchmarks/bench_click.py [--clicks 60] [--images 3] [--fresh 3] [--kind vit_b]

- `cached`: clicks in images that are encoded already. Goal: p95 <= 60 ms on two cores.
- `during_batch`: the same while a champion predicts a batch of other tasks; `batch_ms_a_task` says what one task costs.
- `next_task`: what Label Studio asks of the backend from "submit" to the first answered click in the next task (event,
  health, setup, click), its image prepared on disk by an earlier run of the backend and nothing in memory. Goal: < 1 s.
- `encoding_each_time`: clicks in images that nobody prepared, as where every click encodes; `times_slower` by p50.
- `prepared_s`: how long the backend took to prepare an image while nobody clicked.

The weights are random, which costs the same as trained ones. Each task comes with a draft of 100 polygons, as Label
Studio sends it. The masks of random weights would fill the image, so the logits, once computed, are replaced by a disc
at the prompt; what comes after the network works on that. The server is a process of its own. Prints one JSON line.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
import uvicorn
import yaml
from bench_backend_overhead import LABEL, SIDE, GivenRegistry, draw_cells, draw_image
from bench_sam import random_net
from harness import report
from torch import Tensor

from backend.app import create_app
from backend.settings import Settings
from loop.adapters.index import ImageRow, Index
from loop.config import InstanceConfig, ModelConfig
from loop.labelstudio.interface import Interface, label_config
from loop.labelstudio.results import to_results
from loop.models import new_net
from loop.models.sam import Sam
from loop.models.segmenter import Segmenter

RADIUS = 12.0
BATCH_TASKS = 8


def give_discs() -> None:
    """From now on SAM's logits are, once computed, a disc around each prompt's first point."""
    ask: Any = Sam._ask

    def asked(self: Sam, embedding: Any, prompts: Any, scale: Any, multimask: Any) -> tuple[Tensor, Tensor]:
        logits, iou = ask(self, embedding, prompts, scale, multimask)
        coarse = logits.shape[-1] / self.side
        x, y = (prompts["points"][:, 0] * scale * coarse).T
        grid = torch.arange(logits.shape[-1], device=logits.device) + 0.5
        across = grid[None, None, :] - torch.from_numpy(x).to(logits)[:, None, None]
        down = grid[None, :, None] - torch.from_numpy(y).to(logits)[:, None, None]
        disc = RADIUS * float(np.max(scale)) * coarse - (across**2 + down**2).sqrt()
        return (3 * disc)[:, None].expand_as(logits).contiguous(), iou

    Sam._ask = asked  # type: ignore[method-assign,assignment]


def make_site(root: Path, kind: str, images: int) -> None:
    """Images with tasks in the index, the settings, and SAM's random weights, all below `root`."""
    cells = draw_cells()
    for folder in ("display", "configs"):
        (root / folder).mkdir()
    index = Index(f"sqlite:///{root / 'index.sqlite'}")
    index.add_project("bench", ls_project_id=1, root=root, label_config=label_config())
    rows = []
    for i in range(images):
        draw_image(cells, root / "display" / f"{i}.png", seed=i)
        display = f"/data/local-files/?d={i}.png"
        rows.append(ImageRow(1, str(i), "", "", display, task_id=i + 1, height=SIDE, width=SIDE))
    index.add_images("bench", rows)
    index.set_images("bench", {row.image_id: {"rank": i + 1} for i, row in enumerate(rows)})
    index.close()
    torch.save(random_net(kind).state_dict(), root / "weights.pth")


def set_clicks(root: Path, kind: str, **click: Any) -> None:
    """The settings that the backend reads from now on."""
    tree = {"click": click, "pseudo": {"sam": {"kind": kind, "checkpoint": str(root / "weights.pth")}}}
    (root / "configs" / "bench.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def serve(port: int, root: Path) -> None:
    """The backend on `root`, with a champion of the default size whose weights are random."""
    give_discs()
    settings = Settings(
        index_url="unused",
        models_dir=root,
        display_root=root / "display",
        configs_dir=root / "configs",
        embeddings_dir=root / "embeddings",
        clicks_per_s=1000,
        click_burst=1000,
    )
    index = Index(f"sqlite:///{root / 'index.sqlite'}")
    app = create_app(settings, registry=lambda project: GivenRegistry(), index=index)
    model = ModelConfig()
    segmenter = Segmenter(new_net(model), model, InstanceConfig(min_score=0.99), model_version=LABEL)
    app.state.parts.slot._load = lambda directory, label: segmenter
    uvicorn.run(app, port=port, log_level="warning", access_log=False, ws="none")


class Client:
    """Speaks to the backend as Label Studio does, over one connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = HTTPConnection("127.0.0.1", port, timeout=300)
        self._connection.connect()
        self._connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        drawn = to_results(draw_cells(), Interface.parse(label_config()))
        self._draft = [{"id": 1, "user": 1, "result": drawn}]

    def ask(self, method: str, path: str, body: object = None) -> bytes:
        """The reply's body; anything but 200 ends the benchmark."""
        content = None if body is None else orjson.dumps(body)
        self._connection.request(method, path, content, {"content-type": "application/json"})
        reply = self._connection.getresponse()
        found = reply.read()
        if reply.status != 200:
            raise SystemExit(f"{path} answered {reply.status}: {found[:200]!r}")
        return found

    def body(self, *numbers: int, **params: Any) -> dict[str, Any]:
        """A /predict request for tasks."""
        data = [{"image": f"/data/local-files/?d={i}.png", "celloop_id": str(i)} for i in numbers]
        tasks = [{"id": i + 1, "data": one} for i, one in zip(numbers, data, strict=True)]
        return {"tasks": tasks, "project": "1.1700000000", "label_config": label_config(), "params": params}

    def click(self, number: int, rng: np.random.Generator) -> bytes:
        """One positive point somewhere in an image."""
        x, y = rng.uniform(5, 95, 2).tolist()
        value = {"x": x, "y": y, "width": 0.2, "labels": ["Cell"], "keypointlabels": ["Cell"]}
        named = {"id": "a", "from_name": "point", "to_name": "image", "type": "keypointlabels", "is_positive": True}
        size = {"original_width": SIDE, "original_height": SIDE, "image_rotation": 0}
        body = self.body(number, context={"result": [{**named, **size, "value": value}]})
        body["tasks"][0] |= {"annotations": [], "drafts": self._draft, "predictions": []}
        return self.ask("POST", "/predict", body)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Asks ten times a second; ends the benchmark after ten minutes."""
        limit = time.monotonic() + 600
        while not condition():
            if time.monotonic() > limit:
                raise SystemExit("what the benchmark waits for did not happen within ten minutes")
            time.sleep(0.1)

    def counted(self, name: str, label: str = "") -> float:
        """The sum of a counter of the backend, of all labels or of one."""
        lines = self.ask("GET", "/metrics").decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and label in line)


@contextmanager
def running(root: Path) -> Iterator[Client]:
    """A client of a server process on `root`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen([sys.executable, __file__, "--serve", str(port), str(root)])
    try:
        limit = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > limit:
                raise SystemExit(f"the server did not start ({process.returncode})")
            try:
                client = Client(port)
                break
            except OSError:
                time.sleep(0.2)
        client.wait_until(lambda: LABEL in client.ask("GET", "/versions").decode())
        yield client
    finally:
        process.terminate()
        process.wait(30)


def percentiles(times_s: list[float]) -> dict[str, float]:
    """Middle and slow end, ms."""
    p50, p95 = 1000 * np.percentile(times_s, [50, 95])
    return {"ms_p50": round(float(p50), 1), "ms_p95": round(float(p95), 1), "n": len(times_s)}


def timed(calls: Iterable[Callable[[], object]]) -> list[float]:
    """How long each call takes, s."""
    times = []
    for call in calls:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def while_a_batch_runs(client: Client, images: int, clicks: Sequence[Callable[[], object]]) -> dict[str, Any]:
    """The clicks while another connection asks for one batch after the other, and what a task of those took."""
    ended = threading.Event()
    took: list[float] = []

    def ask_for_batches() -> None:
        batch, numbers = Client(client.port), count(1000)
        while not ended.is_set():
            body = batch.body(*(i % images for i in range(BATCH_TASKS)))
            body["tasks"] = [task | {"id": next(numbers)} for task in body["tasks"]]
            took.extend(time_s / BATCH_TASKS for time_s in timed([partial(batch.ask, "POST", "/predict", body)]))

    thread = threading.Thread(target=ask_for_batches)
    thread.start()
    time.sleep(0.5)
    found = percentiles(timed(clicks))
    ended.set()
    thread.join()
    return {**found, "batch_ms_a_task": round(1000 * float(np.median(took)), 1)}


def measure(root: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All figures; the server is started twice."""
    rng = np.random.default_rng(0)
    images = given.images
    found: dict[str, Any] = {}
    set_clicks(root, given.kind, ahead=images)
    with running(root) as client:
        client.wait_until(lambda: client.counted("celloop_sam_info") > 0)
        begin = time.perf_counter()
        client.wait_until(lambda: client.counted("celloop_prepared_images_total", 'by="sam"') >= images)
        found["prepared_s"] = round((time.perf_counter() - begin) / images, 2)
        set_clicks(root, given.kind, ahead=0)
        cached = [partial(client.click, i % images, rng) for i in range(given.clicks)]
        timed(cached[:5])
        found["cached"] = percentiles(timed(cached))
        found["reply"] = json.loads(client.click(0, rng))["results"][0]["result"][0]["type"]
        if (misses := client.counted("celloop_click_embeddings_total", "miss")) != images:
            raise SystemExit(f"{misses} images were encoded; expected {images}")
        found["during_batch"] = while_a_batch_runs(client, images, cached)
    with running(root) as client:
        client.wait_until(lambda: client.counted("celloop_sam_info") > 0)
        client.click(0, rng)

        def next_task(number: int) -> None:
            event = {"action": "ANNOTATION_CREATED", "project": {"id": 1}}
            client.ask("POST", "/webhook", event)
            client.ask("GET", "/health")
            client.ask("POST", "/setup", {"project": "1.1700000000"})
            client.click(number, rng)

        found["next_task"] = percentiles(timed(partial(next_task, i) for i in range(1, images)))
        set_clicks(root, given.kind, ahead=0, store_mb=0)
        fresh = [partial(client.click, images + i, rng) for i in range(given.fresh)]
        found["encoding_each_time"] = percentiles(timed(fresh))
    found["times_slower"] = round(found["encoding_each_time"]["ms_p50"] / found["cached"]["ms_p50"], 1)
    return found


def main() -> None:
    """Makes the site, measures, prints one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clicks", type=int, default=60)
    parser.add_argument("--images", type=int, default=3, help="images that are prepared")
    parser.add_argument("--fresh", type=int, default=3, help="images that are encoded at the click")
    parser.add_argument("--kind", choices=("vit_b", "vit_l", "vit_h"), default="vit_b")
    parser.add_argument("--serve", nargs=2, metavar=("PORT", "DIR"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(int(given.serve[0]), Path(given.serve[1]))
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        make_site(root, given.kind, given.images + given.fresh)
        found = measure(root, given)
    report(
        "click",
        kind=given.kind,
        threads=torch.get_num_threads(),
        load_1min=[round(load, 1), round(os.getloadavg()[0], 1)],
        **found,
    )


if __name__ == "__main__":
    main()
