"""StarDist (32 rays, from scratch) on the images that bench_models.py drew, for the same minutes.

The configuration and the augmentation (flips, quarter turns, brightness) of StarDist's own training example, on colour
images; patches of 128 px. The validation images serve it as there: the weights of the lowest validation loss are kept,
looked for every hundred steps within the budget.

OUT/default: the tool's thresholds, probability 0.5 and suppression 0.4. OUT/tuned: those of `optimize_thresholds` on
the validation images. A cell's score is StarDist's own object probability.

    python benchmarks/peers/train_stardist.py --draw OUT/draw.json --minutes 10 --out OUT/stardist
"""

import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from csbdeep.utils import normalize
from drawn import CLOCKS, Draw, arguments, read_draw, read_image, read_labels, say, write_prediction, write_run
from stardist import fill_label_holes
from stardist.models import Config2D, StarDist2D

PATCH = 128
MOST_EPOCHS = 10_000


class Budget(tf.keras.callbacks.Callback):
    """Ends the training when the clock or the steps have run out."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self._clock = CLOCKS[given.clock]
        self._seconds = 60 * given.minutes
        self._most = given.max_steps
        self._start = 0.0
        self.steps = 0
        self.seconds = 0.0

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        """Starts the clock."""
        self._start = self._clock()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        """Counts a step."""
        self.steps += 1
        self.seconds = self._clock() - self._start
        if self.steps % 100 == 0:
            say(f"step {self.steps}: loss {(logs or {}).get('loss', float('nan')):.3f}, {self.seconds:.0f} s")
        if self.steps >= self._most if self._most else self.seconds >= self._seconds:
            self.model.stop_training = True


def augment(rng: np.random.Generator) -> Any:
    """StarDist's example augmentation: flips, quarter turns, brightness and a little noise."""

    def change(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))
        image, labels = np.rot90(image, turns), np.rot90(labels, turns)
        if flip:
            image, labels = image[:, ::-1], labels[:, ::-1]
        image = image * rng.uniform(0.6, 2) + rng.uniform(-0.2, 0.2)
        return image + 0.02 * rng.uniform(0, 1) * rng.normal(0, 1, image.shape), labels

    return change


def read(items: list[Any], given: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Normalised images (H, W, 3) float32, all channels together, and label images with filled holes."""
    images = [normalize(read_image(item.image, invert_bright=given.invert_bright), 1, 99.8) for item in items]
    return images, [fill_label_holes(read_labels(item.labels)) for item in items]


def predict(model: StarDist2D, draw: Draw, thresholds: dict[str, float], given: Any, directory: Path) -> float:
    """Writes the label images of the test; the seconds that it took, reading and writing left out."""
    seconds = 0.0
    for item in draw.test:
        image = read_image(item.image, invert_bright=given.invert_bright)
        start = time.perf_counter()
        labels, details = model.predict_instances(
            normalize(image, 1, 99.8), prob_thresh=thresholds["prob"], nms_thresh=thresholds["nms"]
        )
        seconds += time.perf_counter() - start
        write_prediction(directory, item.stem, labels, np.asarray(details["prob"]))
    return seconds


def main() -> None:
    """Trains, chooses, predicts."""
    given = arguments(__doc__)
    draw = read_draw(given)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.keras.utils.set_random_seed(draw.seed)
    config = Config2D(n_rays=32, grid=(2, 2), n_channel_in=3, train_patch_size=(PATCH, PATCH), train_tensorboard=False)
    model = StarDist2D(config, name="stardist", basedir=str(given.out))
    model.prepare_for_training()
    budget = Budget(given)
    model.callbacks.append(budget)
    validation = read(draw.validation, given)
    rng = np.random.default_rng(draw.seed)
    model.train(
        *read(draw.train, given), validation_data=validation, augmenter=augment(rng), epochs=MOST_EPOCHS, seed=draw.seed
    )
    default = {"prob": 0.5, "nms": 0.4}
    tuned = model.optimize_thresholds(*validation)
    variants = {"default": default, "tuned": {name: round(float(tuned[name]), 4) for name in ("prob", "nms")}}
    say(f"tuned: {variants['tuned']}")
    seconds = {name: predict(model, draw, found, given, given.out / name) for name, found in variants.items()}
    facts = {
        "tool": "stardist",
        "version": version("stardist"),
        "steps": budget.steps,
        "predict_s": {name: round(value, 1) for name, value in seconds.items()},
        "variants": variants,
    }
    write_run(given, draw, budget.seconds, facts)


if __name__ == "__main__":
    main()
