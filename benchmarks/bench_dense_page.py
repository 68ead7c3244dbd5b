"""A crowded picture in Label Studio's page, in a real browser: until it stands still, memory, click 1 and click 100.

    python benchmarks/bench_dense_page.py [--cells 100,300] [--side 1080] [--clicks 100] [--pictures DIR]

Starts the services and a headless Chromium. For each number of cells the pre-labels are polygons, and brush regions
where `--brush` is given. `open_s`: from the address to a page with all regions and a still main thread (no task of over
50 ms for half a second). `heap_mb`: JavaScript's heap after a collection. Then so many cells are removed one after the
other and asked for again by a click: from the choice of the label to the answer on the page, and the bytes of the
request from Label Studio's page. One JSON line for each page.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from harness import ROOT, report
from playwright.sync_api import CDPSession
from served_project import Picture, draw_project, publish_cells, services, train_model, wait_for_model

from flows.context import LoopContext
from flows.local.workspace import Workspace
from loop.labelstudio.interface import Interface
from loop.types import Instances

sys.path.insert(0, str(ROOT / "tests" / "services"))
from browser import EDITOR, Person, find_chromium, sitting_person

SCREEN = {"width": 1800, "height": 1500}
"""So large that the whole image is on it."""
WAIT_MS = 120_000

BRUSH = """<View>
  <BrushLabels name="brush" toName="image"><Label value="Cell"/></BrushLabels>
  <KeyPointLabels name="point" toName="image" smart="true"><Label value="Cell"/></KeyPointLabels>
  <Image name="image" value="$image" zoom="true"/>
</View>"""

STILL = """
() => new Promise(done => {
  let last = performance.now(), since = last;
  const tick = now => {
    if (now - last > 50) since = now;
    last = now;
    if (now - since > 500) done(since); else requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
})
"""


def middle(cells: Instances, i: int) -> tuple[float, float]:
    """The pixel of a cell farthest from its edge, in percent of the image."""
    depth = cv2.distanceTransform(np.pad(cells.masks[i].astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    x0, y0 = cells.boxes_xyxy[i][:2]
    return (x0 + column + 0.5) / cells.shape[1] * 100, (y0 + row + 0.5) / cells.shape[0] * 100


def heap_mb(session: CDPSession) -> float:
    """JavaScript's heap after a collection, MB (1e6 bytes)."""
    session.send("HeapProfiler.collectGarbage")
    metrics = {item["name"]: item["value"] for item in session.send("Performance.getMetrics")["metrics"]}
    return round(metrics["JSHeapUsedSize"] / 1e6, 1)


def opened(person: Person, context: LoopContext, picture: Picture) -> float:
    """Seconds until the picture's page stands still with all its regions."""
    address = f"{context.endpoints.label_studio_url}/projects/{context.project.ls_project_id}/data"
    begin = time.perf_counter()
    person.page.goto(f"{address}?task={picture.row.task_id}")
    person.page.wait_for_function(
        f"n => window.Htx && window.Htx.annotationStore && {EDITOR}?.regions.length === n",
        arg=len(picture.cells),
        timeout=WAIT_MS,
    )
    person.page.evaluate(STILL)
    return time.perf_counter() - begin - 0.5


def place_of_label(interface: Interface) -> int:
    """Where the label of the smart points stands in the row above the image."""
    point = next(control for control in interface.controls if control.kind == "keypointlabels")
    return sum(len(control.labels) for control in interface.controls[: interface.controls.index(point)])


def clicked(person: Person, context: LoopContext, picture: Picture, count: int) -> dict[str, Any]:
    """Times and request sizes of so many clicks, each on a cell that was removed before."""
    person.zoom_out()
    person.switch_on()
    person.take_tool("key-point-tool")
    label = place_of_label(context.interface)
    sizes: list[int] = []
    person.page.on(
        "request",
        lambda request: (
            sizes.append(len(request.post_data_buffer or b"")) if "/interactive-annotating" in request.url else None
        ),
    )
    times = []
    for i in np.random.default_rng(0).permutation(len(picture.cells))[:count].tolist():
        x, y = middle(picture.cells, i)
        person.page.evaluate(f"i => {EDITOR}.deleteRegion({EDITOR}.regions.find(r => r.cleanId.endsWith('-' + i)))", i)
        begin = time.perf_counter()
        person.click_for_cell(label, x, y)
        times.append(1000 * (time.perf_counter() - begin))
        person.accept()
    tenth = max(1, len(times) // 10)
    return {
        "clicks": len(times),
        "click_ms_p50": round(float(np.median(times)), 1),
        "click_ms_p95": round(float(np.percentile(times, 95)), 1),
        "first_tenth_ms_p50": round(float(np.median(times[:tenth])), 1),
        "last_tenth_ms_p50": round(float(np.median(times[-tenth:])), 1),
        "last_to_first": round(float(np.median(times[-tenth:]) / np.median(times[:tenth])), 2),
        "request_bytes": [min(sizes), max(sizes)],
    }


def measure(workspace: Workspace, given: argparse.Namespace, kind: str) -> None:
    """One project with a picture for each number of cells; prints a line for each."""
    counts = [int(n) for n in given.cells.split(",")]
    config = BRUSH if kind == "brush" else None
    context, pictures = draw_project(workspace, f"dense-{kind}", counts, given.side, label_config=config)
    version = train_model(workspace, context, seed=0)
    context.registry.promote(version, "the only one", {})
    publish_cells(context, {p.row.image_id: p.cells for p in pictures}, version)
    wait_for_model(context, version.label)
    for picture in pictures:
        with sitting_person(find_chromium(), context.endpoints, workspace.root.parent) as person:
            person.page.set_default_timeout(WAIT_MS)
            person.page.set_viewport_size(SCREEN)
            person.log_in()
            session = person.page.context.new_cdp_session(person.page)
            session.send("Performance.enable")
            seconds = [opened(person, context, picture) for _ in range(given.repeats)]
            heap = heap_mb(session)
            published = context.label_studio.predictions(picture.row.task_id or 0)[-1].result
            if given.pictures:
                given.pictures.mkdir(parents=True, exist_ok=True)
                person.page.screenshot(path=given.pictures / f"dense-{kind}-{len(picture.cells)}.png")
            figures = clicked(person, context, picture, given.clicks) if given.clicks else {}
            report(
                "dense_page",
                regions=kind,
                cells=len(picture.cells),
                side=given.side,
                corners=sum(len(region["value"].get("points", ())) for region in published),
                open_s_p50=round(float(np.median(seconds)), 2),
                opened=given.repeats,
                heap_mb=heap,
                heap_mb_after_clicks=heap_mb(session),
                **figures,
            )


def main() -> None:
    """Starts everything, measures, stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", default="100,300")
    parser.add_argument("--side", type=int, default=1080)
    parser.add_argument("--clicks", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5, help="openings of each page, the median counts")
    parser.add_argument("--brush", action="store_true", help="the same with brush regions (slow)")
    parser.add_argument("--pictures", type=Path, help="screenshots go there")
    given = parser.parse_args()
    with services() as workspace:
        for kind in ("polygon", *(["brush"] if given.brush else [])):
            measure(workspace, given, kind)


if __name__ == "__main__":
    main()
