"""Table A: models trained from scratch on the same images for the same time, measured on the same test images.

--data is a dataset folder whose manifest.csv has the splits pool, val and test. N images of the pool are drawn at
random (of several N the smaller draws are part of the larger), none of a group that stands in another split too. Each
named configuration of configs/model learns from them for --minutes, fits its thresholds on the val images, and predicts
the test images. One JSON line for each, with the keys of `celloop evaluate --json`.

    python benchmarks/bench_models.py --data DIR --images 40 --minutes 10 --models unet,seu_net,sparse_seu_net

Peers (benchmarks/peers) learn from the same draw in an environment of their own; then their label images are measured
here, with the same metric:

    python benchmarks/bench_models.py --data DIR --images 40 --out OUT --draw-only
    python benchmarks/bench_models.py --data DIR --peers OUT/cellpose OUT/stardist

With --clock cpu a minute is one of the process's own CPU time, so that runs side by side stay comparable.
"""

import argparse
import json
from pathlib import Path

from harness import report
from training_runs import Draw, add_arguments, draw_images, measure_cells, rounded, settings, train_row, write_draw

from flows.folders import evaluate_folders


def measure_model(name: str, draw: Draw, given: argparse.Namespace) -> None:
    """One JSON line of a model trained on the draw."""
    row = f"{name}-n{len(draw.train)}-seed{given.seed}"
    run = train_row(row, settings(name, given), draw, given)
    report("models", **{**run.facts, "row": name}, **measure_cells(run.segmenter, draw.test))


def measure_peer(directory: Path, data: Path) -> None:
    """One JSON line for each variant of thresholds that a peer left in its folder."""
    facts = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    variants, predict_s = facts.pop("variants"), facts.pop("predict_s")
    for name, thresholds in variants.items():
        figures = rounded(evaluate_folders(directory / name, data))
        row = f"{facts['tool']} {name}"
        report("models", row=row, **facts, thresholds=thresholds, predict_s=predict_s[name], **figures)


def main() -> None:
    """Prints one JSON line for each number of images and each model, or for each variant of each peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset folder with splits in manifest.csv")
    parser.add_argument("--images", type=int, nargs="+", default=[40], help="images to learn from")
    parser.add_argument("--models", default="seu_net", help="names of configs/model, comma between")
    parser.add_argument("--draw-only", action="store_true", help="only write OUT/draw.json, for the peers")
    parser.add_argument("--peers", type=Path, nargs="+", help="only measure what the peers left in these folders")
    add_arguments(parser, minutes=10.0)
    given = parser.parse_args()
    if given.peers:
        for directory in given.peers:
            measure_peer(directory, given.data)
        return
    if given.draw_only:
        if given.out is None or len(given.images) > 1:
            parser.error("--draw-only needs --out and one number of --images")
        write_draw(given.out / "draw.json", draw_images(given.data, given.images[0], given), given.seed)
        return
    largest = draw_images(given.data, max(given.images), given)
    for count in given.images:
        for name in given.models.split(","):
            measure_model(name, largest._replace(train=largest.train[:count]), given)


if __name__ == "__main__":
    main()
