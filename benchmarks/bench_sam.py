"""Segment Anything's two halves: encoding an image once, and answering prompts; one by one as clicks, and in batches.

    python benchmarks/bench_sam.py [--kind vit_b] [--repeats 5] [--clicks 60]

The weights are random, which costs the network the same as trained ones; what comes after it costs more, since a mask
of random weights fills the image where a cell's would fill a corner (scaling to SIDE px, thresholds, crops: all in the
decoder's time).

`encoder`: fp32 and bf16. `click`: one positive point in an image of SIDE px, three masks, by the clock: `cached` from
an embedding at hand (`cached_fp32` with the decoder in fp32); `encoding` with the package's SamPredictor, set_image and
predict in fp32 at each click. The latter is what label-studio-ml-backend's example segment_anything_2_image does;
its segment_anything_model keeps the embedding of the last image, so it does the same whenever the image changes.
`decoder_ms_a_prompt`: for one prompt (a point and a box, three masks) by the number of prompts in a batch, and
`decoder_cpu_ms_a_prompt` in CPU time, which says more on a busy machine. In `relative` the best batch size is 1 (by CPU
time, on a GPU by the clock). Prints one JSON line.
"""

import argparse
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from harness import report, time_ms

from loop.models import sam as module
from loop.models.runtime import resolve_device, uses_bf16
from loop.models.sam import Embedding, Sam, segment_anything
from loop.models.sam_weights import architecture_of, build_sam
from loop.types import UInt8Array

SIDE = 512
BATCHES = (1, 2, 4, 8, 16, 64)
PROMPTS = 64


def random_net(kind: str) -> torch.nn.Module:
    """The published architecture with small random weights."""
    with torch.device("meta"):
        published = segment_anything().sam_model_registry[kind]()
    net = build_sam(architecture_of(published.state_dict()))
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.02 * torch.randn(v.shape, generator=generator) for name, v in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    return net


def click_ms(net: torch.nn.Module, image: UInt8Array, embedding: Embedding, times: tuple[int, int]) -> dict[str, Any]:
    """Answers to one click each, so many times from the embedding and so many times without, by the clock."""
    rng = np.random.default_rng(1)
    device = embedding.features.device.type

    def place() -> npt.NDArray[np.float64]:
        return rng.uniform(0, SIDE, (1, 1, 2))

    half, full = (Sam(net, version="random", device=device, precision=p) for p in ("auto", "fp32"))
    predictor = segment_anything().SamPredictor(net)

    def encoding() -> None:
        predictor.set_image(image)
        predictor.predict(point_coords=place()[0], point_labels=np.ones(1))

    cached = time_ms(lambda: half.decode(embedding, points=place()), times[0], warmup=5)
    cached_fp32 = time_ms(lambda: full.decode(embedding, points=place()), times[0], warmup=5)
    every = time_ms(encoding, times[1], warmup=0)
    ratio = round(every["ms_p50"] / cached["ms_p50"], 1)
    return {"cached": cached, "cached_fp32": cached_fp32, "encoding": every, "encoding_to_cached": ratio}


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("vit_b", "vit_l", "vit_h"), default="vit_b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clicks", type=int, default=60, help="so many are timed, of each way with an embedding")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    device = resolve_device("auto")
    net = random_net(arguments.kind)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    encoder: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        sam = Sam(net, version="random", device=device.type, precision=precision)
        encoder[precision] = time_ms(lambda sam=sam: sam.encode(image), arguments.repeats, warmup=0)
    encoder["fp32_to_bf16"] = round(encoder["fp32"]["ms_p50"] / encoder["bf16"]["ms_p50"], 2)
    embedding = sam.encode(image)
    click = click_ms(net, image, embedding, (arguments.clicks, arguments.repeats))
    points = rng.uniform(10, SIDE - 10, (PROMPTS, 1, 2))
    boxes = np.concatenate([points[:, 0] - 8, points[:, 0] + 8], axis=1)
    taken: dict[int, list[tuple[float, float]]] = {batch: [] for batch in BATCHES}
    sam.decode(embedding, points=points[:2], boxes=boxes[:2])
    for _ in range(arguments.repeats):  # by turns, so that what else runs meanwhile meets all sizes alike
        for batch, times in taken.items():
            module.PROMPTS_A_BATCH[device.type] = batch
            n = max(8, batch)
            wall, cpu = time.perf_counter(), time.process_time()
            sam.decode(embedding, points=points[:n], boxes=boxes[:n])
            times.append(((time.perf_counter() - wall) / n, (time.process_time() - cpu) / n))
    wall_ms, cpu_ms = (
        {str(batch): round(1000 * float(np.median([t[i] for t in times])), 1) for batch, times in taken.items()}
        for i in (0, 1)
    )
    by = wall_ms if device.type == "cuda" else cpu_ms
    report(
        "sam",
        kind=arguments.kind,
        native_bf16=uses_bf16(device, "auto"),
        threads=torch.get_num_threads(),
        load_1min=[round(load, 1), round(os.getloadavg()[0], 1)],
        encoder=encoder,
        click=click,
        decoder_ms_a_prompt=wall_ms,
        decoder_cpu_ms_a_prompt=cpu_ms,
        relative={batch: round(ms / min(by.values()), 2) for batch, ms in by.items()},
    )


if __name__ == "__main__":
    main()
