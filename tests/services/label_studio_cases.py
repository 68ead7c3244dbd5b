"""What the tests of the Label Studio adapter work with: a label config, results, tasks, pictures, a backend."""

import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loop.adapters.label_studio_api import LabelStudio, TaskPrediction

CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <PolygonLabels name="mask" toName="image"><Label value="Cell"/></PolygonLabels>
  <KeyPointLabels name="point" toName="image" smart="true"><Label value="Cell"/></KeyPointLabels>
</View>
"""


def cell(x: float = 40.0, *, label: str = "Cell", region_id: str = "a") -> dict[str, Any]:
    return {
        "id": region_id,
        "type": "polygonlabels",
        "from_name": "mask",
        "to_name": "image",
        "original_width": 64,
        "original_height": 48,
        "score": 0.9,
        "value": {"points": [[x, 40.0], [x + 9, 40.0], [x + 9, 55.0]], "closed": True, "polygonlabels": [label]},
    }


def add_tasks(studio: LabelStudio, project: int, n: int) -> list[int]:
    names = [f"image-{i:03d}" for i in range(n)]
    tasks = [{"data": {"image": f"/data/local-files/?d=x/{name}.png", "celloop_id": name}} for name in names]
    return studio.import_tasks(project, tasks)


def ranked(tasks: list[int], order: list[int]) -> list[TaskPrediction]:
    """Predictions with which `order` (positions in `tasks`) are served first to last."""
    scores = {position: (rank + 1) / (len(tasks) + 1) for rank, position in enumerate(order)}
    return [TaskPrediction(tasks[i], [cell(10.0 + i)], scores[i]) for i in order]


def tiny_png(value: int) -> bytes:
    """One grey pixel."""

    def part(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    head = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    pixel = zlib.compress(bytes([0, value]))
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", pixel) + part(b"IEND", b"")


class Backend:
    """A backend that is healthy, knows its version, and notes what it is asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({"status": "UP"})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                self._answer({"model_version": "live"} if self.path == "/setup" else {"results": []})

            def _answer(self, body: Any) -> None:
                content = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def told(self, path: str) -> list[tuple[dict[str, str], Any]]:
        return [(headers, body) for asked, headers, body in self.requests if asked == path]

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()
