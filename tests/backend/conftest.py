"""Real sockets for the backend's tests: a tiny HTTP server that records, and uvicorn in a thread."""

import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import numpy as np
import orjson
import pytest
import torch
import uvicorn
from PIL import Image

from backend.app import create_app
from backend.settings import Settings
from loop.adapters.index import Index
from loop.config import InstanceConfig, ModelConfig
from loop.models import SEGMENTERS
from loop.models.seu_net import SEUNet
from loop.training.checkpoint import save_checkpoint


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Recorder:
    """`answer(received)` gives (status, headers, body); everything that came is in `received`."""

    answer: Callable[[Received], tuple[int, dict[str, str], bytes]]
    url: str = ""
    received: list[Received] = field(default_factory=list)


@contextmanager
def recording_server(answer):
    recorder = Recorder(answer)

    class Handler(BaseHTTPRequestHandler):
        def _serve(self):
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            received = Received(self.command, self.path, headers, body)
            recorder.received.append(received)
            status, reply_headers, reply = recorder.answer(received)
            self.send_response(status)
            for name, value in ({"content-length": str(len(reply))} | reply_headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply)

        do_GET = do_POST = _serve  # noqa: N815

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """A client that hangs up in the middle of a reply is part of the tests."""

    server = Quiet(("127.0.0.1", 0), Handler)
    recorder.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield recorder
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def running(app):
    """The address of `app` on a real socket."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # else Nagle delays replies
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        limit = time.monotonic() + 20
        while not server.started:
            assert thread.is_alive(), "uvicorn did not start"
            assert time.monotonic() < limit, "uvicorn did not start within 20 s"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture
def recorder() -> Iterator[Callable]:
    """recorder(answer) -> a running Recorder."""
    with ExitStack() as stack:
        yield lambda answer: stack.enter_context(recording_server(answer))


@pytest.fixture
def serve() -> Iterator[Callable]:
    """serve(app) -> its address."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(running(app))


@pytest.fixture
def eventually() -> Callable:
    """eventually(condition, within_s=5): waits until it holds, fails otherwise."""

    def wait(condition, within_s=5.0):
        limit = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < limit, "it did not happen in time"
            time.sleep(0.01)

    return wait


CONFIG = """<View><Image name="image" value="$image"/>
  <BrushLabels name="brush" toName="image"><Label value="Cell"/><Label value="Dead"/></BrushLabels>
  <PolygonLabels name="poly" toName="image"><Label value="Cell"/><Label value="Dead"/></PolygonLabels>
  <KeyPointLabels name="kp" toName="image" smart="true"><Label value="Cell"/><Label value="Dead"/></KeyPointLabels>
  <RectangleLabels name="box" toName="image" smart="true"><Label value="BoxCell"/></RectangleLabels>
</View>"""
CELLS_XYR = ((358, 102, 20), (345, 384, 18), (100, 200, 25))
CREATED = 1700000000


KEYPOINTS = (  # as Label Studio 1.23 sends them; the third one was clicked with Alt
    {
        "original_width": 512,
        "original_height": 512,
        "image_rotation": 0,
        "value": {"x": 70.03, "y": 19.98, "width": 0.23, "labels": ["Cell"], "keypointlabels": ["Cell"]},
        "is_positive": True,
        "id": "XJLAU2QCjd",
        "from_name": "kp",
        "to_name": "image",
        "type": "keypointlabels",
        "origin": "manual",
    },
    {
        "original_width": 512,
        "original_height": 512,
        "image_rotation": 0,
        "value": {"x": 80.02, "y": 80.02, "width": 0.23, "labels": ["Cell"], "keypointlabels": ["Cell"]},
        "is_positive": False,
        "id": "DUUnlA26X8",
        "from_name": "kp",
        "to_name": "image",
        "type": "keypointlabels",
        "origin": "manual",
    },
)
RECTANGLE = {
    "original_width": 512,
    "original_height": 512,
    "image_rotation": 0,
    "value": {
        "x": 60.04,
        "y": 70.03,
        "width": 14.93,
        "height": 9.99,
        "rotation": 0,
        "rectanglelabels": ["BoxCell"],
    },
    "id": "mV53gt6STk",
    "from_name": "box",
    "to_name": "image",
    "type": "rectanglelabels",
    "origin": "manual",
}


class BrightNet(SEUNet):
    """A SEU-Net whose answer is the brightness of each pixel, so that tests know what it must find."""

    sign, nap_s, value = 1.0, 0.0, 1.0

    def decode(self, features):
        raise AssertionError("not reached: forward does not decode")

    def forward(self, x):
        time.sleep(self.nap_s)
        interior = 20 * self.sign * (x.mean(1, keepdim=True) - 0.5) * self.value
        return torch.cat([interior, torch.full_like(interior, -8.0)], 1)


class DarkNet(BrightNet):
    sign = -1.0


class SlowNet(BrightNet):
    nap_s = 0.1
    calls: ClassVar[list[None]] = []

    def forward(self, x):
        self.calls.append(None)
        return super().forward(x)


class NanNet(BrightNet):
    value = float("nan")


NETS = {"bright": BrightNet, "dark": DarkNet, "slow": SlowNet, "nan": NanNet}


@dataclass(frozen=True)
class Labelled:
    label: str


class Champions:
    """A registry with real checkpoints on disk, whose alias a test moves."""

    def __init__(self, directory):
        self._directory = directory
        self._champion = None
        self._download_s = 0.0
        self.count = 0

    def promote(self, kind, download_s=0.0):
        self.count += 1
        label = f"celloop-cells-v{self.count}"
        model = ModelConfig(name=kind, base=4, depth=2)
        save_checkpoint(self._directory / label, NETS[kind](model), model, InstanceConfig())
        self._download_s = download_s
        self._champion = Labelled(label)
        return label

    def champion(self):
        return self._champion

    def download(self, version, cache_dir):
        time.sleep(self._download_s)
        return self._directory / version.label


class Backend:
    """A running backend with what it works on, spoken to as Label Studio does."""

    config, keypoints, rectangle = CONFIG, KEYPOINTS, RECTANGLE

    def __init__(self, app, http, index, registry, display, truth):
        self.parts = app.state.parts
        self.slow_calls = SlowNet.calls
        self.http, self.index, self.registry, self.display, self.truth = http, index, registry, display, truth

    def get(self, path, **given):
        return self.http.get(path, **given)

    def post(self, path, body):
        return self.http.post(path, content=orjson.dumps(body), headers={"content-type": "application/json"})

    def setup(self, project=f"3.{CREATED}", extra_params=None):
        body = {"project": project, "schema": CONFIG, "hostname": "http://localhost:8080", "access_token": "ls-token"}
        return self.post("/setup", body | {"extra_params": extra_params})

    def task(self, name, number):
        data = {"image": f"/data/local-files/?d={name}", "celloop_id": name.partition(".")[0], "rank": None}
        return {"id": number, "data": data, "meta": {}, "project": 3, "is_labeled": False, "predictions": []}

    def body(self, tasks, project=f"3.{CREATED}", label_config=CONFIG, params=None):
        empty = {"login": None, "password": None, "context": None}
        return {"tasks": tasks, "project": project, "label_config": label_config, "params": empty | (params or {})}

    def predict_tasks(self, tasks, **given):
        return self.post("/predict", self.body(tasks, **given))

    def predict(self, name, **given):
        return self.predict_tasks([self.task(name, 1)], **given)

    def click(self, name, *prompts, **given):
        task = self.task(name, 1) | {"annotations": [], "drafts": []}
        return self.predict_tasks([task], params={"context": {"result": list(prompts)}}, **given)

    @staticmethod
    def stored(reply, tasks):
        """What Label Studio 1.23.2 stores of a batch reply; its checks, so that a reply it chokes on fails here too."""
        assert isinstance(reply, dict)
        responses = reply["results"]
        assert isinstance(responses, list)
        assert len(responses) == len(tasks)
        stored = []
        for task, response in zip(tasks, responses, strict=True):
            for one in [response] if isinstance(response, dict) else response:
                assert isinstance(one["result"], list)
                assert all(isinstance(region, dict) for region in one["result"])
                assert isinstance(one["score"], float)
                assert np.isfinite(one["score"])
                assert isinstance(one["model_version"], str)
                assert one["model_version"]
                stored.append((task["id"], one))
        return stored

    def metric(self, name, **labels):
        return self.parts.metrics.registry.get_sample_value(name, labels)


def _draw(display):
    display.mkdir()
    truth = np.zeros((512, 512), bool)
    y, x = np.mgrid[:512, :512] + 0.5
    for cx, cy, radius in CELLS_XYR:
        truth |= (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
    Image.fromarray(np.where(truth, 200, 20).astype(np.uint8)).save(display / "two.png")
    Image.fromarray(np.full((512, 512), 20, np.uint8)).save(display / "empty.png")
    (display / "corrupt.png").write_bytes((display / "two.png").read_bytes()[:200])
    return truth


@pytest.fixture
def backend(tmp_path, monkeypatch, eventually):
    """backend(kind of net or None, **settings): a context manager with a running Backend."""
    for name, net in NETS.items():
        monkeypatch.setitem(SEGMENTERS, name, net)
    monkeypatch.setenv("CELLOOP_HOME", str(tmp_path / "home"))

    @contextmanager
    def start(kind=None, **given):
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        truth = _draw(root / "display")
        index = Index(f"sqlite:///{root / 'index.sqlite'}")
        index.add_project("cells", ls_project_id=3, root=root, label_config=CONFIG)
        registry = Champions(root / "registry")
        if kind is not None:
            registry.promote(kind)
        values = {
            "index_url": "unused",
            "models_dir": root / "models",
            "display_root": root / "display",
            "device": "cpu",
            "poll_s": 0.05,
        }
        app = create_app(Settings.model_validate(values | given), registry=lambda project: registry, index=index)
        with running(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            found = Backend(app, http, index, registry, root / "display", truth)
            if kind is not None:
                eventually(lambda: found.parts.slot.get("cells") is not None, within_s=20)
            yield found
        index.close()

    return start
