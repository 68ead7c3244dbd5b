"""Make examples/dsb2018-mini from a dataset folder of the 2018 Data Science Bowl; the same seed, the same files.

    python benchmarks/make_mini.py --source DIR --out examples/dsb2018-mini --seed 0

`--source` is a folder with images/, labels/ and a manifest.csv that has the columns image, label, modality, height,
width, instances, group and split. Only images of split "pool" are taken, from as many groups as there are, small files
first within a group. Images larger than MAX_SIDE are cropped to one window; the others are copied byte for byte.
Prints one JSON line.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

Entry = dict[str, str]

QUOTAS = {  # images, and the largest file that is copied, bytes
    "fluo_dark": (36, 90_000),
    "purple_on_white": (12, 115_000),
    "purple_on_purple": (4, 115_000),
    "brightfield_gray": (8, 0),
}
MAX_SIDE = 1000  # px; a larger image is cropped
CROP = 512  # px, side of the window cut out
MIN_CELLS, MAX_CELLS = 7, 120  # of an image that is copied
MIN_PIECE = 20  # px; what the window leaves of a nucleus is dropped below this


def main() -> None:
    """Read the arguments, write the folder, print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    with (arguments.source / "manifest.csv").open(newline="", encoding="utf-8") as file:
        pool = [entry for entry in csv.DictReader(file) if entry["split"] == "pool"]
    for folder in ("images", "labels"):
        shutil.rmtree(arguments.out / folder, ignore_errors=True)
        (arguments.out / folder).mkdir(parents=True)
    rows = []
    for modality, (quota, max_bytes) in QUOTAS.items():
        candidates = [entry for entry in pool if entry["modality"] == modality]
        candidates = [entry for entry in candidates if is_cropped(entry) or fits(arguments.source, entry, max_bytes)]
        for entry in choose(arguments.source, candidates, quota, rng):
            rows.append(write(arguments.source, entry, arguments.out, rng))
    rows.sort(key=lambda row: row["image"])
    with (arguments.out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["image", "label", "modality", "group"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    groups = len({row["group"] for row in rows})
    print(json.dumps({"images": len(rows), "groups": groups, "bytes": size, "seed": arguments.seed}))


def choose(source: Path, candidates: list[Entry], quota: int, rng: np.random.Generator) -> list[Entry]:
    """At most `quota` entries, one of each group in turn, the groups in random order, small files first."""
    by_group: dict[str, list[Entry]] = {}
    for entry in sorted(candidates, key=lambda entry: ((source / entry["image"]).stat().st_size, entry["image"])):
        by_group.setdefault(entry["group"], []).append(entry)
    names = sorted(by_group)
    order = [names[int(i)] for i in rng.permutation(len(names))]
    chosen: list[Entry] = []
    while len(chosen) < quota and any(by_group.values()):
        for name in order:
            if by_group[name] and len(chosen) < quota:
                chosen.append(by_group[name].pop(0))
    return chosen


def is_cropped(entry: Entry) -> bool:
    """Whether only a window of the image is taken."""
    return min(int(entry["height"]), int(entry["width"])) > MAX_SIDE


def fits(source: Path, entry: Entry, max_bytes: int) -> bool:
    """Whether the whole image is small enough to be copied, and neither nearly empty nor crowded."""
    return (source / entry["image"]).stat().st_size <= max_bytes and MIN_CELLS <= int(entry["instances"]) <= MAX_CELLS


def write(source: Path, entry: Entry, out: Path, rng: np.random.Generator) -> Entry:
    """Copy or crop one image with its labels and return its line of the manifest."""
    stem = Path(entry["image"]).stem
    if is_cropped(entry):
        image = read(source / entry["image"])
        labels = read(source / entry["label"])
        top, left = (int(v) for v in rng.choice([0, CROP], 2))
        stem = f"{stem}_r{top}_c{left}"
        window = np.s_[top : top + CROP, left : left + CROP]
        save(out / "images" / f"{stem}.png", image[window])
        save(out / "labels" / f"{stem}.png", renumber(labels[window]))
    else:
        for folder, name in (("images", "image"), ("labels", "label")):
            shutil.copyfile(source / entry[name], out / folder / f"{stem}.png")
    return {
        "image": f"images/{stem}.png",
        "label": f"labels/{stem}.png",
        "modality": entry["modality"],
        "group": entry["group"],
    }


def renumber(labels: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """The nuclei as 1..N in their old order, without pieces below MIN_PIECE."""
    values, areas = np.unique(labels[labels > 0], return_counts=True)
    fresh = np.zeros_like(labels)
    for number, value in enumerate(values[areas >= MIN_PIECE], start=1):
        fresh[labels == value] = number
    return fresh


def read(path: Path) -> npt.NDArray[np.uint16]:
    """The file's pixels as stored."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise SystemExit(f"{path} is no image that can be read; check --source")
    return np.asarray(pixels)


def save(path: Path, pixels: npt.NDArray[np.uint16]) -> None:
    """Write a PNG, as small as it gets."""
    if not cv2.imwrite(str(path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9]):
        raise SystemExit(f"cannot write {path}; check --out and the free space")


if __name__ == "__main__":
    main()
