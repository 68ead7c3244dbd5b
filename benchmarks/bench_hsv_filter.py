"""What the colour filter keeps of an over-segmentation of stained tissue: precision, recall and F1 before and after.

SAM's masks stand for nothing here: its weights are not at hand, so a classical over-segmenter makes the masks, as SAM
does of stained tissue: pieces of many sizes, nuclei and all else. They are the connected parts below 12 levels of
brightness and the segments of Felzenszwalb's graph at three scales, without doubles (IoU above 0.7). A mask counts when
it matches a nucleus one to one at IoU 0.5.

Measured on the test and val images of the purple modalities; the target colour is learnt from n pool images of the same
modalities, drawn by three seeds (the mean is given), from the image's own labelled cells ("own", what a champion's
cells are at best), or not at all.

    python benchmarks/bench_hsv_filter.py --data DIR
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import report
from scipy import ndimage
from skimage.segmentation import felzenszwalb

from loop.data.folder import open_folder, read_sample
from loop.data.store import read_image
from loop.masks import from_label_image
from loop.metrics.matching import iou_matrix, match
from loop.models.sam import batched_nms
from loop.pseudo.hsv_filter import cell_colours, hsv_filter
from loop.types import FloatArray, ImageRef, Instances, UInt8Array

MIN_AREA = 20
MAX_SHARE = 0.4
LEVELS = 12
SCALES = (30, 100, 300)
SEEDS = 3


def over_segment(image: UInt8Array) -> Instances:
    """Many overlapping masks of an image, most of which are no cells."""
    grey = ndimage.gaussian_filter(image.astype(np.float32).mean(axis=2), 1)
    layers = [
        ndimage.label(grey < level)[0] for level in np.quantile(grey, np.linspace(0, 1, LEVELS + 2)[1:-1]).tolist()
    ]
    layers += [felzenszwalb(image, scale=scale, sigma=1, min_size=MIN_AREA) + 1 for scale in SCALES]
    boxes, masks = [], []
    for layer in layers:
        cells = from_label_image(np.asarray(layer, np.int32))
        for box, mask in zip(cells.boxes_xyxy.tolist(), cells.masks, strict=True):
            if MIN_AREA <= mask.sum() <= MAX_SHARE * grey.size:
                boxes.append(box)
                masks.append(mask)
    sizes = torch.tensor([float(mask.sum()) for mask in masks])
    kept = batched_nms(torch.tensor(boxes, dtype=torch.float32), sizes, torch.zeros(len(boxes)), 0.7).tolist()
    return Instances.build(grey.shape, [boxes[i] for i in kept], [masks[i] for i in kept])


def counts(masks: Instances, truth: Instances) -> FloatArray:
    """Matched masks, masks, cells."""
    return np.array([len(match(iou_matrix(masks, truth), 0.5)), len(masks), len(truth)], np.float32)


def scores(total: FloatArray) -> dict[str, float]:
    """Precision, recall and F1 of summed counts."""
    hits, masks, cells = total.tolist()
    return {
        "precision": round(hits / max(1, masks), 3),
        "recall": round(hits / max(1, cells), 3),
        "f1": round(2 * hits / max(1, masks + cells), 3),
        "masks": int(masks),
    }


def purple(data: Path, splits: Sequence[str]) -> list[ImageRef]:
    """The labelled images of the purple modalities in these splits, by id."""
    found = open_folder(data).images
    return [r for r in found if r.modality.startswith("purple") and r.split in splits and r.label_path is not None]


def colours_of(images: Sequence[ImageRef]) -> FloatArray:
    """Colours of all labelled cells of these images."""
    return np.concatenate([cell_colours(read_image(r.path).pixels, read_sample(r).instances) for r in images])


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, labels and a manifest")
    parser.add_argument("--labelled", type=int, nargs="*", default=[1, 4, 16], help="images to learn the colour from")
    arguments = parser.parse_args()
    pool, test = purple(arguments.data, ("pool",)), purple(arguments.data, ("test", "val"))
    seen = [(read_image(r.path).pixels, read_sample(r).instances) for r in test]
    masks = [over_segment(pixels) for pixels, _ in seen]

    def measure(known: Sequence[FloatArray | None]) -> FloatArray:
        kept = [hsv_filter(p, m, known_colours=k) for (p, _), m, k in zip(seen, masks, known, strict=True)]
        return np.sum([counts(m, truth) for m, (_, truth) in zip(kept, seen, strict=True)], axis=0)

    figures: dict[str, Any] = {
        "before": scores(np.sum([counts(m, truth) for m, (_, truth) in zip(masks, seen, strict=True)], axis=0)),
        "not_learnt": scores(measure([None] * len(seen))),
    }
    for n in arguments.labelled:
        drawn = [np.random.default_rng(seed).choice(len(pool), n, replace=False) for seed in range(SEEDS)]
        total = [measure([colours_of([pool[i] for i in chosen])] * len(seen)) for chosen in drawn]
        figures[f"learnt_from_{n}"] = scores(np.mean(total, axis=0))
    figures["own"] = scores(measure([cell_colours(pixels, truth) for pixels, truth in seen]))
    report("hsv_filter", images=len(test), cells=sum(len(truth) for _, truth in seen), **figures)


if __name__ == "__main__":
    main()
