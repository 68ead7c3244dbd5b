import logging

import numpy as np
import pytest
import torch
from torch import nn

from loop.config import InstanceConfig, ModelConfig, TrainConfig
from loop.data.store import read_image, write_png
from loop.data.synthetic import draw_cells
from loop.errors import ConfigError, InputError, NonFiniteError
from loop.metrics.instance import evaluate
from loop.models import SEGMENTERS
from loop.models.segmenter import Segmenter
from loop.models.seu_net import SEUNet
from loop.training.trainer import learning_rate, train
from loop.types import ImageRef, Sample

SMALL = ModelConfig(base=4, depth=2)
QUICK = TrainConfig(max_steps=3, crop=32, batch=2, device="cpu")


def silent(step, values):
    return None


@pytest.fixture
def samples(tmp_path):
    found = []
    for i in range(4):
        pixels, cells = draw_cells(np.random.default_rng(i), (64, 64), 5)
        path = tmp_path / f"{i}.png"
        write_png(pixels, path)
        found.append(Sample(ImageRef(f"{i}", path, "", 64, 64, 3), cells))
    return found


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_four_images_are_learnt_by_heart(samples, precision):
    config = TrainConfig(
        max_steps=80, crop=64, batch=4, learning_rate=1e-2, warmup_steps=5, device="cpu", precision=precision,
        scale_jitter=1, rotate=0, elastic=0, intensity=0.2,
    )  # fmt: skip
    model = ModelConfig(base=16, depth=2)
    trained = train(samples, model, config, log=silent)
    segmenter = Segmenter(
        trained.net, model, InstanceConfig(min_area=10, min_score=0.5), device="cpu", precision=precision
    )
    pairs = [(segmenter.predict(read_image(s.image.path).pixels).instances, s.instances) for s in samples]
    metrics = evaluate(pairs)
    assert metrics["ap50"] > 0.95
    assert metrics["ap"] > 0.65
    assert np.mean(trained.losses[-10:]) < 0.5 * np.mean(trained.losses[:10])


def test_same_seed_and_steps_give_the_same_weights(samples):
    one, two = (train(samples, SMALL, QUICK, log=silent) for _ in range(2))
    assert one.losses == two.losses
    for left, right in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.equal(left, right)
    other = train(samples, SMALL, TrainConfig(**{**QUICK.model_dump(), "seed": 1}), log=silent)
    assert other.losses != one.losses


def test_global_generators_are_left_alone(samples):
    torch.manual_seed(5)
    SEGMENTERS["seu_net"](SMALL)  # building a net draws its first weights, which are then drawn anew
    after_building = torch.rand(3)
    torch.manual_seed(5)
    train(samples, SMALL, QUICK, log=silent)
    assert torch.equal(torch.rand(3), after_building)


def test_progress_is_told_every_ten_steps_and_at_the_end(samples):
    seen = []
    trained = train(
        samples, SMALL, TrainConfig(**{**QUICK.model_dump(), "max_steps": 13}), log=lambda *args: seen.append(args)
    )
    assert [step for step, _ in seen] == [10, 13]
    assert trained.steps == len(trained.losses) == 13
    assert set(seen[0][1]) == {"loss", "seconds", "learning_rate", "seconds_left"}
    assert seen[0][1]["loss"] == pytest.approx(np.mean(trained.losses[:10]), rel=1e-5)
    assert seen[1][1]["loss"] == pytest.approx(np.mean(trained.losses[10:]), rel=1e-5)
    assert 0 < seen[0][1]["seconds"] <= seen[1][1]["seconds"] <= trained.seconds
    assert not trained.net.training


def test_the_budget_of_minutes_ends_it_after_one_step_at_least(samples):
    config = TrainConfig(**{**QUICK.model_dump(), "max_steps": None, "minutes": 1e-9})
    assert train(samples, SMALL, config, log=silent).steps == 1
    config = TrainConfig(**{**QUICK.model_dump(), "max_steps": None, "minutes": 0.02})
    trained = train(samples, SMALL, config, log=silent)
    assert trained.steps > 1
    assert 1.2 <= trained.seconds < 5


def test_it_can_be_stopped(samples):
    asked = []

    def stop():
        asked.append(1)
        return len(asked) == 4

    config = TrainConfig(**{**QUICK.model_dump(), "max_steps": 100})
    assert train(samples, SMALL, config, log=silent, should_stop=stop).steps == 4


def test_images_without_cells_alone_are_valid(tmp_path):
    pixels, none = draw_cells(np.random.default_rng(0), (64, 64), 0)
    write_png(pixels, tmp_path / "e.png")
    trained = train([Sample(ImageRef("e", tmp_path / "e.png", "", 64, 64, 3), none)], SMALL, QUICK, log=silent)
    assert np.isfinite(trained.losses).all()


def test_the_learning_rate_rises_then_falls_to_zero():
    config = TrainConfig(learning_rate=1e-2, warmup_steps=9)
    assert learning_rate(0, 0.0, config) == pytest.approx(1e-3)
    assert learning_rate(9, 0.0, config) == pytest.approx(1e-2)
    assert learning_rate(50, 0.5, config) == pytest.approx(5e-3)
    assert learning_rate(99, 1.0, config) == pytest.approx(0)


def test_ignored_cells_do_not_teach(samples):
    ignored = [Sample(s.image, _with_weights(s.instances, 0.0)) for s in samples]
    halved = [Sample(s.image, _with_weights(s.instances, 0.5)) for s in samples]
    losses = [train(given, SMALL, QUICK, log=silent).losses[0] for given in (samples, halved, ignored)]
    assert len(set(losses)) == 3


def _with_weights(cells, weight):
    return type(cells).build(
        cells.shape, cells.boxes_xyxy, cells.masks, weights=np.full(len(cells), weight, np.float32)
    )


class Greedy(SEUNet):
    """A net that runs out of memory with more than two images at once."""

    limit = 2

    def forward(self, x):
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(x)


class Insatiable(Greedy):
    limit = 0


class Exploding(SEUNet):
    def forward(self, x):
        return super().forward(x) * float("inf")


def test_out_of_memory_halves_the_batch_and_says_so(samples, monkeypatch, caplog):
    monkeypatch.setitem(SEGMENTERS, "greedy", Greedy)
    config = TrainConfig(**{**QUICK.model_dump(), "batch": 8})
    with caplog.at_level(logging.WARNING):
        trained = train(samples, ModelConfig(name="greedy", base=4, depth=2), config, log=silent)
    assert trained.steps == 3
    assert [r.getMessage().split(": ")[-1] for r in caplog.records] == ["halved to 4", "halved to 2"]


def test_one_crop_too_many_for_the_memory_is_refused(samples, monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "insatiable", Insatiable)
    with pytest.raises(ConfigError, match="one crop of 32 px"):
        train(samples, ModelConfig(name="insatiable", base=4, depth=2), QUICK, log=silent)


def test_a_loss_that_is_not_finite_is_refused(samples, monkeypatch):
    monkeypatch.setitem(SEGMENTERS, "exploding", Exploding)
    with pytest.raises(NonFiniteError, match="learning_rate"):
        train(samples, ModelConfig(name="exploding", base=4, depth=2), QUICK, log=silent)


def test_bad_arguments_are_refused(samples):
    with pytest.raises(InputError, match="0 labelled images"):
        train([], SMALL, QUICK, log=silent)
    with pytest.raises(ConfigError, match=r"resnet.*seu_net"):
        train(samples, ModelConfig(name="resnet"), QUICK, log=silent)
    with pytest.raises(ConfigError, match=r"crop=32 is not a multiple of the network's 64; use 64"):
        train(samples, ModelConfig(base=4, depth=6), QUICK, log=silent)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_gpu_is_used_where_there_is_one(samples):
    trained = train(samples, SMALL, TrainConfig(**{**QUICK.model_dump(), "device": "auto"}), log=silent)
    assert isinstance(trained.net, nn.Module)
    assert next(trained.net.parameters()).is_cuda
