"""Clicks on real images by a simulated person: how good the answer is after 1, 2 and 3 clicks and to a box.

    OMP_NUM_THREADS=1 python benchmarks/bench_clicks.py --data DIR --sam small_sam.pth --model CHECKPOINT_DIR

Cells of --images images of a split are drawn, as many of each modality as there are, in turn. The person clicks the
middle of a cell (its pixel farthest from its edge), then, up to --clicks times in all, the middle of the largest part
that is wrong: a positive click where the cell is missing, a negative one where the answer goes too far. A box is the
cell's with each side moved by up to 2 px. Who answers:

- champion: `cell_at` on what the model of --model sees;
- sam: `sam_cell_at` without typical cells, so SAM's own expected IoU chooses among the masks;
- sam re-ranked W: the same with the typical cells of the pool's labels, by modality, at each weight W of --weights.

For each: mean IoU with the true cell, the shares of IoU >= 0.5 and >= 0.8, `clumps` (share of first answers that hold
two or more true cells by half), `clicks` to IoU 0.8 (--clicks + 1 where it was not reached) and `reached`, over all
cells and by modality. `best_mask`: the IoU after the first click if always the best of SAM's three masks were taken.
`gain`: re-ranked minus not, mean over images with the 95 % bootstrap interval over groups of images. Weights are to be
chosen on --split val and reported on test. One JSON line. --looks FOLDER draws each image with the first answers of the
last row: the truth green, the answer red, the click white.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from harness import report
from training_runs import rounded

from loop.data.embeddings import to_encode
from loop.data.folder import TEACHING, leaking_groups, open_folder, read_labels
from loop.data.store import read_image
from loop.labelstudio.results import Prompts
from loop.metrics.gain import bootstrap_mean
from loop.metrics.matching import areas, intersections, iou_matrix
from loop.metrics.typical import Typical, fit_typical
from loop.models import click_sam
from loop.models.click import cell_at
from loop.models.click_sam import sam_cell_at
from loop.models.sam import Answers, Embedding, Sam
from loop.models.sam_weights import load_sam
from loop.models.segmenter import Segmenter
from loop.rings import Crop
from loop.training.checkpoint import load_checkpoint
from loop.types import BoolArray, ImageRef, Instances, UInt8Array

LEAST_PX = 20
JITTER = 2.0
GOOD = 0.8
RESAMPLES = 2000

Answer = Callable[[Prompts], Instances]


class Clicked(NamedTuple):
    """One cell by one row: IoU after each click and of the box, and whether the first answer took a clump."""

    image: int
    cell: int
    ious: tuple[float, ...]
    box: float
    clump: bool
    first: Crop | None


class Asked(NamedTuple):
    """An image with its true cells and those of them that are clicked."""

    ref: ImageRef
    pixels: UInt8Array
    cells: Instances
    chosen: tuple[int, ...]


class Remembering:
    """A SAM that answers the same prompts on the same image from memory: rows ask much the same."""

    def __init__(self, sam: Sam) -> None:
        """Takes the network."""
        self._sam = sam
        self._answers: dict[Any, Answers] = {}
        self.seconds: list[float] = []

    def decode(self, embedding: Any, *, multimask: Any = True, **prompts: Any) -> Answers:
        """As `Sam.decode`."""
        key = (id(embedding), multimask, *((name, np.asarray(v).tobytes()) for name, v in sorted(prompts.items())))
        if key not in self._answers:
            start = time.perf_counter()
            self._answers[key] = self._sam.decode(embedding, multimask=multimask, **prompts)
            self.seconds.append(time.perf_counter() - start)
        return self._answers[key]

    def forget(self) -> None:
        """Before another image."""
        self._answers.clear()


def draw(data: Path, given: argparse.Namespace) -> tuple[list[Asked], dict[str, Typical]]:
    """The images with the cells to click, and what is typical of the pool's cells, by modality and "" for all."""
    images = [ref for ref in open_folder(data).images if ref.label_path is not None]
    rng = np.random.default_rng(given.seed)
    own = [ref for ref in images if ref.split == given.split]
    if not own:
        raise SystemExit(f"{data} has no labelled image of the split {given.split}; give --split")
    own = [own[int(i)] for i in rng.permutation(len(own))]
    kinds = sorted({ref.modality for ref in own})
    turns = zip_longest(*([ref for ref in own if ref.modality == kind] for kind in kinds))
    chosen = [ref for turn in turns for ref in turn if ref is not None][: given.images]
    asked = []
    for ref in chosen:
        cells = read_labels(ref)
        large = np.flatnonzero(areas(cells) >= LEAST_PX)
        some = rng.permutation(large)[: -(-given.cells // len(chosen))]
        asked.append(Asked(ref, read_image(ref.path).pixels, cells, tuple(int(i) for i in some)))
    leaking = leaking_groups(images)
    pool = [ref for ref in images if ref.split in TEACHING and ref.group not in leaking]
    taught = [(ref.modality, read_labels(ref)) for ref in pool]
    found = {
        kind: fit_typical([cells for modality, cells in taught if kind in ("", modality)])
        for kind in ("", *{modality for modality, _ in taught})
    }
    return asked, {kind: typical for kind, typical in found.items() if typical is not None}


def answers(
    one: Asked, embedding: Embedding | None, sam: Remembering | None, champion: Segmenter | None, given: Any
) -> dict[str, Answer]:
    """Who answers the prompts in one image, by row."""
    rows: dict[str, Answer] = {}
    if champion is not None:
        scene = champion.scene(one.pixels)
        rows["champion"] = lambda prompts: cell_at(scene, prompts, champion.instance_config)
    if sam is not None and embedding is not None:
        usual = given.typical.get(one.ref.modality, given.typical.get(""))
        rows["sam"] = lambda prompts: sam_cell_at(sam, embedding, prompts)
        for weight in given.weights:
            rows[f"sam re-ranked {weight:g}"] = partial(ranked, sam, embedding, usual, weight)
    return rows


def ranked(sam: Remembering, embedding: Embedding, usual: Typical | None, weight: float, prompts: Prompts) -> Instances:
    """`sam_cell_at` with typicality at another weight than that of the module."""
    before = click_sam.TYPICAL_WEIGHT
    click_sam.TYPICAL_WEIGHT = weight
    try:
        return sam_cell_at(sam, embedding, prompts, typical=usual)
    finally:
        click_sam.TYPICAL_WEIGHT = before


def prompts_of(points: Sequence[tuple[float, float, bool]], boxes: npt.ArrayLike = ()) -> Prompts:
    """Points (x, y, positive) and boxes as the backend gives them on."""
    xy = np.array([point[:2] for point in points], np.float64).reshape(-1, 2)
    positive = np.array([point[2] for point in points], np.bool_)
    return Prompts(xy, positive, np.array(boxes, np.float64).reshape(-1, 4), "")


def paste(cells: Instances, i: int) -> BoolArray:
    """(H, W) bool: cell `i`, or nothing where there is none."""
    full = np.zeros(cells.shape, np.bool_)
    if i < len(cells):
        x0, y0, x1, y1 = cells.boxes_xyxy[i].tolist()
        full[y0:y1, x0:x1] = cells.masks[i]
    return full


def middle(mask: BoolArray) -> tuple[float, float, int]:
    """x, y of the pixel of the mask's largest part that is farthest from its edge, and that part's area in px."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if len(stats) < 2:
        return 0.0, 0.0, 0
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    x, y, width, height, area = stats[largest].tolist()
    part = (labels[y : y + height, x : x + width] == largest).astype(np.uint8)
    inside = cv2.distanceTransform(np.pad(part, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    return x + int(column) + 0.5, y + int(row) + 0.5, area


def click_cell(one: Asked, image: int, i: int, answer: Answer, given: Any) -> Clicked:
    """The whole exchange about one cell; it goes on to the third click, and then until the cell is good."""
    truth = paste(one.cells, i)
    x, y, _ = middle(truth)
    points, ious = [(x, y, True)], list[float]()
    clump, first = False, None
    while len(ious) < given.clicks:
        found = answer(prompts_of(points))
        mask = paste(found, 0)
        ious.append(float((mask & truth).sum() / (mask | truth).sum()))
        if len(ious) == 1 and len(found):
            shared = intersections(found, one.cells)[0]
            clump = bool((2 * shared >= areas(one.cells)).sum() > 1)
            first = Crop(tuple(found.boxes_xyxy[0].tolist()), found.masks[0])
        if len(ious) >= 3 and max(ious) >= GOOD:
            break
        missing, beyond = middle(truth & ~mask), middle(mask & ~truth)
        if missing[2] or beyond[2]:
            points.append((*missing[:2], True) if missing[2] >= beyond[2] else (*beyond[:2], False))
    rng = np.random.default_rng([given.seed, image, i])
    edge = np.array(one.cells.shape[::-1] * 2)
    box = np.clip(one.cells.boxes_xyxy[i] + rng.uniform(-JITTER, JITTER, 4), 0, edge)
    mask = paste(answer(prompts_of([], box)), 0)
    return Clicked(image, i, tuple(ious), float((mask & truth).sum() / (mask | truth).sum()), clump, first)


def best_mask(one: Asked, embedding: Embedding, sam: Remembering) -> list[float]:
    """For each cell the highest IoU of the masks that SAM answers to its first click, before they are cut."""
    best = []
    for i in one.chosen:
        truth = paste(one.cells, i)
        x, y, _ = middle(truth)
        crops = sam.decode(embedding, points=np.array([[[x, y]]]), point_labels=np.ones((1, 1), np.int64)).crops[0]
        boxes, masks = zip(*(crop for crop in crops if crop is not None), strict=True) if any(crops) else ((), ())
        own = Instances.build(one.cells.shape, boxes, masks)
        best.append(float(iou_matrix(own, one.cells)[:, i].max(initial=0)))
    return best


def figures(clicked: Sequence[Clicked], clicks: int) -> dict[str, Any]:
    """Means over cells."""

    def of(ious: Sequence[float]) -> dict[str, float]:
        array = np.array(ious)
        return {
            "iou": float(array.mean()),
            "at_0.5": float((array >= 0.5).mean()),
            "at_0.8": float((array >= GOOD).mean()),
        }

    needed = needed_clicks(clicked, clicks)
    after = {
        f"click_{k}": of([one.ious[min(k, len(one.ious)) - 1] for one in clicked]) for k in range(1, min(clicks, 3) + 1)
    }
    return {
        "cells": len(clicked),
        **after,
        "box": of([one.box for one in clicked]),
        "clumps": float(np.mean([one.clump for one in clicked])),
        "clicks": float(needed.mean()),
        "reached": float((needed <= clicks).mean()),
    }


def needed_clicks(clicked: Sequence[Clicked], clicks: int) -> npt.NDArray[np.int64]:
    """(N,) clicks until IoU 0.8, `clicks` + 1 where it was not reached."""
    return np.array([next((k for k, iou in enumerate(one.ious, 1) if iou >= GOOD), clicks + 1) for one in clicked])


def gains(
    rows: Mapping[str, Sequence[Clicked]], asked: Sequence[Asked], clicks: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Re-ranked minus not: means over images, with intervals."""
    plain, result = rows["sam"], dict[str, Any]()
    image = np.array([one.image for one in plain])
    kept = np.unique(image)
    groups = [asked[k].ref.group or asked[k].ref.image_id for k in kept]
    for name, own in rows.items():
        if not name.startswith("sam re-ranked"):
            continue
        differences = {
            "click_1_iou": [b.ious[0] - a.ious[0] for a, b in zip(plain, own, strict=True)],
            "box_iou": [b.box - a.box for a, b in zip(plain, own, strict=True)],
            "clumps": [float(b.clump) - float(a.clump) for a, b in zip(plain, own, strict=True)],
            "clicks": needed_clicks(own, clicks) - needed_clicks(plain, clicks),
        }
        result[name] = {}
        for what, difference in differences.items():
            means = np.array([np.asarray(difference, np.float64)[image == k].mean() for k in kept])
            result[name][what] = bootstrap_mean(means, groups, confidence=0.95, resamples=RESAMPLES, rng=rng)._asdict()
    return result


def draw_look(one: Asked, clicked: Sequence[Clicked], path: Path) -> None:
    """Writes the image with the truth and the first answers of its clicked cells."""
    picture = to_encode(one.pixels).copy()
    factor = max(1, 768 // max(picture.shape[:2]))
    picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)

    def outline(mask: BoolArray, colour: tuple[int, int, int]) -> None:
        large = cv2.resize(mask.astype(np.uint8), None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
        contours, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, contours, -1, colour, 1)

    for answered in clicked:
        truth = paste(one.cells, answered.cell)
        outline(truth, (0, 255, 0))
        if answered.first is not None:
            (x0, y0, x1, y1), own = answered.first
            mask = np.zeros_like(truth)
            mask[y0:y1, x0:x1] = own
            outline(mask, (255, 0, 0))
        x, y, _ = middle(truth)
        cv2.circle(picture, (round(x * factor), round(y * factor)), 3, (255, 255, 255), -1)
        cv2.putText(
            picture, f"{answered.ious[0]:.2f}", (round(x * factor) + 4, round(y * factor)), 0, 0.4, (255, 255, 0), 1
        )
    cv2.imwrite(str(path), picture[:, :, ::-1])


def measure(asked: Sequence[Asked], given: argparse.Namespace) -> tuple[dict[str, list[Clicked]], dict[str, float]]:
    """Every cell by every row; how long SAM took, and the best of its masks."""
    sam = load_sam("vit_b", str(given.sam)) if given.sam else None
    champion = None
    if given.model:
        loaded = load_checkpoint(given.model)
        champion = Segmenter(loaded.net, loaded.model_config, loaded.instance_config)
    memory = None if sam is None else Remembering(sam)
    rows, encoded, best = dict[str, list[Clicked]](), list[float](), list[float]()
    for k, one in enumerate(asked):
        embedding = None
        if sam is not None and memory is not None:
            memory.forget()
            start = time.perf_counter()
            embedding = sam.encode(to_encode(one.pixels))
            encoded.append(time.perf_counter() - start)
        for name, answer in answers(one, embedding, memory, champion, given).items():
            found = [click_cell(one, k, i, answer, given) for i in one.chosen]
            rows.setdefault(name, []).extend(found)
        if memory is not None and embedding is not None:
            best += best_mask(one, embedding, memory)
        if given.looks:
            given.looks.mkdir(parents=True, exist_ok=True)
            draw_look(one, found, given.looks / f"{one.ref.modality or 'image'}-{one.ref.image_id}.png")
    times = {} if memory is None else {"encode": encoded, "decode": memory.seconds}
    facts = {f"{what}_ms_p50": 1000 * float(np.median(seconds)) for what, seconds in times.items()}
    return rows, facts | ({"best_mask": float(np.mean(best))} if best else {})


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, labels and a manifest of splits")
    parser.add_argument("--sam", type=Path, help="weights of a SAM, as train_small_sam.py writes them")
    parser.add_argument("--model", type=Path, help="checkpoint directory of a champion")
    parser.add_argument("--split", default="test")
    parser.add_argument("--images", type=int, default=36)
    parser.add_argument("--cells", type=int, default=200, help="in all; as many an image as that takes")
    parser.add_argument("--clicks", type=int, default=5, help="at most, a cell")
    parser.add_argument("--weights", type=float, nargs="*", default=[click_sam.TYPICAL_WEIGHT])
    parser.add_argument("--looks", type=Path, help="folder to draw images with first answers into")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not given.sam and not given.model:
        parser.error("give --sam, --model, or both")
    start = time.perf_counter()
    asked, given.typical = draw(given.data, given)
    rows, facts = measure(asked, given)
    kinds = sorted({one.ref.modality for one in asked})
    summary = {
        name: {
            "all": figures(clicked, given.clicks),
            **{
                kind: figures([one for one in clicked if asked[one.image].ref.modality == kind], given.clicks)
                for kind in kinds
            },
        }
        for name, clicked in rows.items()
    }
    report(
        "clicks",
        split=given.split,
        images={kind: sum(one.ref.modality == kind for one in asked) for kind in kinds},
        seed=given.seed,
        most_clicks=given.clicks,
        rows=rounded(summary),
        gain=rounded(gains(rows, asked, given.clicks, np.random.default_rng(given.seed))) if given.sam else {},
        **rounded(facts),
        threads=torch.get_num_threads(),
        seconds=round(time.perf_counter() - start, 1),
    )


if __name__ == "__main__":
    main()
