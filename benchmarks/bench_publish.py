"""Publishing 200 tasks of 100 cells into a running Label Studio, beside predictions created one by one.

Needs a server and its token: CELLOOP_LABEL_STUDIO_URL and CELLOOP_LABEL_STUDIO_TOKEN. Works in a project of its own,
which is deleted at the end. Run: `python benchmarks/bench_publish.py`.
"""

import argparse
import math
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

from harness import report

from loop.adapters.label_studio_api import LabelStudio, TaskPrediction
from loop.adapters.label_studio_http import Connection

LABEL_CONFIG = """
<View>
  <Image name="image" value="$image"/>
  <PolygonLabels name="mask" toName="image"><Label value="Cell"/></PolygonLabels>
</View>
"""
POINTS = 20


def cells(n: int) -> list[dict[str, Any]]:
    """`n` polygons of 20 points on a grid, as Label Studio result items."""
    side = math.ceil(math.sqrt(n))
    turns = [2 * math.pi * k / POINTS for k in range(POINTS)]
    items = []
    for i in range(n):
        x, y = 5 + 90 * (i % side) / side, 5 + 90 * (i // side) / side
        points = [[x + 2 * math.cos(turn), y + 2 * math.sin(turn)] for turn in turns]
        items.append(
            {
                "id": f"cell-{i}",
                "type": "polygonlabels",
                "from_name": "mask",
                "to_name": "image",
                "original_width": 1080,
                "original_height": 1080,
                "score": 0.9,
                "value": {"points": points, "closed": True, "polygonlabels": ["Cell"]},
            }
        )
    return items


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call; a publish cannot be repeated on the same state."""
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 3)


def main() -> None:
    """Measures and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--cells", type=int, default=100)
    parser.add_argument("--chunk", type=int, default=500)
    parser.add_argument("--single", type=int, default=30, help="predictions created one by one, for the ratio")
    options = parser.parse_args()
    url, token = os.environ["CELLOOP_LABEL_STUDIO_URL"], os.environ["CELLOOP_LABEL_STUDIO_TOKEN"]
    studio, connection = LabelStudio(url, token), Connection(url, token)
    project = studio.create_project(f"bench publish {uuid.uuid4().hex[:8]}", LABEL_CONFIG)
    try:
        names = [f"image-{i}" for i in range(options.tasks)]
        tasks = [{"data": {"image": f"/data/local-files/?d=none/{name}.png", "celloop_id": name}} for name in names]
        numbers: list[int] = []
        import_s = seconds(lambda: numbers.extend(studio.import_tasks(project, tasks)))
        result = cells(options.cells)
        wanted = [TaskPrediction(number, result, (i + 1) / (len(numbers) + 1)) for i, number in enumerate(numbers)]

        def publish(version: str) -> float:
            return seconds(lambda: studio.publish(project, version, wanted, chunk=options.chunk))

        def create_one_by_one() -> None:
            for task in numbers[: options.single]:
                body = {"task": task, "result": result, "score": 0.5, "model_version": "single"}
                connection.send("POST", "/api/predictions/", body=body)

        first_s, next_s, again_s = publish("first"), publish("second"), publish("second")
        one_by_one_ms = 1000 * seconds(create_one_by_one) / options.single
    finally:
        studio.delete_project(project)
    bulk_ms = 1000 * first_s / options.tasks
    report(
        "publish",
        tasks=options.tasks,
        cells=options.cells,
        chunk=options.chunk,
        import_s=import_s,
        first_s=first_s,
        next_round_s=next_s,
        again_s=again_s,
        bulk_ms_per_task=round(bulk_ms, 1),
        one_by_one_ms_per_task=round(one_by_one_ms, 1),
        one_by_one_ratio=round(one_by_one_ms / bulk_ms, 2),
    )


if __name__ == "__main__":
    main()
