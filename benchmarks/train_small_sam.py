"""Trains a small Segment Anything on a folder's labelled images, for trials where the published weights are missing.

    OMP_NUM_THREADS=1 python benchmarks/train_small_sam.py --data DIR --out FILE.pth --minutes 15

The architecture is segment_anything's (image encoder, prompt encoder, mask decoder), its sizes stand in `SIZES`: 2.1
million parameters, 512 px, patches of 8 px, windows of 16 patches, no position in the encoder. The file is what
`load_sam(kind, checkpoint=FILE)` takes; it holds half precision.

Learnt from is the split pool (or train). A step takes a crop of the frame that SAM would see, zoomed by 0.7 to 1.4,
turned and mirrored, and sets it down at a random place of the frame: half of the side costs a quarter, so crops are
small at first and the whole frame at last. Points in random cells and boxes with jitter are asked first; then each
again with 1 to 3 points where its mask was wrong. A single point means the cell, or the clump of touching cells around
it: where there is a clump, one mask is to hold the one and another the other, whichever way costs less; more prompts
mean the cell. Loss: 20 focal + dice, and the squared error of the expected IoU, which is that with the cell or with the
clump, whichever is higher. So that the encoder learns from every pixel, a head that is thrown away tells cells from
background and points to each cell's middle.

Source: Kirillov et al. 2023, "Segment Anything" (arXiv:2304.02643), appendix A.
Differs: corrected by points, never by the last mask; one crop a step; the clump as a second truth; the extra head.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import report
from sam_lesson import (
    PATCH,
    SIDE,
    Asked,
    Frame,
    View,
    corrections,
    draw_box,
    draw_order,
    draw_point,
    draw_view,
    read_frame,
)
from torch import Tensor, nn
from torch.nn import functional
from training_runs import draw_images

from loop.models.sam_weights import Architecture, build_sam
from loop.training.ema import AveragedWeights
from loop.types import BoolArray, FloatArray, IntArray

SIZES = Architecture(
    width=128,
    depth=4,
    heads=4,
    mlp_ratio=4.0,
    image_size=SIDE,
    patch=PATCH,
    window=16,
    global_blocks=(),
    embedding=128,
    mask_channels=16,
    masks=3,
    decoder_depth=2,
    decoder_mlp=256,
    iou_depth=3,
    iou_width=128,
)
STAGES = ((0.5, 128), (0.9, 256), (1.0, 512))
"""Until which share of the time crops have which side, px."""
FREQUENCIES = (0.5, 8.0)
"""Of the code of a position, from the lowest to the highest; the package draws all near 1, too low for small cells."""
ATTENTIVE = 2.5
"""How much larger the first weights are by which prompts and places find each other."""
POINTS, BOXES, MORE_POINTS = 5, 3, 3
LEAST_PX = 24
RATE, WARM_UP, DECAY, AVERAGE = 1e-3, 100, 0.05, 0.998
SAVE_EVERY = 500
FOCAL, DICE, EXTRA = 20.0, 1.0, 1.0


def start_state(net: nn.Module, rng: np.random.Generator) -> dict[str, Tensor]:
    """Random weights for the network's tensors, which lie on the meta device."""
    low, high = np.log(FREQUENCIES)
    state = {}
    for name, value in net.state_dict().items():
        shape = tuple(value.shape)
        if "gaussian_matrix" in name:
            angle, frequency = rng.uniform(0, 2 * np.pi, shape[1]), np.exp(rng.uniform(low, high, shape[1]))
            array = np.stack([np.cos(angle), np.sin(angle)]) * frequency
        elif name == "image_encoder.patch_embed.proj.bias":  # else the norms blow up what is padded, which is all zero
            array = rng.normal(0, 1, shape)
        elif "rel_pos" in name or "pos_embed" in name or name.endswith("bias"):
            array = np.zeros(shape)
        elif len(shape) == 1:
            array = np.ones(shape)
        elif name.endswith(("_token.weight", "_tokens.weight")) or ("embed" in name and len(shape) == 2):
            array = rng.normal(0, 1, shape)
        else:
            fan_in = shape[0] if "output_upscaling" in name else int(np.prod(shape[1:]))
            array = rng.normal(0, 0.7 / np.sqrt(fan_in), shape)
        state[name] = torch.from_numpy(np.asarray(array, np.float32))
    for name in state:  # so that prompts look at, and are looked at from, where they lie
        if ".cross_attn_" in name or "final_attn" in name:
            if name.endswith("q_proj.weight"):
                state[name] *= ATTENTIVE
            elif name.endswith("k_proj.weight"):
                state[name] = state[name.replace("k_proj", "q_proj")].clone()
    return state


def encode(net: Any, image: FloatArray) -> Tensor:
    """(1, C, S / patch, S / patch) features of a crop (3, S, S)."""
    tokens = net.image_encoder.patch_embed(torch.from_numpy(image)[None])
    for block in net.image_encoder.blocks:
        tokens = block(tokens)
    features: Tensor = net.image_encoder.neck(tokens.permute(0, 3, 1, 2))
    return features


def ask(net: Any, features: Tensor, view: View, asked: Asked) -> tuple[Tensor, Tensor]:
    """Logits (P, 4, S / 2, S / 2) and expected IoU (P, 4): the mask for clear prompts, then the three for a point."""

    def place(xy: FloatArray) -> Tensor:
        return torch.from_numpy(xy + np.tile(view.corner, xy.shape[-1] // 2) - 0.5).float()

    column, row = (int(v) // PATCH for v in view.corner)
    side = features.shape[-1]
    code = net.prompt_encoder.get_dense_pe()[..., row : row + side, column : column + side]
    points = (place(asked.points), torch.from_numpy(asked.labels)) if asked.points.shape[1] else None
    boxes = None if asked.boxes is None else place(asked.boxes)
    sparse, _ = net.prompt_encoder(points=points, boxes=boxes, masks=None)
    dense = net.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    masks, iou = net.mask_decoder.predict_masks(features, code, sparse, dense)
    return masks, iou


def mask_losses(logits: Tensor, truth: Tensor) -> Tensor:
    """20 focal + dice (..., ) of logits (..., h, w) against a truth in [0, 1] that broadcasts to them."""
    truth = truth.expand_as(logits)
    entropy = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p = logits.sigmoid()
    focal = (entropy * (p - truth).square()).mean(dim=(-2, -1))
    shared = (p * truth).sum(dim=(-2, -1))
    dice = 1 - (2 * shared + 1) / (p.sum(dim=(-2, -1)) + truth.sum(dim=(-2, -1)) + 1)
    return FOCAL * focal + DICE * dice


def ious(logits: Tensor, truth: Tensor) -> Tensor:
    """(P, M) IoU of masks (P, M, h, w) with a truth (P, 1, h, w)."""
    mask, true = logits > 0, truth > 0.5
    shared = (mask & true).sum(dim=(-2, -1))
    return shared / (mask | true).sum(dim=(-2, -1)).clamp(min=1)


def answer_loss(logits: Tensor, iou: Tensor, cell: Tensor, clump: Tensor | None) -> Tensor:
    """Loss of P answers (P, 4, h, w) and their expected IoU (P, 4); `cell`, `clump` (P, 1, h, w) in [0, 1]."""
    own = mask_losses(logits, cell)
    best = own[:, 1:].min(dim=1).values
    reached = ious(logits.detach(), cell)
    if clump is not None:
        other = mask_losses(logits, clump)
        apart = ((clump - cell).sum(dim=(-2, -1)) > 1)[:, 0]
        pairs = own[:, 1:, None] + 0.5 * other[:, None, 1:]
        pairs = pairs + 1e6 * torch.eye(3)
        best = torch.where(apart, pairs.flatten(1).min(dim=1).values, best)
        several = torch.maximum(reached, ious(logits.detach(), clump))
        reached = torch.cat([reached[:, :1], several[:, 1:]], dim=1)
    return (own[:, 0] + best).mean() + (iou - reached).square().mean()


def extra_loss(head: nn.Module, features: Tensor, cells: IntArray) -> Tensor:
    """What the thrown-away head is taught: cell or background, and the way to the cell's middle, at mask resolution."""
    small = np.ascontiguousarray(cells[::2, ::2])
    rows, columns = np.indices(small.shape)
    count = np.maximum(np.bincount(small.ravel()), 1)
    ways = [np.bincount(small.ravel(), axis.ravel().astype(np.float64)) / count for axis in (rows, columns)]
    truth = np.stack([(ways[0][small] - rows) / 8, (ways[1][small] - columns) / 8]).astype(np.float32)
    found = functional.pixel_shuffle(head(features), 4)[0]
    inside = torch.from_numpy(small > 0)
    cell = functional.binary_cross_entropy_with_logits(found[0], inside.float())
    way = (found[1:] - torch.from_numpy(truth)).abs().clamp(max=3).sum(dim=0)
    return cell + 0.3 * (way * inside).sum() / inside.sum().clamp(min=1)


def shrunk(masks: BoolArray) -> Tensor:
    """(P, S, S) bool as shares (P, 1, S / 2, S / 2) in [0, 1]: the resolution of masks."""
    return functional.avg_pool2d(torch.from_numpy(masks[:, None]).float(), PATCH // 4)


def step_loss(net: Any, head: nn.Module, view: View, rng: np.random.Generator) -> dict[str, Tensor]:
    """Losses of one crop: `total` and its parts."""
    areas = np.bincount(view.cells.ravel())
    areas[0] = 0
    seen = np.flatnonzero(areas >= LEAST_PX)
    features = encode(net, view.image)
    extra = EXTRA * extra_loss(head, features, view.cells)
    if len(seen) == 0:
        return {"total": extra, "extra": extra}
    order = rng.permutation(seen)
    chosen = np.resize(order, POINTS + BOXES)
    cells = view.cells[None] == chosen[:, None, None]
    of_point = cells[:POINTS]
    clump_map = view.clump_of[view.cells]
    clumps = clump_map[None] == view.clump_of[chosen[:POINTS], None, None]
    truth = shrunk(cells)
    points = np.array([[draw_point(m, rng, float(rng.choice([0.2, 0.9])))] for m in of_point], np.float32)
    first = Asked(points, np.ones((POINTS, 1), np.float32), None)
    boxes = np.array([draw_box(m, rng) for m in cells[POINTS:]], np.float32)
    framed = Asked(np.zeros((BOXES, 0, 2), np.float32), np.zeros((BOXES, 0), np.float32), boxes)
    answers = [ask(net, features, view, asked) for asked in (first, framed)]
    point_loss = answer_loss(*answers[0], truth[:POINTS], shrunk(clumps))
    box_loss = answer_loss(*answers[1], truth[POINTS:], None)
    count = int(rng.integers(1, MORE_POINTS + 1))
    with torch.no_grad():
        scored = [(answer, iou, rng.random() < 0.5) for answer, iou in answers]
        taken = [a[:, 1:][torch.arange(len(a)), i[:, 1:].argmax(1)] if m else a[:, 0] for a, i, m in scored]
        masks = functional.interpolate(torch.cat(taken)[:, None], view.cells.shape, mode="bilinear")[:, 0] > 0
    more, labels = corrections(masks.numpy(), cells, count, rng)
    refined = (
        Asked(np.concatenate([points, more[:POINTS]], 1), np.concatenate([first.labels, labels[:POINTS]], 1), None),
        Asked(more[POINTS:], labels[POINTS:], boxes),
    )
    second = [ask(net, features, view, asked) for asked in refined]
    more_loss = (
        POINTS * answer_loss(*second[0], truth[:POINTS], None) + BOXES * answer_loss(*second[1], truth[POINTS:], None)
    ) / (POINTS + BOXES)
    parts = {"point": point_loss, "box": box_loss, "more": more_loss, "extra": extra}
    found = {"iou": ious(answers[0][0][:, 1:], truth[:POINTS]).max(dim=1).values.mean()}
    found["iou_box"] = ious(answers[1][0][:, :1], truth[POINTS:]).mean()
    return {"total": point_loss + 0.6 * box_loss + more_loss + extra, **parts, **found}


def rate_at(step: int, share: float) -> float:
    """The learning rate after `share` of the time: a short rise, then half a cosine."""
    return RATE * min(1.0, (step + 1) / WARM_UP) * (0.5 + 0.5 * float(np.cos(np.pi * min(share, 1.0)))) + 1e-6


def save(net: nn.Module, path: Path) -> None:
    """The network's tensors in half precision, by name, written whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    torch.save({name: value.half() for name, value in net.state_dict().items()}, unfinished)
    unfinished.replace(path)


def teach(net: nn.Module, frames: Sequence[Frame], given: argparse.Namespace) -> dict[str, Any]:
    """Trains for --minutes of this process's CPU time; the network ends with its weights' average.

    What there is lies in --out every 500 steps, so that a run that is stopped leaves something.
    """
    rng = np.random.default_rng(given.seed)
    head = nn.Conv2d(SIZES.embedding, 48, 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    net.get_parameter("image_encoder.pos_embed").requires_grad_(False)
    learnt = [p for module in (net, head) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=RATE, weight_decay=DECAY, betas=(0.9, 0.99))
    average, likely = AveragedWeights(net, AVERAGE), draw_order(frames)
    start, step, recent = time.process_time(), 0, dict[str, list[float]]()
    while (share := (time.process_time() - start) / (60 * given.minutes)) < 1:
        crop = next(side for until, side in STAGES if share < until)
        view = draw_view(frames[int(rng.choice(len(frames), p=likely))], crop, rng)
        losses = step_loss(net, head, view, rng)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, share)
        optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        step += 1
        average.update(net, step)
        for name, value in losses.items():
            recent.setdefault(name, []).append(float(value.detach()))
        if step % 100 == 0:
            told = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in recent.items())
            print(f"step {step}, {100 * share:.0f} %: {told}", file=sys.stderr, flush=True)
            last, recent = {name: round(float(np.mean(values)), 4) for name, values in recent.items()}, {}
        if step % SAVE_EVERY == 0:
            with average.lent_to(net):
                save(net, given.out)
    average.copy_to(net)
    minutes = round((time.process_time() - start) / 60, 2)
    return {"steps": step, "cpu_minutes": minutes, "last": last if step >= 100 else {}}


def main() -> None:
    """Train, write the file, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with images, labels and a manifest of splits")
    parser.add_argument("--out", type=Path, required=True, help="file to write, as small_sam.pth")
    parser.add_argument("--minutes", type=float, default=15, help="of CPU time of this process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=0, help="learn from so many of the pool only; 0 = all")
    given = parser.parse_args()
    asked = argparse.Namespace(seed=given.seed, test_images=0, validation_images=0)
    draw = draw_images(given.data, given.images, asked)
    frames = [read_frame(ref) for ref in draw.train]
    net = build_sam(SIZES)
    net.load_state_dict(start_state(net, np.random.default_rng(given.seed)), assign=True)
    facts = teach(net, frames, given)
    save(net, given.out)
    report(
        "train_small_sam",
        images=len(frames),
        cells=sum(int(frame.cells.max()) for frame in frames),
        parameters=sum(p.numel() for p in net.parameters()),
        megabytes=round(given.out.stat().st_size / 1e6, 1),
        seed=given.seed,
        threads=torch.get_num_threads(),
        **facts,
    )


if __name__ == "__main__":
    main()
