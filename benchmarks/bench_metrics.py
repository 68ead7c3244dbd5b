"""Metrics against pycocotools: 100 images of 512 x 512 px with 100 cells each, 95 % of them predicted."""

import contextlib
import io
from typing import Any

import numpy as np
from harness import report, time_ms
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from loop.masks import from_label_image, to_coco_rle
from loop.metrics.instance import evaluate, image_ap
from loop.metrics.matching import areas
from loop.metrics.paired import paired_bootstrap
from loop.types import Instances

N_IMAGES, GRID, CELL = 100, 10, 51


def scene(rng: np.random.Generator) -> tuple[Instances, Instances]:
    """Predicted and true cells of one image: discs on a grid, moved by up to 3 px, 95 % of them found."""
    truth, guess = np.zeros((512, 512), np.int32), np.zeros((512, 512), np.int32)
    y, x = np.mgrid[:CELL, :CELL] - CELL // 2
    for number in range(GRID * GRID):
        top, left = number // GRID * CELL, number % GRID * CELL
        radius, (dy, dx) = rng.uniform(12, 20), rng.integers(-3, 4, size=2)
        truth[top : top + CELL, left : left + CELL][y**2 + x**2 < radius**2] = number + 1
        if rng.random() < 0.95:
            guess[top : top + CELL, left : left + CELL][(y - dy) ** 2 + (x - dx) ** 2 < radius**2] = number + 1
    pred = from_label_image(guess)
    return from_label_image(guess, scores=rng.random(len(pred), np.float32)), from_label_image(truth)


def collection(images: list[Instances]) -> COCO:
    """What pycocotools evaluates, with run lengths already made."""
    coco, annotations = COCO(), list[dict[str, Any]]()
    for i, cells in enumerate(images, start=1):
        for rle, area, score in zip(to_coco_rle(cells), areas(cells).tolist(), cells.scores.tolist(), strict=True):
            annotation = {"image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": rle, "area": area}
            annotations.append({**annotation, "id": len(annotations) + 1, "score": score, "bbox": [0, 0, 1, 1]})
    sizes = [{"id": i, "height": 512, "width": 512} for i in range(1, len(images) + 1)]
    coco.dataset = {"info": {}, "images": sizes, "categories": [{"id": 1}], "annotations": annotations}
    coco.createIndex()
    return coco


def pycocotools_ap(truth: COCO, guess: COCO) -> float:
    """AP as pycocotools computes it, from run lengths made before; its prints are dropped."""
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(truth, guess, "segm")
        judge.params.maxDets = [1000]
        judge.evaluate()
        judge.accumulate()
    return float(judge.eval["precision"][:, :, 0, 0, 0].mean())


def main() -> None:
    """Measure and print one JSON line each."""
    rng = np.random.default_rng(0)
    pairs = [scene(rng) for _ in range(N_IMAGES)]
    with contextlib.redirect_stdout(io.StringIO()):
        truth, guess = collection([gt for _, gt in pairs]), collection([pred for pred, _ in pairs])
    ours, theirs = evaluate(pairs)["ap"], pycocotools_ap(truth, guess)
    fast, slow = time_ms(lambda: evaluate(pairs), 5), time_ms(lambda: pycocotools_ap(truth, guess), 3, warmup=0)
    report(
        "evaluate (all metrics), 100 images x 100 cells at 512 px, against pycocotools (AP alone, run lengths in hand)",
        **fast,
        pycocotools_ms_p50=slow["ms_p50"],
        ratio=round(slow["ms_p50"] / fast["ms_p50"], 1),
        ap=ours,
        ap_difference=abs(ours - theirs),
    )
    report("image_ap, one image of 100 cells at 512 px", **time_ms(lambda: image_ap(*pairs[0]), 200))
    scores = rng.random((2, 100))

    def bootstrap() -> None:
        paired_bootstrap(scores[0], scores[1], confidence=0.8, resamples=2000, rng=rng)

    report("paired_bootstrap, 100 images, 2000 resamples", **time_ms(bootstrap, 50))


if __name__ == "__main__":
    main()
