"""The negative controls once more, with networks that really learn: drawn cells of two looks, one of them rare."""

import numpy as np
import pytest
import torch
from replay_stage import plan

from loop.config import ModelConfig, TrainConfig
from loop.data.store import describe, write_png
from loop.data.synthetic import draw_cells
from loop.metrics.penalty import paired_t
from loop.replay.engine import Bench, Labelled, play
from loop.replay.pool import ReplayData
from loop.types import Sample

SEEDS = 8
KINDS = {"rare": 6, "common": 24, "empty": 10}
MODEL = ModelConfig(name="unet", base=16, depth=2, dark_background=False)
TRAIN = TrainConfig(
    crop=32,
    batch=2,
    max_steps=50,
    learning_rate=5e-3,
    warmup_steps=5,
    ema=0.9,
    intensity=0,
    scale_jitter=1,
    rotate=0,
    elastic=0,
    validations=0,
    compile="off",
    device="cpu",
)
NAMES = ("random", "shuffled", "true_error", "emptiest")


def picture(root, name, rng, kind):
    """Grey cells on a dark ground, or, where they are rare, blue ones on a yellow ground, which look the other way."""
    pixels, cells = draw_cells(rng, (48, 48), int(rng.integers(1, 3) if kind == "empty" else rng.integers(4, 8)))
    if kind == "rare":
        grey = pixels[:, :, 0]
        yellow = 180 - np.minimum(grey, 180)
        pixels = np.stack([yellow, yellow, grey], axis=2)
    path = root / f"{name}.png"
    write_png(pixels, path)
    return Sample(describe(path, modality="rare" if kind == "rare" else "common"), cells)


def bench_of(root, seed):
    rng = np.random.default_rng(seed)
    kinds = [kind for kind, n in KINDS.items() for _ in range(n)]
    names = [f"im{number:02d}" for number in rng.permutation(len(kinds))]
    pool = tuple(picture(root, name, rng, kind) for name, kind in zip(names, kinds, strict=True))
    test = tuple(picture(root, f"x{i}", rng, kind) for i, kind in enumerate(["rare"] * 4 + ["common"] * 4))
    train_plan = plan(model=MODEL, train=TRAIN, start=1, batch=2, rounds=2)
    return Bench(ReplayData(pool, test), train_plan)


def after_one_choice(bench, seed):
    """AP averaged over the two looks, by strategy; all begin with the same image of common cells."""
    first = next(s for s in bench.data.pool if s.image.modality == "common" and len(s.instances) > 3)
    labelled = Labelled((first.image.image_id,), (first.image.image_id,), cells=len(first.instances))
    played = play(bench, seed, 0, labelled, NAMES)
    return {name: play(bench, seed, 1, played.following[name], [name]).figures["macro_ap"] for name in NAMES}


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pictures")
    found = []
    for seed in range(SEEDS):
        (root / str(seed)).mkdir()
        found.append(after_one_choice(bench_of(root / str(seed), seed), seed))
    torch.set_num_threads(threads)
    return {name: np.array([own[name] for own in found]) for name in NAMES}


@pytest.fixture(scope="module")
def chance(scores):
    """Random and shuffled scores are two draws of the same; their mean is less a matter of luck than either."""
    return (scores["random"] + scores["shuffled"]) / 2


# which way it goes is said beforehand, so a test of one side is asked for: half the p


def test_the_true_error_wins_with_networks(scores, chance):
    assert np.mean(scores["true_error"] - chance) > 0.1
    assert paired_t(scores["true_error"], chance) / 2 < 0.05


def test_shuffled_scores_tie_with_random_with_networks(scores):
    assert paired_t(scores["shuffled"], scores["random"]) > 0.05


def test_the_emptiest_lose_with_networks(scores, chance):
    assert np.mean(scores["emptiest"] - chance) < -0.05
    assert paired_t(scores["emptiest"], chance) / 2 < 0.05
